// Variant 1: a thread an element; the backward pass adds by atomics, so that rows of frequent tokens are fought over and
// the order of their sums, with the last bits, changes from run to run.
#pragma once
#include "llmc/cuda_common.cuh"

namespace naive {

__global__ void forward(bf16* out, const int32_t* tokens, const bf16* table, int64_t N, int64_t C) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < N * C) out[i] = table[tokens[i / C] * C + i % C];
}

__global__ void backward(float* dtable, const int32_t* tokens, const bf16* dout, int64_t N, int64_t C) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < N * C) atomicAdd(dtable + tokens[i / C] * C + i % C, to_float(dout[i]));
}

}  // namespace naive
