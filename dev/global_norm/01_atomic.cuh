// Rung 1: a launch a tensor, a thread a value; each block of 256 sums its squares and adds the sum to one number by an
// atomic addition.
//
// Predicted: 2 bytes a value (4 where the gradient is fp32), read once. But a thread asks for 2 bytes, waits for them,
// and waits again at the two barriers of the block's sum: too little is on its way, and starting and ending the blocks,
// n/256 of them, takes longer than what they read. The atomic additions are all to one address, one after the other in
// the L2 cache: n/256 of a clock or two. Several times the floor.
//
// The additions come in any order: this rung does not repeat its bits, and so neither would the training that clips by
// it. And a single fp32 number takes n/256 additions: towards the end each is rounded to the spacing of fp32 at the
// sum.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/parameters.h"

namespace atomic {

using View = ParameterView<Gpu<bf16>>;
constexpr int threads = 256;

// Block (x,y): columns x * threads ... of row y.
__global__ void __launch_bounds__(threads) add_squares(float* sum, View p) {
  const int64_t c = int64_t(blockIdx.x) * threads + threadIdx.x, i = p.map(blockIdx.y) * p.cols + c;
  float g = 0;
  if (c < p.cols)
    g = p.grad.wide ? static_cast<const float*>(p.grad.data)[i] : to_float(static_cast<const bf16*>(p.grad.data)[i]);
  g = block_sum(g * g);
  if (threadIdx.x == 0) atomicAdd(sum, g);
}

__global__ void square_root(float* norm) { *norm = sqrtf(*norm); }

// norm: of all gradients. No tensor has a second gradient.
inline void global_norm(GpuBase& dev, float* norm, const std::vector<View>& views) {
  dev.zero(norm, sizeof(float));
  for (const View& p : views) {
    if (p.rows > 65535) fail("global_norm 01_atomic: ", p.rows, " rows, at most 65535");
    launch(dev, add_squares, dim3(unsigned(ceil_div(p.cols, threads)), unsigned(p.rows)), threads, 0, norm, p);
  }
  launch(dev, square_root, 1, 1, 0, norm);
}

}  // namespace atomic
