// Attention in float, for debugging, and decoding in both types: plain loops, a warp a row, exact exp and log.
//
// A warp takes 32 rows of the other side at a time. First each lane computes the score of one of them; then, row after
// row, all lanes share out the columns of what is added up. Every sum has one fixed order.
#include "llmc/attention_tile.cuh"

namespace {
using attention_tile::Sizes;

constexpr int warps_per_block = 4, decode_warps = 8;

// Sum of x[c] * y[c]; `packed`: y can be read 16 bytes at a time.
template <class Real>
__device__ float dot(const float* x, const Real* y, int HD, bool packed) {
  float sum = 0;
  if (packed) {
    for (int c = 0; c < HD; c += Pack<Real>::n) {
      const Pack<Real> part = *reinterpret_cast<const Pack<Real>*>(y + c);
#pragma unroll
      for (int i = 0; i < Pack<Real>::n; ++i) sum = fmaf(x[c + i], part[i], sum);
    }
  } else {
    for (int c = 0; c < HD; ++c) sum = fmaf(x[c], to_float(y[c]), sum);
  }
  return sum;
}

// A row of HD values shared out over the lanes of a warp: lane l holds columns l, l + 32, ...
template <int per_lane>
struct LaneRow {
  float v[per_lane] = {};
  // v += weight * row
  template <class Real>
  __device__ __forceinline__ void add(float weight, const Real* row, int HD, int lane) {
#pragma unroll
    for (int i = 0; i < per_lane; ++i)
      if (int c = 32 * i + lane; c < HD) v[i] = fmaf(weight, to_float(row[c]), v[i]);
  }
  template <class T>
  __device__ __forceinline__ void store(T* row, float factor, int HD, int lane) const {
#pragma unroll
    for (int i = 0; i < per_lane; ++i)
      if (int c = 32 * i + lane; c < HD) row[c] = from_float<T>(v[i] * factor);
  }
};

// A row of values as floats in the warp's part of shared memory.
template <class Real>
__device__ __forceinline__ void spread(float* to, const Real* row, int HD, int lane) {
  for (int c = lane; c < HD; c += 32) to[c] = to_float(row[c]);
}

// What a warp knows of a query after some of its keys: relative to the largest score so far.
template <int per_lane>
struct RunningRow {
  float maximum = -INFINITY, sum = 0;
  LaneRow<per_lane> out;

