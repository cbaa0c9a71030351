// Rung 2: tiles in the cache. A tile of B, 128 of its rows by 32 of the reduction (16 KB), is copied into the
// first-level cache, transposed, and used for all rows of A before the next one. Neighbours in the tile's rows belong
// to different elements of C: the sums in the innermost loop are independent, so the compiler makes vectors of them.
//
// Predicted: a clock for each `lanes` multiply-adds, on one thread: M N K / lanes clocks. For every one the processor
// loads a vector of the tile and a vector of C and stores one of C, and it stores one a clock. That is half of what the
// FMA units could do. The row of C is wide (8 vectors of AVX-512) so that a vector that is stored is needed again
// only 8 stores later. The floor leaves out that reading it back, adding and storing takes longer than these 8 clocks.
//
// The tile without the transposition would change nothing: rung 1 does not wait for memory.
#pragma once
#include <algorithm>
#include <cstdint>

namespace tiled {

inline constexpr int64_t columns = 128, depth = 32;

// c (M,N) = a (M,K) b (N,K)^T
inline void product(float* c, const float* a, const float* b, int64_t M, int64_t N, int64_t K) {
  float tile[depth][columns];  // tile[k][j] = b[j0 + j][k0 + k]
  std::fill_n(c, M * N, 0.0f);
  for (int64_t j0 = 0; j0 < N; j0 += columns)
    for (int64_t k0 = 0; k0 < K; k0 += depth) {
      const int64_t n = std::min(columns, N - j0), steps = std::min(depth, K - k0);
      for (int64_t k = 0; k < steps; ++k)
        for (int64_t j = 0; j < n; ++j) tile[k][j] = b[(j0 + j) * K + k0 + k];
      for (int64_t i = 0; i < M; ++i)
        for (int64_t k = 0; k < steps; ++k) {
          const float x = a[i * K + k0 + k];
          float* row = c + i * N + j0;
          for (int64_t j = 0; j < n; ++j) row[j] += x * tile[k][j];
        }
    }
}

}  // namespace tiled
