// Rung 9: results leave through shared memory, carried by TMA, while the next tile is multiplied.
//
// As wgmma leaves them, a thread holds two neighbours of a row at a time: 4 bytes, four threads 16 bytes of a row, and
// each store instruction of a warp touches eight rows with half a sector (32 bytes) each: 64 of them a thread, for
// which the consumer waits in the queue of the memory system. Now stmatrix puts the results into shared memory, eight
// rows of 16 bytes at a time and four such matrices in an instruction, in the swizzled layout that TMA
// knows; one thread asks for the box to be stored, and the consumers go on.
//
// The ring leaves 35 KB, a tile is 64 KB. So each consumer has two panels of 64 x 64, 8 KB each, and its 64 x 256 leave
// in four parts that take turns: a panel is written again once TMA has read it. The last two parts are
// still on their way when the next tile's products begin.
//
//   wait until the store before the last has read its panel (the thread that asked), meet: the panel is free
//   write it, make what was written visible to TMA (a fence between the two ways into memory), meet
//   ask for the store (one thread), and mark it as a group to be waited for
//
// Predicted: what stops the multiplication between tiles shrinks from 64 scattered stores a thread to 16 stmatrix and
// eight meetings of a warpgroup. Worth most where the reduction is short.
//
// Before the block leaves, its last stores must have read their panels: the memory belongs to the next block then.
//
// Sizes: M and N multiples of 256, K of 64.
#pragma once
#include "llmc/hopper.cuh"

namespace async_store {

using namespace hopper;

constexpr int blocks = 2;  // of a cluster
constexpr int BM = 128, BN = 256, BK = 64, stages = 4, threads = 3 * warpgroup, group = 8;
constexpr int a_bytes = BM * BK * 2, b_bytes = BN * BK * 2, stage_bytes = a_bytes + b_bytes;
constexpr int panel_bytes = 64 * 128, panels = 2;  // 64 x 64 results; of a consumer
constexpr int panels_at = stages * stage_bytes, barriers_at = panels_at + 2 * panels * panel_bytes;
constexpr int shared_size = barriers_at + stages * 16;
static_assert(shared_size <= shared_bytes);

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

// The 64 x 256 results of a consumer, which begin at row m and column n of C. `staging`: its panels. All of its
// threads.
__device__ __forceinline__ void store_tile(const float (&acc)[BN / 8][4], const TensorMap* c, uint32_t staging, int m,
                                           int n, int named_barrier) {
  const int thread = threadIdx.x % warpgroup, lane = threadIdx.x % 32;
  const int row = thread / 32 * 16 + lane % 16;  // lane l gives the address of row l % 16 of block j + l / 16
#pragma unroll
  for (int part = 0; part < BN / 64; ++part) {
    const uint32_t panel = staging + part % panels * panel_bytes;
    if (thread == 0) wait_stores_read<panels - 1>();
    sync_threads(named_barrier, warpgroup);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const auto &x = acc[part * 8 + j], &y = acc[part * 8 + j + 1];
      const uint32_t four[4] = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(y[0], y[1]),
                                pack_bf16(y[2], y[3])};
      store_matrices(panel + row * 128 + (((j + lane / 16) ^ (row & 7)) << 4), four);
    }
    fence_async_proxy();
    sync_threads(named_barrier, warpgroup);
    if (thread == 0) {
      store_box(c, panel, n + part * 64, m, 0);
      commit_stores();
    }
  }
}

__global__ void __launch_bounds__(threads, 1)
    dense_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
               const __grid_constant__ TensorMap c, int M, int N, int K) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared), full = ring + barriers_at, empty = full + stages * 8;
  const int pairs_m = M / (BM * blocks), pairs_n = N / BN, pairs = pairs_m * pairs_n;
  const int first_pair = blockIdx.x / blocks, clusters = gridDim.x / blocks, rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) init_barrier(full + s * 8, 1), init_barrier(empty + s * 8, 8 * blocks);
    fence_barriers();
    prefetch_map(&a), prefetch_map(&b), prefetch_map(&c);
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
    const int consumer = threadIdx.x / warpgroup - 1, first_row = consumer * 64, lane = threadIdx.x % 32;
    const uint32_t staging = ring + panels_at + consumer * panels * panel_bytes;
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
      store_tile(acc, &c, staging, pair.m0 + rank * BM + first_row, pair.n0, 1 + consumer);
    }
    if (threadIdx.x % warpgroup == 0) wait_stores_read<0>();
  }
  sync_cluster();
#endif
}

// c (M,N) = a (M,K) b (N,K)^T
inline void product(GpuBase& dev, bf16* c, const bf16* a, const bf16* b, int M, int N, int K) {
  if (M % (BM * blocks) || N % BN || K % BK)
    fail("dense_gemm 09_async_store: M and N must be multiples of 256 and K of 64, not ", M, ", ", N, ", ", K);
  const TensorMap a_map = tensor_map(a, 1, M, K, int64_t(M) * K, BM);
  const TensorMap b_map = tensor_map(b, 1, N, K, int64_t(N) * K, BN / blocks);
  const TensorMap c_map = tensor_map(c, 1, M, N, int64_t(M) * N, 64);
  const int64_t pairs = int64_t(M / (BM * blocks)) * (N / BN), rounds = ceil_div(pairs, dev.multiprocessors / blocks);
  launch_clusters(dev, dense_gemm, blocks, dim3(unsigned(ceil_div(pairs, rounds) * blocks)), dim3(threads), shared_size,
                  a_map, b_map, c_map, M, N, K);
}

}  // namespace async_store
