// Rung 2: a launch a tensor, a thread four neighbours: 16 bytes of master, m and v at a time, 8 or 16 of the gradient.
// A block belongs to one row, so that its place in the buffer is found once a thread and not once a value.
//
// Predicted: 28 bytes a value, and a thread has 56 on their way with a quarter of the instructions: large tensors take
// what their bytes take. What is left is the launches: one a tensor, some 3 microseconds each from the end of one to
// where the next has filled the GPU. Of gpt124-8x2 the 374 tensors have 42 MB each on average, 14 microseconds of
// copying; of a layer of 128 small experts a fourth of that. (Counted: the bytes; launches have no rate here.)
//
// Sizes: columns a multiple of 4; rows below 65536.
#pragma once
#include "llmc/adamw.h"
#include "llmc/cuda_common.cuh"

namespace vector {

using View = ParameterView<Gpu<bf16>>;
constexpr int threads = 192, width = 4;

struct alignas(8) FourNarrow {
  bf16 v[width];
};

// Block (x,y): columns x * threads * width ... of row y.
__global__ void __launch_bounds__(threads)
    update(View p, const StepParams* params, const StepStats* stats, AdamWConfig config) {
  const int64_t c = (int64_t(blockIdx.x) * threads + threadIdx.x) * width;
  if (c >= p.cols || stats->skip) return;
  const int64_t i = p.map(blockIdx.y) * p.cols + c;
  const float b1 = float(config.beta1), b2 = float(config.beta2), eps = float(config.eps);
  const float correct1 = 1 / (1 - powf(b1, float(params->step))), correct2 = 1 / (1 - powf(b2, float(params->step)));
  const float lr = float(params->learning_rate), clip = float(stats->clip);
  const float decay = p.decay ? float(config.weight_decay) : 0;
  float g[width];
  if (p.grad.wide) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(p.grad.data) + i);
    g[0] = four.x, g[1] = four.y, g[2] = four.z, g[3] = four.w;
  } else {
    const auto four = *reinterpret_cast<const FourNarrow*>(static_cast<const bf16*>(p.grad.data) + i);
#pragma unroll
    for (int j = 0; j < width; ++j) g[j] = to_float(four.v[j]);
  }
  using Four = Pack<float>;
  auto m = *reinterpret_cast<Four*>(p.m + i), v = *reinterpret_cast<Four*>(p.v + i);
  auto w = *reinterpret_cast<Four*>(p.master + i);
  FourNarrow weight;
#pragma unroll
  for (int j = 0; j < width; ++j) {
    const float gj = clip * g[j];
    m.v[j] = b1 * m.v[j] + (1 - b1) * gj;
    v.v[j] = b2 * v.v[j] + (1 - b2) * gj * gj;
    w.v[j] -= lr * (m.v[j] * correct1 / (sqrtf(v.v[j] * correct2) + eps) + decay * w.v[j]);
    weight.v[j] = from_float<bf16>(w.v[j]);
  }
  *reinterpret_cast<Four*>(p.m + i) = m, *reinterpret_cast<Four*>(p.v + i) = v;
  *reinterpret_cast<Four*>(p.master + i) = w, *reinterpret_cast<FourNarrow*>(p.weight + i) = weight;
}

inline void adamw(GpuBase& dev, const std::vector<View>& views, const StepParams* params, const StepStats* stats,
                  AdamWConfig config) {
  for (const View& p : views) {
    if (p.cols % width || p.rows > 65535)
      fail("adamw 02_vector: ", p.rows, " rows of ", p.cols, " columns; at most 65535, a multiple of 4");
    launch(dev, update, dim3(unsigned(ceil_div(p.cols, threads * width)), unsigned(p.rows)), threads, 0, p, params,
           stats, config);
  }
}

}  // namespace vector
