// QK-norm and rotary embedding on the GPU. All heads of a token are turned by the same angles, and all its queries (all
// its keys) have the same weight. So a group of lanes takes several heads of one token, queries and keys apart, and
// loads once, into registers, what they share. A head is 16 bytes a lane of each of its halves where its size allows
// that, else up to eight single elements. Backward without QK-norm is the forward pass with the angles negated; with it,
// as many blocks as are resident walk over all heads, so that few partial sums of the weights' gradients are left, and
// the next heads are on their way to shared memory while these are computed.
#include "llmc/rope.h"

#include <algorithm>

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_mma.cuh"
#include "llmc/cuda_reduce.cuh"

namespace {

constexpr int threads = 128;
constexpr int forward_batch = 4;  // heads whose loads are on their way together
// Backward: threads of a block, blocks of a multiprocessor and of an H100, and rounds of a thread in shared memory, all
// but one of them on their way.
constexpr int backward_threads = 256, resident = 2, most_blocks = 132 * resident, stages = 2;

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
  // bf16 stay in pairs: as single ones each would take a register, like a float.
  static constexpr bool in_pairs = std::is_same_v<Real, bf16> && W % 2 == 0;
  static constexpr int words = in_pairs ? W / 2 : W;
  struct alignas(sizeof(Real) * W < 16 ? sizeof(Real) * W : 16) Piece {
    std::conditional_t<in_pairs, uint32_t, Real> v[words];
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
  // The same as load() in two parts: to this thread's slots of shared memory, (2*I, backward_threads) of them, and from
  // there once the copy has landed.
  static __device__ __forceinline__ void fetch(Piece* slots, const Real* row, const Lane& l) {
#pragma unroll
    for (int i = 0; i < 2 * I; ++i)
      if (inside(l, i / 2)) {
        Piece* to = slots + i * backward_threads;
        const Real* from = row + i % 2 * l.half + at(l, i / 2);
        if constexpr (sizeof(Piece) == 16)
          copy_async(shared_address(to), from);
        else
          *to = *reinterpret_cast<const Piece*>(from);
      }
  }
  __device__ __forceinline__ void take(const Piece* slots, const Lane& l) {
#pragma unroll
    for (int i = 0; i < I; ++i)
      if (inside(l, i)) low[i] = slots[2 * i * backward_threads], high[i] = slots[(2 * i + 1) * backward_threads];
  }
  static __device__ __forceinline__ float element(const Piece& p, int j) {
    if constexpr (in_pairs)
      return j % 2 ? unpack_bf16(p.v[j / 2]).y : unpack_bf16(p.v[j / 2]).x;
    else
      return to_float(p.v[j]);
  }
  __device__ __forceinline__ float a(int j) const { return element(low[j / W], j % W); }
  __device__ __forceinline__ float b(int j) const { return element(high[j / W], j % W); }
  // Pair j = f(j), a float2 of its elements in the low and the high half.
  template <class F>
  __device__ __forceinline__ void set(F f) {
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
      for (int k = 0; k < words; ++k) {
        if constexpr (in_pairs) {
          const float2 first = f(i * W + 2 * k), second = f(i * W + 2 * k + 1);
          low[i].v[k] = pack_bf16(first.x, second.x), high[i].v[k] = pack_bf16(first.y, second.y);
        } else {
          const float2 pair = f(i * W + k);
          low[i].v[k] = from_float<Real>(pair.x), high[i].v[k] = from_float<Real>(pair.y);
        }
      }
  }
};

// A block: 128/lanes tokens, up to four heads of each, all queries or all keys. The rows of qk are `width` apart; qk may
// be qkv. inverse: the angles negated.
template <class Real, int W, int I, bool norm, bool inverse>
__global__ void __launch_bounds__(threads)
    rope_forward(Real* qk, int64_t width, float* rstd, const Real* qkv, const Real* q_weight, const Real* k_weight,
                 const float* table, const int32_t* positions, int64_t N, HeadShape s, float eps, int lanes) {
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
  Real* to = qk + n * width + first * HD;
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
    x[i].set([&](int j) -> float2 {
      float a = x[i].a(j), b = x[i].b(j);
      if constexpr (norm) a *= r * weight.a(j), b *= r * weight.b(j);
      const float cosine = angle.a(j), sine = inverse ? -angle.b(j) : angle.b(j);
      return {a * cosine - b * sine, b * cosine + a * sine};
    });
    if (live) x[i].store(to + i * HD, lane);
  }
}

