// Rung 3: the same for 64 queries and 2 vectors of keys at a time (32 with AVX-512). Scores of a tile are a small
// matrix product, and so are its probabilities with the values: both run in the register tile of rung 3 of matmul_cpu.
// The keys are copied into its panel, transposed, and the tile of keys, values and scores (24 KB at HD 64 with AVX-512)
// stays in the first-level cache. Exponentials come in vectors again; maximum, sum and output are corrected once a tile
// instead of once a key. A key and a value that come from the second-level cache are used for 64 queries, not for one.
//
// Predicted: the FMA peak of all threads, B NH T (T+1)/2 scores of 4 HD operations and 40 for the exponential (about 14
// vector instructions, a few more for maximum and sum). The floor leaves out what is computed above the diagonal, half
// a square of 64 for each 64 queries, the copies of the keys, and the corrections.
#pragma once
#include <algorithm>
#include <vector>

#include "dev/matmul_cpu/03_vectorised.h"
#include "llmc/attention.h"
#include "llmc/cpu_math.h"

namespace tiles {

inline constexpr int64_t queries = 64, keys = vectorised::width;

// What a query knows of the keys so far.
struct Query {
  float maximum = -std::numeric_limits<float>::infinity(), sum = 0;
};

// Scores row (keys), of which the first `visible` count, become probabilities relative to the maximum; the others 0.
// Returns what the earlier ones have to be multiplied by.
inline float softmax_step(Query& query, float* row, int64_t visible, float scale) {
  float maximum = query.maximum, sum = 0;
  for (int64_t j = visible; j < keys; ++j) row[j] = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < keys; ++j) maximum = std::max(maximum, row[j] * scale);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < keys; ++j) sum += row[j] = exp_of(row[j] * scale - maximum);
  const float correction = exp_of(query.maximum - maximum);
  query = {maximum, query.sum * correction + sum};
  return correction;
}

// scratch: not used; the other tensors as in llmc/attention.h. HD is a multiple of `keys`.
inline void attention(float* o, float* lse, float*, const float* qk, const float* qkv, int64_t B, int64_t T,
                      HeadShape heads) {
  const int64_t NH = heads.n_head, HD = heads.head_dim, group = NH / heads.n_kv_head;
  const int64_t ldk = heads.qk_width(), ldv = heads.qkv_width();
  const float scale = 1 / std::sqrt(float(HD));
#pragma omp parallel
  {
    bench_cpu::Array<float> panel(HD * keys), scores(queries * keys), product(queries * HD), out(queries * HD);
    std::vector<Query> state(queries);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t head = 0; head < B * NH; ++head)
      for (int64_t q0 = 0; q0 < T; q0 += queries) {
        const int64_t b = head / NH, h = head % NH, kv = h / group, rows = std::min(queries, T - q0);
        const float* q = qk + (b * T + q0) * ldk + h * HD;
        const float* k = qk + b * T * ldk + (NH + kv) * HD;
        const float* v = qkv + b * T * ldv + (NH + heads.n_kv_head + kv) * HD;
        std::fill(state.begin(), state.end(), Query{});
        std::fill(out.begin(), out.end(), 0.0f);
        for (int64_t k0 = 0; k0 < q0 + rows; k0 += keys) {
          const int64_t n = std::min(keys, q0 + rows - k0);
          vectorised::fill_panel(panel.data(), k + k0 * ldk, ldk, n, HD);
          vectorised::strip(scores.data(), keys, q, ldk, panel.data(), keys, rows, keys, HD);
          float correction[queries];
          for (int64_t i = 0; i < rows; ++i)
            correction[i] =
                softmax_step(state[i], &scores[i * keys], std::clamp<int64_t>(q0 + i - k0 + 1, 0, n), scale);
          for (int64_t c = 0; c < HD; c += keys)
            vectorised::strip(&product[c], HD, scores.data(), keys, v + k0 * ldv + c, ldv, rows, keys, n);
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < HD; ++c) out[i * HD + c] = out[i * HD + c] * correction[i] + product[i * HD + c];
        }
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = (b * T + q0 + i) * NH + h;
          for (int64_t c = 0; c < HD; ++c) o[at * HD + c] = out[i * HD + c] / state[i].sum;
          lse[at] = state[i].maximum + std::log(state[i].sum);
        }
      }
  }
}

}  // namespace tiles
