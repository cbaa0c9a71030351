// Rung 1: the op as it is written in a paper. First the norm (head_norm.cuh), then the rotation in place, a block a
// token, a thread a pair of values (i, i + HD/2); the angle's cosine and sine are computed where they are needed.
//
// Predicted: with M = 2N(NH+NKV)HD, the bytes of all queries and keys, the norm reads M and writes M and so does the
// rotation: 4M, twice what one pass would take. Backward the rotation takes 2M and the norm 3M. (Without QK-norm there
// is only the rotation: 2M each way.) A pair takes a power, a cosine and a sine in fp32, some 100 instructions
// together, for 8 bytes. At 200 operations a pair that is M/4 * 200 = 50M operations; at 20 operations a byte, the
// ratio of an H100's CUDA cores to its memory, worth 2.5M bytes: arithmetic and memory would take about the same time,
// and rotation is bound by the arithmetic. Backward the weights' gradients are N(NH+NKV)HD atomic additions to 2HD
// addresses, which no number here predicts, and which take longer than the rest.
#pragma once
#include "dev/rope_qknorm/head_norm.cuh"

namespace two_passes {

constexpr int threads = 256;

// y = x, heads of `width` a token, rotated by the angle of its position times `direction` (1 or -1). y may be x.
__global__ void __launch_bounds__(threads) rotate(bf16* y, int64_t y_width, const bf16* x, int64_t x_width,
                                                  const int32_t* positions, HeadShape s, float theta, float direction) {
  const int64_t n = blockIdx.x;
  const int HD = int(s.head_dim), half = HD / 2, pairs = int(s.n_head + s.n_kv_head) * half;
  const float position = float(positions[n]);
  for (int i = threadIdx.x; i < pairs; i += threads) {
    const int h = i / half, c = i % half;
    float cosine, sine;
    sincosf(position * powf(theta, -2.0f * float(c) / float(HD)), &sine, &cosine);
    sine *= direction;
    const bf16* from = x + n * x_width + h * HD + c;
    bf16* to = y + n * y_width + h * HD + c;
    const float a = to_float(from[0]), b = to_float(from[half]);
    to[0] = from_float<bf16>(a * cosine - b * sine);
    to[half] = from_float<bf16>(b * cosine + a * sine);
  }
}

inline void forward(GpuBase& dev, bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight, const bf16* k_weight,
                    double theta, const int32_t* positions, int64_t N, HeadShape s, double eps) {
  if (q_weight)
    launch(dev, head_norm::normalise, head_norm::blocks_for(N, s), head_norm::warps * 32, 0, qk, rstd, qkv, q_weight,
           k_weight, N, s, float(eps));
  const bf16* from = q_weight ? qk : qkv;
  launch(dev, rotate, unsigned(N), threads, 0, qk, s.qk_width(), from, q_weight ? s.qk_width() : s.qkv_width(),
         positions, s, float(theta), 1.0f);
}

inline void backward(GpuBase& dev, bf16* dqkv, float* dq_weight, float* dk_weight, const bf16* qkv, const float* rstd,
                     const bf16* q_weight, const bf16* k_weight, double theta, const int32_t* positions, int64_t N,
                     HeadShape s) {
  launch(dev, rotate, unsigned(N), threads, 0, dqkv, s.qkv_width(), dqkv, s.qkv_width(), positions, s, float(theta),
         -1.0f);
  if (q_weight)
    launch(dev, head_norm::normalise_backward, head_norm::blocks_for(N, s), head_norm::warps * 32, 0, dqkv, dq_weight,
           dk_weight, qkv, rstd, q_weight, k_weight, N, s);
}

}  // namespace two_passes
