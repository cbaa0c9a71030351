// Rung 4: 16 bytes a lane. A group of HD/16 lanes takes a head: a lane holds eight neighbours of its first half and the
// eight that they are rotated with, so a warp has four or eight heads at a time, sums over two or three shuffles, and
// reads a head once. Weights and angles are loaded 16 bytes at a time too.
//
// Backward the weights' gradients of 32 tokens are added up in registers, then over the groups of the block and over
// the blocks, in a fixed order: the same bits every time, and no atomics.
//
// Predicted: the same bytes as rung 3, 2M forward and 3M backward with QK-norm (M = 2N(NH+NKV)HD), and near their time
// without QK-norm. With it each head still waits for its position, then for its row of the table, and loads 6HD bytes
// of angles and weights from the caches for the 2HD of its own.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/cuda_reduce.cuh"
#include "llmc/rope.h"

namespace group_a_head {

constexpr int threads = 256, block_tokens = 32;

// A lane's part of a row of HD elements: a chunk of the first half, and the one opposite to it.
template <class Real, int chunks = 8 / Pack<Real>::n>
struct Part {
  Pack<Real> low[chunks] = {}, high[chunks] = {};
  __device__ __forceinline__ void load(const Real* low_half, int half) {
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      low[i] = reinterpret_cast<const Pack<Real>*>(low_half)[i];
      high[i] = reinterpret_cast<const Pack<Real>*>(low_half + half)[i];
    }
  }
  __device__ __forceinline__ float2 operator[](int j) const {
    constexpr int n = Pack<Real>::n;
    return {low[j / n][j % n], high[j / n][j % n]};
  }
};
__device__ __forceinline__ void store(bf16* low_half, int half, const float2 (&pair)[8]) {
  Pack<bf16> low, high;
#pragma unroll
  for (int j = 0; j < 8; ++j) low.set(j, pair[j].x), high.set(j, pair[j].y);
  *reinterpret_cast<Pack<bf16>*>(low_half) = low, *reinterpret_cast<Pack<bf16>*>(low_half + half) = high;
}

