// Rung 3: sums in registers. A tile of C, 8 rows by two vectors, stays in 16 of the 32 vector registers of AVX-512
// while the whole reduction runs (4 rows by two vectors where there are 16 registers); nothing is stored until it is
// done. B comes from a panel, two vectors wide and K high: a transposed copy, made once and used for all rows of A.
//
// Predicted: the FMA peak of one thread, 2 M N K operations. A unit takes a vector multiply-add every clock and answers
// after 4, and there are two: 8 must be in flight, each with a sum of its own. The tile has 16. For these 16 a step
// loads two vectors of the panel and 8 single values of A, 10 loads in 8 clocks, where 16 would be possible.
//
// What the floor leaves out is the panel: N K values are moved singly, a clock or two each, while the FMA units wait.
// That is M / (2 lanes) clocks of multiply-adds a value to pay for it: nothing at M = 1024, most of the time at M = 8.
// The panel (128 K bytes with AVX-512) is read again for every 8 rows, 16 bytes a clock, which the second-level cache
// gives.
#pragma once
#include <algorithm>

#include "dev/bench_cpu.h"

namespace vectorised {
using bench_cpu::Array, bench_cpu::Lanes, bench_cpu::lanes;

inline constexpr int64_t tile_rows = lanes == 16 ? 8 : 4, vectors = 2, width = vectors * lanes;

// c (rows, n) = a (rows,K) panel (K,width), of which the first n columns. lda, ldp and ldc are distances between rows.
template <int64_t rows>
void register_tile(float* c, int64_t ldc, const float* a, int64_t lda, const float* panel, int64_t ldp, int64_t n,
                   int64_t K) {
  Lanes sum[rows][vectors] = {};
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t v = 0; v < vectors; ++v)
        sum[i][v] += a[i * lda + k] * *reinterpret_cast<const Lanes*>(panel + k * ldp + v * lanes);
  for (int64_t i = 0; i < rows; ++i) {
    float row[width];
    for (int64_t v = 0; v < vectors; ++v) *reinterpret_cast<Lanes*>(row + v * lanes) = sum[i][v];
    if (n == width)
      std::copy_n(row, width, c + i * ldc);
    else
      std::copy_n(row, n, c + i * ldc);
  }
}

// The same for any number of rows.
inline void strip(float* c, int64_t ldc, const float* a, int64_t lda, const float* panel, int64_t ldp, int64_t rows,
                  int64_t n, int64_t K) {
  int64_t i = 0;
  for (; i + tile_rows <= rows; i += tile_rows)
    register_tile<tile_rows>(c + i * ldc, ldc, a + i * lda, lda, panel, ldp, n, K);
  for (; i < rows; ++i) register_tile<1>(c + i * ldc, ldc, a + i * lda, lda, panel, ldp, n, K);
}

// panel (K,width): the n rows of b as columns, and zeros in the others. ldb: the distance between rows of b.
inline void fill_panel(float* panel, const float* b, int64_t ldb, int64_t n, int64_t K) {
  if (n < width) std::fill_n(panel, K * width, 0.0f);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t j = 0; j < n; ++j) panel[k * width + j] = b[j * ldb + k];
}

// c (M,N) = a (M,K) b (N,K)^T
inline void product(float* c, const float* a, const float* b, int64_t M, int64_t N, int64_t K) {
  Array<float> panel(K * width);
  for (int64_t j = 0; j < N; j += width) {
    const int64_t n = std::min(width, N - j);
    fill_panel(panel.data(), b + j * K, K, n, K);
    strip(c + j, N, a, K, panel.data(), width, M, n, K);
  }
}

}  // namespace vectorised
