// Rung 2: a warp a token. Neighbouring lanes read neighbouring 16 bytes of the row, a logit is a sum over the warp, and
// lane l keeps the logits of experts l, l + 32, ... in registers, so that softmax and top-k are shuffles.
//
// Predicted: x from DRAM once, N*C*2 bytes; the E - 1 further times a warp's row is in L1, or in L2 where 32 rows and Wg
// are more than L1 holds. What binds is Wg: every token reads all of it, N*E*C*2 bytes. Where it fits into L1 beside the
// rows (E = 8) that is fast; where not, it comes from L2, which gives about twice what DRAM does: E/2 times the time of
// reading x. The arithmetic, 2NCE operations and as many conversions, is less. The printed prediction counts DRAM and
// operations only.
//
// A warp goes on to further tokens and keeps their statistics in registers; they are added with atomics, once a warp, in
// no fixed order.
#pragma once
#include "llmc/cuda_common.cuh"
#include "moe/router.h"

namespace warp_a_token {

constexpr int threads = 256, warps = threads / 32;

// A lane has V experts. Renormalised gates, one balance group; C is a multiple of 8, K at most 32. group_prob and
// group_count start at zero.
template <int V>
__global__ void __launch_bounds__(threads)
    router(float* gates, int32_t* top_k_index, float* lse, float* group_prob, int32_t* group_count, const bf16* x,
           const bf16* wg, const float* bias, RouterShape s) {
  const int E = int(s.E), K = int(s.K), packs = int(s.C / 8), lane = threadIdx.x % 32;
  float prob[V] = {};
  int count[V] = {};
  for (int64_t n = int64_t(blockIdx.x) * warps + threadIdx.x / 32; n < s.N; n += int64_t(gridDim.x) * warps) {
    const auto* row = reinterpret_cast<const Pack<bf16>*>(x + n * s.C);
    float p[V], largest = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) p[i] = -INFINITY;
    for (int e = 0; e < E; ++e) {
      const auto* weights = reinterpret_cast<const Pack<bf16>*>(wg + e * s.C);
      float sum = 0;
      for (int c = lane; c < packs; c += 32) {
        const Pack<bf16> a = row[c], w = weights[c];
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += a[i] * w[i];
      }
      sum = warp_sum(sum);
      largest = fmaxf(largest, sum);
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (e == i * 32 + lane) p[i] = sum;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) total += expf(p[i] - largest);
    const float l = largest + logf(warp_sum(total));
    if (lane == 0) lse[n] = l;

    total = 0;
    float key[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      p[i] = s.gate == Gate::softmax ? expf(p[i] - l) : 1.0f / (1.0f + expf(-p[i]));  // 0 where there is no expert
      total += p[i];
      const int e = i * 32 + lane;
      key[i] = e < E ? p[i] + (bias ? bias[e] : 0) : -INFINITY;
    }
    total = warp_sum(total);
#pragma unroll
    for (int i = 0; i < V; ++i) prob[i] += p[i] / total;

    float gate = 0, chosen_sum = 0;  // lane k: of choice k
    int chosen = 0;
    for (int k = 0; k < K; ++k) {
      float value = key[0];
      int best = lane;
#pragma unroll
      for (int i = 1; i < V; ++i)
        if (key[i] > value) value = key[i], best = i * 32 + lane;
#pragma unroll
      for (int step = 16; step; step /= 2) {
        const float other = __shfl_xor_sync(~0u, value, step);
        const int e = __shfl_xor_sync(~0u, best, step);
        if (other > value || (other == value && e < best)) value = other, best = e;
      }
      float score = 0;
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (best == i * 32 + lane) score = p[i], key[i] = -INFINITY, ++count[i];
      score = __shfl_sync(~0u, score, best % 32);
      chosen_sum += score;
      if (lane == k) gate = score, chosen = best;
    }
    const float factor = (s.gate == Gate::softmax ? 1.0f : float(s.route_scale)) / chosen_sum;
    if (lane < K) gates[n * K + lane] = gate * factor, top_k_index[n * K + lane] = chosen;
  }
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i * 32 + lane < E) {
      atomicAdd(group_prob + i * 32 + lane, prob[i]);
      atomicAdd(group_count + i * 32 + lane, count[i]);
    }
}

inline void forward(Gpu<bf16>& dev, float* gates, int32_t* top_k_index, float* lse, float* group_prob,
                    int32_t* group_count, const bf16* x, const bf16* wg, const float* bias, RouterShape s) {
  if (s.E > 256 || s.C % 8 || s.K > 32)
    fail("router 02_warp_a_token: E at most 256, K at most 32 and C a multiple of 8");
  dev.zero(group_prob, size_t(s.E) * sizeof(float));
  dev.zero(group_count, size_t(s.E) * sizeof(int32_t));
  auto* kernel = s.E <= 32 ? router<1> : s.E <= 64 ? router<2> : s.E <= 128 ? router<4> : router<8>;
  launch(dev, kernel, unsigned(4 * dev.multiprocessors), threads, 0, gates, top_k_index, lse, group_prob, group_count,
         x, wg, bias, s);
}

}  // namespace warp_a_token
