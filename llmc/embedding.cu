// Token embedding on the GPU. Backward without floating-point atomics: positions are sorted by token (a stable radix sort
// made of bucket passes), cut into runs of 32, and every run is summed by one block; pieces of a token that span several
// runs are added in order by a second kernel.
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

// W neighbouring columns: read from dout, added to the gradient, kept in `pieces`.
template <class Real, int W>
struct Columns {
  struct alignas(sizeof(Real) * W) Chunk {
    Real v[W];
  };
  float sum[W] = {};
  __device__ void add(const Chunk& c) {
#pragma unroll
    for (int j = 0; j < W; ++j) sum[j] += to_float(c.v[j]);
  }
  __device__ void add(const float* piece) {
#pragma unroll
    for (int j = 0; j < W; ++j) sum[j] += piece[j];
  }
  __device__ void put_aside(float* piece) const {
#pragma unroll
    for (int j = 0; j < W; ++j) piece[j] = sum[j];
  }
  __device__ void to_gradient(void* gradient, bool wide, int64_t at) const {
    struct alignas(sizeof(float) * (W < 4 ? W : 4)) Wide {
      float v[W];
    };
    if (wide) {
      Wide* p = reinterpret_cast<Wide*>(static_cast<float*>(gradient) + at);
      Wide v = *p;
#pragma unroll
      for (int j = 0; j < W; ++j) v.v[j] += sum[j];
      *p = v;
    } else {
      Chunk* p = reinterpret_cast<Chunk*>(static_cast<Real*>(gradient) + at);
      Chunk v = *p;
#pragma unroll
      for (int j = 0; j < W; ++j) v.v[j] = from_float<Real>(to_float(v.v[j]) + sum[j]);
      *p = v;
    }
  }
};

// Sums of one run of sorted positions, W columns a thread. A token's piece that neither begins at the run's first
// position as the rest of an earlier run nor goes on in the next is complete: it goes to the gradient. Others are put
// aside: pieces (runs, 2, C): [0] the piece at the run's beginning, [1] the one at its end.
template <class Real, int W>
__global__ void sum_runs(void* gradient, bool wide, float* pieces, const int32_t* order, const int32_t* tokens,
                         const Real* dout, int64_t N, int64_t C, int V) {
  using Chunk = typename Columns<Real, W>::Chunk;
  __shared__ int position[run], token[run + 2];  // token[1 + i]; its neighbours at both ends
  int64_t first = int64_t(blockIdx.x) * run;
  int n = int(min(int64_t(run), N - first));
  for (int j = threadIdx.x; j < run + 2; j += blockDim.x) {
    int64_t i = first + j - 1;
    bool inside = i >= 0 && i < N;
    int p = inside ? order[i] : -1;
    token[j] = inside ? sort_token(tokens, p, V) : -1;
    if (j >= 1 && j <= run) position[j - 1] = p;
  }
  __syncthreads();
  int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * W;
  if (c >= C) return;
  Columns<Real, W> columns;
  bool from_before = token[0] == token[1];  // the piece being summed began in an earlier run
  constexpr int batch = 8;                  // loads in flight
  for (int i0 = 0; i0 < n; i0 += batch) {
    Chunk value[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j)
      if (i0 + j < n) value[j] = *reinterpret_cast<const Chunk*>(dout + int64_t(position[i0 + j]) * C + c);
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      int i = i0 + j;
      if (i >= n) break;
      columns.add(value[j]);
      int id = token[1 + i];
      if (i + 1 < n && token[2 + i] == id) continue;
      bool goes_on = i + 1 == n && token[2 + i] == id;
      if (from_before)
        columns.put_aside(pieces + int64_t(blockIdx.x) * 2 * C + c);
      else if (goes_on)
        columns.put_aside(pieces + (int64_t(blockIdx.x) * 2 + 1) * C + c);
      else if (id < V)
        columns.to_gradient(gradient, wide, int64_t(id) * C + c);
      columns = {}, from_before = false;
    }
  }
}

// For every run whose last token begins there and goes on: its end piece and the beginning pieces that follow.
template <class Real, int W>
__global__ void join_runs(void* gradient, bool wide, const float* pieces, const int32_t* order, const int32_t* tokens,
                          int64_t N, int64_t C, int V) {
  int64_t b = blockIdx.x, last = (b + 1) * run - 1;
  if (last + 1 >= N) return;
  int id = sort_token(tokens, order[last], V);
  if (id >= V || sort_token(tokens, order[last + 1], V) != id) return;
  if (b > 0 && sort_token(tokens, order[b * run - 1], V) == id) return;  // the whole run is a middle piece
  int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * W;
  if (c >= C) return;
  Columns<Real, W> columns;
  columns.add(pieces + (b * 2 + 1) * C + c);
  for (int64_t next = b + 1; next * run < N && sort_token(tokens, order[next * run], V) == id; ++next)
    columns.add(pieces + next * 2 * C + c);
  columns.to_gradient(gradient, wide, int64_t(id) * C + c);
}

int passes(int64_t V) {
  int n = 1;
  while ((V >> (n * digit_bits)) > 0) ++n;
  return n;
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
  float* pieces = reinterpret_cast<float*>(counts + bucket_tiles(N) * buckets);
  const int32_t* from = nullptr;
  for (int p = 0; p < passes(V); ++p) {
    int32_t* to = order[p % 2];
    bucket_items(dev, totals, offsets, counts, N, buckets, 0, DigitOf{tokens, from, int(V), p * digit_bits},
                 PlacePosition{to, from, offsets});
    from = to;
  }
  auto sum = [&]<int W>() {
    int64_t chunks = ceil_div(C, W), threads = std::min<int64_t>(256, ceil_div(chunks, 32) * 32);
    dim3 grid(unsigned(ceil_div(N, run)), unsigned(ceil_div(chunks, threads)));
    launch(dev, sum_runs<Real, W>, grid, unsigned(threads), 0, dtable.data, dtable.wide, pieces, from, tokens, dout, N,
           C, int(V));
    launch(dev, join_runs<Real, W>, grid, unsigned(threads), 0, dtable.data, dtable.wide, pieces, from, tokens, N, C,
           int(V));
  };
  if (packable<Real>(C, dout, dtable.data))
    sum.template operator()<Pack<Real>::n>();
  else
    sum.template operator()<1>();
}
template <class Device>
size_t embedding_backward_scratch_bytes(int64_t N, int64_t C, int64_t) {
  constexpr int64_t buckets = 1 << digit_bits;
  return size_t(2 * N + 2 * buckets + 1) * sizeof(int32_t) + bucket_scratch_bytes(N, buckets) +
         size_t(ceil_div(N, run) * 2 * C) * sizeof(float);
}

#define INSTANTIATE(Real)                                                                                             \
  template void embedding_forward(Gpu<Real>&, Real*, const int32_t*, const Real*, int64_t, int64_t, int64_t);         \
  template void embedding_backward(Gpu<Real>&, Grad<Gpu<Real>>, void*, const int32_t*, const Real*, int64_t, int64_t, \
                                   int64_t);                                                                          \
  template size_t embedding_backward_scratch_bytes<Gpu<Real>>(int64_t, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
