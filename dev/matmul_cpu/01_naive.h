// Rung 1: the formula. An element is the sum of K products, added one after the other.
//
// Predicted: M N K additions, each of which needs the sum that the one before it makes: 2 to 4 clocks each, by the
// processor, and the language forbids to add in another order. (The compiler multiplies in vectors and then adds one by
// one.) The processor could start two multiply-adds a clock, of 4, 8 or 16 floats each. Memory is idle: 8 bytes in 4
// clocks, in order, from a cache.
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
