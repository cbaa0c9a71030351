// Rung 2: the same two passes, with the cosines and sines from a table of the positions, made once when training
// begins. A token needs HD values of it, and all its heads need the same ones.
//
// Predicted: bytes as in rung 1, 4M forward and 5M backward (2M without QK-norm), and no arithmetic to speak of. The
// table adds 4HD bytes a token if a block reads it from the L2 cache once and from the L1 cache for all other heads;
// N/T tokens share a row of it, so next to nothing comes from memory. What is left besides the second pass: requests of
// 64 bytes a warp, as everywhere where a lane takes one bf16 at a time, and, backward, the atomics.
#pragma once
#include "dev/rope_qknorm/head_norm.cuh"

namespace table {

constexpr int threads = 256;

// y = x, rotated by the angle of the token's position times `direction` (1 or -1). y may be x.
__global__ void __launch_bounds__(threads)
    rotate(bf16* y, int64_t y_width, const bf16* x, int64_t x_width, const float* angles, const int32_t* positions,
           HeadShape s, float direction) {
  const int64_t n = blockIdx.x;
  const int HD = int(s.head_dim), half = HD / 2, pairs = int(s.n_head + s.n_kv_head) * half;
  const float *cosines = angles + int64_t(positions[n]) * HD, *sines = cosines + half;
  for (int i = threadIdx.x; i < pairs; i += threads) {
    const int h = i / half, c = i % half;
    const float cosine = cosines[c], sine = sines[c] * direction;
    const bf16* from = x + n * x_width + h * HD + c;
    bf16* to = y + n * y_width + h * HD + c;
    const float a = to_float(from[0]), b = to_float(from[half]);
    to[0] = from_float<bf16>(a * cosine - b * sine);
    to[half] = from_float<bf16>(b * cosine + a * sine);
  }
}

// angles: rope_table().
inline void forward(GpuBase& dev, bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight, const bf16* k_weight,
                    const float* angles, const int32_t* positions, int64_t N, HeadShape s, double eps) {
  if (q_weight)
    launch(dev, head_norm::normalise, head_norm::blocks_for(N, s), head_norm::warps * 32, 0, qk, rstd, qkv, q_weight,
           k_weight, N, s, float(eps));
  const bf16* from = q_weight ? qk : qkv;
  launch(dev, rotate, unsigned(N), threads, 0, qk, s.qk_width(), from, q_weight ? s.qk_width() : s.qkv_width(), angles,
         positions, s, 1.0f);
}

inline void backward(GpuBase& dev, bf16* dqkv, float* dq_weight, float* dk_weight, const bf16* qkv, const float* rstd,
                     const bf16* q_weight, const bf16* k_weight, const float* angles, const int32_t* positions,
                     int64_t N, HeadShape s) {
  launch(dev, rotate, unsigned(N), threads, 0, dqkv, s.qkv_width(), dqkv, s.qkv_width(), angles, positions, s, -1.0f);
  if (q_weight)
    launch(dev, head_norm::normalise_backward, head_norm::blocks_for(N, s), head_norm::warps * 32, 0, dqkv, dq_weight,
           dk_weight, qkv, rstd, q_weight, k_weight, N, s);
}

}  // namespace table
