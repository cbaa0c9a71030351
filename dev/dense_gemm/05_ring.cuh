// Rung 5: a ring of stages, and one warp that does nothing but copy. A stage holds the tiles of one step and has two
// barriers: `full` (its bytes have arrived) and `empty` (nobody reads it any more). The producer runs ahead as far as
// there are empty stages; the consumers, a warpgroup, multiply what is full. Neither ever waits for the other's work
// to begin, only for a stage.
//
//   producer  wait until empty, announce the bytes, ask for both boxes                      one thread
//   consumer  wait until full, start its products, wait for those of the step before it, call that stage empty
//
// The consumer leaves one step's products in flight while it starts the next, so that the tensor cores have work
// queued.
//
// Tile and arithmetic are those of rung 4. Three stages are 96 KB: two blocks share a multiprocessor, and one
// multiplies while the other starts or finishes.
//
// Predicted: the trip to the L2 cache is hidden. What is left is shared memory: wgmma reads 96 bytes a clock, and TMA
// writes 32 KB in the 512 clocks that a step takes, 64 bytes a clock. Together 160 of 128: at most 80 % of
// the tensor cores' rate.
//
// Sizes: M and N multiples of 128, K of 64.
#pragma once
#include "llmc/hopper.cuh"

namespace ring {

using namespace hopper;

constexpr int BM = 128, BN = 128, BK = 64, stages = 3, threads = warpgroup + 32;
constexpr int a_bytes = BM * BK * 2, stage_bytes = a_bytes + BN * BK * 2;
constexpr int shared_size = stages * (stage_bytes + 16);

// Where in the ring: both sides go round in the same order. The parity changes with every round.
struct Position {
  uint32_t stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

__global__ void __launch_bounds__(threads, 2)
    dense_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, bf16* c, int N, int K) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared), full = ring + stages * stage_bytes, empty = full + stages * 8;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) init_barrier(full + s * 8, 1), init_barrier(empty + s * 8, 4);
    fence_barriers();
  }
  __syncthreads();

  if (warp == 4) {  // the producer
    if (lane > 0) return;
    Position at;
    for (int k = 0; k < K; k += BK, at.advance()) {
      const uint32_t to = ring + at.stage * stage_bytes, arrived = full + at.stage * 8;
      wait(empty + at.stage * 8, at.parity ^ 1);  // in the first round the phase before the first: over already
      arrive_expecting(arrived, stage_bytes);
      load_box(to, &a, k, m0, 0, arrived);
      load_box(to + a_bytes, &b, k, n0, 0, arrived);
    }
    return;
  }

  auto release = [&](uint32_t stage) {
    if (lane == 0) arrive(empty + stage * 8);
  };
  float acc[2][BN / 8][4];
  const uint64_t a0 = descriptor(ring), b0 = descriptor(ring + a_bytes);
  Position at;
  uint32_t before = 0;
  for (int step = 0; step < K / BK; ++step, at.advance()) {
    wait(full + at.stage * 8, at.parity);
    const uint64_t stage = at.stage * (stage_bytes / 16);
    fence_products();
#pragma unroll
    for (int k = 0; k < BK / 16; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        multiply<false, false>(acc[i], a0 + stage + i * (64 * 128 / 16) + k * step_k<false>(),
                               b0 + stage + k * step_k<false>(), step > 0 || k > 0);
    commit_products();
    wait_products<1>();
    if (step > 0) release(before);
    before = at.stage;
  }
  wait_products<0>();  // the last stage need not be released: nobody waits for it
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
    fail("dense_gemm 05_ring: M and N must be multiples of 128 and K of 64, not ", M, ", ", N, ", ", K);
  const TensorMap a_map = tensor_map(a, 1, M, K, int64_t(M) * K, BM),
                  b_map = tensor_map(b, 1, N, K, int64_t(N) * K, BN);
  launch(dev, dense_gemm, dim3(unsigned(N / BN), unsigned(M / BM)), dim3(threads), shared_size, a_map, b_map, c, N, K);
}

}  // namespace ring
