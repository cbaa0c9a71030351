// Rung 3: norm and rotation in one pass. A warp takes a head of a token: its lanes sum the squares, and then each takes
// pairs (i, i + HD/2), normalises both values and rotates them. Between the two the head is in the L1 cache.
//
// Predicted: the least there is, 2M bytes forward and, with QK-norm, 3M backward (M = 2N(NH+NKV)HD): half and three
// fifths of rung 2, and the values are rounded once instead of twice. Requests are still of 64 bytes a warp, and a warp
// now lives for HD values only: the division that finds its token, the position, its row of the table, the sum over the
// lanes are paid for every head, one after the other. So it should come nowhere near the floor, and without QK-norm,
// where there was one pass before too, be slower than rung 2. Backward the atomics are as they were.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/rope.h"

namespace fused {

constexpr int warps = 8;

// What a warp works on: head h of token n.
struct Head {
  int64_t n;
  int h;
  const float *cosines, *sines;
  const bf16* weight;  // of its norm, or null
};
__device__ __forceinline__ Head head_of(int64_t item, const bf16* q_weight, const bf16* k_weight, const float* angles,
                                        const int32_t* positions, const HeadShape& s) {
  const int64_t H = s.n_head + s.n_kv_head, n = item / H;
  const int h = int(item - n * H);
  const float* cosines = angles + int64_t(positions[n]) * s.head_dim;
  return {n, h, cosines, cosines + s.head_dim / 2, h < s.n_head ? q_weight : k_weight};
}

__global__ void __launch_bounds__(warps * 32)
    norm_rotate(bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight, const bf16* k_weight, const float* angles,
                const int32_t* positions, int64_t N, HeadShape s, float eps) {
  const int64_t item = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (item >= N * (s.n_head + s.n_kv_head)) return;
  const int HD = int(s.head_dim), half = HD / 2, lane = threadIdx.x % 32;
  const Head head = head_of(item, q_weight, k_weight, angles, positions, s);
  const bf16 *x = qkv + head.n * s.qkv_width() + head.h * HD, *w = head.weight;
  bf16* y = qk + head.n * s.qk_width() + head.h * HD;
  float r = 1;
  if (w) {
    float squares = 0;
    for (int c = lane; c < HD; c += 32) squares += to_float(x[c]) * to_float(x[c]);
    r = 1.0f / sqrtf(warp_sum(squares) / float(HD) + eps);
    if (lane == 0) rstd[item] = r;
  }
  for (int c = lane; c < half; c += 32) {
    float a = to_float(x[c]), b = to_float(x[c + half]);
    if (w) a *= r * to_float(w[c]), b *= r * to_float(w[c + half]);
    const float cosine = head.cosines[c], sine = head.sines[c];
    y[c] = from_float<bf16>(a * cosine - b * sine);
    y[c + half] = from_float<bf16>(b * cosine + a * sine);
  }
}

// In place on dqkv. The second loop turns the gradient back once more instead of keeping it.
__global__ void __launch_bounds__(warps * 32)
    norm_rotate_backward(bf16* dqkv, float* dq_weight, float* dk_weight, const bf16* qkv, const float* rstd,
                         const bf16* q_weight, const bf16* k_weight, const float* angles, const int32_t* positions,
                         int64_t N, HeadShape s) {
  const int64_t item = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (item >= N * (s.n_head + s.n_kv_head)) return;
  const int HD = int(s.head_dim), half = HD / 2, lane = threadIdx.x % 32;
  const Head head = head_of(item, q_weight, k_weight, angles, positions, s);
  const int64_t at = head.n * s.qkv_width() + head.h * HD;
  const bf16 *x = qkv + at, *w = head.weight;
  bf16* d = dqkv + at;
  auto turned_back = [&](int c) {
    const float a = to_float(d[c]), b = to_float(d[c + half]), cosine = head.cosines[c], sine = head.sines[c];
    return float2{a * cosine + b * sine, b * cosine - a * sine};
  };
  float r = 1, mean = 0;
  if (w) {
    float dot = 0;
    for (int c = lane; c < half; c += 32) {
      const float2 g = turned_back(c);
      dot += g.x * to_float(w[c]) * to_float(x[c]) + g.y * to_float(w[c + half]) * to_float(x[c + half]);
    }
    r = rstd[item];
    mean = warp_sum(dot) * r / float(HD);
  }
  float* dw = head.h < s.n_head ? dq_weight : dk_weight;
  for (int c = lane; c < half; c += 32) {
    float2 g = turned_back(c);
    if (w) {
      const float a = to_float(x[c]) * r, b = to_float(x[c + half]) * r;
      atomicAdd(dw + c, g.x * a), atomicAdd(dw + c + half, g.y * b);
      g = {r * (g.x * to_float(w[c]) - a * mean), r * (g.y * to_float(w[c + half]) - b * mean)};
    }
    d[c] = from_float<bf16>(g.x), d[c + half] = from_float<bf16>(g.y);
  }
}

inline unsigned blocks_for(int64_t N, const HeadShape& s) {
  return unsigned(ceil_div(N * (s.n_head + s.n_kv_head), warps));
}
inline void forward(GpuBase& dev, bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight, const bf16* k_weight,
                    const float* angles, const int32_t* positions, int64_t N, HeadShape s, double eps) {
  launch(dev, norm_rotate, blocks_for(N, s), warps * 32, 0, qk, rstd, qkv, q_weight, k_weight, angles, positions, N, s,
         float(eps));
}
inline void backward(GpuBase& dev, bf16* dqkv, float* dq_weight, float* dk_weight, const bf16* qkv, const float* rstd,
                     const bf16* q_weight, const bf16* k_weight, const float* angles, const int32_t* positions,
                     int64_t N, HeadShape s) {
  launch(dev, norm_rotate_backward, blocks_for(N, s), warps * 32, 0, dqkv, dq_weight, dk_weight, qkv, rstd, q_weight,
         k_weight, angles, positions, N, s);
}

}  // namespace fused
