// Rung 2: three passes, the middle one a dense product an expert. Gather the rows of x that the experts want into a
// matrix (R,C), expert after expert; multiply each expert's rows by its weight, a launch an expert; apply the
// activation. The product is the sixth rung of dev/dense_gemm: 128 x 256 tiles, two consumers, a ring of four stages,
// TMA.
//
// An expert's last tile may reach beyond its rows. Loading them does no harm: they are the next expert's, or zeros
// behind the last, and a row of A only ever reaches its own row of C. Storing would: stores are guarded.
//
// Predicted: three things are wrong with it.
//   The host must know the number of rows of every expert, which the router has only just found out on the device: in
//   training that is a copy to the host and a wait in every layer. (Not in the times: here the host knows already.)
//   Launches follow one another, and each has a last round that does not fill the chip. Of 128 experts with 1536 rows
//   and 2F = 512 (fine-128x8), each is 24 tiles: 24 of 132 multiprocessors work.
//   Memory: the gathered matrix is written and read, and so is h for the activation. For fine-128x8 that is 1.2 GB for
//   the rows and 0.2 GB to read h again: 0.5 ms of memory traffic beside 0.4 ms of multiplication.
//
// Sizes: C a multiple of 64, 2F of 256.
#pragma once
#include "dev/experts/buffers.h"
#include "llmc/swiglu.h"
#include "llmc/hopper.cuh"

namespace launch_an_expert {

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

// h of rows [begin, end), which belong to `expert`. x (R,C) gathered, w (E,N,C), h (R,N); N = 2F.
__global__ void __launch_bounds__(threads, 1)
    up_product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, bf16* h, int begin, int end,
               int expert, int N, int C) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared), full = ring + stages * stage_bytes, empty = full + stages * 8;
  const int m0 = begin + blockIdx.x * BM, n0 = blockIdx.y * BN;
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
      load_box(to, &x, k, m0, 0, arrived);
      load_box(to + a_bytes, &w, k, n0, expert, arrived);
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
      const int row = m0 + first_row + warp * 16 + half * 8 + lane / 4;
      if (row >= end) continue;
      bf16* to = h + int64_t(row) * N + n0 + lane % 4 * 2;
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
  if (C % BK || N % BN)
    fail("grouped_gemm 02_launch_an_expert: C must be a multiple of 64 and 2F of 256, not ", C, " and ", N);
  dispatch_gather(dev, b.x_rows, b.x, b.offsets, b.row_slot, s.R / s.K, s.K, s.E, s.C);
  const TensorMap x = tensor_map(b.x_rows, 1, s.R, C, s.R * C, BM),
                  w = tensor_map(b.w13, s.E, N, C, int64_t(N) * C, BN);
  for (int e = 0; e < s.E; ++e) {
    const int begin = b.routing.offsets[e], end = b.routing.offsets[e + 1];
    // Tiles of neighbouring rows are neighbours in the grid, too: those that run at once share tiles of the weight.
    launch(dev, up_product, dim3(unsigned(ceil_div(end - begin, BM)), unsigned(N / BN)), dim3(threads), shared_size, x,
           w, b.h, begin, end, e, N, C);
  }
  swiglu_forward(dev, b.a, b.h, s.R, s.F);
}

}  // namespace launch_an_expert
