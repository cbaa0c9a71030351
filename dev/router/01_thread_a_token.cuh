// Rung 1: a thread a token. It computes its E logits one after another, then softmax (or sigmoid), top-k and gates from
// an array of its own: the formulas of moe/router.h, written down once, and nothing between threads but the statistics.
//
// Predicted: all tokens are in flight at once, so by the time a thread begins its next expert, its row has left the L1
// cache, and the L2 cache too where x is larger: x is read E times, E*N*C*2 bytes. And the rows of a warp lie 2C bytes
// apart: a load touches 32 lines, for which L1 needs 32 clocks. At eight elements a load that is N*C*E/8 clocks of one
// multiprocessor: 16 operations a clock, a sixteenth of what its CUDA cores do. Whichever is longer binds, and latency
// where there are few tokens; the printed prediction knows the bytes and the operations alone.
//
// The statistics: a sum over each warp, then one atomic add an expert. The order of those adds is not fixed.
#pragma once
#include "llmc/cuda_common.cuh"
#include "moe/router.h"

namespace thread_a_token {

constexpr int threads = 64, most_experts = 256;

// Renormalised gates, one balance group, as all shapes here have it; C is a multiple of 8. group_prob and group_count
// start at zero.
__global__ void __launch_bounds__(threads)
    router(float* gates, int32_t* top_k_index, float* lse, float* group_prob, int32_t* group_count, const bf16* x,
           const bf16* wg, const float* bias, RouterShape s) {
  const int E = int(s.E), K = int(s.K), packs = int(s.C / 8);
  const int64_t thread = int64_t(blockIdx.x) * threads + threadIdx.x;
  const bool live = thread < s.N;  // no early exit: the warp sums together
  const int64_t n = live ? thread : 0;
  const auto* row = reinterpret_cast<const Pack<bf16>*>(x + n * s.C);
  float p[most_experts], largest = -INFINITY;
  for (int e = 0; e < E; ++e) {
    const auto* weights = reinterpret_cast<const Pack<bf16>*>(wg + e * s.C);
    float sum = 0;
    for (int c = 0; c < packs; ++c) {
      const Pack<bf16> a = row[c], w = weights[c];
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += a[i] * w[i];
    }
    p[e] = sum;
    largest = fmaxf(largest, sum);
  }
  float total = 0;
  for (int e = 0; e < E; ++e) total += expf(p[e] - largest);
  const float l = largest + logf(total);
  if (live) lse[n] = l;

  total = 0;
  for (int e = 0; e < E; ++e) {
    p[e] = s.gate == Gate::softmax ? expf(p[e] - l) : 1.0f / (1.0f + expf(-p[e]));
    total += p[e];
  }
  for (int e = 0; e < E; ++e) {
    const float sum = warp_sum(live ? p[e] / total : 0);
    if (threadIdx.x % 32 == 0) atomicAdd(group_prob + e, sum);
  }
  if (!live) return;

  float chosen_sum = 0;
  for (int k = 0; k < K; ++k) {
    int best = 0;
    float best_key = -INFINITY;
    for (int e = 0; e < E; ++e) {
      const float key = p[e] + (bias ? bias[e] : 0);
      if (key > best_key) best_key = key, best = e;
    }
    top_k_index[n * K + k] = best, gates[n * K + k] = p[best];
    atomicAdd(group_count + best, 1);
    chosen_sum += p[best];
    p[best] = -INFINITY;  // taken
  }
  const float factor = (s.gate == Gate::softmax ? 1.0f : float(s.route_scale)) / chosen_sum;
  for (int k = 0; k < K; ++k) gates[n * K + k] *= factor;
}

inline void forward(Gpu<bf16>& dev, float* gates, int32_t* top_k_index, float* lse, float* group_prob,
                    int32_t* group_count, const bf16* x, const bf16* wg, const float* bias, RouterShape s) {
  if (s.E > most_experts || s.C % 8) fail("router 01_thread_a_token: E at most 256 and C a multiple of 8");
  dev.zero(group_prob, size_t(s.E) * sizeof(float));
  dev.zero(group_count, size_t(s.E) * sizeof(int32_t));
  launch(dev, router, unsigned(ceil_div(s.N, threads)), threads, 0, gates, top_k_index, lse, group_prob, group_count, x,
         wg, bias, s);
}

}  // namespace thread_a_token
