// Rung 2: tiles in shared memory. A block owns 128 x 128 of C; for every 16 steps of the reduction its 256 threads copy
// 128 rows of A and of B into shared memory once, as fp32, and then each computes 8 x 8 elements from there.
//
// Predicted: what is read from global memory is used 128 times, so the limit moves inwards. A thread reads 8 + 8 floats
// from shared memory for 64 multiply-adds: four loads of 16 bytes to 64 FMA. The FMA are the limit then: 128 a clock
// and multiprocessor, 60 TFLOP/s of fp32 on the whole chip. Conversion, copies and the barriers (nothing overlaps
// within a block, but two blocks share a multiprocessor) take a third of it: about 40.
//
// The tiles are stored transposed, [k][row], so that a thread's rows are neighbours, and each thread has two groups of
// four rows and of four columns, 64 apart: the 16-byte loads of neighbouring threads then lie side by side and hit
// different banks.
//
// Sizes: M and N multiples of 128, K of 16.
#pragma once
#include "llmc/cuda_common.cuh"

namespace shared_tiles {

constexpr int BM = 128, BN = 128, BK = 16, threads = 256;

// Row `row` of a tile, chunk of 8 values at `from`, into the columns [k][row].
__device__ __forceinline__ void load_chunk(float (&tile)[BK][BM], int row, int k, const bf16* from) {
  const Pack<bf16> chunk = *reinterpret_cast<const Pack<bf16>*>(from);
#pragma unroll
  for (int i = 0; i < 8; ++i) tile[k + i][row] = chunk[i];
}

// Of 128 values those at 4 * thread ... + 3 and 64 further.
__device__ __forceinline__ void read_eight(float (&v)[8], const float (&tile)[BM], int thread) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 four = *reinterpret_cast<const float4*>(&tile[half * 64 + thread * 4]);
    v[half * 4] = four.x, v[half * 4 + 1] = four.y, v[half * 4 + 2] = four.z, v[half * 4 + 3] = four.w;
  }
}

__global__ void __launch_bounds__(threads, 2) dense_gemm(bf16* c, const bf16* a, const bf16* b, int N, int K) {
  __shared__ __align__(16) float a_tile[BK][BM], b_tile[BK][BN];
  const int64_t m0 = int64_t(blockIdx.y) * BM, n0 = int64_t(blockIdx.x) * BN;
  const int row = threadIdx.x % BM, k_half = threadIdx.x / BM * 8;  // what this thread copies
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;             // what it computes
  const bf16 *from_a = a + (m0 + row) * K + k_half, *from_b = b + (n0 + row) * K + k_half;

  float sum[8][8] = {};
  for (int k0 = 0; k0 < K; k0 += BK) {
    load_chunk(a_tile, row, k_half, from_a + k0);
    load_chunk(b_tile, row, k_half, from_b + k0);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < BK; ++k) {
      float u[8], v[8];
      read_eight(u, a_tile[k], y), read_eight(v, b_tile[k], x);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] += u[i] * v[j];
    }
    __syncthreads();  // before the tiles are overwritten
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* s = &sum[i][half * 4];
      bf16* to = c + (m0 + i / 4 * 64 + y * 4 + i % 4) * N + n0 + half * 64 + x * 4;
      *reinterpret_cast<uint2*>(to) = {pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3])};
    }
}

// c (M,N) = a (M,K) b (N,K)^T
inline void product(GpuBase& dev, bf16* c, const bf16* a, const bf16* b, int M, int N, int K) {
  if (M % BM || N % BN || K % BK)
    fail("dense_gemm 02_shared_tiles: M and N must be multiples of 128 and K of 16, not ", M, ", ", N, ", ", K);
  launch(dev, dense_gemm, dim3(unsigned(N / BN), unsigned(M / BM)), dim3(threads), 0, c, a, b, N, K);
}

}  // namespace shared_tiles
