// Rung 1: a thread an element of C, which walks along a row of A and a row of B by itself.
//
// Predicted: every multiply-add loads its two operands, so loads are the limit. The 32 threads of a warp have the same
// row of A (one load, broadcast) and 32 different rows of B: each load of B touches 32 lines of 128 bytes to take 2
// bytes of each. The L1 cache holds on to the lines for the next 63 steps, but a load that touches 32 lines is taken
// apart into 32, one a clock: 32 multiply-adds in about 32 clocks of a multiprocessor that could do 128 a clock on its
// CUDA cores, and 2048 on its tensor cores. Well below 1 TFLOP/s.
//
// Sizes: M a multiple of 8, N of 32.
#pragma once
#include "llmc/cuda_common.cuh"

namespace naive {

constexpr int BM = 8, BN = 32;  // of C, of a block; a warp has 32 neighbours in a row

__global__ void dense_gemm(bf16* c, const bf16* a, const bf16* b, int N, int K) {
  const int64_t m = int64_t(blockIdx.y) * BM + threadIdx.y, n = int64_t(blockIdx.x) * BN + threadIdx.x;
  float sum = 0;
  for (int k = 0; k < K; ++k) sum += to_float(a[m * K + k]) * to_float(b[n * K + k]);
  c[m * N + n] = from_float<bf16>(sum);
}

// c (M,N) = a (M,K) b (N,K)^T
inline void product(GpuBase& dev, bf16* c, const bf16* a, const bf16* b, int M, int N, int K) {
  if (M % BM || N % BN) fail("dense_gemm 01_naive: M must be a multiple of 8 and N of 32, not ", M, " and ", N);
  launch(dev, dense_gemm, dim3(unsigned(N / BN), unsigned(M / BM)), dim3(BN, BM), 0, c, a, b, N, K);
}

}  // namespace naive
