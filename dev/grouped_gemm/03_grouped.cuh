// Rung 3: one launch. The number of rows of an expert stays on the device: the grid is as large as it can ever need to
// be, each block looks up in the offsets of the routing plan which tile of which expert is its own, and blocks that are
// too many leave at once. However the rows fall, there are at most R / 128 + E tiles of rows.
//
// Predicted: all tiles form one queue, so that the chip is full until the last round: for fine-128x8, 24 tiles an
// expert, up to five times faster than rung 2 in the product. Where an expert has hundreds of tiles of its own
// (mixtral-8x2), little is gained. The other two passes are still there.
//
// Tiles of an expert run down its rows first: those in flight at a time share few tiles of the weight.
//
// Sizes: C a multiple of 64, 2F of 256.
#pragma once
#include "dev/experts/buffers.h"
#include "llmc/swiglu.h"
#include "llmc/hopper.cuh"

namespace grouped_rows {

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

// Tile t of all: experts in order, each cut into tiles of its own. Whole warps call it.
struct Tile {
  int expert = -1, m0 = 0, n0 = 0, row_end = 0;  // expert < 0: there are not so many

  // A warp looks at 32 experts at a time: how many row tiles they and all before them have, and the first that reaches
  // t.
  __device__ Tile(int t, const int32_t* offsets, int E, int tiles_n) {
    const int lane = threadIdx.x % 32;
    for (int e0 = 0, before = 0; e0 < E; e0 += 32) {
      const int e = min(e0 + lane, E - 1), begin = offsets[e], end = e0 + lane < E ? offsets[e + 1] : begin;
      const int tiles_m = (end - begin + BM - 1) / BM;
      int upto = tiles_m;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += other;
      }
      upto += before;
      const uint32_t reached = __ballot_sync(~0u, upto > t / tiles_n);
      before = __shfl_sync(~0u, upto, 31);
      if (!reached) continue;
      const int found = __ffs(int(reached)) - 1, mine = __shfl_sync(~0u, tiles_m, found);
      const int local = t - (__shfl_sync(~0u, upto, found) - mine) * tiles_n;
      expert = e0 + found, row_end = __shfl_sync(~0u, end, found);
      m0 = __shfl_sync(~0u, begin, found) + local % mine * BM, n0 = local / mine * BN;
      return;
    }
  }
};

// h of all rows. x (R,C) gathered, w (E,N,C), h (R,N); N = 2F.
__global__ void __launch_bounds__(threads, 1)
    up_product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, bf16* h,
               const int32_t* offsets, int E, int N, int C) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared), full = ring + stages * stage_bytes, empty = full + stages * 8;
  const Tile tile(blockIdx.x, offsets, E, N / BN);
  if (tile.expert < 0) return;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) init_barrier(full + s * 8, 1), init_barrier(empty + s * 8, 8);
    fence_barriers();
  }
  __syncthreads();

  if (threadIdx.x < warpgroup) {
    give_registers<40>();
    if (threadIdx.x > 0) return;
    Position at;
    for (int k = 0; k < C; k += BK, at.advance()) {
      const uint32_t to = ring + at.stage * stage_bytes, arrived = full + at.stage * 8;
      wait(empty + at.stage * 8, at.parity ^ 1);
      arrive_expecting(arrived, stage_bytes);
      load_box(to, &x, k, tile.m0, 0, arrived);
      load_box(to + a_bytes, &w, k, tile.n0, tile.expert, arrived);
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
    for (int step = 0; step < C / BK; ++step, at.advance()) {
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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.m0 + first_row + warp * 16 + half * 8 + lane / 4;
      if (row >= tile.row_end) continue;
      bf16* to = h + int64_t(row) * N + tile.n0 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < BN / 8; ++j)
        *reinterpret_cast<uint32_t*>(to + j * 8) = pack_bf16(acc[j][half * 2], acc[j][half * 2 + 1]);
    }
  }
#endif
}

inline void up(Gpu<bf16>& dev, const ExpertBuffers& b) {
  const ExpertShape& s = b.s;
  const int N = int(2 * s.F), C = int(s.C);
  if (C % BK || N % BN) fail("grouped_gemm 03_grouped: C must be a multiple of 64 and 2F of 256, not ", C, " and ", N);
  dispatch_gather(dev, b.x_rows, b.x, b.offsets, b.row_slot, s.R / s.K, s.K, s.E, s.C);
  const TensorMap x = tensor_map(b.x_rows, 1, s.R, C, s.R * C, BM),
                  w = tensor_map(b.w13, s.E, N, C, int64_t(N) * C, BN);
  const int64_t most_row_tiles = s.R / BM + s.E;  // each expert's last may be all but empty
  launch(dev, up_product, dim3(unsigned(most_row_tiles * (N / BN))), dim3(threads), shared_size, x, w, b.h, b.offsets,
         int(s.E), N, C);
  swiglu_forward(dev, b.a, b.h, s.R, s.F);
}

}  // namespace grouped_rows
