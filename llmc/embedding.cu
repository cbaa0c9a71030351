// Token embedding on the GPU. Backward without floating-point atomics: positions are sorted by token (a stable radix
// sort made of bucket passes), cut into runs of 32, and every run is summed by one block; pieces of a token that span
// several runs are added in order by a second kernel.
#include "llmc/embedding.h"

#include "llmc/cuda_bucket.cuh"

namespace {

constexpr int run = 32, digit_bits = 8;

template <class Real>
__global__ void copy_rows(Real* out, const int32_t* tokens, const Real* table, int64_t N, int64_t C, int64_t V,
                          bool packed, DeviceStatus* status, int layer) {
  int64_t n = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (n >= N) return;
  int lane = threadIdx.x % 32;
  int64_t id = tokens[n];
  if (id < 0 || id >= V) {
    if (lane == 0) report_fault(status, layer, DeviceStatus::token_out_of_range, n, id);
    id = 0;
  }
  constexpr int W = Pack<Real>::n;
  const Real* from = table + id * C;
  Real* to = out + n * C;
  if (packed)
    for (int64_t c = lane * W; c < C; c += 32 * W)
      *reinterpret_cast<Pack<Real>*>(to + c) = *reinterpret_cast<const Pack<Real>*>(from + c);
  else
    for (int64_t c = lane; c < C; c += 32) to[c] = from[c];
}

// One pass of the sort: positions, in the order so far (null: ascending), by one digit of their token. Tokens outside
// the vocabulary count as V, the last.
__device__ __forceinline__ int sort_token(const int32_t* tokens, int position, int V) {
  int id = tokens[position];
  return id >= 0 && id < V ? id : V;
}
struct DigitOf {
  const int32_t *tokens, *order;
  int V, shift;
  __device__ int operator()(int64_t i) const {
    return sort_token(tokens, order ? order[i] : int(i), V) >> shift & ((1 << digit_bits) - 1);
  }
};
struct PlacePosition {
  int32_t* sorted;
  const int32_t *order, *offsets;
  __device__ void operator()(int64_t i, int digit, int rank) const {
    sorted[offsets[digit] + rank] = order ? order[i] : int32_t(i);
  }
};

// W neighbouring columns of T, read and written 16 bytes at a time where they are as many.
template <class T, int W>
struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) Columns {
  T v[W];
  __device__ static Columns load(const T* p) { return *reinterpret_cast<const Columns*>(p); }
  __device__ void store(T* p) const { *reinterpret_cast<Columns*>(p) = *this; }
};
template <class T, int W>
__device__ __forceinline__ void add(Columns<float, W>& sum, const Columns<T, W>& a) {
#pragma unroll
  for (int j = 0; j < W; ++j) sum.v[j] += to_float(a.v[j]);
}
template <class G, int W>
__device__ __forceinline__ void add_to_gradient(G* at, Columns<G, W> old, const Columns<float, W>& sum) {
#pragma unroll
  for (int j = 0; j < W; ++j) old.v[j] = from_float<G>(to_float(old.v[j]) + sum.v[j]);
  old.store(at);
}

// What becomes of the sum so far after a position, where it is not the row of the gradient that it completes.
enum : int { goes_on = -1, to_begin = -2, to_end = -3, dropped = -4 };

// Sums of one run of sorted positions, W columns a thread. A token's piece that neither begins at the run's first
// position as the rest of an earlier run nor goes on in the next is complete: it goes to the gradient. Others are put
// aside: pieces (runs, 2, C): [0] the piece at the run's beginning, [1] the one at its end.
//
// Most rows of a large vocabulary occur once in a batch: what they add to is asked for together with dout's rows, since
// a run that waited for one row after another would wait 32 times for memory.
template <class Real, class G, int W>
__global__ void __launch_bounds__(256, 3)
    sum_runs(G* gradient, float* pieces, const int32_t* order, const int32_t* tokens, const Real* dout, int64_t N,
             int64_t C, int V) {
  __shared__ int position[run], target[run], token[run + 2];  // token[1 + i]; its neighbours at both ends
  int64_t first = int64_t(blockIdx.x) * run;
  for (int j = threadIdx.x; j < run + 2; j += blockDim.x) {
    int64_t i = first + j - 1;
    int p = order[max(int64_t(0), min(i, N - 1))];
    token[j] = i >= 0 && i < N ? sort_token(tokens, p, V) : -1;
    if (j >= 1 && j <= run) position[j - 1] = p;  // past the end: any row that can be read
  }
  __syncthreads();
  if (threadIdx.x < run) {
    int i = int(threadIdx.x), id = token[1 + i];
    bool more = token[2 + i] == id;
    target[i] = id < 0 || id == V     ? dropped
                : more && i + 1 < run ? goes_on
                : id == token[0]      ? to_begin
                : more                ? to_end
                                      : id;
  }
  __syncthreads();
  int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * W;
  if (c >= C) return;
  Columns<float, W> sum = {};
  constexpr int batch = 4;  // rows in flight, of dout and of the gradient
  for (int i0 = 0; i0 < run; i0 += batch) {
    Columns<Real, W> value[batch];
    Columns<G, W> old[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      value[j] = Columns<Real, W>::load(dout + int64_t(position[i0 + j]) * C + c);
      if (target[i0 + j] >= 0) old[j] = Columns<G, W>::load(gradient + int64_t(target[i0 + j]) * C + c);
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      add(sum, value[j]);
      int to = target[i0 + j];
      if (to == goes_on) continue;
      if (to >= 0)
        add_to_gradient(gradient + int64_t(to) * C + c, old[j], sum);
      else if (to != dropped)
        sum.store(pieces + (int64_t(blockIdx.x) * 2 + (to == to_end)) * C + c);
      sum = {};
    }
  }
}

