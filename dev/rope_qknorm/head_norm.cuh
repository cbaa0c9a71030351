// The norm of rungs 1 and 2, a pass of its own: a warp a head of a token. The lanes sum the squares, then read the head
// once more, from the L1 cache.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/rope.h"

namespace head_norm {

constexpr int warps = 8;

// qk (N, (NH+NKV)*HD) = x * rstd * weight of the queries and keys of qkv; rstd (N, NH+NKV).
__global__ void __launch_bounds__(warps * 32) normalise(bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight,
                                                        const bf16* k_weight, int64_t N, HeadShape s, float eps) {
  const int64_t H = s.n_head + s.n_kv_head, item = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (item >= N * H) return;
  const int64_t n = item / H, h = item % H;
  const int HD = int(s.head_dim), lane = threadIdx.x % 32;
  const bf16 *x = qkv + n * s.qkv_width() + h * HD, *w = h < s.n_head ? q_weight : k_weight;
  bf16* y = qk + n * s.qk_width() + h * HD;
  float squares = 0;
  for (int c = lane; c < HD; c += 32) squares += to_float(x[c]) * to_float(x[c]);
  const float r = 1.0f / sqrtf(warp_sum(squares) / float(HD) + eps);
  for (int c = lane; c < HD; c += 32) y[c] = from_float<bf16>(to_float(x[c]) * r * to_float(w[c]));
  if (lane == 0) rstd[item] = r;
}

// In place on dqkv. The gradients of the weights are added up by atomics, head by head, in whatever order: they do not
// repeat their bits.
__global__ void __launch_bounds__(warps * 32)
    normalise_backward(bf16* dqkv, float* dq_weight, float* dk_weight, const bf16* qkv, const float* rstd,
                       const bf16* q_weight, const bf16* k_weight, int64_t N, HeadShape s) {
  const int64_t H = s.n_head + s.n_kv_head, item = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (item >= N * H) return;
  const int64_t n = item / H, h = item % H;
  const int HD = int(s.head_dim), lane = threadIdx.x % 32;
  const int64_t at = n * s.qkv_width() + h * HD;
  const bf16 *x = qkv + at, *w = h < s.n_head ? q_weight : k_weight;
  bf16* d = dqkv + at;
  float* dw = h < s.n_head ? dq_weight : dk_weight;
  const float r = rstd[item];
  float dot = 0;
  for (int c = lane; c < HD; c += 32) dot += to_float(d[c]) * to_float(w[c]) * to_float(x[c]) * r;
  const float mean = warp_sum(dot) / float(HD);
  for (int c = lane; c < HD; c += 32) {
    const float dy = to_float(d[c]), normal = to_float(x[c]) * r;
    atomicAdd(dw + c, dy * normal);
    d[c] = from_float<bf16>(r * (dy * to_float(w[c]) - normal * mean));
  }
}

inline unsigned blocks_for(int64_t N, const HeadShape& s) {
  return unsigned(ceil_div(N * (s.n_head + s.n_kv_head), warps));
}

}  // namespace head_norm
