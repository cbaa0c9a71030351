// Variant 1: a block a row, plain loads, and the weight's gradient by atomics (whose order, and so whose last bits,
// change from run to run).
#pragma once
#include "llmc/cuda_common.cuh"

namespace naive {

__global__ void forward(bf16* sum, bf16* out, float* rstd, const bf16* residual, const bf16* branch, const bf16* weight,
                        int64_t C, float eps) {
  int64_t row = int64_t(blockIdx.x) * C;
  float squares = 0;
  for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
    sum[row + c] = from_float<bf16>(to_float(residual[row + c]) + to_float(branch[row + c]));
    float x = to_float(sum[row + c]);
    squares += x * x;
  }
  float r = rsqrtf(block_sum(squares) / float(C) + eps);
  for (int64_t c = threadIdx.x; c < C; c += blockDim.x)
    out[row + c] = from_float<bf16>(to_float(sum[row + c]) * r * to_float(weight[c]));
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

__global__ void backward(bf16* dx, float* dweight, const bf16* dout, const bf16* dresidual, const bf16* x,
                         const bf16* weight, const float* rstd, int64_t C) {
  int64_t row = int64_t(blockIdx.x) * C;
  float r = rstd[blockIdx.x], dot = 0;
  for (int64_t c = threadIdx.x; c < C; c += blockDim.x)
    dot += to_float(dout[row + c]) * to_float(weight[c]) * to_float(x[row + c]) * r;
  float mean = block_sum(dot) / float(C);
  for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
    float d = to_float(dout[row + c]), xhat = to_float(x[row + c]) * r;
    dx[row + c] = from_float<bf16>(to_float(dresidual[row + c]) + r * (d * to_float(weight[c]) - xhat * mean));
    atomicAdd(dweight + c, d * xhat);
  }
}

}  // namespace naive
