// Variant 1: a warp a row, no tiles, no tensor cores. Each warp owns one query (or, for dk and dv, one key), holds its HD
// values across the lanes, and walks over the other side one row at a time. Scores never leave registers, but every row
// of K and V is read T/2 times: what tiling is for.
#pragma once
#include "llmc/attention.h"
#include "llmc/cuda_common.cuh"

namespace naive {

// The rows that a head reads; NKV = NH.
struct Rows {
  const bf16 *qk, *qkv;
  int64_t T, NH;
  int HD;
  __device__ const bf16* q(int64_t n, int64_t h) const { return qk + (n * 2 * NH + h) * HD; }
  __device__ const bf16* k(int64_t n, int64_t h) const { return qk + (n * 2 * NH + NH + h) * HD; }
  __device__ const bf16* v(int64_t n, int64_t h) const { return qkv + (n * 3 * NH + 2 * NH + h) * HD; }
};

// HD / 32 values a lane of a row of HD.
template <int per_lane>
struct Slice {
  float value[per_lane] = {};
  __device__ void load(const bf16* row) {
    for (int i = 0; i < per_lane; ++i) value[i] = to_float(row[threadIdx.x % 32 * per_lane + i]);
  }
  __device__ void store(bf16* row) const {
    for (int i = 0; i < per_lane; ++i) row[threadIdx.x % 32 * per_lane + i] = from_float<bf16>(value[i]);
  }
  __device__ float dot(const Slice& other) const {
    float sum = 0;
    for (int i = 0; i < per_lane; ++i) sum += value[i] * other.value[i];
    return warp_sum(sum);
  }
  __device__ void add(float factor, const Slice& other) {
    for (int i = 0; i < per_lane; ++i) value[i] += factor * other.value[i];
  }
  __device__ void scale(float factor) {
    for (int i = 0; i < per_lane; ++i) value[i] *= factor;
  }
};

// Which row n = b*T + t and head h this warp owns; false past the end.
__device__ inline bool own_row(int64_t N, int64_t NH, int64_t& n, int64_t& h) {
  int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  n = warp / NH, h = warp % NH;
  return n < N;
}

template <int per_lane>
__global__ void forward(bf16* o, float* lse, Rows rows, int64_t N) {
  int64_t n, h;
  if (!own_row(N, rows.NH, n, h)) return;
  Slice<per_lane> q, k, v, out;
  q.load(rows.q(n, h));
  float maximum = -INFINITY, sum = 0, scale = rsqrtf(float(rows.HD));
  for (int64_t j = n / rows.T * rows.T; j <= n; ++j) {  // the keys of this sequence up to the query
    k.load(rows.k(j, h)), v.load(rows.v(j, h));
    float score = q.dot(k) * scale, larger = fmaxf(maximum, score);
    float p = __expf(score - larger), correction = __expf(maximum - larger);
    sum = sum * correction + p, maximum = larger;
    out.scale(correction), out.add(p, v);
  }
  out.scale(1 / sum);
  out.store(o + (n * rows.NH + h) * rows.HD);
  if (threadIdx.x % 32 == 0) lse[n * rows.NH + h] = maximum + logf(sum);
}

// The gradient of query n from all keys that it sees.
template <int per_lane>
__global__ void backward_queries(bf16* dqkv, const bf16* dout, const bf16* o, const float* lse, Rows rows, int64_t N) {
  int64_t n, h;
  if (!own_row(N, rows.NH, n, h)) return;
  int64_t at = n * rows.NH + h;
  Slice<per_lane> q, k, v, d_o, out, dq;
  q.load(rows.q(n, h)), d_o.load(dout + at * rows.HD), out.load(o + at * rows.HD);
  float D = d_o.dot(out), scale = rsqrtf(float(rows.HD)), l = lse[at];
  for (int64_t j = n / rows.T * rows.T; j <= n; ++j) {
    k.load(rows.k(j, h)), v.load(rows.v(j, h));
    float p = __expf(q.dot(k) * scale - l);
    dq.add(p * (d_o.dot(v) - D) * scale, k);
  }
  dq.store(dqkv + (n * 3 * rows.NH + h) * rows.HD);
}

// The gradients of key and value n from all queries that see them.
template <int per_lane>
__global__ void backward_keys(bf16* dqkv, const bf16* dout, const bf16* o, const float* lse, Rows rows, int64_t N) {
  int64_t n, h;
  if (!own_row(N, rows.NH, n, h)) return;
  Slice<per_lane> q, k, v, d_o, out, dk, dv;
  k.load(rows.k(n, h)), v.load(rows.v(n, h));
  float scale = rsqrtf(float(rows.HD));
  for (int64_t i = n; i < (n / rows.T + 1) * rows.T; ++i) {
    int64_t at = i * rows.NH + h;
    q.load(rows.q(i, h)), d_o.load(dout + at * rows.HD), out.load(o + at * rows.HD);
    float p = __expf(q.dot(k) * scale - lse[at]);
    dv.add(p, d_o);
    dk.add(p * (d_o.dot(v) - d_o.dot(out)) * scale, q);
  }
  dk.store(dqkv + (n * 3 * rows.NH + rows.NH + h) * rows.HD);
  dv.store(dqkv + (n * 3 * rows.NH + 2 * rows.NH + h) * rows.HD);
}

inline constexpr int block = 128;
inline unsigned warps_to_blocks(int64_t warps) { return unsigned(ceil_div(warps * 32, block)); }

inline void attention_forward(GpuBase& dev, bf16* o, float* lse, const bf16* qk, const bf16* qkv, int64_t B, int64_t T,
                              HeadShape heads) {
  auto kernel = heads.head_dim == 64 ? forward<2> : forward<4>;
  Rows rows{qk, qkv, T, heads.n_head, int(heads.head_dim)};
  launch(dev, kernel, warps_to_blocks(B * T * heads.n_head), block, 0, o, lse, rows, B * T);
}
inline void attention_backward(GpuBase& dev, bf16* dqkv, const bf16* dout, const bf16* o, const float* lse,
                               const bf16* qk, const bf16* qkv, int64_t B, int64_t T, HeadShape heads) {
  bool narrow = heads.head_dim == 64;
  Rows rows{qk, qkv, T, heads.n_head, int(heads.head_dim)};
  unsigned blocks = warps_to_blocks(B * T * heads.n_head);
  launch(dev, narrow ? backward_queries<2> : backward_queries<4>, blocks, block, 0, dqkv, dout, o, lse, rows, B * T);
  launch(dev, narrow ? backward_keys<2> : backward_keys<4>, blocks, block, 0, dqkv, dout, o, lse, rows, B * T);
}

}  // namespace naive
