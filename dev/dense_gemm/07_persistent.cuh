// Rung 7: persistent blocks. The grid has at most one block a multiprocessor, and each works on one tile after another.
//
// With a tile a block and a block a multiprocessor, the tensor cores stand still while a block starts (barriers, first
// loads), while it stores its tile, and while the next takes its place. Now the ring goes on from tile to tile: while
// the consumers store a tile, the producer fills all stages with the start of the next.
//
// The order of tiles is ours to choose, too. The tiles in flight at a time should read as few different rows of A and B
// as possible, so that most reads hit the L2 cache: tiles are numbered down groups of 16 tile rows, and 128 of them in
// flight cover a patch of 16 x 8 tiles, 2048 x 2048 of C.
//
// Predicted: the start of a block (some microseconds) is paid once, and the loads behind a store are free. Stores
// themselves still stop the consumers: 64 KB a tile. With a short reduction that is much of the time: a tile with
// K = 768 multiplies for 12,000 clocks.
//
// The grid is not simply all multiprocessors: 2048 tiles take 16 rounds on 132 blocks, and also on 128.
//
// Sizes: M a multiple of 128, N of 256, K of 64.
#pragma once
#include "llmc/hopper.cuh"

namespace persistent {

using namespace hopper;

constexpr int BM = 128, BN = 256, BK = 64, stages = 4, threads = 3 * warpgroup, group = 16;
constexpr int a_bytes = BM * BK * 2, stage_bytes = a_bytes + BN * BK * 2;
constexpr int shared_size = stages * (stage_bytes + 16);

struct Position {
  uint32_t stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Tile t begins at row m0 and column n0 of C.
struct Tile {
  int m0, n0;
  __device__ Tile(int t, int tiles_m, int tiles_n) {
    const int first = t / (group * tiles_n) * group, rows = min(group, tiles_m - first), local = t - first * tiles_n;
    m0 = (first + local % rows) * BM, n0 = local / rows * BN;
  }
};

__global__ void __launch_bounds__(threads, 1)
    dense_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, bf16* c, int M, int N, int K) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared), full = ring + stages * stage_bytes, empty = full + stages * 8;
  const int tiles_m = M / BM, tiles_n = N / BN, tiles = tiles_m * tiles_n;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) init_barrier(full + s * 8, 1), init_barrier(empty + s * 8, 8);
    fence_barriers();
    prefetch_map(&a), prefetch_map(&b);
  }
  __syncthreads();

  if (threadIdx.x < warpgroup) {
    give_registers<40>();
    if (threadIdx.x > 0) return;
    Position at;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const Tile tile(t, tiles_m, tiles_n);
      for (int k = 0; k < K; k += BK, at.advance()) {
        const uint32_t to = ring + at.stage * stage_bytes, arrived = full + at.stage * 8;
        wait(empty + at.stage * 8, at.parity ^ 1);
        arrive_expecting(arrived, stage_bytes);
        load_box(to, &a, k, tile.m0, 0, arrived);
        load_box(to + a_bytes, &b, k, tile.n0, 0, arrived);
      }
    }
  } else {
    take_registers<232>();
    const int first_row = (threadIdx.x / warpgroup - 1) * 64, warp = threadIdx.x % warpgroup / 32;
    const int lane = threadIdx.x % 32;
    const uint64_t a0 = descriptor(ring + first_row * 128), b0 = descriptor(ring + a_bytes);
    auto release = [&](uint32_t stage) {
      if (lane == 0) arrive(empty + stage * 8);
    };
    Position at;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
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
      release(before);  // now somebody does wait for it
      const Tile tile(t, tiles_m, tiles_n);
      bf16* to = c + int64_t(tile.m0 + first_row + warp * 16 + lane / 4) * N + tile.n0 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        *reinterpret_cast<uint32_t*>(to + j * 8) = pack_bf16(acc[j][0], acc[j][1]);
        *reinterpret_cast<uint32_t*>(to + 8 * int64_t(N) + j * 8) = pack_bf16(acc[j][2], acc[j][3]);
      }
    }
  }
#endif
}

// c (M,N) = a (M,K) b (N,K)^T
inline void product(GpuBase& dev, bf16* c, const bf16* a, const bf16* b, int M, int N, int K) {
  if (M % BM || N % BN || K % BK)
    fail("dense_gemm 07_persistent: M must be a multiple of 128, N of 256 and K of 64, not ", M, ", ", N, ", ", K);
  const TensorMap a_map = tensor_map(a, 1, M, K, int64_t(M) * K, BM),
                  b_map = tensor_map(b, 1, N, K, int64_t(N) * K, BN);
  const int64_t tiles = int64_t(M / BM) * (N / BN), rounds = ceil_div(tiles, dev.multiprocessors);
  launch(dev, dense_gemm, dim3(unsigned(ceil_div(tiles, rounds))), dim3(threads), shared_size, a_map, b_map, c, M, N,
         K);
}

}  // namespace persistent
