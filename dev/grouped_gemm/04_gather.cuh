// Rung 4: rows are gathered while they are loaded. TMA knows boxes, not lists of rows; so the rows of x are
// copied by the producer's threads, 16 bytes at a time with cp.async, to the places in the swizzled tile where TMA
// would have put them. The weights still come in boxes. Both arrive at the stage's `full` barrier: TMA
// by bytes, each of the 128 threads once its copies so far have landed (cp.async.mbarrier.arrive). The consumers
// notice no difference.
//
// A row beyond the expert's last is not read at all, but filled with zeros.
//
// Predicted: the pass that gathers is gone, and with it its 2 R C bytes written and read; what is left is to read x
// itself, K times, mostly from the L2 cache. For fine-128x8 that is 0.4 ms saved of about 1. The price: 8 copies a
// thread and step, 1024 instructions instead of one for 16 KB, issued by warps that had nothing to do.
//
// Sizes: C a multiple of 64, 2F of 256.
#pragma once
#include "dev/experts/buffers.h"
#include "llmc/swiglu.h"
#include "llmc/hopper.cuh"

namespace gathered {

using namespace hopper;

constexpr int BM = 128, BN = 256, BK = 64, stages = 4, threads = 3 * warpgroup;
constexpr int a_bytes = BM * BK * 2, stage_bytes = a_bytes + BN * BK * 2;
constexpr int copies = BM * 8 / warpgroup;  // of 16 bytes, of a producer thread, a step
constexpr uint32_t outside = ~0u;
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

// h of all rows. x (tokens,C), w (E,N,C), h (R,N); N = 2F.
__global__ void __launch_bounds__(threads, 1)
    up_product(const bf16* x, const __grid_constant__ TensorMap w, bf16* h, const int32_t* offsets,
               const int32_t* row_slot, int slots, int E, int N, int C) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared), full = ring + stages * stage_bytes, empty = full + stages * 8;
  const Tile tile(blockIdx.x, offsets, E, N / BN);
  if (tile.expert < 0) return;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) init_barrier(full + s * 8, 1 + warpgroup), init_barrier(empty + s * 8, 8);
    fence_barriers();
  }
  __syncthreads();

  if (threadIdx.x < warpgroup) {
    give_registers<40>();
    // This thread copies chunk threadIdx.x % 8 of every 16th row. Where the rows are is found once a tile.
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const uint32_t place = row * 128 + ((chunk ^ (row & 7)) << 4);
    uint32_t from[copies];  // in chunks of 8 elements; `outside` beyond the expert's rows
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      const int r = tile.m0 + row + i * 16;
      from[i] = r < tile.row_end ? uint32_t(row_slot[r] / slots) * (C / 8) + chunk : outside;
    }
    Position at;
    for (int k = 0; k < C; k += BK, at.advance()) {
      const uint32_t to = ring + at.stage * stage_bytes, arrived = full + at.stage * 8;
      wait(empty + at.stage * 8, at.parity ^ 1);
      if (threadIdx.x == 0) {
        arrive_expecting(arrived, stage_bytes - a_bytes);
        load_box(to + a_bytes, &w, k, tile.n0, tile.expert, arrived);
      }
#pragma unroll
      for (int i = 0; i < copies; ++i) {
        const bool inside = from[i] != outside;
        copy_async(to + place + i * 16 * 128, x + (inside ? int64_t(from[i]) * 8 + k : 0), inside);
      }
      arrive_after_copies(arrived);
    }
    wait_copies();  // nobody leaves before the copies are done
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
      fence_async_proxy();  // cp.async wrote as threads do; wgmma reads as TMA does
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
  if (C % BK || N % BN) fail("grouped_gemm 04_gather: C must be a multiple of 64 and 2F of 256, not ", C, " and ", N);
  const TensorMap w = tensor_map(b.w13, s.E, N, C, int64_t(N) * C, BN);
  const int64_t most_row_tiles = s.R / BM + s.E;  // each expert's last may be all but empty
  launch(dev, up_product, dim3(unsigned(most_row_tiles * (N / BN))), dim3(threads), shared_size, b.x, w, b.h, b.offsets,
         b.row_slot, int(s.K), int(s.E), N, C);
  swiglu_forward(dev, b.a, b.h, s.R, s.F);
}

}  // namespace gathered
