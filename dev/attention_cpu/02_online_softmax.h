// Rung 2: no matrix. A query walks over its keys once, with the largest score so far, the sum of exponentials relative
// to it, and the output relative to it. When a key has a larger score, sum and output are multiplied by exp(old - new):
// what was relative to the old maximum becomes relative to the new one. After the last key the output is divided by the
// sum.
//
// Predicted, in clocks for each score: as rung 1, HD / 4 + 20, and 6 more. The exponential is now a single one, some 20
// instructions where 16 at once took as many. A larger maximum is rare, about ln T times a query. Bytes: those of the
// tensors. The (T,T) scratch is gone, which is what the rung is for: it is not expected to be faster.
#pragma once
#include <algorithm>

#include "llmc/attention.h"
#include "llmc/cpu_math.h"

namespace online_softmax {

// scratch: not used; the other tensors as in llmc/attention.h.
inline void attention(float* o, float* lse, float*, const float* qk, const float* qkv, int64_t B, int64_t T,
                      HeadShape heads) {
  const int64_t NH = heads.n_head, HD = heads.head_dim, group = NH / heads.n_kv_head;
  const float scale = 1 / std::sqrt(float(HD));
#pragma omp parallel for collapse(2) schedule(dynamic, 64)
  for (int64_t head = 0; head < B * NH; ++head)
    for (int64_t i = 0; i < T; ++i) {
      const int64_t b = head / NH, h = head % NH, kv = h / group;
      const float* q = qk + (b * T + i) * heads.qk_width() + h * HD;
      const float* k = qk + b * T * heads.qk_width() + (NH + kv) * HD;
      const float* v = qkv + b * T * heads.qkv_width() + (NH + heads.n_kv_head + kv) * HD;
      float* out = o + ((b * T + i) * NH + h) * HD;
      float maximum = -std::numeric_limits<float>::infinity(), sum = 0;
      std::fill_n(out, HD, 0.0f);
      for (int64_t j = 0; j <= i; ++j) {
        const float *kj = k + j * heads.qk_width(), *vj = v + j * heads.qkv_width();
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int64_t c = 0; c < HD; ++c) score += q[c] * kj[c];
        score *= scale;
        if (score > maximum) {
          const float correction = exp_of(maximum - score);  // 0 at the first key
          for (int64_t c = 0; c < HD; ++c) out[c] *= correction;
          sum *= correction;
          maximum = score;
        }
        const float p = exp_of(score - maximum);
#pragma omp simd
        for (int64_t c = 0; c < HD; ++c) out[c] += p * vj[c];
        sum += p;
      }
      for (int64_t c = 0; c < HD; ++c) out[c] /= sum;
      lse[(b * T + i) * NH + h] = maximum + std::log(sum);
    }
}

}  // namespace online_softmax