// Backward with QK-norm: first all queries, then all keys. A group takes up to `batch` heads of a token at a time, and
// then those that lie gridDim.x blocks of groups further on. partial (2, blocks, HD): the gradients of both weights over
// the heads of a block. Shared memory: (stages, batch, d and x, 2*I, threads) pieces that only their thread reads; at
// the end of queries and keys (groups, HD) floats.
template <class Real, int W, int I>
struct Backward {
  using Head = Row<Real, W, I>;
  using Piece = typename Head::Piece;
  static constexpr int batch = W > 1 ? 2 : 1, head_slots = 2 * I * backward_threads;
  static constexpr size_t shared_bytes = size_t(stages) * batch * 2 * head_slots * sizeof(Piece);
  static_assert(shared_bytes >= backward_threads * 2 * W * I * sizeof(float));
};
template <class Real, int W, int I>
__global__ void __launch_bounds__(backward_threads, resident)
    rope_backward(Real* dqkv, float* partial, const Real* qkv, const float* rstd, const Real* q_weight,
                  const Real* k_weight, const float* table, const int32_t* positions, int64_t N, HeadShape s,
                  int lanes) {
  using Shape = Backward<Real, W, I>;
  using Head = typename Shape::Head;
  using Piece = typename Shape::Piece;
  constexpr int batch = Shape::batch, pairs = W * I;
  extern __shared__ uint4 shared_memory[];
  const int HD = int(s.head_dim), half = HD / 2, H = int(s.n_head + s.n_kv_head);
  const int groups = backward_threads / lanes, group = int(threadIdx.x) / lanes;
  const unsigned all_groups = gridDim.x * groups, first_group = blockIdx.x * groups;
  const Lane lane(lanes, half);
  const float share = 1.0f / float(HD);
  auto slots = [&](int stage, int i, int tensor) {
    return reinterpret_cast<Piece*>(shared_memory) + ((stage * batch + i) * 2 + tensor) * Shape::head_slots +
           threadIdx.x;
  };
  for (int kind = 0; kind < 2; ++kind) {
    const int first_head = kind ? int(s.n_head) : 0, heads = int(kind ? s.n_kv_head : s.n_head);
    const int batches = (heads + batch - 1) / batch;  // of a token
    struct Place {
      int64_t n;
      int batch;
    };
    auto further = [&](Place p) -> Place {
      p.n += all_groups / batches, p.batch += all_groups % batches;
      return p.batch < batches ? p : Place{p.n + 1, p.batch - batches};
    };
    Place place{int64_t((first_group + group) / batches), int((first_group + group) % batches)}, ahead = place;
    auto present = [&](Place p, int i) { return p.n < N && p.batch * batch + i < heads; };
    auto element = [&](Place p, int i) { return p.n * s.qkv_width() + (first_head + p.batch * batch + i) * HD; };

    float next_r[batch];
    int next_position;
    auto fetch = [&](int stage) {  // the heads at `ahead`
#pragma unroll
      for (int i = 0; i < batch; ++i)
        if (present(ahead, i)) {
          Head::fetch(slots(stage, i, 0), dqkv + element(ahead, i), lane);
          Head::fetch(slots(stage, i, 1), qkv + element(ahead, i), lane);
        }
      commit_copies();
      ahead = further(ahead);
    };
    auto fetch_scalars = [&](Place p) {
      next_position = p.n < N ? positions[p.n] : 0;
#pragma unroll
      for (int i = 0; i < batch; ++i)
        next_r[i] = present(p, i) ? rstd[p.n * H + first_head + p.batch * batch + i] : 0.0f;
    };
    for (int i = 0; i < stages - 1; ++i) fetch(i);
    fetch_scalars(place);
    Head weight;
    weight.load(kind ? k_weight : q_weight, lane);
    float low_sum[pairs] = {}, high_sum[pairs] = {};  // of the weight's gradient
    int stage = 0;
    // As many rounds as the block's first group needs: the lanes of a warp sum together.
    for (int64_t left = N * batches - first_group; left > 0; left -= all_groups) {
      fetch(stage == 0 ? stages - 1 : stage - 1);
      Row<float, W, I> angle;
      if (place.n < N) angle.load(table + int64_t(next_position) * HD, lane);
      float r[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) r[i] = next_r[i];
      fetch_scalars(further(place));
      wait_copies<stages - 1>();
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        Head d, x;  // zeros, which add nothing to the sums, where there is no head
        if (present(place, i)) d.take(slots(stage, i, 0), lane), x.take(slots(stage, i, 1), lane);
        float da[pairs], db[pairs], dot = 0;
#pragma unroll
        for (int j = 0; j < pairs; ++j) {  // the inverse rotation, then RMSNorm backward
          const float a = x.a(j) * r[i], b = x.b(j) * r[i];
          da[j] = d.a(j) * angle.a(j) + d.b(j) * angle.b(j);
          db[j] = d.b(j) * angle.a(j) - d.a(j) * angle.b(j);
          low_sum[j] += da[j] * a, high_sum[j] += db[j] * b;
          da[j] *= weight.a(j), db[j] *= weight.b(j);
          dot += da[j] * a + db[j] * b;
        }
        const float mean = group_sum(dot, lanes) * share;
        d.set([&](int j) -> float2 {
          return {r[i] * (da[j] - x.a(j) * r[i] * mean), r[i] * (db[j] - x.b(j) * r[i] * mean)};
        });
        if (present(place, i)) d.store(dqkv + element(place, i), lane);
      }
      place = further(place);
      stage = stage == stages - 1 ? 0 : stage + 1;
    }
    __syncthreads();  // all have read their last pieces
    float* sums = reinterpret_cast<float*>(shared_memory);
#pragma unroll
    for (int j = 0; j < pairs; ++j)
      if (Head::inside(lane, j / W)) {
        const int c = group * HD + Head::at(lane, j / W) + j % W;
        sums[c] = low_sum[j], sums[c + half] = high_sum[j];
      }
    __syncthreads();
    for (int c = threadIdx.x; c < HD; c += backward_threads) {
      float sum = 0;
      for (int g = 0; g < groups; ++g) sum += sums[g * HD + c];
      partial[(int64_t(kind) * gridDim.x + blockIdx.x) * HD + c] = sum;
    }
    __syncthreads();  // the sums of the queries have been read
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

// qk = qkv, normed if there are weights, and rotated; the rows of qk are `width` apart.
template <bool inverse, class Device, class Real = typename Device::Real>
void rotate(Device& dev, Real* qk, int64_t width, float* rstd, const Real* qkv, const Real* q_weight,
            const Real* k_weight, const float* table, const int32_t* positions, int64_t N, HeadShape heads,
            double eps) {
  const int64_t batches = ceil_div(heads.n_head, forward_batch) + ceil_div(heads.n_kv_head, forward_batch);
  auto run = [&]<int W, int I>(int lanes) {
    auto kernel = rope_forward<Real, W, I, false, inverse>;
    if constexpr (!inverse)
      if (q_weight) kernel = rope_forward<Real, W, I, true, false>;
    launch(dev, kernel, dim3(unsigned(ceil_div(N, threads / lanes) * batches)), threads, 0, qk, width, rstd, qkv,
           q_weight, k_weight, table, positions, N, heads, float(eps), lanes);
  };
  with_head_shape<Real>(heads.head_dim, run, qk, qkv, q_weight, k_weight, table);
}

}  // namespace

