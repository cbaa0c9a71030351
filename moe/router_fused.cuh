// The router in one kernel a pass, for bf16, few experts (router.cu: most_forward, most_backward), and rows of whole
// 16-byte chunks. A block owns 64 tokens: small enough that several blocks share a multiprocessor, one loading while
// another chooses.
//
//   1. logits = x Wg^T by mma.sync: 64 columns of the tokens' rows and of Wg at a time through a ring in shared memory,
//      so that x is read once and enough of it is always under way to keep DRAM busy. Forward, the logits are laid into
//      the ring's memory and the tokens finished there (router_token.cuh); they never leave the multiprocessor.
//   2. Backward, each row of logits is replaced by its gradient ds, as two bf16 numbers an expert. Every warp takes 16
//      rows of it into registers as operands, and Wg comes through the ring once more: dx = ds Wg is written at once.
//      All three parts of ds also go to global memory, for the product that makes dwg.
//
// Two of the three parts are enough for dx: they hold 16 bits of ds, and dx is rounded to 8. dwg may be kept in fp32.
//
// E experts are padded with rows of zeros to a multiple of 16. Columns past C and tokens past the last are zeros too.
#pragma once
#include "llmc/cuda_mma.cuh"
#include "moe/router_token.cuh"

namespace router_fused {

using namespace router_token;

template <int LANES_, int V_>
struct Layout {
  static constexpr int LANES = LANES_, V = V_;
  static constexpr int E = LANES * V < 16 ? 16 : LANES * V;  // padded
  static constexpr int tokens = 64, warps = tokens / 16, threads = warps * 32;
  // The ring of phase 1: a stage is a tile of x, then one of Wg.
  static constexpr int stages = E >= 64 ? 3 : 4, x_bytes = tokens * 128, weight_bytes = E * 128;
  static constexpr int bytes = stages * (x_bytes + weight_bytes);
  static constexpr int blocks = E == 16 ? 5 : E <= 64 ? 4 : 3;  // on a multiprocessor, at least
  // Logits (tokens, row), in the ring's memory: 8 floats of padding put the rows that a warp writes into other banks.
  static constexpr int row = E + 8, row_bytes = row * 4, logits_bytes = tokens * row_bytes;
  static_assert(logits_bytes + threads * 8 <= bytes);  // and the statistics of choose_tokens()
  // Phase 2, in the same memory: a slot a warp to turn its rows of dx into whole lines, and a ring of tiles of Wg.
  static constexpr int slot_bytes = 16 * 128, dx_stages = 4;
  static_assert(warps * slot_bytes + dx_stages * weight_bytes <= bytes);
  static_assert(tokens % (threads / LANES) == 0);
};

using Tile = Swizzle<64>;  // rows of 128 bytes

// Begins to copy 64 columns from `column` on of `rows` rows of C; rows from `valid` on and columns from C on are zeros.
template <int rows, int threads>
__device__ __forceinline__ void load_tile(uint32_t tile, const bf16* from, int valid, int column, int C) {
  static_assert(rows * 8 % threads == 0);
  const int first = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const bool inside = column + chunk * 8 < C;
#pragma unroll
  for (int i = 0; i < rows * 8 / threads; ++i) {
    const int row = first + i * (threads / 8);
    const bool read = inside && row < valid;
    copy_async(tile + Tile::offset(row, chunk), read ? from + (row * C + column + chunk * 8) : from, read);
  }
}

// Phase 1: the logits of `tokens` rows of x, in the block's memory when all threads have returned.
template <class L>
__device__ __forceinline__ void compute_logits(unsigned char* memory, const bf16* x, const bf16* wg, int tokens, int E,
                                               int C) {
  const uint32_t ring = shared_address(memory);
  const int lane = threadIdx.x % 32, first_token = threadIdx.x / 32 * 16;  // a warp computes 16 tokens of all experts
  const int steps = (C + 63) / 64;
  auto load = [&](int step) {
    const uint32_t stage = ring + step % L::stages * (L::x_bytes + L::weight_bytes);
    load_tile<L::tokens, L::threads>(stage, x, tokens, step * 64, C);
    load_tile<L::E, L::threads>(stage + L::x_bytes, wg, E, step * 64, C);
  };
#pragma unroll
  for (int step = 0; step < L::stages - 1; ++step) {
    if (step < steps) load(step);
    commit_copies();
  }
  float acc[L::E / 8][4] = {};
  // Where the lane points in a stage: of A down first, of B (rows are experts) across first. An exclusive or with k << 5
  // leads from there to chunks 2k and 2k + 1, because tiles begin at multiples of 128.
  const uint32_t a_place = Tile::offset(first_token + lane % 16, lane / 16),
                 b_place = L::x_bytes + Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  for (int step = 0; step < steps; ++step) {
    wait_copies<L::stages - 2>();
    __syncthreads();  // this stage is there, and nobody reads the one before it any more
    if (step + L::stages - 1 < steps) load(step + L::stages - 1);
    commit_copies();
    const uint32_t stage = ring + step % L::stages * (L::x_bytes + L::weight_bytes);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4];
      load_matrices<false>(a, (stage + a_place) ^ (k << 5));
#pragma unroll
      for (int j = 0; j < L::E / 16; ++j) {
        uint32_t b[4];
        load_matrices<false>(b, ((stage + b_place) ^ (k << 5)) + j * 16 * 128);
        multiply_add(acc[2 * j], a, b[0], b[1]);
        multiply_add(acc[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
  __syncthreads();  // the ring becomes the logits
  float* logits = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int j = 0; j < L::E / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_token + half * 8 + lane / 4, column = j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(logits + row * L::row + column) = {acc[j][2 * half], acc[j][2 * half + 1]};
    }
  __syncthreads();
}

// grid (G, blocks of a group of statistics), here and below
template <class L>
__global__ void __launch_bounds__(L::threads, L::blocks) forward(Forward f, const bf16* x, const bf16* wg) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int C = int(f.shape.C);
  const int64_t per_group = f.shape.N / f.shape.G, first = int64_t(blockIdx.y) * L::tokens;
  const int64_t n0 = int64_t(blockIdx.x) * per_group + first;
  const int tokens = int(min(int64_t(L::tokens), per_group - first));
  compute_logits<L>(memory, x + n0 * C, wg, tokens, int(f.shape.E), C);
  float* probs = reinterpret_cast<float*>(memory + L::logits_bytes);
  choose_tokens<L::LANES, L::V, L::threads>(f, reinterpret_cast<const float*>(memory), L::row, n0, tokens,
                                            int64_t(blockIdx.x) * gridDim.y + blockIdx.y, probs,
                                            reinterpret_cast<int32_t*>(probs + L::threads));
}

// Each row of logits becomes two rows of E bf16, one after the other: ds, and what that rounding left of it.
template <class L>
__device__ __forceinline__ void replace_by_gradient(unsigned char* memory, bf16* parts, int width, const Backward& b,
                                                    int64_t n0, int tokens) {
  constexpr int groups = L::threads / L::LANES, slots = L::E / L::LANES;
  using Lanes = Group<L::LANES>;
  const int E = int(b.shape.E);
  const LogitGradient<L::LANES, L::V> gradient(b, blockIdx.x);
  auto token = [&](int t) { return n0 + (t < tokens ? t : 0); };
  int t = threadIdx.x / L::LANES;
  Choice<L::LANES> next(b, token(t));
  for (; t < L::tokens; t += groups) {
    const Choice<L::LANES> choice = next;
    if (t + groups < L::tokens) next = Choice<L::LANES>(b, token(t + groups));  // under way while this one is computed
    unsigned char* row = memory + t * L::row_bytes;
    float ds[L::V];
    gradient(ds, reinterpret_cast<const float*>(row), choice);
    __syncwarp();  // the row has been read
    bf16* pair = reinterpret_cast<bf16*>(row);
#pragma unroll
    for (int i = 0; i < slots; ++i) {
      const int e = Lanes::index(i);
      bf16 part[3];
      split(part, i < L::V && e < E ? ds[i < L::V ? i : 0] : 0);
      pair[e] = part[0], pair[L::E + e] = part[1];
    }
    if (t < tokens) store_parts<L::LANES, L::V>(parts + (n0 + t) * width, ds, E, width);
  }
  __syncthreads();
}

template <class L>
__global__ void __launch_bounds__(L::threads, L::blocks)
    backward(bf16* dx, bf16* parts, int width, Backward b, const bf16* x, const bf16* wg) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int E = int(b.shape.E), C = int(b.shape.C);
  const int64_t per_group = b.shape.N / b.shape.G, first = int64_t(blockIdx.y) * L::tokens;
  const int64_t n0 = int64_t(blockIdx.x) * per_group + first;
  const int tokens = int(min(int64_t(L::tokens), per_group - first));
  compute_logits<L>(memory, x + n0 * C, wg, tokens, E, C);
  replace_by_gradient<L>(memory, parts, width, b, n0, tokens);

  // Phase 2. The warp's 16 rows of ds, as operands: 16 experts and a part each.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t shared = shared_address(memory);
  uint32_t a[L::E / 16][2][4];
#pragma unroll
  for (int k = 0; k < L::E / 16; ++k)
#pragma unroll
    for (int part = 0; part < 2; ++part)
      load_matrices<false>(
          a[k][part], shared + (warp * 16 + lane % 16) * L::row_bytes + part * L::E * 2 + (2 * k + lane / 16) * 16);
  __syncthreads();  // the ring again

  unsigned char* slot = memory + warp * L::slot_bytes;
  const uint32_t ring = shared + L::warps * L::slot_bytes;
  const int chunks = (C + 63) / 64;
  auto load = [&](int chunk) {
    load_tile<L::E, L::threads>(ring + chunk % L::dx_stages * L::weight_bytes, wg, E, chunk * 64, C);
  };
#pragma unroll
  for (int chunk = 0; chunk < L::dx_stages - 1; ++chunk) {
    if (chunk < chunks) load(chunk);
    commit_copies();
  }
  // The lane stores 16 bytes of every fourth row, from this one on; rows and columns that are left from there.
  bf16* out = dx + (n0 + warp * 16 + lane / 8) * C + lane % 8 * 8;
  const int rows = tokens - warp * 16 - lane / 8, columns = C - lane % 8 * 8;
  const uint32_t place = Tile::offset(lane % 16, lane / 16);  // of B (columns are experts) down first
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies<L::dx_stages - 2>();
    __syncthreads();
    if (chunk + L::dx_stages - 1 < chunks) load(chunk + L::dx_stages - 1);
    commit_copies();
    const uint32_t tile = ring + chunk % L::dx_stages * L::weight_bytes;
    float acc[8][4] = {};
#pragma unroll
    for (int k = 0; k < L::E / 16; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t w[4];
        load_matrices<true>(w, ((tile + place) ^ (j << 5)) + k * 16 * 128);
#pragma unroll
        for (int part = 1; part >= 0; --part) {
          multiply_add(acc[2 * j], a[k][part], w[0], w[1]);
          multiply_add(acc[2 * j + 1], a[k][part], w[2], w[3]);
        }
      }
    __syncwarp();  // the slot has been read
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(slot + Tile::offset(half * 8 + lane / 4, j) + lane % 4 * 4) =
            pack_bf16(acc[j][2 * half], acc[j][2 * half + 1]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i * 4 < rows && chunk * 64 < columns)
        *reinterpret_cast<uint4*>(out + (i * 4 * C + chunk * 64)) =
            *reinterpret_cast<const uint4*>(slot + Tile::offset(i * 4 + lane / 8, lane % 8));
  }
}

}  // namespace router_fused
