// Variant 1: one launch a tensor, a thread an element; the norm with a block for every 64 rows.
#pragma once
#include "llmc/adamw.h"
#include "llmc/cuda_common.cuh"

namespace naive {

using View = ParameterView<Gpu<bf16>>;

__device__ inline float gradient_at(const View& p, int64_t i) {
  return p.grad.wide ? static_cast<const float*>(p.grad.data)[i] : to_float(static_cast<const bf16*>(p.grad.data)[i]);
}

__global__ void adamw(View p, const StepParams* params, const StepStats* stats, AdamWConfig config) {
  int64_t element = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= p.rows * p.cols || stats->skip) return;
  int64_t row = element / p.cols, i = p.map(row) * p.cols + element % p.cols;
  float b1 = float(config.beta1), b2 = float(config.beta2), g = float(stats->clip) * gradient_at(p, i);
  float correct1 = 1 / (1 - powf(b1, float(params->step))), correct2 = 1 / (1 - powf(b2, float(params->step)));
  float m = b1 * p.m[i] + (1 - b1) * g, v = b2 * p.v[i] + (1 - b2) * g * g, w = p.master[i];
  float decay = p.decay ? float(config.weight_decay) : 0;
  w -= float(params->learning_rate) * (m * correct1 / (sqrtf(v * correct2) + float(config.eps)) + decay * w);
  p.m[i] = m, p.v[i] = v, p.master[i] = w, p.weight[i] = from_float<bf16>(w);
}

__global__ void norm_partials(float* partials, View p) {
  float sum = 0;
  for (int64_t row = blockIdx.x * norm_block_rows; row < min(p.rows, (blockIdx.x + 1) * norm_block_rows); ++row) {
    int64_t first = p.map(row) * p.cols;
    for (int64_t c = threadIdx.x; c < p.cols; c += blockDim.x) {
      float g = gradient_at(p, first + c);
      sum += g * g;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[p.first_partial + blockIdx.x] = sum;
}

}  // namespace naive
