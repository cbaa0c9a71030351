// QK-norm and rotary embedding on the GPU. All heads of a token are turned by the same angles, and all its queries (all
// its keys) have the same weight. So a group of lanes takes several heads of one token, queries and keys apart, and
// loads once, into registers, what they share. A head is 16 bytes a lane of each of its halves where its size allows
// that, else up to eight single elements.
#include "llmc/rope.h"

#include <algorithm>

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_reduce.cuh"

namespace {

constexpr int threads = 128;
constexpr int forward_batch = 4;                           // heads whose loads are on their way together
constexpr int resident = 3, most_blocks = 132 * resident;  // backward: blocks of a multiprocessor, and of an H100

__device__ __forceinline__ float group_sum(float v, int lanes) {
  for (int step = lanes / 2; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// A lane of the group that holds a row of two halves.
struct Lane {
  int lanes, index, half;
  __device__ Lane(int lanes, int half) : lanes(lanes), index(int(threadIdx.x) % lanes), half(half) {}
};

// What a lane holds of a row of HD elements: of each half I pieces of W neighbours, or zeros beyond its end. The two
// halves of a row of the table are cosines and sines.
template <class Real, int W, int I>
struct Row {
  struct alignas(sizeof(Real) * W < 16 ? sizeof(Real) * W : 16) Piece {
    Real v[W];
  };
  Piece low[I] = {}, high[I] = {};
  // Element of the half at which piece i starts, and whether there is one: with W > 1 the group is as wide as the half.
  static __device__ __forceinline__ int at(const Lane& l, int i) { return (i * l.lanes + l.index) * W; }
  static __device__ __forceinline__ bool inside(const Lane& l, int i) { return W > 1 || at(l, i) < l.half; }
  __device__ __forceinline__ void load(const Real* row, const Lane& l) {
#pragma unroll
    for (int i = 0; i < I; ++i)
      if (inside(l, i)) {
        low[i] = *reinterpret_cast<const Piece*>(row + at(l, i));
        high[i] = *reinterpret_cast<const Piece*>(row + l.half + at(l, i));
      }
  }
  __device__ __forceinline__ void store(Real* row, const Lane& l) const {
#pragma unroll
    for (int i = 0; i < I; ++i)
      if (inside(l, i)) {
        *reinterpret_cast<Piece*>(row + at(l, i)) = low[i];
        *reinterpret_cast<Piece*>(row + l.half + at(l, i)) = high[i];
      }
  }
  __device__ __forceinline__ float a(int j) const { return to_float(low[j / W].v[j % W]); }
  __device__ __forceinline__ float b(int j) const { return to_float(high[j / W].v[j % W]); }
  __device__ __forceinline__ void set(int j, float a, float b) {
    low[j / W].v[j % W] = from_float<Real>(a), high[j / W].v[j % W] = from_float<Real>(b);
  }
};

// A block: 128/lanes tokens, up to four heads of each, all queries or all keys.
template <class Real, int W, int I, bool norm>
__global__ void __launch_bounds__(threads)
    rope_forward(Real* qk, float* rstd, const Real* qkv, const Real* q_weight, const Real* k_weight, const float* table,
                 const int32_t* positions, int64_t N, HeadShape s, float eps, int lanes) {
  constexpr int pairs = W * I;  // of a lane, in a head
  const int HD = int(s.head_dim), H = int(s.n_head + s.n_kv_head);
  const unsigned q_batches = unsigned(ceil_div(s.n_head, forward_batch)),
                 batches = q_batches + unsigned(ceil_div(s.n_kv_head, forward_batch)), batch = blockIdx.x % batches;
  const bool query = batch < q_batches;
  const int first = query ? int(batch) * forward_batch : int(s.n_head) + int(batch - q_batches) * forward_batch,
            heads = min(forward_batch, (query ? int(s.n_head) : H) - first);
  const int64_t n = int64_t(blockIdx.x / batches) * (threads / lanes) + threadIdx.x / lanes;
  const bool live = n < N;  // no early return: the lanes of a warp sum together
  const Lane lane(lanes, HD / 2);

  Row<Real, W, I> x[forward_batch], weight;
  Row<float, W, I> angle;
  if (live) {
    const Real* from = qkv + n * s.qkv_width() + first * HD;
#pragma unroll
    for (int i = 0; i < forward_batch; ++i)
      if (i < heads) x[i].load(from + i * HD, lane);
    angle.load(table + int64_t(positions[n]) * HD, lane);
  }
  if constexpr (norm) weight.load(query ? q_weight : k_weight, lane);
  Real* to = qk + n * s.qk_width() + first * HD;
#pragma unroll
  for (int i = 0; i < forward_batch; ++i) {
    if (i >= heads) break;
    float r = 1;
    if constexpr (norm) {
      float squares = 0;
#pragma unroll
      for (int j = 0; j < pairs; ++j) squares += x[i].a(j) * x[i].a(j) + x[i].b(j) * x[i].b(j);
      r = 1.0f / sqrtf(group_sum(squares, lanes) / float(HD) + eps);
      if (live && lane.index == 0) rstd[n * H + first + i] = r;
    }
#pragma unroll
    for (int j = 0; j < pairs; ++j) {
      float a = x[i].a(j), b = x[i].b(j);
      if constexpr (norm) a *= r * weight.a(j), b *= r * weight.b(j);
      x[i].set(j, a * angle.a(j) - b * angle.b(j), b * angle.a(j) + a * angle.b(j));
    }
    if (live) x[i].store(to + i * HD, lane);
  }
}

// A block: a range of tokens, first their queries, then their keys, a token a group at a time. partial (2, blocks, HD):
// the gradients of both weights over the tokens of a block.
template <class Real, int W, int I, bool norm>
__global__ void __launch_bounds__(threads, resident)
    rope_backward(Real* dqkv, float* partial, const Real* qkv, const float* rstd, const Real* q_weight,
                  const Real* k_weight, const float* table, const int32_t* positions, int64_t N, HeadShape s,
                  int64_t tokens, int lanes) {
  constexpr int batch = W > 1 ? 2 : 1;  // heads whose loads are on their way together
  using Head = Row<Real, W, I>;
  constexpr int pairs = W * I;
  __shared__ float sums[threads * 2 * pairs];  // (groups, HD)
  const int HD = int(s.head_dim), half = HD / 2, H = int(s.n_head + s.n_kv_head);
  const int groups = threads / lanes, group = int(threadIdx.x) / lanes;
  const int64_t begin = blockIdx.x * tokens, end = min(begin + tokens, N);
  const Lane lane(lanes, half);
  for (int kind = 0; kind < 2; ++kind) {
    const int first_head = kind ? int(s.n_head) : 0, end_head = kind ? H : int(s.n_head);
    Head weight;
    float low_sum[pairs] = {}, high_sum[pairs] = {};  // of the weight's gradient
    if constexpr (norm) weight.load(kind ? k_weight : q_weight, lane);
    for (int64_t n0 = begin; n0 < end; n0 += groups) {
      const int64_t n = n0 + group;
      const bool live = n < end;
      Row<float, W, I> angle;
      if (live) angle.load(table + int64_t(positions[n]) * HD, lane);
      for (int h = first_head; h < end_head; h += batch) {
        const int64_t at = n * s.qkv_width() + h * HD;
        Head d[batch], x[batch];
        float r[batch] = {};
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          if (!live || h + i >= end_head) continue;  // zeros, which add nothing to the sums
          d[i].load(dqkv + at + i * HD, lane);
          if constexpr (norm) x[i].load(qkv + at + i * HD, lane), r[i] = rstd[n * H + h + i];
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          float da[pairs], db[pairs];
#pragma unroll
          for (int j = 0; j < pairs; ++j) {  // the inverse rotation
            da[j] = d[i].a(j) * angle.a(j) + d[i].b(j) * angle.b(j);
            db[j] = d[i].b(j) * angle.a(j) - d[i].a(j) * angle.b(j);
          }
          if constexpr (norm) {  // RMSNorm backward
            float dot = 0;
#pragma unroll
            for (int j = 0; j < pairs; ++j) {
              const float a = x[i].a(j) * r[i], b = x[i].b(j) * r[i];
              low_sum[j] += da[j] * a, high_sum[j] += db[j] * b;
              da[j] *= weight.a(j), db[j] *= weight.b(j);
              dot += da[j] * a + db[j] * b;
            }
            const float mean = group_sum(dot, lanes) / float(HD);
#pragma unroll
            for (int j = 0; j < pairs; ++j) {
              da[j] = r[i] * (da[j] - x[i].a(j) * r[i] * mean);
              db[j] = r[i] * (db[j] - x[i].b(j) * r[i] * mean);
            }
          }
          if (!live || h + i >= end_head) continue;
#pragma unroll
          for (int j = 0; j < pairs; ++j) d[i].set(j, da[j], db[j]);
          d[i].store(dqkv + at + i * HD, lane);
        }
      }
    }
    if constexpr (norm) {
      __syncthreads();  // the sums of the queries have been read
#pragma unroll
      for (int j = 0; j < pairs; ++j)
        if (Head::inside(lane, j / W)) {
          const int c = group * HD + Head::at(lane, j / W) + j % W;
          sums[c] = low_sum[j], sums[c + half] = high_sum[j];
        }
      __syncthreads();
      for (int c = threadIdx.x; c < HD; c += threads) {
        float sum = 0;
        for (int g = 0; g < groups; ++g) sum += sums[g * HD + c];
        partial[(int64_t(kind) * gridDim.x + blockIdx.x) * HD + c] = sum;
      }
    }
  }
}

// Calls f<W, I>(lanes): 16 bytes of a half a lane where the head allows it, else single elements.
template <class Real, class F, class... Pointers>
void with_head_shape(int64_t HD, F f, Pointers... pointers) {
  constexpr int W = Pack<Real>::n;
  int64_t half = HD / 2, lanes = half / W;
  if (packable<Real>(HD, pointers...) && half % W == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0)
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
  const int64_t batches = ceil_div(heads.n_head, forward_batch) + ceil_div(heads.n_kv_head, forward_batch);
  auto run = [&]<int W, int I>(int lanes) {
    launch(dev, q_weight ? rope_forward<Real, W, I, true> : rope_forward<Real, W, I, false>,
           dim3(unsigned(ceil_div(N, threads / lanes) * batches)), threads, 0, qk, rstd, qkv, q_weight, k_weight, table,
           positions, N, heads, float(eps), lanes);
  };
  with_head_shape<Real>(heads.head_dim, run, qk, qkv, q_weight, k_weight, table);
}

template <class Device>
void qknorm_rope_backward(Device& dev, typename Device::Real* dqkv, Grad<Device> dq_weight, Grad<Device> dk_weight,
                          void* scratch, const typename Device::Real* qkv, const typename Device::Acc* rstd,
                          const typename Device::Real* q_weight, const typename Device::Real* k_weight,
                          const typename Device::Acc* table, const int32_t* positions, int64_t N, HeadShape heads) {
  using Real = typename Device::Real;
  float* partial = static_cast<float*>(scratch);
  const int64_t HD = heads.head_dim;
  auto run = [&]<int W, int I>(int lanes) {
    // A round of a block's groups or more, and no more blocks than are resident.
    const int64_t tokens = std::max<int64_t>(ceil_div(N, most_blocks), threads / lanes), blocks = ceil_div(N, tokens);
    launch(dev, q_weight ? rope_backward<Real, W, I, true> : rope_backward<Real, W, I, false>, dim3(unsigned(blocks)),
           threads, 0, dqkv, partial, qkv, rstd, q_weight, k_weight, table, positions, N, heads, tokens, lanes);
    if (!q_weight) return;
    add_partial_rows(dev, dq_weight, partial, blocks, HD, HD);
    add_partial_rows(dev, dk_weight, partial + blocks * HD, blocks, HD, HD);
  };
  with_head_shape<Real>(HD, run, dqkv, qkv, q_weight, k_weight, table);
}
template <class Device>
size_t qknorm_rope_backward_scratch_bytes(int64_t N, HeadShape heads) {
  return size_t(std::min<int64_t>(N, most_blocks) * 2 * heads.head_dim) * sizeof(float);  // a row a block
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
