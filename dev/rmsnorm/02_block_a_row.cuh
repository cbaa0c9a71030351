// Rung 2: a block of 256 threads a row, neighbours in a row side by side; the sum over the row goes through shared
// memory.
//
// Predicted: a warp's load is 64 neighbouring bytes, and the second walk along a row (2C bytes, a few KB) finds it in
// the L1 cache: global memory sees each value once. Forward 4NC bytes, backward 6NC: the floor of the op. It stays
// above it by what a block spends waiting: a load of 2 bytes a thread, then two barriers, then as much again, so that
// too few bytes are on their way.
//
// Backward adds each row's part of the weight's gradient by atomic additions, a coalesced NC of them. They are done by
// the L2 cache, a few thousand bytes a clock in all, and NC times 4 bytes of them are twice what dx is: the limit of
// the backward pass. Their order is any: this rung does not repeat its bits.
#pragma once
#include "llmc/cuda_common.cuh"

namespace block_a_row {

constexpr int threads = 256;

__global__ void __launch_bounds__(threads)
    norm(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t C, float eps) {
  const int64_t row = int64_t(blockIdx.x) * C;
  float squares = 0;
  for (int64_t c = threadIdx.x; c < C; c += threads) squares += to_float(x[row + c]) * to_float(x[row + c]);
  const float r = rsqrtf(block_sum(squares) / float(C) + eps);
  for (int64_t c = threadIdx.x; c < C; c += threads)
    out[row + c] = from_float<bf16>(to_float(x[row + c]) * r * to_float(weight[c]));
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

__global__ void __launch_bounds__(threads) norm_gradient(bf16* dx, float* dweight, const bf16* dout, const bf16* x,
                                                         const bf16* weight, const float* rstd, int64_t C) {
  const int64_t row = int64_t(blockIdx.x) * C;
  const float r = rstd[blockIdx.x];
  float dot = 0;
  for (int64_t c = threadIdx.x; c < C; c += threads)
    dot += to_float(dout[row + c]) * to_float(weight[c]) * to_float(x[row + c]) * r;
  const float mean = block_sum(dot) / float(C);
  for (int64_t c = threadIdx.x; c < C; c += threads) {
    const float d = to_float(dout[row + c]), xhat = to_float(x[row + c]) * r;
    dx[row + c] = from_float<bf16>(r * (d * to_float(weight[c]) - xhat * mean));
    atomicAdd(dweight + c, d * xhat);
  }
}

inline void forward(GpuBase& dev, bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t N, int64_t C,
                    double eps) {
  launch(dev, norm, unsigned(N), threads, 0, out, rstd, x, weight, C, float(eps));
}
inline void backward(GpuBase& dev, bf16* dx, float* dweight, const bf16* dout, const bf16* x, const bf16* weight,
                     const float* rstd, int64_t N, int64_t C) {
  launch(dev, norm_gradient, unsigned(N), threads, 0, dx, dweight, dout, x, weight, rstd, C);
}

}  // namespace block_a_row