// For every run whose last token begins there and goes on: its end piece and the beginning pieces that follow.
template <class G, int W>
__global__ void __launch_bounds__(256) join_runs(G* gradient, const float* pieces, const int32_t* order,
                                                 const int32_t* tokens, int64_t N, int64_t C, int V) {
  int64_t b = blockIdx.x, last = (b + 1) * run - 1;
  if (last + 1 >= N) return;
  int id = sort_token(tokens, order[last], V);
  if (id >= V || sort_token(tokens, order[last + 1], V) != id) return;
  if (b > 0 && sort_token(tokens, order[b * run - 1], V) == id) return;  // the whole run is a middle piece
  // The runs that begin with this token, [b + 1, end): each thread looks at one of the next. Tokens are sorted, so that
  // where not all find it, those that do are the first.
  int64_t end = b + 1;
  for (int found = int(blockDim.x); found == int(blockDim.x); end += found) {
    int64_t next = end + threadIdx.x;
    found = __syncthreads_count(next * run < N && sort_token(tokens, order[next * run], V) == id);
  }
  int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * W;
  if (c >= C) return;
  auto sum = Columns<float, W>::load(pieces + (b * 2 + 1) * C + c);
  constexpr int batch = 8;  // loads in flight
  for (int64_t next = b + 1; next < end; next += batch) {
    Columns<float, W> piece[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j)
      if (next + j < end) piece[j] = Columns<float, W>::load(pieces + (next + j) * 2 * C + c);
#pragma unroll
    for (int j = 0; j < batch; ++j)
      if (next + j < end) add(sum, piece[j]);
  }
  G* at = gradient + int64_t(id) * C + c;
  add_to_gradient(at, Columns<G, W>::load(at), sum);
}

int passes(int64_t V) {
  int n = 1;
  while ((V >> (n * digit_bits)) > 0) ++n;
  return n;
}
// Of scratch, before `pieces`: two orders of the positions, totals, offsets and counts of the sort; a multiple of 16
// bytes.
int64_t sort_ints(int64_t N) {
  constexpr int64_t buckets = 1 << digit_bits;
  return ceil_div(2 * N + 2 * buckets + 1 + bucket_tiles(N) * buckets, 4) * 4;
}

}  // namespace

template <class Device>
void embedding_forward(Device& dev, typename Device::Real* out, const int32_t* tokens,
                       const typename Device::Real* table, int64_t N, int64_t C, int64_t V) {
  using Real = typename Device::Real;
  launch(dev, copy_rows<Real>, dim3(unsigned(ceil_div(N, 8))), 256, 0, out, tokens, table, N, C, V,
         packable<Real>(C, out, table), dev.status, dev.layer);
}

template <class Device>
void embedding_backward(Device& dev, Grad<Device> dtable, void* scratch, const int32_t* tokens,
                        const typename Device::Real* dout, int64_t N, int64_t C, int64_t V) {
  using Real = typename Device::Real;
  constexpr int64_t buckets = 1 << digit_bits;
  int32_t* order[2] = {static_cast<int32_t*>(scratch), static_cast<int32_t*>(scratch) + N};
  int32_t *totals = order[1] + N, *offsets = totals + buckets, *counts = offsets + buckets + 1;
  float* pieces = static_cast<float*>(scratch) + sort_ints(N);
  const int32_t* from = nullptr;
  for (int p = 0; p < passes(V); ++p) {
    int32_t* to = order[p % 2];
    bucket_items(dev, totals, offsets, counts, N, buckets, 0, DigitOf{tokens, from, int(V), p * digit_bits},
                 PlacePosition{to, from, offsets});
    from = to;
  }
  auto sum = [&]<int W, class G>(G* gradient) {
    auto run_launch = [&]<int width>(auto kernel, auto... args) {
      int64_t chunks = ceil_div(C, width), threads = std::min<int64_t>(256, ceil_div(chunks, 32) * 32);
      dim3 grid(unsigned(ceil_div(N, run)), unsigned(ceil_div(chunks, threads)));
      launch(dev, kernel, grid, unsigned(threads), 0, gradient, pieces, from, tokens, args..., N, C, int(V));
    };
    constexpr int join_width = W < 4 ? W : 4;  // pieces are fp32
    run_launch.template operator()<W>(sum_runs<Real, G, W>, dout);
    run_launch.template operator()<join_width>(join_runs<G, join_width>);
  };
  dtable.visit([&](auto* gradient) {
    if (packable<Real>(C, dout, gradient, scratch))
      sum.template operator()<Pack<Real>::n>(gradient);
    else
      sum.template operator()<1>(gradient);
  });
}
template <class Device>
size_t embedding_backward_scratch_bytes(int64_t N, int64_t C, int64_t) {
  return size_t(sort_ints(N) + ceil_div(N, run) * 2 * C) * sizeof(float);
}

#define INSTANTIATE(Real)                                                                                             \
  template void embedding_forward(Gpu<Real>&, Real*, const int32_t*, const Real*, int64_t, int64_t, int64_t);         \
  template void embedding_backward(Gpu<Real>&, Grad<Gpu<Real>>, void*, const int32_t*, const Real*, int64_t, int64_t, \
                                   int64_t);                                                                          \
  template size_t embedding_backward_scratch_bytes<Gpu<Real>>(int64_t, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
