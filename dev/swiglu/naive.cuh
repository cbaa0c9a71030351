// Variant 1: a thread an element of a. Gate and up columns alternate 8 by 8 (swiglu.h), so neighbouring threads read
// pieces of 16 bytes.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/swiglu.h"

namespace naive {

// Where the gate of element i of a (N,F) stands in h (N,2F); its up projection is swiglu_interleave further.
__device__ inline int64_t gate_at(int64_t i) {
  return i / swiglu_interleave * 2 * swiglu_interleave + i % swiglu_interleave;
}

__global__ void forward(bf16* a, const bf16* h, int64_t n) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float gate = to_float(h[gate_at(i)]), up = to_float(h[gate_at(i) + swiglu_interleave]);
  a[i] = from_float<bf16>(gate * sigmoid_of(gate) * up);
}

__global__ void backward(bf16* dh, const bf16* da, const bf16* h, int64_t n) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int64_t at = gate_at(i);
  float gate = to_float(h[at]), up = to_float(h[at + swiglu_interleave]), d = to_float(da[i]), s = sigmoid_of(gate);
  dh[at] = from_float<bf16>(d * up * s * (1 + gate * (1 - s)));
  dh[at + swiglu_interleave] = from_float<bf16>(d * gate * s);
}

}  // namespace naive
