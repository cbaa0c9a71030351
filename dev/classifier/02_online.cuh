// Rung 2: maximum and sum in one walk along the row, and the gradient written over the logits in a second: one kernel,
// nothing stored in between. Each thread keeps the largest logit m that it has met and the sum s of exp(logit - m);
// when a larger one comes, what s holds so far shrinks by exp(m - new m). Pairs (m, s) of threads are joined the same
// way.
//
// Predicted, bytes a logit: 2 read, 2 written, and 2 for the second reading where the L2 cache no longer holds the row
// (132 * 4 rows of 100 KB in work are about its size): 4 to 6. Counted here: 4, the floor. Three walks have become two,
// but a thread still loads 2 bytes at a time and looks at them before the next: it waits, and is a few times above
// that.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/step.h"

namespace online {

constexpr int threads = 512;

__global__ void __launch_bounds__(threads)
    rows(float* losses, bf16* logits, const int32_t* targets, const StepParams* params, int64_t V, int64_t Vp) {
  bf16* row = logits + int64_t(blockIdx.x) * Vp;
  const int64_t target = targets[blockIdx.x];
  float largest = -INFINITY, sum = 0;
  for (int64_t v = threadIdx.x; v < V; v += threads) {
    const float x = to_float(row[v]);
    if (x > largest) sum *= __expf(largest - x), largest = x;  // the first time exp(-inf) * 0
    sum += __expf(x - largest);
  }
  const float all = block_max(largest);
  sum = block_sum(sum == 0 ? 0.0f : sum * __expf(largest - all));  // a thread without a logit has (-inf, 0)
  const float scale = float(params->loss_scale);
  if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0 : logf(sum) + (all - to_float(row[target]));
  __syncthreads();  // the target's logit has been read
  for (int64_t v = threadIdx.x; v < Vp; v += threads) {
    float d = 0;
    if (v < V && target >= 0) d = (__expf(to_float(row[v]) - all) / sum - (v == target ? 1.0f : 0.0f)) * scale;
    row[v] = from_float<bf16>(d);
  }
}

// As cross_entropy(). Targets are in [-1,V), logits finite.
inline void cross_entropy(GpuBase& dev, float* losses, bf16* logits, const int32_t* targets, const StepParams* params,
                          int64_t N, int64_t V, int64_t Vp) {
  launch(dev, rows, unsigned(N), threads, 0, losses, logits, targets, params, V, Vp);
}

}  // namespace online
