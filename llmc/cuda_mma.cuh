// The instructions of tensor cores since Ampere: copies into shared memory that run beside the computation, loads of
// 8x8 matrices, and the product of a warp; and how tiles lie in shared memory for them. (Hopper's own are in
// llmc/hopper.cuh.)
#pragma once
#include "llmc/cuda_common.cuh"

// Address of shared memory as instructions want it.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- cp.async ----

// 16 bytes from global to shared memory. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// The same, or 16 zero bytes without looking at the source.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest `pending` groups of this thread have landed. Other threads see them after a barrier.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
// Until all copies that this thread began have landed, in groups or not.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- tiles in shared memory ----

// Rows of `width` bf16, stored without gaps, so that 16-byte chunks of the same column would lie in the same banks;
// instead chunk c of row r is stored as chunk c ^ flip(r), and the eight chunks that ldmatrix reads at a time (one
// column, eight rows) lie in eight different places of the 128-byte line.
template <int width>
struct Swizzle {
  static_assert(width % 16 == 0);
  static constexpr int row_bytes = 2 * width;
  // Chunks that a flip may permute: the power of two in the chunks of a row, at most the eight of a line.
  static constexpr int period = width % 64 == 0 ? 8 : width % 32 == 0 ? 4 : 2;
  static __device__ __forceinline__ int flip(int row) { return row / (8 / period) % period; }
  // Where a chunk begins, in bytes from the beginning of the tile.
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return uint32_t(row * row_bytes + ((chunk ^ flip(row)) << 4));
  }
};

// ---- ldmatrix ----

// Four 8x8 matrices; lane l gives the address of row l%8 of matrix l/8 and receives elements (l/4, 2*(l%4) + {0,1}) of
// each matrix, or of its transpose.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// ---- mma ----

// c (16x8, fp32) += a (16x16) * b (16x8). With g = lane / 4 and t = lane % 4 a lane holds
//   A  a[0] (row g, columns 2t, 2t+1), a[1] (row g+8, same), a[2] (row g, columns 2t+8, 2t+9), a[3] (row g+8, same)
//   B  b0 (rows 2t, 2t+1 of column g), b1 (rows 2t+8, 2t+9 of column g)
//   C  c[0], c[1] (row g, columns 2t, 2t+1), c[2], c[3] (row g+8, same)
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
