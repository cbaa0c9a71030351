// Rung 1: as the formulas read. A kernel writes the probabilities softmax(logits) (N,Vp) in fp32, a second takes the
// loss -log p[target] of each row, a third the gradient (p - onehot) * scale over the logits.
//
// Predicted, bytes a logit: 2 read for the probabilities, 4 written; 4 read for the gradient, 2 written: 12, three
// times the floor of 4, and the memory of the model's largest tensor once more. The first kernel walks along a row
// three times (maximum, sum, probabilities). A row is 100 KB, and those in work together, 132 * 4 of them, are about
// what the L2 cache holds: of the second and third walk some comes from memory again, 14 or 16 bytes a logit in all.
// And it loads 2 bytes a thread, so that the walks wait more than they read.
//
// The loss of a target whose probability is below 1e-45 is infinite here. Production never forms the probability for
// it.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/step.h"

namespace naive {

constexpr int threads = 512;

// p (N,Vp): a block a row. Padding has no part in it.
__global__ void __launch_bounds__(threads) softmax(float* p, const bf16* logits, int64_t V, int64_t Vp) {
  const bf16* row = logits + int64_t(blockIdx.x) * Vp;
  float largest = -INFINITY, sum = 0;
  for (int64_t v = threadIdx.x; v < V; v += threads) largest = fmaxf(largest, to_float(row[v]));
  largest = block_max(largest);
  for (int64_t v = threadIdx.x; v < V; v += threads) sum += __expf(to_float(row[v]) - largest);
  sum = block_sum(sum);
  for (int64_t v = threadIdx.x; v < V; v += threads)
    p[int64_t(blockIdx.x) * Vp + v] = __expf(to_float(row[v]) - largest) / sum;
}

__global__ void row_losses(float* losses, const float* p, const int32_t* targets, int64_t N, int64_t Vp) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n < N) losses[n] = targets[n] < 0 ? 0 : -logf(p[n * Vp + targets[n]]);
}

// A thread an element: block (x,y) has columns x * blockDim.x ... of row y.
__global__ void gradient(bf16* logits, const float* p, const int32_t* targets, const StepParams* params, int64_t V,
                         int64_t Vp) {
  const int64_t v = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (v >= Vp) return;
  const int64_t target = targets[row];
  float d = 0;
  if (v < V && target >= 0) d = (p[row * Vp + v] - (v == target ? 1.0f : 0.0f)) * float(params->loss_scale);
  logits[row * Vp + v] = from_float<bf16>(d);
}

// As cross_entropy(), with p (N,Vp). Targets are in [-1,V); N < 65536.
inline void cross_entropy(GpuBase& dev, float* losses, bf16* logits, float* p, const int32_t* targets,
                          const StepParams* params, int64_t N, int64_t V, int64_t Vp) {
  launch(dev, softmax, unsigned(N), threads, 0, p, logits, V, Vp);
  launch(dev, row_losses, unsigned(ceil_div(N, 256)), 256, 0, losses, p, targets, N, Vp);
  launch(dev, gradient, dim3(unsigned(ceil_div(Vp, 256)), unsigned(N)), 256, 0, logits, p, targets, params, V, Vp);
}

}  // namespace naive