template <int lanes>
__device__ __forceinline__ float sum_over(float v) {
#pragma unroll
  for (int step = lanes / 2; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

template <int HD>
__global__ void __launch_bounds__(threads)
    norm_rotate(bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight, const bf16* k_weight, const float* angles,
                const int32_t* positions, int64_t N, HeadShape s, float eps) {
  constexpr int lanes = HD / 16, half = HD / 2;
  const int64_t H = s.n_head + s.n_kv_head, item = int64_t(blockIdx.x) * (threads / lanes) + threadIdx.x / lanes;
  const bool live = item < N * H;  // no early return: the lanes of a warp sum together
  const int64_t n = live ? item / H : 0, h = live ? item % H : 0;
  const int c = int(threadIdx.x) % lanes * 8;
  Part<bf16> x, weight;
  Part<float> angle;
  x.load(qkv + n * s.qkv_width() + h * HD + c, half);
  angle.load(angles + int64_t(positions[n]) * HD + c, half);
  float r = 1;
  if (q_weight) {
    weight.load((h < s.n_head ? q_weight : k_weight) + c, half);
    float squares = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += x[j].x * x[j].x + x[j].y * x[j].y;
    r = 1.0f / sqrtf(sum_over<lanes>(squares) / float(HD) + eps);
    if (live && c == 0) rstd[item] = r;
  }
  float2 y[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float a = x[j].x, b = x[j].y;
    if (q_weight) a *= r * weight[j].x, b *= r * weight[j].y;
    y[j] = {a * angle[j].x - b * angle[j].y, b * angle[j].x + a * angle[j].y};
  }
  if (live) store(qk + n * s.qk_width() + h * HD + c, half, y);
}

// partial (blocks, 2, HD): the gradients of the queries' weight and of the keys' over the tokens of a block.
template <int HD>
__global__ void __launch_bounds__(threads)
    norm_rotate_backward(bf16* dqkv, float* partial, const bf16* qkv, const float* rstd, const bf16* q_weight,
                         const bf16* k_weight, const float* angles, const int32_t* positions, int64_t N, HeadShape s) {
  constexpr int lanes = HD / 16, half = HD / 2, groups = threads / lanes;
  __shared__ float sums[groups][2][HD];
  const int H = int(s.n_head + s.n_kv_head), c = int(threadIdx.x) % lanes * 8, group = int(threadIdx.x) / lanes;
  const int64_t first = int64_t(blockIdx.x) * block_tokens;
  const int items = int(min(int64_t(block_tokens), N - first)) * H;
  float2 dw[2][8] = {};  // of queries and keys
  for (int base = 0; base < items; base += groups) {
    const int item = base + group;
    const bool live = item < items;
    const int64_t n = first + (live ? item / H : 0);
    const int h = live ? item % H : 0;
    const bool query = h < s.n_head;
    const int64_t at = n * s.qkv_width() + h * HD + c;
    Part<bf16> d, x, weight;  // zeros where no head is left: they add nothing to the sums
    Part<float> angle;
    if (live) d.load(dqkv + at, half), angle.load(angles + int64_t(positions[n]) * HD + c, half);
    float2 g[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)  // the inverse rotation
      g[j] = {d[j].x * angle[j].x + d[j].y * angle[j].y, d[j].y * angle[j].x - d[j].x * angle[j].y};
    if (q_weight) {
      weight.load((query ? q_weight : k_weight) + c, half);
      if (live) x.load(qkv + at, half);
      const float r = live ? rstd[n * H + h] : 0;
      float dot = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) dot += g[j].x * weight[j].x * x[j].x + g[j].y * weight[j].y * x[j].y;
      const float mean = sum_over<lanes>(dot) * r / float(HD);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float a = x[j].x * r, b = x[j].y * r;
        dw[0][j].x += query ? g[j].x * a : 0, dw[0][j].y += query ? g[j].y * b : 0;
        dw[1][j].x += query ? 0 : g[j].x * a, dw[1][j].y += query ? 0 : g[j].y * b;
        g[j] = {r * (g[j].x * weight[j].x - a * mean), r * (g[j].y * weight[j].y - b * mean)};
      }
    }
    if (live) store(dqkv + at, half, g);
  }
  if (!q_weight) return;
  for (int part = 0; part < 2; ++part)
    for (int j = 0; j < 8; ++j)
      sums[group][part][c + j] = dw[part][j].x, sums[group][part][half + c + j] = dw[part][j].y;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * HD; i += threads) {
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += sums[g][i / HD][i % HD];
    partial[int64_t(blockIdx.x) * 2 * HD + i] = sum;
  }
}

// Calls f<HD>() for the head sizes there are here.
template <class F>
void with_head_size(int64_t HD, F f) {
  if (HD == 64) return f.template operator()<64>();
  if (HD != 128) fail("rope_qknorm 04_group_a_head: heads of ", HD, " values");
  f.template operator()<128>();
}

inline void forward(GpuBase& dev, bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight, const bf16* k_weight,
                    const float* angles, const int32_t* positions, int64_t N, HeadShape s, double eps) {
  with_head_size(s.head_dim, [&]<int HD>() {
    launch(dev, norm_rotate<HD>, unsigned(ceil_div(N * (s.n_head + s.n_kv_head), threads / (HD / 16))), threads, 0, qk,
           rstd, qkv, q_weight, k_weight, angles, positions, N, s, float(eps));
  });
}

// Floats of `partial`.
inline int64_t scratch_size(int64_t N, const HeadShape& s) { return ceil_div(N, block_tokens) * 2 * s.head_dim; }
inline void backward(Gpu<bf16>& dev, bf16* dqkv, Grad<Gpu<bf16>> dq_weight, Grad<Gpu<bf16>> dk_weight, float* partial,
                     const bf16* qkv, const float* rstd, const bf16* q_weight, const bf16* k_weight,
                     const float* angles, const int32_t* positions, int64_t N, HeadShape s) {
  const int64_t blocks = ceil_div(N, block_tokens);
  with_head_size(s.head_dim, [&]<int HD>() {
    launch(dev, norm_rotate_backward<HD>, unsigned(blocks), threads, 0, dqkv, partial, qkv, rstd, q_weight, k_weight,
           angles, positions, N, s);
  });
  if (!q_weight) return;
  add_partial_rows(dev, dq_weight, partial, blocks, s.head_dim, 2 * s.head_dim);
  add_partial_rows(dev, dk_weight, partial + s.head_dim, blocks, s.head_dim, 2 * s.head_dim);
}

}  // namespace group_a_head
