// Rung 1: a launch a tensor, a thread a value.
//
// Predicted: each value needs 28 bytes: master, m and v are read and written, the gradient read (2 bytes, or 4), the
// weight written. A warp's loads are 64 or 128 neighbouring bytes, as a memory bus wants it, so the bytes are the
// floor. But a thread has only 14 bytes on their way, and spends more instructions on finding its row, two divisions of
// 64-bit integers for the row and its place in the buffer, than on the update. And each launch fills the GPU anew and
// empties it at its end: some microseconds for each of hundreds of tensors, most of them small.
#pragma once
#include "llmc/adamw.h"
#include "llmc/cuda_common.cuh"

namespace scalar {

using View = ParameterView<Gpu<bf16>>;

__global__ void update(View p, const StepParams* params, const StepStats* stats, AdamWConfig config) {
  const int64_t element = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= p.rows * p.cols || stats->skip) return;
  const int64_t i = p.map(element / p.cols) * p.cols + element % p.cols;
  const float b1 = float(config.beta1), b2 = float(config.beta2);
  const float correct1 = 1 / (1 - powf(b1, float(params->step))), correct2 = 1 / (1 - powf(b2, float(params->step)));
  const float decay = p.decay ? float(config.weight_decay) : 0;
  float g =
      p.grad.wide ? static_cast<const float*>(p.grad.data)[i] : to_float(static_cast<const bf16*>(p.grad.data)[i]);
  g *= float(stats->clip);
  const float m = b1 * p.m[i] + (1 - b1) * g, v = b2 * p.v[i] + (1 - b2) * g * g;
  float w = p.master[i];
  w -= float(params->learning_rate) * (m * correct1 / (sqrtf(v * correct2) + float(config.eps)) + decay * w);
  p.m[i] = m, p.v[i] = v, p.master[i] = w, p.weight[i] = from_float<bf16>(w);
}

inline void adamw(GpuBase& dev, const std::vector<View>& views, const StepParams* params, const StepStats* stats,
                  AdamWConfig config) {
  for (const View& p : views)
    launch(dev, update, unsigned(ceil_div(p.rows * p.cols, 256)), 256, 0, p, params, stats, config);
}

}  // namespace scalar
