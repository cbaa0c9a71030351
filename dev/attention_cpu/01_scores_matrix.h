// Rung 1: the formula. For a head, first all scores (T,T) below the diagonal, then the softmax of each row, then the
// product with the values: three passes over a matrix that exists. Heads are tasks for threads.
//
// Predicted, in clocks for each of the B NH T (T+1)/2 scores, shared by the threads: HD / 4 + 20. A score reads a key
// and a value, 8 HD bytes. T of them do not fit in the first-level cache, and the second gives about 32 bytes a clock:
// HD / 4. Beside that, 10 clocks to add up the lanes of the score, one for the exponential (16 at once), and 9 because
// the output is stored, and read back for the next key, which takes that long. Bytes: the matrix is written, read and
// written, and read once more: 16 for each score. It is T^2 floats for every thread, which no cache holds once T is
// some thousands.
#pragma once
#include <omp.h>

#include <algorithm>

#include "llmc/attention.h"
#include "llmc/cpu_math.h"

namespace scores_matrix {

// scratch (threads,T,T); the other tensors as in llmc/attention.h.
inline void attention(float* o, float* lse, float* scratch, const float* qk, const float* qkv, int64_t B, int64_t T,
                      HeadShape heads) {
  const int64_t NH = heads.n_head, HD = heads.head_dim, group = NH / heads.n_kv_head;
  const float scale = 1 / std::sqrt(float(HD));
#pragma omp parallel for schedule(dynamic)
  for (int64_t head = 0; head < B * NH; ++head) {
    const int64_t b = head / NH, h = head % NH, kv = h / group;
    const float* q = qk + b * T * heads.qk_width() + h * HD;
    const float* k = qk + b * T * heads.qk_width() + (NH + kv) * HD;
    const float* v = qkv + b * T * heads.qkv_width() + (NH + heads.n_kv_head + kv) * HD;
    float* scores = scratch + omp_get_thread_num() * T * T;
    for (int64_t i = 0; i < T; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        const float *qi = q + i * heads.qk_width(), *kj = k + j * heads.qk_width();
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int64_t c = 0; c < HD; ++c) score += qi[c] * kj[c];
        scores[i * T + j] = score * scale;
      }
    for (int64_t i = 0; i < T; ++i) {
      float *row = scores + i * T, maximum = row[0], sum = 0;
#pragma omp simd reduction(max : maximum)
      for (int64_t j = 0; j <= i; ++j) maximum = std::max(maximum, row[j]);
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j <= i; ++j) sum += row[j] = exp_of(row[j] - maximum);
#pragma omp simd
      for (int64_t j = 0; j <= i; ++j) row[j] /= sum;
      lse[(b * T + i) * NH + h] = maximum + std::log(sum);
    }
    for (int64_t i = 0; i < T; ++i) {
      float* out = o + ((b * T + i) * NH + h) * HD;
      std::fill_n(out, HD, 0.0f);
      for (int64_t j = 0; j <= i; ++j) {
        const float p = scores[i * T + j], *vj = v + j * heads.qkv_width();
#pragma omp simd
        for (int64_t c = 0; c < HD; ++c) out[c] += p * vj[c];
      }
    }
  }
}

}  // namespace scores_matrix
