// Rung 2: one kernel and no matrix. A warp owns a query, holds its HD values across the lanes, and walks over the keys.
// The softmax is computed on the way (Milakov and Gimelshein 2018): sum and output are relative to the largest score so
// far, and are multiplied by exp(old maximum - new maximum) whenever a larger one comes.
//
// Predicted: global memory gives Q, K, V and takes O, once each; keys and values come from the caches for all but the
// first query. The limit is the work around a key: a score is a sum over 32 lanes, five shuffles at one a clock of a
// multiprocessor, and some thirty instructions in all at four a clock, 8 clocks for 2*HD multiply-adds of which the
// CUDA cores do 128 a clock. An eighth of their rate at HD 64, a fifth at HD 128. Measured: half of that, and slower
// than rung 1. As compiled a key takes 45 instructions (HD 64), and each key's maximum waits for the one before.
#pragma once
#include "llmc/attention_tile.cuh"

namespace online_softmax {
using attention_tile::Sizes;

// A row of HD values; lane l holds columns 64*i + 2*l and the one after it.
template <int HD>
struct Row {
  float2 v[HD / 64] = {};
  __device__ void load(const bf16* row, int lane) {
#pragma unroll
    for (int i = 0; i < HD / 64; ++i) v[i] = unpack_bf16(reinterpret_cast<const uint32_t*>(row)[32 * i + lane]);
  }
  __device__ void store(bf16* row, float factor, int lane) const {
#pragma unroll
    for (int i = 0; i < HD / 64; ++i)
      reinterpret_cast<uint32_t*>(row)[32 * i + lane] = pack_bf16(v[i].x * factor, v[i].y * factor);
  }
  __device__ float dot(const Row& other) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < HD / 64; ++i) sum = fmaf(v[i].x, other.v[i].x, fmaf(v[i].y, other.v[i].y, sum));
    return warp_sum(sum);
  }
  // this * old + other * weight
  __device__ void blend(float old, float weight, const Row& other) {
#pragma unroll
    for (int i = 0; i < HD / 64; ++i)
      v[i] = {fmaf(v[i].x, old, weight * other.v[i].x), fmaf(v[i].y, old, weight * other.v[i].y)};
  }
};

template <int HD>
__global__ void forward_kernel(bf16* o, float* lse, const bf16* qk, const bf16* qkv, Sizes size, float scale) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;  // (B, NH, T): neighbours share keys
  const int lane = threadIdx.x % 32;
  if (row >= int64_t(size.B) * size.NH * size.T) return;
  const int query = int(row % size.T), h = int(row / size.T % size.NH), kv = h / (size.NH / size.NKV);
  const int64_t n0 = row / size.T / size.NH * size.T, n = n0 + query;
  const bf16* k_row = qk + n0 * size.qk_stride + (size.NH + kv) * HD;
  const bf16* v_row = qkv + n0 * size.qkv_stride + (size.NH + size.NKV + kv) * HD;
  Row<HD> q, k, v, out;
  q.load(qk + n * size.qk_stride + h * HD, lane);
  float maximum = -INFINITY, sum = 0;
#pragma unroll 4
  for (int key = 0; key <= query; ++key) {
    k.load(k_row + key * size.qk_stride, lane), v.load(v_row + key * size.qkv_stride, lane);
    const float score = q.dot(k) * scale, larger = fmaxf(maximum, score);
    const float p = __expf(score - larger), correction = __expf(maximum - larger);
    maximum = larger, sum = fmaf(sum, correction, p);
    out.blend(correction, p, v);
  }
  out.store(o + n * size.o_stride + h * HD, 1 / sum, lane);
  if (lane == 0) lse[n * size.NH + h] = maximum + logf(sum);
}

// HD is 64 or 128.
inline void attention_forward(Gpu<bf16>& dev, bf16* o, float* lse, void*, const bf16* qk, const bf16* qkv, int64_t B,
                              int64_t T, HeadShape heads) {
  launch(dev, heads.head_dim == 64 ? forward_kernel<64> : forward_kernel<128>,
         dim3(unsigned(ceil_div(B * T * heads.n_head, 4))), 128, 0, o, lse, qk, qkv, Sizes(B, T, heads),
         float(1 / std::sqrt(double(heads.head_dim))));
}

}  // namespace online_softmax