template <class Device>
void qknorm_rope_forward(Device& dev, typename Device::Real* qk, typename Device::Acc* rstd,
                         const typename Device::Real* qkv, const typename Device::Real* q_weight,
                         const typename Device::Real* k_weight, const typename Device::Acc* table,
                         const int32_t* positions, int64_t N, HeadShape heads, double eps) {
  rotate<false>(dev, qk, heads.qk_width(), rstd, qkv, q_weight, k_weight, table, positions, N, heads, eps);
}

template <class Device>
void qknorm_rope_backward(Device& dev, typename Device::Real* dqkv, Grad<Device> dq_weight, Grad<Device> dk_weight,
                          void* scratch, const typename Device::Real* qkv, const typename Device::Acc* rstd,
                          const typename Device::Real* q_weight, const typename Device::Real* k_weight,
                          const typename Device::Acc* table, const int32_t* positions, int64_t N, HeadShape heads) {
  using Real = typename Device::Real;
  if (!q_weight) {
    const Real* no_weight = nullptr;
    float* no_rstd = nullptr;
    return rotate<true>(dev, dqkv, heads.qkv_width(), no_rstd, dqkv, no_weight, no_weight, table, positions, N, heads,
                        0);
  }
  float* partial = static_cast<float*>(scratch);
  const int64_t HD = heads.head_dim;
  auto run = [&]<int W, int I>(int lanes) {
    using Shape = Backward<Real, W, I>;
    const int64_t batches = N * ceil_div(std::max(heads.n_head, heads.n_kv_head), Shape::batch),
                  blocks = std::min<int64_t>(ceil_div(batches, backward_threads / lanes), most_blocks);
    launch(dev, rope_backward<Real, W, I>, dim3(unsigned(blocks)), backward_threads, Shape::shared_bytes, dqkv, partial,
           qkv, rstd, q_weight, k_weight, table, positions, N, heads, lanes);
    add_partial_rows(dev, dq_weight, partial, blocks, HD, HD);
    add_partial_rows(dev, dk_weight, partial + blocks * HD, blocks, HD, HD);
  };
  with_head_shape<Real>(HD, run, dqkv, qkv, q_weight, k_weight, table);
}
template <class Device>
size_t qknorm_rope_backward_scratch_bytes(int64_t N, HeadShape heads) {
  const int64_t batches = N * std::max(heads.n_head, heads.n_kv_head);  // of one head or more: at most a block each
  return size_t(std::min<int64_t>(batches, most_blocks) * 2 * heads.head_dim) * sizeof(float);
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
