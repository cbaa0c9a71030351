// Rung 3: the tensor cores, as Ampere has them. mma.sync multiplies 16 x 16 by 16 x 8 from the registers of a warp;
// ldmatrix brings the operands there from shared memory; cp.async copies the next step's tiles into the other half of
// a double buffer while this step is multiplied.
//
// A block owns 128 x 128 of C and has 8 warps, each with 64 x 32 of it (64 accumulators a thread). A step is 64 of the
// reduction: rows of 128 bytes.
//
// Predicted: this runs on Hopper as it does on Ampere, and that is the limit: mma.sync is issued warp by warp, waits
// for its operands in registers, and reaches at most about two thirds of what Hopper's tensor cores can do.
// Of shared memory, a warp reads (64 + 32) x 16 operands for 64 x 32 x 16 multiply-adds: 3 KB for 16 clocks of its
// multiprocessor's tensor cores at their full rate, 192 bytes a clock where shared memory delivers 128. So even a
// perfect pipeline would stop at two thirds. Expect half of the library's speed, or a little more.
//
// Eight rows' chunks of the same column are read at a time by ldmatrix. Rows are 128 bytes, all 32 banks, so that
// unswizzled all eight would lie in the same four banks. Chunk c of row r is stored at c ^ (r % 8) instead: the eight
// chunks of a column lie in eight different places.
//
// Sizes: M and N multiples of 128, K of 64.
#pragma once
#include "llmc/cuda_mma.cuh"

namespace tensor_cores {

constexpr int BM = 128, BN = 128, BK = 64, threads = 256;
constexpr int a_bytes = BM * BK * 2, stage_bytes = a_bytes + BN * BK * 2, shared_bytes = 2 * stage_bytes;

__device__ __forceinline__ uint32_t place(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// All threads begin to copy 128 rows of 64, `K` elements apart.
__device__ __forceinline__ void copy_tile(uint32_t to, const bf16* from, int K) {
  const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
#pragma unroll
  for (int r = row; r < BM; r += threads / 8) copy_async(to + place(r, chunk), from + int64_t(r) * K + chunk * 8);
}

__global__ void __launch_bounds__(threads, 2) dense_gemm(bf16* c, const bf16* a, const bf16* b, int N, int K) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t m0 = int64_t(blockIdx.y) * BM, n0 = int64_t(blockIdx.x) * BN;
  const int warp_m = warp / 4 * 64, warp_n = warp % 4 * 32;
  a += m0 * K, b += n0 * K;

  auto copy_step = [&](int step) {
    const uint32_t to = ring + step % 2 * stage_bytes;
    copy_tile(to, a + step * BK, K), copy_tile(to + a_bytes, b + step * BK, K);
    commit_copies();
  };
  float acc[4][4][4] = {};  // 4 strips of 16 rows, 4 blocks of 8 columns
  const int steps = K / BK;
  copy_step(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      copy_step(step + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();  // everybody's copies of this step have landed
    const uint32_t a_tile = ring + step % 2 * stage_bytes, b_tile = a_tile + a_bytes;
#pragma unroll
    for (int k = 0; k < BK / 16; ++k) {
      uint32_t a_part[4][4], b_part[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)  // lanes 0-15: the rows of columns 0-7, lanes 16-31: of columns 8-15
        load_matrices<false>(a_part[i], a_tile + place(warp_m + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 2; ++j)  // a row of B is a column of the product: two blocks of 8, both halves of k
        load_matrices<false>(b_part[j],
                             b_tile + place(warp_n + j * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          multiply_add(acc[i][j], a_part[i], b_part[j / 2][j % 2 * 2], b_part[j / 2][j % 2 * 2 + 1]);
    }
    __syncthreads();  // before this half of the buffer is overwritten
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bf16* to = c + (m0 + warp_m + i * 16 + lane / 4) * N + n0 + warp_n + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *reinterpret_cast<uint32_t*>(to + j * 8) = pack_bf16(acc[i][j][0], acc[i][j][1]);
      *reinterpret_cast<uint32_t*>(to + 8 * int64_t(N) + j * 8) = pack_bf16(acc[i][j][2], acc[i][j][3]);
    }
  }
}

// c (M,N) = a (M,K) b (N,K)^T
inline void product(GpuBase& dev, bf16* c, const bf16* a, const bf16* b, int M, int N, int K) {
  if (M % BM || N % BN || K % BK)
    fail("dense_gemm 03_tensor_cores: M and N must be multiples of 128 and K of 64, not ", M, ", ", N, ", ", K);
  launch(dev, dense_gemm, dim3(unsigned(N / BN), unsigned(M / BM)), dim3(threads), shared_bytes, c, a, b, N, K);
}

}  // namespace tensor_cores
