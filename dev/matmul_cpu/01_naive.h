// Rung 1: the formula. An element is the sum of K products, added one after the other.
//
// Predicted: M N K multiply-adds of 4 clocks each, on one thread. A processor starts two of them a clock, and of 4, 8
// or 16 floats each, but here every one needs the sum that the one before it makes, and the language forbids to add in
// another order. Memory is idle: 8 bytes in 4 clocks, in order, from a cache.
#pragma once
#include <cstdint>

namespace naive {

// c (M,N) = a (M,K) b (N,K)^T
inline void product(float* c, const float* a, const float* b, int64_t M, int64_t N, int64_t K) {
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < N; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += a[i * K + k] * b[j * K + k];
      c[i * N + j] = sum;
    }
}

}  // namespace naive
