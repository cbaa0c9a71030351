// QK-norm and rotary embedding on the GPU: a group of L lanes a head; a lane holds W neighbouring elements of the first
// half of the head and the W that they are rotated with, in the second half.
#include "llmc/rope.h"

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_reduce.cuh"

namespace {

constexpr int threads = 256, backward_tokens = 32;  // tokens of a block whose weight gradients are summed first

__device__ float group_sum(float v, int lanes) {
  for (int step = lanes / 2; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// I pieces a lane: piece i starts at element (i*L + lane) * W of each half.
template <class Real, int W, int I>
struct HeadOf {
  struct alignas(sizeof(Real) * W) Chunk {
    Real v[W];
  };
  float a[I][W], b[I][W];  // first and second half
  int lanes, lane, half;
  __device__ HeadOf(int lanes, int half) : lanes(lanes), lane(threadIdx.x % lanes), half(half) {}
  __device__ int at(int i) const { return (i * lanes + lane) * W; }
  __device__ void load(const Real* x) {
#pragma unroll
    for (int i = 0; i < I; ++i) {
      if (at(i) >= half) {
        for (int j = 0; j < W; ++j) a[i][j] = b[i][j] = 0;
        continue;
      }
      Chunk p = *reinterpret_cast<const Chunk*>(x + at(i)), q = *reinterpret_cast<const Chunk*>(x + half + at(i));
#pragma unroll
      for (int j = 0; j < W; ++j) a[i][j] = to_float(p.v[j]), b[i][j] = to_float(q.v[j]);
    }
  }
  __device__ void store(Real* y) const {
#pragma unroll
    for (int i = 0; i < I; ++i) {
      if (at(i) >= half) continue;
      Chunk p, q;
#pragma unroll
      for (int j = 0; j < W; ++j) p.v[j] = from_float<Real>(a[i][j]), q.v[j] = from_float<Real>(b[i][j]);
      *reinterpret_cast<Chunk*>(y + at(i)) = p, *reinterpret_cast<Chunk*>(y + half + at(i)) = q;
    }
  }
  // Calls f(a, b, element of the first half); the pieces beyond the head are left out.
  template <class F>
  __device__ void each(F f) {
#pragma unroll
    for (int i = 0; i < I; ++i)
      if (at(i) < half)
#pragma unroll
        for (int j = 0; j < W; ++j) f(a[i][j], b[i][j], i, j, at(i) + j);
  }
};

template <class Real, int W, int I>
__global__ void __launch_bounds__(threads)
    rope_forward(Real* qk, float* rstd, const Real* qkv, const Real* q_weight, const Real* k_weight, const float* table,
                 const int32_t* positions, int64_t N, HeadShape heads, float eps, int lanes) {
  int HD = int(heads.head_dim), half = HD / 2, H = int(heads.n_head + heads.n_kv_head);
  int64_t item = int64_t(blockIdx.x) * (threads / lanes) + threadIdx.x / lanes;
  bool live = item < N * H;  // no early return: the lanes of a warp sum together
  int64_t n = live ? item / H : 0;
  int h = live ? int(item - n * H) : 0;
  HeadOf<Real, W, I> x(lanes, half);
  x.load(qkv + n * heads.qkv_width() + h * HD);
  const Real* w = h < heads.n_head ? q_weight : k_weight;
  if (q_weight) {
    float squares = 0;
    x.each([&](float& a, float& b, int, int, int) { squares += a * a + b * b; });
    float r = 1.0f / sqrtf(group_sum(squares, lanes) / float(HD) + eps);
    if (live && x.lane == 0) rstd[n * H + h] = r;
    x.each([&](float& a, float& b, int, int, int c) { a *= r * to_float(w[c]), b *= r * to_float(w[c + half]); });
  }
  const float* cosine = table + int64_t(positions[n]) * HD;
  x.each([&](float& a, float& b, int, int, int c) {
    float cs = cosine[c], sn = cosine[half + c], rotated = a * cs - b * sn;
    b = b * cs + a * sn, a = rotated;
  });
  if (live) x.store(qk + n * heads.qk_width() + h * HD);
}

// partial (blocks, 2, HD): weight gradients of the queries' norm and of the keys' over the tokens of a block.
template <class Real, int W, int I>
__global__ void __launch_bounds__(threads)
    rope_backward(Real* dqkv, float* partial, const Real* qkv, const float* rstd, const Real* q_weight,
                  const Real* k_weight, const float* table, const int32_t* positions, int64_t N, HeadShape heads,
                  int lanes) {
  extern __shared__ float sums[];  // (groups, 2, HD)
  int HD = int(heads.head_dim), half = HD / 2, H = int(heads.n_head + heads.n_kv_head);
  int groups = threads / lanes, group = threadIdx.x / lanes;
  int64_t first = int64_t(blockIdx.x) * backward_tokens, tokens = min(int64_t(backward_tokens), N - first);
  float dw[2][2][I][W] = {};  // [query or key][half]
  int items = int(tokens) * H;
  for (int base = 0; base < items; base += groups) {
    int item = base + group;
    bool live = item < items;
    int64_t n = first + (live ? item / H : 0);
    int h = live ? item % H : 0;
    bool query = h < heads.n_head;
    Real* dy = dqkv + n * heads.qkv_width() + h * HD;
    HeadOf<Real, W, I> d(lanes, half), x(lanes, half);
    d.load(dy);
    const float* cosine = table + int64_t(positions[n]) * HD;
    d.each([&](float& a, float& b, int, int, int c) {  // the inverse rotation
      float cs = cosine[c], sn = cosine[half + c], back = a * cs + b * sn;
      b = b * cs - a * sn, a = back;
    });
    if (q_weight) {  // RMSNorm backward
      const Real* w = query ? q_weight : k_weight;
      x.load(qkv + n * heads.qkv_width() + h * HD);
      float r = rstd[n * H + h], dot = 0;
      d.each([&](float& a, float& b, int i, int j, int c) {
        dot += a * to_float(w[c]) * x.a[i][j] + b * to_float(w[c + half]) * x.b[i][j];
      });
      float mean = group_sum(dot, lanes) * r / float(HD), counted = live ? 1.0f : 0.0f;
      d.each([&](float& a, float& b, int i, int j, int c) {
        float xa = x.a[i][j] * r, xb = x.b[i][j] * r;
        float da = counted * a * xa, db = counted * b * xb;
        dw[0][0][i][j] += query ? da : 0, dw[0][1][i][j] += query ? db : 0;
        dw[1][0][i][j] += query ? 0 : da, dw[1][1][i][j] += query ? 0 : db;
        a = r * (a * to_float(w[c]) - xa * mean), b = r * (b * to_float(w[c + half]) - xb * mean);
      });
    }
    if (live) d.store(dy);
  }
  if (!q_weight) return;
  HeadOf<Real, W, I> place(lanes, half);
  for (int part = 0; part < 2; ++part)
    place.each([&](float&, float&, int i, int j, int c) {
      sums[(group * 2 + part) * HD + c] = dw[part][0][i][j];
      sums[(group * 2 + part) * HD + half + c] = dw[part][1][i][j];
    });
  __syncthreads();
  for (int c = threadIdx.x; c < 2 * HD; c += threads) {
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += sums[g * 2 * HD + c];
    partial[int64_t(blockIdx.x) * 2 * HD + c] = sum;
  }
}

// Calls f<W, I>(lanes): 16-byte chunks and one chunk a lane where the head allows it, else single elements.
template <class Real, class F>
void with_head_shape(int64_t HD, bool packed, F f) {
  constexpr int W = Pack<Real>::n;
  int64_t half = HD / 2, lanes = half / W;
  if (packed && half % W == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0)
    return f.template operator()<W, 1>(int(lanes));
  if (HD > max_head_dim) fail("RoPE on the GPU: head size ", HD, " is too large (", max_head_dim, " at most)");
  f.template operator()<1, max_head_dim / 64>(32);
}

}  // namespace

template <class Device>
void qknorm_rope_forward(Device& dev, typename Device::Real* qk, typename Device::Acc* rstd,
                         const typename Device::Real* qkv, const typename Device::Real* q_weight,
                         const typename Device::Real* k_weight, const typename Device::Acc* table,
                         const int32_t* positions, int64_t N, HeadShape heads, double eps) {
  using Real = typename Device::Real;
  int64_t items = N * (heads.n_head + heads.n_kv_head);
  with_head_shape<Real>(heads.head_dim, packable<Real>(heads.head_dim, qk, qkv), [&]<int W, int I>(int lanes) {
    launch(dev, rope_forward<Real, W, I>, dim3(unsigned(ceil_div(items, threads / lanes))), threads, 0, qk, rstd, qkv,
           q_weight, k_weight, table, positions, N, heads, float(eps), lanes);
  });
}

template <class Device>
void qknorm_rope_backward(Device& dev, typename Device::Real* dqkv, Grad<Device> dq_weight, Grad<Device> dk_weight,
                          void* scratch, const typename Device::Real* qkv, const typename Device::Acc* rstd,
                          const typename Device::Real* q_weight, const typename Device::Real* k_weight,
                          const typename Device::Acc* table, const int32_t* positions, int64_t N, HeadShape heads) {
  using Real = typename Device::Real;
  float* partial = static_cast<float*>(scratch);
  int64_t blocks = ceil_div(N, backward_tokens), HD = heads.head_dim;
  with_head_shape<Real>(HD, packable<Real>(HD, dqkv, qkv), [&]<int W, int I>(int lanes) {
    size_t shared = q_weight ? size_t(threads / lanes) * 2 * size_t(HD) * sizeof(float) : 0;
    launch(dev, rope_backward<Real, W, I>, dim3(unsigned(blocks)), threads, shared, dqkv, partial, qkv, rstd, q_weight,
           k_weight, table, positions, N, heads, lanes);
  });
  if (!q_weight) return;
  add_partial_rows(dev, dq_weight, partial, blocks, HD, 2 * HD);
  add_partial_rows(dev, dk_weight, partial + HD, blocks, HD, 2 * HD);
}
template <class Device>
size_t qknorm_rope_backward_scratch_bytes(int64_t N, HeadShape heads) {
  return size_t(ceil_div(N, backward_tokens) * 2 * heads.head_dim) * sizeof(float);
}

#define INSTANTIATE(Real)                                                                                           \
  template void qknorm_rope_forward(Gpu<Real>&, Real*, float*, const Real*, const Real*, const Real*, const float*, \
                                    const int32_t*, int64_t, HeadShape, double);                                    \
  template void qknorm_rope_backward(Gpu<Real>&, Real*, Grad<Gpu<Real>>, Grad<Gpu<Real>>, void*, const Real*,       \
                                     const float*, const Real*, const Real*, const float*, const int32_t*, int64_t, \
                                     HeadShape);                                                                    \
  template size_t qknorm_rope_backward_scratch_bytes<Gpu<Real>>(int64_t, HeadShape);
INSTANTIATE(float)
INSTANTIATE(bf16)
