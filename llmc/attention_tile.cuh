// Pieces of the attention kernels on tensor cores: tiles of bf16 in shared memory, how they are filled, and how warps
// read them as operands of mma.m16n8k16.
//
// A product's C, two neighbours of it rounded to bf16, is an A (cuda_mma.cuh says which lane holds what): probabilities
// go from one product into the next without leaving the registers.
#pragma once
#include <utility>

#include "llmc/attention.h"
#include "llmc/cuda_mma.cuh"

namespace attention_tile {

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

// 2^x of the special function unit; 0 for minus infinity.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same value, of which the compiler knows nothing: it cannot compute in advance, outside a loop, what depends on
// it. Left to itself it keeps dozens of addresses in registers that the accumulators need.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// A tile of rows of `width` bf16.
template <int width>
struct Tile : Swizzle<width> {
  using Swizzle<width>::row_bytes, Swizzle<width>::offset;
  static constexpr int chunks = width / 8;  // of a row

  // `threads` threads begin to copy `rows` rows, `stride` elements apart; rows from `valid` (at least 1) on are zeros.
  template <int rows, int threads>
  static __device__ __forceinline__ void load(uint32_t tile, const bf16* from, int stride, int valid, int thread) {
    if constexpr (rows * chunks < threads) {
      if (thread < rows * chunks) load<rows, rows * chunks>(tile, from, stride, valid, thread);
      return;
    }
    static_assert(rows * chunks < threads || rows * chunks % threads == 0);
    stride = opaque(stride), thread = opaque(thread);
    constexpr int step = threads / chunks;                   // rows that all threads copy at a time
    if constexpr (threads % chunks == 0 && step % 8 == 0) {  // flips repeat: a thread's chunks are equally far apart
      const int row = thread / chunks, chunk = thread % chunks;
      const bf16* p = from + row * stride + chunk * 8;
      tile += offset(row, chunk);
#pragma unroll
      for (int i = 0; i < rows / step; ++i) {
        bool inside = row + i * step < valid;
        copy_async(tile + i * step * row_bytes, inside ? p + i * step * stride : from, inside);
      }
    } else {
#pragma unroll
      for (int i = 0; i < rows * chunks / threads; ++i) {
        const int row = (thread + i * threads) / chunks, chunk = (thread + i * threads) % chunks;
        bool inside = row < valid;
        copy_async(tile + offset(row, chunk), inside ? from + row * stride + chunk * 8 : from, inside);
      }
    }
  }
};

// ---- operands ----

// Where a lane points for the 16 x 16 block at (row, chunk) of a tile. The four 8 x 8 blocks are ordered down first
// (down = true) or across first:
//   A of a tile that holds rows of A            down,   load_matrices<false>
//   A of a tile that holds columns of A         across, load_matrices<true>
//   B twice, of a tile that holds columns of B  across, load_matrices<false>: r[0], r[1] are B of tile rows 0-7; r[2], r[3] 8-15
//   B twice, of a tile that holds rows of B     down,   load_matrices<true>: likewise tile columns 0-7 and 8-15
template <int width, bool down>
struct LaneView {
  uint32_t base, flip;
  __device__ __forceinline__ LaneView(uint32_t tile, int lane) {
    int row = down ? lane % 16 : lane % 8 + lane / 16 * 8, right = down ? lane / 16 : lane / 8 % 2;
    base = tile + row * Tile<width>::row_bytes;
    flip = opaque((right ^ Tile<width>::flip(row)) << 4);
  }
  // row is a multiple of 8 (flips repeat), chunk is even (so `right` may be part of the flip).
  __device__ __forceinline__ uint32_t at(int row, int chunk) const {
    return base + row * Tile<width>::row_bytes + (uint32_t(chunk << 4) ^ flip);
  }
};

// Two neighbouring C (16 x 16 values), rounded, as an A.
__device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_bf16(left[0], left[1]);
  a[1] = pack_bf16(left[2], left[3]);
  a[2] = pack_bf16(right[0], right[1]);
  a[3] = pack_bf16(right[2], right[3]);
}

// Writes this warp's 16 * m_blocks rows of C as bf16, 16 bytes a lane: through rows `row0` .. of a tile in shared
// memory that no other warp uses any more. Rows from `valid` on are not written.
template <int width, int m_blocks>
__device__ __forceinline__ void store_rows(bf16* to, int64_t stride, int valid,
                                           const float (&c)[m_blocks][width / 8][4], unsigned char* tile, int row0,
                                           int lane) {
  using T = Tile<width>;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < m_blocks; ++m)
#pragma unroll
    for (int n = 0; n < width / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(tile + T::offset(row0 + m * 16 + half * 8 + lane / 4, n) + lane % 4 * 4) =
            pack_bf16(c[m][n][2 * half], c[m][n][2 * half + 1]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < m_blocks * 16 * T::chunks / 32; ++i) {
    int row = (i * 32 + lane) / T::chunks, chunk = (i * 32 + lane) % T::chunks;
    if (row < valid)
      *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + T::offset(row0 + row, chunk));
  }
}

// Sizes as the kernels take them.
struct Sizes {
  int B, T, NH, NKV;
  int64_t qk_stride, qkv_stride, o_stride;
  Sizes(int64_t B, int64_t T, HeadShape heads)
      : B(int(B)),
        T(int(T)),
        NH(int(heads.n_head)),
        NKV(int(heads.n_kv_head)),
        qk_stride(heads.qk_width()),
        qkv_stride(heads.qkv_width()),
        o_stride(heads.q_width()) {}
};

// Query heads whose keys and values take half of a 50 MB L2 cache: they are worked on together.
inline int64_t head_section(int64_t B, int64_t T, HeadShape heads) {
  int64_t group = heads.n_head / heads.n_kv_head, kv_bytes = std::max<int64_t>(1, T * heads.head_dim * 4);
  return std::max<int64_t>(1, std::min((int64_t(25) << 20) / kv_bytes * group, B * heads.n_head));
}

// Calls f(std::integral_constant<int, head_dim>).
template <class F>
void with_head_dim(int64_t head_dim, F f) {
  switch (head_dim) {
    case 16:
      return f(std::integral_constant<int, 16>());
    case 32:
      return f(std::integral_constant<int, 32>());
    case 64:
      return f(std::integral_constant<int, 64>());
    case 96:
      return f(std::integral_constant<int, 96>());
    case 128:
      return f(std::integral_constant<int, 128>());
    default:
      fail("attention: head size ", head_dim, " is not supported in bf16 on the GPU; it can be 16, 32, 64, 96 or 128");
  }
}

}  // namespace attention_tile
