// Variant 1 of the cross-entropy: a block a row, one pass for the maximum, one for the sum, one for the gradient.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/step.h"

namespace naive {

__global__ void cross_entropy(float* losses, bf16* logits, const int32_t* targets, const StepParams* params, int64_t V,
                              int64_t Vp) {
  bf16* row = logits + int64_t(blockIdx.x) * Vp;
  int64_t target = targets[blockIdx.x];
  float largest = -INFINITY, sum = 0, scale = float(params->loss_scale);
  for (int64_t v = threadIdx.x; v < V; v += blockDim.x) largest = fmaxf(largest, to_float(row[v]));
  largest = block_max(largest);
  for (int64_t v = threadIdx.x; v < V; v += blockDim.x) sum += __expf(to_float(row[v]) - largest);
  sum = block_sum(sum);
  if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0 : logf(sum) + largest - to_float(row[target]);
  __syncthreads();  // the target's logit has been read
  for (int64_t v = threadIdx.x; v < Vp; v += blockDim.x) {
    float p = v < V && target >= 0 ? __expf(to_float(row[v]) - largest) / sum - (v == target ? 1.0f : 0.0f) : 0.0f;
    row[v] = from_float<bf16>(p * scale);
  }
}

}  // namespace naive
