// Pieces of the attention kernels on tensor cores: tiles of bf16 in shared memory, how they are filled, and how warps
// read them as operands of mma.m16n8k16.
//
// A warp multiplies a 16 x 16 block A by a 16 x 8 block B into a 16 x 8 block C of floats. With g = lane / 4 and
// t = lane % 4, a lane holds
//   A  a[0] (row g, columns 2t, 2t+1), a[1] (row g+8, same), a[2] (row g, columns 2t+8, 2t+9), a[3] (row g+8, same)
//   B  b[0] (rows 2t, 2t+1 of column g), b[1] (rows 2t+8, 2t+9 of column g)
//   C  c[0], c[1] (row g, columns 2t, 2t+1), c[2], c[3] (row g+8, same)
// C of two neighbouring products, rounded to bf16, is therefore an A: probabilities go from one product into the next
// without leaving the registers.
#pragma once
#include <utility>

#include "llmc/attention.h"
#include "llmc/cuda_common.cuh"

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

// ---- copies from global to shared memory that run while the warps compute ----

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes; zeros if not `inside`, and then `from` is not read.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
// Until the copies that this thread began have landed. Other threads see them after a barrier.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A tile of rows of `width` bf16. Rows are stored without gaps, so that 16-byte chunks of the same column would lie in
// the same banks; instead chunk c of row r is stored as chunk c ^ flip(r), and the eight chunks that ldmatrix reads at
// a time (one column, eight rows) lie in eight different places of the 128-byte line.
template <int width>
struct Tile {
  static_assert(width % 16 == 0);
  static constexpr int chunks = width / 8, row_bytes = 2 * width;
  // Chunks that a flip may permute: the power of two in `chunks`, at most the eight of a line.
  static constexpr int period = width % 64 == 0 ? 8 : width % 32 == 0 ? 4 : 2;
  static __device__ __forceinline__ int flip(int row) { return row / (8 / period) % period; }
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return uint32_t(row * row_bytes + ((chunk ^ flip(row)) << 4));
  }

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

// Four 8 x 8 blocks; lanes 8i .. 8i+7 point to the rows of block i, and every lane receives its two elements of each.
__device__ __forceinline__ void load_blocks(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same of the transposed blocks.
__device__ __forceinline__ void load_blocks_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// c += a b
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where a lane points for the 16 x 16 block at (row, chunk) of a tile. The four 8 x 8 blocks are ordered down first
// (down = true) or across first:
//   A of a tile that holds rows of A            down,   load_blocks
//   A of a tile that holds columns of A         across, load_blocks_transposed
//   B twice, of a tile that holds columns of B  across, load_blocks: r[0], r[1] are B of tile rows 0-7; r[2], r[3] 8-15
//   B twice, of a tile that holds rows of B     down,   load_blocks_transposed: likewise tile columns 0-7 and 8-15
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
