// Rung 6: a tile of 128 x 256, multiplied by two warpgroups of 64 x 256 each.
//
// Predicted: of the two limits that rung 5 runs into, both fall. wgmma with N = 256 reads 2 KB of A and 8 KB of B for
// 128 clocks of multiplication, 80 bytes a clock instead of 96; and a tile with twice the area needs only 1.5 times
// the operands, 48 KB for 1024 clocks, 48 bytes a clock from the L2 cache instead of 64. Together 128 bytes a clock:
// just what shared memory delivers.
//
// The accumulators of such a tile are 128 KB, half of all registers of a multiprocessor, so one block has the
// multiprocessor to itself. 384 threads could have 168 registers each: the consumers want 128 for accumulators alone,
// plus addresses. setmaxnreg moves registers from the producer's warpgroup, which needs few, to them: 40, 232, 232.
// (It works on whole warpgroups, so the producer is one now, of which one thread has something to do.)
//
// The ring has four stages of 48 KB.
//
// Sizes: M a multiple of 128, N of 256, K of 64.
#pragma once
#include "llmc/hopper.cuh"

namespace two_consumers {

using namespace hopper;

constexpr int BM = 128, BN = 256, BK = 64, stages = 4, threads = 3 * warpgroup;
constexpr int a_bytes = BM * BK * 2, stage_bytes = a_bytes + BN * BK * 2;
constexpr int shared_size = stages * (stage_bytes + 16);

struct Position {
  uint32_t stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

__global__ void __launch_bounds__(threads, 1)
    dense_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, bf16* c, int N, int K) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared), full = ring + stages * stage_bytes, empty = full + stages * 8;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) init_barrier(full + s * 8, 1), init_barrier(empty + s * 8, 8);
    fence_barriers();
  }
  __syncthreads();

  if (threadIdx.x < warpgroup) {
    give_registers<40>();
    if (threadIdx.x > 0) return;
    Position at;
    for (int k = 0; k < K; k += BK, at.advance()) {
      const uint32_t to = ring + at.stage * stage_bytes, arrived = full + at.stage * 8;
      wait(empty + at.stage * 8, at.parity ^ 1);
      arrive_expecting(arrived, stage_bytes);
      load_box(to, &a, k, m0, 0, arrived);
      load_box(to + a_bytes, &b, k, n0, 0, arrived);
    }
  } else {
    take_registers<232>();
    const int first_row = (threadIdx.x / warpgroup - 1) * 64, warp = threadIdx.x % warpgroup / 32;
    const int lane = threadIdx.x % 32;
    const uint64_t a0 = descriptor(ring + first_row * 128), b0 = descriptor(ring + a_bytes);
    auto release = [&](uint32_t stage) {
      if (lane == 0) arrive(empty + stage * 8);
    };
    float acc[BN / 8][4];
    Position at;
    uint32_t before = 0;
    for (int step = 0; step < K / BK; ++step, at.advance()) {
      wait(full + at.stage * 8, at.parity);
      const uint64_t stage = at.stage * (stage_bytes / 16);
      fence_products();
#pragma unroll
      for (int k = 0; k < BK / 16; ++k)
        multiply<false, false>(acc, a0 + stage + k * step_k<false>(), b0 + stage + k * step_k<false>(),
                               step > 0 || k > 0);
      commit_products();
      wait_products<1>();
      if (step > 0) release(before);
      before = at.stage;
    }
    wait_products<0>();
    bf16* to = c + int64_t(m0 + first_row + warp * 16 + lane / 4) * N + n0 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      *reinterpret_cast<uint32_t*>(to + j * 8) = pack_bf16(acc[j][0], acc[j][1]);
      *reinterpret_cast<uint32_t*>(to + 8 * int64_t(N) + j * 8) = pack_bf16(acc[j][2], acc[j][3]);
    }
  }
#endif
}

// c (M,N) = a (M,K) b (N,K)^T
inline void product(GpuBase& dev, bf16* c, const bf16* a, const bf16* b, int M, int N, int K) {
  if (M % BM || N % BN || K % BK)
    fail("dense_gemm 06_two_consumers: M must be a multiple of 128, N of 256 and K of 64, not ", M, ", ", N, ", ", K);
  const TensorMap a_map = tensor_map(a, 1, M, K, int64_t(M) * K, BM),
                  b_map = tensor_map(b, 1, N, K, int64_t(N) * K, BN);
  launch(dev, dense_gemm, dim3(unsigned(N / BN), unsigned(M / BM)), dim3(threads), shared_size, a_map, b_map, c, N, K);
}

}  // namespace two_consumers
