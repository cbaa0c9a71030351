// Variant 1: a block a token. Warps take the logits in turn, then one thread does the softmax, the top-k and the gates.
// Softmax with renormalised gates and one balance group, as the shapes here have it.
#pragma once
#include "llmc/cuda_common.cuh"
#include "moe/router.h"

namespace naive {

inline constexpr int most_experts = 512;

__global__ void router(float* gates, int32_t* top_k_index, float* lse, float* group_prob, int32_t* group_count,
                       const bf16* x, const bf16* wg, RouterShape s) {
  __shared__ float logits[most_experts];
  int64_t n = blockIdx.x;
  int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int64_t e = threadIdx.x / 32; e < s.E; e += warps) {
    float sum = 0;
    for (int64_t c = lane; c < s.C; c += 32) sum += to_float(x[n * s.C + c]) * to_float(wg[e * s.C + c]);
    sum = warp_sum(sum);
    if (lane == 0) logits[e] = sum;
  }
  __syncthreads();
  if (threadIdx.x) return;
  float largest = -INFINITY, sum = 0, chosen_sum = 0;
  for (int64_t e = 0; e < s.E; ++e) largest = fmaxf(largest, logits[e]);
  for (int64_t e = 0; e < s.E; ++e) sum += __expf(logits[e] - largest);
  lse[n] = largest + logf(sum);
  for (int64_t e = 0; e < s.E; ++e) atomicAdd(group_prob + e, __expf(logits[e] - lse[n]));
  for (int64_t k = 0; k < s.K; ++k) {
    int64_t best = 0;
    for (int64_t e = 1; e < s.E; ++e)
      if (logits[e] > logits[best]) best = e;
    top_k_index[n * s.K + k] = int32_t(best);
    atomicAdd(group_count + best, 1);
    gates[n * s.K + k] = __expf(logits[best] - largest);
    chosen_sum += gates[n * s.K + k];
    logits[best] = -INFINITY;
  }
  for (int64_t k = 0; k < s.K; ++k) gates[n * s.K + k] /= chosen_sum;
}

}  // namespace naive
