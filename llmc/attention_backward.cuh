// What the backward kernels of attention on tensor cores share (attention_backward.cu, attention_hopper_backward.cu):
// their scratch, sums over rows, and the turns in which blocks add their shares of dQ.
#pragma once
#include "llmc/attention_tile.cuh"

namespace attention_tile {

constexpr int row_padding = 64;  // rows of lse and D are padded to whole tiles of queries

// What is laid out in scratch.
struct BackwardScratch {
  int *ticket, *turns;          // turns (B*NH, tiles of queries): shares of dQ that are in
  float *lse2, *D;              // (B*NH, padded_T): lse in units of log2, D; plus infinity and 0 in the padding
  float* dq;                    // (B*NH, tiles of queries) blocks of partial dQ, each as its threads hold it
  size_t counter_bytes, bytes;  // of ticket and turns; of everything
  BackwardScratch(void* scratch, int64_t B, int64_t T, HeadShape heads, int64_t queries) {
    int64_t padded_T = ceil_div(T, row_padding) * row_padding, tiles = padded_T / queries, BH = B * heads.n_head;
    bytes = 0;
    auto take = [&](auto*& part, int64_t n) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(reinterpret_cast<uintptr_t>(scratch) + bytes);
      bytes += size_t(ceil_div(n * int64_t(sizeof(*part)), 256) * 256);
    };
    take(ticket, 1);
    take(turns, BH * tiles);
    counter_bytes = bytes;
    take(lse2, BH * padded_T);
    take(D, BH * padded_T);
    take(dq, BH * padded_T * heads.head_dim);
  }
};

// Lanes that share a row of a head, 16 bytes each at a time.
constexpr int rowsum_lanes(int head_dim) { return head_dim % 64 == 0 ? 8 : head_dim % 32 == 0 ? 4 : 2; }

// lse2 and D. Rows past the end get lse = infinity, which makes their P, and with D = 0 their dS, vanish.
template <int HD>
__global__ void attention_rowsum_kernel(float* lse2, float* D, const bf16* dout, const bf16* o, const float* lse,
                                        Sizes size, int padded_T) {
  constexpr int lanes = rowsum_lanes(HD);
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;  // (B, padded_T, NH)
  const int part = threadIdx.x % lanes, h = int(row % size.NH), t = int(row / size.NH % padded_T);
  const int64_t b = row / size.NH / padded_T;
  if (b >= size.B) return;
  const bool inside = t < size.T;
  const int64_t n = b * size.T + t;
  float sum = 0;
  if (inside) {
#pragma unroll
    for (int i = 0; i < HD / 8 / lanes; ++i) {
      int64_t at = n * size.o_stride + h * HD + (i * lanes + part) * 8;
      Pack<bf16> x = *reinterpret_cast<const Pack<bf16>*>(dout + at), y = *reinterpret_cast<const Pack<bf16>*>(o + at);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum = fmaf(x[c], y[c], sum);
    }
  }
  const unsigned mask = __activemask();  // blocks end at a multiple of `lanes`: the lanes of a row are all here
#pragma unroll
  for (int step = lanes / 2; step; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
  if (part == 0) {
    int64_t to = (b * size.NH + h) * padded_T + t;
    lse2[to] = inside ? lse[n * size.NH + h] * log2_e : INFINITY;
    D[to] = sum;
  }
}

// Before either kernel: counters to 0, lse2 and D.
template <int HD>
void prepare_backward(GpuBase& dev, const BackwardScratch& scratch, const bf16* dout, const bf16* o, const float* lse,
                      int64_t B, int64_t T, HeadShape heads) {
  constexpr int lanes = rowsum_lanes(HD);
  const int64_t padded_T = ceil_div(T, row_padding) * row_padding;
  CUDA_CHECK(cudaMemsetAsync(scratch.ticket, 0, scratch.counter_bytes, dev.stream));
  launch(dev, attention_rowsum_kernel<HD>, dim3(unsigned(ceil_div(B * padded_T * heads.n_head * lanes, 256))), 256, 0,
         scratch.lse2, scratch.D, dout, o, lse, Sizes(B, T, heads), int(padded_T));
}

// A turn is passed on: what its reader sees done before write_turn() is done.
__device__ __forceinline__ int read_turn(const int* turn) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(turn) : "memory");
  return v;
}
__device__ __forceinline__ void write_turn(int* turn, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(v) : "memory");
}

}  // namespace attention_tile