  // Keys first .. first + 31, as far as they are below `end`; there is at least one.
  template <class Real>
  __device__ void attend(const float* q, const Real* K, int64_t k_stride, const Real* V, int64_t v_stride, int first,
                         int end, int HD, float scale, bool packed, int lane) {
    const int key = first + lane, keys = min(32, end - first);
    const float s = key < end ? dot(q, K + key * k_stride, HD, packed) * scale : -INFINITY;
    const float now = fmaxf(maximum, warp_max(s)), correction = expf(maximum - now);
    float p = expf(s - now);
    maximum = now;
    sum = fmaf(sum, correction, warp_sum(p));
    p = rounded<Real>(p);
#pragma unroll
    for (int i = 0; i < per_lane; ++i) out.v[i] *= correction;
#pragma unroll 4
    for (int j = 0; j < keys; ++j) out.add(__shfl_sync(~0u, p, j), V + (first + j) * v_stride, HD, lane);
  }
};

// Calls f(std::integral_constant<int, per_lane>) with enough columns a lane.
template <class F>
void with_columns(int64_t HD, F f) {
  if (HD > max_head_dim) fail("attention: head size ", HD, " is larger than the largest supported, ", max_head_dim);
  if (HD <= 32) return f(std::integral_constant<int, 1>());
  if (HD <= 64) return f(std::integral_constant<int, 2>());
  if (HD <= 128) return f(std::integral_constant<int, 4>());
  f(std::integral_constant<int, max_head_dim / 32>());
}

// A warp a query of a head; t runs fastest, so that neighbours read the same keys.
template <int per_lane>
__global__ void plain_forward_kernel(float* o, float* lse, const float* qk, const float* qkv, Sizes size, int HD,
                                     float scale, bool packed) {
  extern __shared__ float rows[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * warps_per_block + warp;
  if (row >= int64_t(size.B) * size.NH * size.T) return;
  const int t = int(row % size.T), h = int(row / size.T % size.NH), kv = h / (size.NH / size.NKV);
  const int64_t n0 = row / size.T / size.NH * size.T, n = n0 + t;
  float* q = rows + warp * HD;
  spread(q, qk + n * size.qk_stride + h * HD, HD, lane);
  __syncwarp();
  const float* K = qk + n0 * size.qk_stride + (size.NH + kv) * HD;
  const float* V = qkv + n0 * size.qkv_stride + (size.NH + size.NKV + kv) * HD;
  RunningRow<per_lane> state;
  for (int first = 0; first <= t; first += 32)
    state.attend(q, K, size.qk_stride, V, size.qkv_stride, first, t + 1, HD, scale, packed, lane);
  state.out.store(o + n * size.o_stride + h * HD, 1.0f / state.sum, HD, lane);
  if (lane == 0) lse[n * size.NH + h] = state.maximum + logf(state.sum);
}

// D and dQ, a warp a query of a head. D (B*NH, T).
template <int per_lane>
__global__ void plain_dq_kernel(float* dqkv, float* D, const float* dout, const float* o, const float* lse,
                                const float* qk, const float* qkv, Sizes size, int HD, float scale, bool packed) {
  extern __shared__ float rows[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * warps_per_block + warp;
  if (row >= int64_t(size.B) * size.NH * size.T) return;
  const int t = int(row % size.T), h = int(row / size.T % size.NH), kv = h / (size.NH / size.NKV);
  const int64_t n0 = row / size.T / size.NH * size.T, n = n0 + t, at = n * size.o_stride + h * HD;
  float *q = rows + warp * 2 * HD, *d_o = q + HD;
  spread(q, qk + n * size.qk_stride + h * HD, HD, lane);
  spread(d_o, dout + at, HD, lane);
  __syncwarp();
  float d = 0;
  for (int c = lane; c < HD; c += 32) d = fmaf(d_o[c], o[at + c], d);
  d = warp_sum(d);
  if (lane == 0) D[row] = d;
  const float* K = qk + n0 * size.qk_stride + (size.NH + kv) * HD;
  const float* V = qkv + n0 * size.qkv_stride + (size.NH + size.NKV + kv) * HD;
  const float l = lse[n * size.NH + h];
  LaneRow<per_lane> dq;
  for (int first = 0; first <= t; first += 32) {
    const int key = first + lane;
    float ds = 0;
    if (key <= t) {
      float p = expf(dot(q, K + key * size.qk_stride, HD, packed) * scale - l);
      ds = p * (dot(d_o, V + key * size.qkv_stride, HD, packed) - d) * scale;
    }
    for (int j = 0; j < min(32, t + 1 - first); ++j)
      dq.add(__shfl_sync(~0u, ds, j), K + (first + j) * size.qk_stride, HD, lane);
  }
  dq.store(dqkv + n * size.qkv_stride + h * HD, 1, HD, lane);
}

// dK and dV, a warp a key of a key/value head: over the query heads of its group and the queries from the key on.
template <int per_lane>
__global__ void plain_dkv_kernel(float* dqkv, const float* D, const float* dout, const float* lse, const float* qk,
                                 const float* qkv, Sizes size, int HD, float scale, bool packed) {
  extern __shared__ float rows[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * warps_per_block + warp;
  if (row >= int64_t(size.B) * size.NKV * size.T) return;
  const int key = int(row % size.T), kv = int(row / size.T % size.NKV), group = size.NH / size.NKV;
  const int64_t b = row / size.T / size.NKV, n0 = b * size.T;
  float *k = rows + warp * 2 * HD, *v = k + HD;
  spread(k, qk + (n0 + key) * size.qk_stride + (size.NH + kv) * HD, HD, lane);
  spread(v, qkv + (n0 + key) * size.qkv_stride + (size.NH + size.NKV + kv) * HD, HD, lane);
  __syncwarp();
  LaneRow<per_lane> dk, dv;
  for (int h = kv * group; h < (kv + 1) * group; ++h) {
    const float *Q = qk + n0 * size.qk_stride + h * HD, *dO = dout + n0 * size.o_stride + h * HD;
    for (int first = key; first < size.T; first += 32) {
      const int t = first + lane;
      float p = 0, ds = 0;
      if (t < size.T) {
        p = expf(dot(k, Q + t * size.qk_stride, HD, packed) * scale - lse[(n0 + t) * size.NH + h]);
        ds = p * (dot(v, dO + t * size.o_stride, HD, packed) - D[(b * size.NH + h) * size.T + t]) * scale;
      }
      for (int j = 0; j < min(32, size.T - first); ++j) {
        dv.add(__shfl_sync(~0u, p, j), dO + (first + j) * size.o_stride, HD, lane);
        dk.add(__shfl_sync(~0u, ds, j), Q + (first + j) * size.qk_stride, HD, lane);
      }
    }
  }
  float* to = dqkv + (n0 + key) * size.qkv_stride;
  dk.store(to + (size.NH + kv) * HD, 1, HD, lane);
  dv.store(to + (size.NH + size.NKV + kv) * HD, 1, HD, lane);
}

// ---- decoding ----

// Stores the new key and value of sequence blockIdx.x; a kernel of its own, as all heads of a group read them.
template <class Real>
__global__ void store_kv_kernel(Real* k_cache, Real* v_cache, const Real* qk, const Real* qkv, const int32_t* positions,
                                int64_t S, Sizes size, int HD) {
  const int64_t b = blockIdx.x, width = int64_t(size.NKV) * HD, to = (b * S + positions[b]) * width;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    k_cache[to + i] = qk[b * size.qk_stride + size.NH * HD + i];
    v_cache[to + i] = qkv[b * size.qkv_stride + (size.NH + size.NKV) * HD + i];
  }
}

// A block a head of a sequence. Its warps take 32 keys at a time in turn; their results are combined in their order.
template <class Real, int per_lane>
__global__ void decode_kernel(Real* o, const Real* k_cache, const Real* v_cache, const Real* qk,
                              const int32_t* positions, int64_t S, Sizes size, int HD, float scale, bool packed) {
  extern __shared__ float rows[];
  float *q = rows, *maxima = q + HD, *sums = maxima + decode_warps, *outs = sums + decode_warps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = blockIdx.x % size.NH;
  const int64_t b = blockIdx.x / size.NH, width = int64_t(size.NKV) * HD;
  const int64_t cache = b * S * width + h / (size.NH / size.NKV) * HD;
  const int keys = positions[b] + 1;
  if (warp == 0) spread(q, qk + b * size.qk_stride + h * HD, HD, lane);
  __syncthreads();
  RunningRow<per_lane> state;
  for (int first = 32 * warp; first < keys; first += 32 * decode_warps)
    state.attend(q, k_cache + cache, width, v_cache + cache, width, first, keys, HD, scale, packed, lane);
  if (lane == 0) maxima[warp] = state.maximum, sums[warp] = state.sum;
  state.out.store(outs + warp * HD, 1, HD, lane);
  __syncthreads();
  // A warp without keys has the maximum minus infinity, hence the weight 0.
  float largest = maxima[0], sum = 0;
  for (int w = 1; w < decode_warps; ++w) largest = fmaxf(largest, maxima[w]);
  for (int w = 0; w < decode_warps; ++w) sum = fmaf(sums[w], expf(maxima[w] - largest), sum);
  for (int c = threadIdx.x; c < HD; c += blockDim.x) {
    float value = 0;
    for (int w = 0; w < decode_warps; ++w) value = fmaf(outs[w * HD + c], expf(maxima[w] - largest), value);
    o[b * size.o_stride + h * HD + c] = from_float<Real>(value / sum);
  }
}

float scale_of(int64_t HD) { return float(1 / std::sqrt(double(HD))); }
dim3 plain_grid(int64_t rows) { return dim3(unsigned(ceil_div(rows, warps_per_block))); }
}  // namespace

template <>
void attention_forward(Gpu<float>& dev, float* o, float* lse, void*, const float* qk, const float* qkv, int64_t B,
                       int64_t T, HeadShape heads) {
  const int HD = int(heads.head_dim);
  with_columns(HD, [&](auto per_lane) {
    launch(dev, plain_forward_kernel<decltype(per_lane)::value>, plain_grid(B * heads.n_head * T), 32 * warps_per_block,
           warps_per_block * HD * sizeof(float), o, lse, qk, qkv, Sizes(B, T, heads), HD, scale_of(HD),
           packable<float>(HD, qk, qkv));
  });
}

template <>
void attention_backward(Gpu<float>& dev, float* dqkv, void* scratch, const float* dout, const float* o,
                        const float* lse, const float* qk, const float* qkv, int64_t B, int64_t T, HeadShape heads) {
  const int HD = int(heads.head_dim);
  const size_t shared_bytes = warps_per_block * 2 * HD * sizeof(float);
  const Sizes size(B, T, heads);
  const bool packed = packable<float>(HD, qk, qkv, dout);
  float* D = static_cast<float*>(scratch);
  with_columns(HD, [&](auto per_lane) {
    launch(dev, plain_dq_kernel<decltype(per_lane)::value>, plain_grid(B * heads.n_head * T), 32 * warps_per_block,
           shared_bytes, dqkv, D, dout, o, lse, qk, qkv, size, HD, scale_of(HD), packed);
    launch(dev, plain_dkv_kernel<decltype(per_lane)::value>, plain_grid(B * heads.n_kv_head * T), 32 * warps_per_block,
           shared_bytes, dqkv, D, dout, lse, qk, qkv, size, HD, scale_of(HD), packed);
  });
}

template <>
size_t attention_scratch_bytes<Gpu<float>>(int64_t B, int64_t T, HeadShape heads) {
  return std::max<size_t>(16, size_t(B * heads.n_head * T) * sizeof(float));
}

namespace {
template <class Real>
void decode(Gpu<Real>& dev, Real* o, Real* k_cache, Real* v_cache, const Real* qk, const Real* qkv,
            const int32_t* positions, int64_t B, int64_t S, HeadShape heads) {
  const int HD = int(heads.head_dim);
  const Sizes size(B, 1, heads);
  with_columns(HD, [&](auto per_lane) {
    launch(dev, store_kv_kernel<Real>, dim3(unsigned(B)), 256, 0, k_cache, v_cache, qk, qkv, positions, S, size, HD);
    launch(dev, decode_kernel<Real, decltype(per_lane)::value>, dim3(unsigned(B * heads.n_head)), 32 * decode_warps,
           (HD + decode_warps * (HD + 2)) * sizeof(float), o, k_cache, v_cache, qk, positions, S, size, HD,
           scale_of(HD), packable<Real>(HD, k_cache));
  });
}
}  // namespace

#define INSTANTIATE(Real)                                                                                              \
  template <>                                                                                                          \
  void attention_decode(Gpu<Real>& dev, Real* o, Real* k_cache, Real* v_cache, void*, const Real* qk, const Real* qkv, \
                        const int32_t* positions, int64_t B, int64_t S, HeadShape heads) {                             \
    decode(dev, o, k_cache, v_cache, qk, qkv, positions, B, S, heads);                                                 \
  }                                                                                                                    \
  template <>                                                                                                          \
  size_t attention_decode_scratch_bytes<Gpu<Real>>(int64_t, int64_t) {                                                 \
    return 16; /* none is used */                                                                                      \
  }
INSTANTIATE(float)
INSTANTIATE(bf16)
