// Rung 1: a thread an element of a. Gate and up columns alternate 8 by 8 (swiglu.h), so neighbouring threads read
// pieces of 16 bytes: of each sector of 32 bytes the gates are one half, and the other half, the up projections,
// follows at once and is found in the L1 cache. No byte is fetched twice from memory.
//
// Predicted: 6NF bytes forward, 10NF backward, as production. The number that is short is bytes on their way. Memory
// answers after some 700 ns; at 3 TB/s and 132 multiprocessors each has to have asked for 16 KB, of which a share of
// 2/3 (forward) or 3/5 (backward) is loads: about 10 KB. 64 warps that ask for two or three times 64 bytes are 8 and 12
// KB. But a warp does not spend all its time waiting: it computes addresses and an exponential, and ends, and another
// begins. So well below the floor forward, nearer to it backward.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/swiglu.h"

namespace thread_an_element {

constexpr int threads = 256;

// Where the gate of element i of a (N,F) stands in h (N,2F); its up projection is swiglu_interleave further.
__device__ __forceinline__ int64_t gate_at(int64_t i) {
  return i / swiglu_interleave * 2 * swiglu_interleave + i % swiglu_interleave;
}

__global__ void __launch_bounds__(threads) activate(bf16* a, const bf16* h, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= n) return;
  const float gate = to_float(h[gate_at(i)]), up = to_float(h[gate_at(i) + swiglu_interleave]);
  a[i] = from_float<bf16>(gate * sigmoid_of(gate) * up);
}

__global__ void __launch_bounds__(threads) activate_backward(bf16* dh, const bf16* da, const bf16* h, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= n) return;
  const int64_t at = gate_at(i);
  const float gate = to_float(h[at]), up = to_float(h[at + swiglu_interleave]), d = to_float(da[i]);
  const float s = sigmoid_of(gate);
  dh[at] = from_float<bf16>(d * up * s * (1 + gate * (1 - s)));
  dh[at + swiglu_interleave] = from_float<bf16>(d * gate * s);
}

inline void forward(GpuBase& dev, bf16* a, const bf16* h, int64_t N, int64_t F) {
  launch(dev, activate, unsigned(ceil_div(N * F, threads)), threads, 0, a, h, N * F);
}
inline void backward(GpuBase& dev, bf16* dh, const bf16* da, const bf16* h, int64_t N, int64_t F) {
  launch(dev, activate_backward, unsigned(ceil_div(N * F, threads)), threads, 0, dh, da, h, N * F);
}

}  // namespace thread_an_element
