// Rung 4: Hopper's own instructions. TMA, the tensor memory accelerator, brings whole tiles to shared memory at the request of one
// thread, and wgmma multiplies them from there: 64 x 128 x 16 in one instruction of a warpgroup, four warps.
//
// A block is one warpgroup with 128 x 128 of C: two strips of 64 rows, 2 x 64 accumulators a thread. One stage: ask for
// the tiles of a step, wait, multiply, wait, ask for the next.
//
// Predicted: operands no longer pass through registers. For 64 x 128 x 16 multiply-adds, 64 clocks, wgmma reads 2 KB of
// A and 4 KB of B: 96 of the 128 bytes that shared memory delivers a clock. But within a block either the copy or the
// product is idle: a step is a trip to the L2 cache (some 800 clocks) and then 512 clocks of multiplication. Three
// blocks fit on a multiprocessor (by their registers) and fill each other's gaps: expect half to two thirds of the
// library.
//
// Sizes: M and N multiples of 128, K of 64.
#pragma once
#include "llmc/hopper.cuh"

namespace one_stage {

using namespace hopper;

constexpr int BM = 128, BN = 128, BK = 64;
constexpr int a_bytes = BM * BK * 2, stage_bytes = a_bytes + BN * BK * 2;
constexpr int shared_size = stage_bytes + 8;  // and a barrier

__global__ void __launch_bounds__(warpgroup, 3)
    dense_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, bf16* c, int N, int K) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t stage = shared_address(shared), full = stage + stage_bytes;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init_barrier(full, 1);
    fence_barriers();
  }
  __syncthreads();

  float acc[2][BN / 8][4];
  const uint64_t a0 = descriptor(stage), b0 = descriptor(stage + a_bytes);
  for (int step = 0; step < K / BK; ++step) {
    if (threadIdx.x == 0) {
      arrive_expecting(full, stage_bytes);
      load_box(stage, &a, step * BK, m0, 0, full);
      load_box(stage + a_bytes, &b, step * BK, n0, 0, full);
    }
    wait(full, step & 1);  // each use of the barrier is a phase, and their parities alternate
    fence_products();
#pragma unroll
    for (int k = 0; k < BK / 16; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        multiply<false, false>(acc[i], a0 + i * (64 * 128 / 16) + k * step_k<false>(), b0 + k * step_k<false>(),
                               step > 0 || k > 0);
    commit_products();
    wait_products<0>();
    __syncthreads();  // before the tiles are overwritten
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    bf16* to = c + int64_t(m0 + i * 64 + warp * 16 + lane / 4) * N + n0 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      *reinterpret_cast<uint32_t*>(to + j * 8) = pack_bf16(acc[i][j][0], acc[i][j][1]);
      *reinterpret_cast<uint32_t*>(to + 8 * int64_t(N) + j * 8) = pack_bf16(acc[i][j][2], acc[i][j][3]);
    }
  }
#endif
}

// c (M,N) = a (M,K) b (N,K)^T
inline void product(GpuBase& dev, bf16* c, const bf16* a, const bf16* b, int M, int N, int K) {
  if (M % BM || N % BN || K % BK)
    fail("dense_gemm 04_wgmma: M and N must be multiples of 128 and K of 64, not ", M, ", ", N, ", ", K);
  const TensorMap a_map = tensor_map(a, 1, M, K, int64_t(M) * K, BM),
                  b_map = tensor_map(b, 1, N, K, int64_t(N) * K, BN);
  launch(dev, dense_gemm, dim3(unsigned(N / BN), unsigned(M / BM)), dim3(warpgroup), shared_size, a_map, b_map, c, N,
         K);
}

}  // namespace one_stage
