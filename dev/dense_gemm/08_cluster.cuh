// Rung 8: clusters of two blocks. Two tiles, one above the other, have the same columns of B. The blocks that compute
// them form a cluster: they run at the same time on neighbouring multiprocessors, and a load of TMA can
// deliver to both. Each block loads its own tile of A, and half of the common tile of B for both.
//
// Predicted: a block asks the L2 cache for 16 KB of A and 16 KB of B a step instead of 16 and 32: a third less. At 800
// TFLOP/s rung 7 draws 48 KB for every 128 x 256 x 64 multiply-adds, 9 TB/s, about all that the L2 cache can deliver;
// now it is 6. Shared memory sees no difference: what arrives there is as much as before.
//
// What it costs is that the two blocks depend on each other:
//   full   of each block waits for all three boxes, 48 KB, whoever asked for them
//   empty  of each block waits for the consumers of both, because its producer writes to both
//   start  nobody may send anything to a block that has not initialised its barriers: the cluster meets
//   end    nobody may leave while the other may still arrive at its barriers or write to its memory: it meets again
// A box may arrive before the block's own producer has announced its bytes: the phase waits for the announcement too,
// as it is the one arrival that the barrier counts, and the bytes may be counted in either order. A box cannot arrive a
// whole phase early: it is sent only after this block's consumers have called the stage empty.
//
// Sizes: M and N multiples of 256, K of 64.
#pragma once
#include "llmc/hopper.cuh"

namespace cluster {

using namespace hopper;

constexpr int blocks = 2;  // of a cluster
constexpr int BM = 128, BN = 256, BK = 64, stages = 4, threads = 3 * warpgroup, group = 8;
constexpr int a_bytes = BM * BK * 2, b_bytes = BN * BK * 2, stage_bytes = a_bytes + b_bytes;
constexpr int shared_size = stages * (stage_bytes + 16);

struct Position {
  uint32_t stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// A cluster works on pairs of tiles, 256 x 256. 64 of them in flight are a patch of 8 x 8.
struct Pair {
  int m0, n0;
  __device__ Pair(int p, int pairs_m, int pairs_n) {
    const int first = p / (group * pairs_n) * group, rows = min(group, pairs_m - first), local = p - first * pairs_n;
    m0 = (first + local % rows) * BM * blocks, n0 = local / rows * BN;
  }
};

__global__ void __launch_bounds__(threads, 1)
    dense_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, bf16* c, int M, int N, int K) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared), full = ring + stages * stage_bytes, empty = full + stages * 8;
  const int pairs_m = M / (BM * blocks), pairs_n = N / BN, pairs = pairs_m * pairs_n;
  const int first_pair = blockIdx.x / blocks, clusters = gridDim.x / blocks, rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) init_barrier(full + s * 8, 1), init_barrier(empty + s * 8, 8 * blocks);
    fence_barriers();
    prefetch_map(&a), prefetch_map(&b);
  }
  sync_cluster();

  if (threadIdx.x < warpgroup) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      Position at;
      for (int p = first_pair; p < pairs; p += clusters) {
        const Pair pair(p, pairs_m, pairs_n);
        for (int k = 0; k < K; k += BK, at.advance()) {
          const uint32_t to = ring + at.stage * stage_bytes, arrived = full + at.stage * 8;
          wait(empty + at.stage * 8, at.parity ^ 1);
          arrive_expecting(arrived, stage_bytes);
          load_box(to, &a, k, pair.m0 + rank * BM, 0, arrived);
          load_box_multicast(to + a_bytes + rank * (b_bytes / blocks), &b, k, pair.n0 + rank * (BN / blocks), 0,
                             arrived, (1 << blocks) - 1);
        }
      }
    }
  } else {
    take_registers<232>();
    const int first_row = (threadIdx.x / warpgroup - 1) * 64, warp = threadIdx.x % warpgroup / 32;
    const int lane = threadIdx.x % 32;
    const uint64_t a0 = descriptor(ring + first_row * 128), b0 = descriptor(ring + a_bytes);
    auto release = [&](uint32_t stage) {
      if (lane < blocks) arrive_at(empty + stage * 8, lane);
    };
    Position at;
    for (int p = first_pair; p < pairs; p += clusters) {
      float acc[BN / 8][4];
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
      release(before);
      const Pair pair(p, pairs_m, pairs_n);
      bf16* to = c + int64_t(pair.m0 + rank * BM + first_row + warp * 16 + lane / 4) * N + pair.n0 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        *reinterpret_cast<uint32_t*>(to + j * 8) = pack_bf16(acc[j][0], acc[j][1]);
        *reinterpret_cast<uint32_t*>(to + 8 * int64_t(N) + j * 8) = pack_bf16(acc[j][2], acc[j][3]);
      }
    }
  }
  sync_cluster();
#endif
}

// c (M,N) = a (M,K) b (N,K)^T
inline void product(GpuBase& dev, bf16* c, const bf16* a, const bf16* b, int M, int N, int K) {
  if (M % (BM * blocks) || N % BN || K % BK)
    fail("dense_gemm 08_cluster: M and N must be multiples of 256 and K of 64, not ", M, ", ", N, ", ", K);
  const TensorMap a_map = tensor_map(a, 1, M, K, int64_t(M) * K, BM);
  const TensorMap b_map = tensor_map(b, 1, N, K, int64_t(N) * K, BN / blocks);
  const int64_t pairs = int64_t(M / (BM * blocks)) * (N / BN), rounds = ceil_div(pairs, dev.multiprocessors / blocks);
  launch_clusters(dev, dense_gemm, blocks, dim3(unsigned(ceil_div(pairs, rounds) * blocks)), dim3(threads), shared_size,
                  a_map, b_map, c, M, N, K);
}

}  // namespace cluster
