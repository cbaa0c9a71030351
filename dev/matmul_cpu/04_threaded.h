// Rung 4: all cores. Panels of B are independent of each other, so each thread takes the next one that nobody has
// taken, copies it, and multiplies all of A by it.
//
// Predicted: the FMA peak of all threads together, 2 M N K operations. Each core has its own FMA units, first-level and
// second-level cache, and what they share, the path to memory, carries little. To wake the threads and to wait for the
// last one takes microseconds: nothing for a product of milliseconds, most of the time of a small one.
#pragma once
#include "dev/matmul_cpu/03_vectorised.h"

namespace threaded {
using namespace vectorised;

// c (M,N) = a (M,K) b (N,K)^T
inline void product(float* c, const float* a, const float* b, int64_t M, int64_t N, int64_t K) {
#pragma omp parallel
  {
    Array<float> panel(K * width);
#pragma omp for schedule(dynamic)
    for (int64_t j = 0; j < N; j += width) {
      const int64_t n = std::min(width, N - j);
      fill_panel(panel.data(), b + j * K, K, n, K);
      strip(c + j, N, a, K, panel.data(), width, M, n, K);
    }
  }
}

}  // namespace threaded
