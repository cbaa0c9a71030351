// RMSNorm on the GPU. Forward: a warp a row, or four warps where it is wide, held in registers between its two uses.
// Backward: as many blocks as are resident walk over all rows, one 16-byte chunk of a row a thread, so that the weight
// gradient of a thread's columns stays in registers and few partial sums are left; the next rows are on their way to
// shared memory while this one is summed.
#include "llmc/rmsnorm.h"

#include <algorithm>

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_mma.cuh"
#include "llmc/cuda_reduce.cuh"

namespace {

constexpr int forward_threads = 128;
// Backward: threads of a block unless a row needs more, blocks that walk (two on each multiprocessor of an H100), and
// rows of a thread in shared memory, all but one of them on their way.
constexpr int backward_threads = 512, most_blocks = 132 * 2, stages = 3;

// W neighbouring elements. bf16 stay in pairs: as single ones each would take a register, like a float.
template <class Real, int W>
struct alignas(sizeof(Real) * W) Chunk {
  static constexpr bool pairs = std::is_same_v<Real, bf16> && W % 2 == 0;
  std::conditional_t<pairs, uint32_t, Real> v[pairs ? W / 2 : W];
  __device__ float operator[](int j) const {
    if constexpr (pairs)
      return j % 2 ? unpack_bf16(v[j / 2]).y : unpack_bf16(v[j / 2]).x;
    else
      return to_float(v[j]);
  }
  // The same elements, of which the compiler knows nothing: it cannot keep them as floats, in twice the registers.
  __device__ void keep_packed() {
    if constexpr (pairs)
#pragma unroll
      for (int i = 0; i < W / 2; ++i) asm volatile("" : "+r"(v[i]));
  }
  template <class F>
  __device__ void set(F f) {  // element j = f(j)
    if constexpr (pairs) {
#pragma unroll
      for (int j = 0; j < W; j += 2) v[j / 2] = pack_bf16(f(j), f(j + 1));
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] = from_float<Real>(f(j));
    }
  }
};

// The part of a row that a lane of one of T warps holds: P chunks.
template <class Real, int W, int P, int T>
struct RowOf {
  using Part = Chunk<Real, W>;
  Part chunk[P];
  // Element of the row at which chunk i starts.
  static __device__ int64_t at(int i) { return int64_t(i * 32 * T + int(threadIdx.x % (32 * T))) * W; }
  // Calls f(i) for the chunks inside a row of C elements.
  template <class F>
  static __device__ void each_chunk(int64_t C, F f) {
#pragma unroll
    for (int i = 0; i < P; ++i)
      if (at(i) < C) f(i);
  }
  __device__ void load(const Real* row, int64_t C) {
    each_chunk(C, [&](int i) { chunk[i] = *reinterpret_cast<const Part*>(row + at(i)); });
  }
  __device__ void store(Real* row, int64_t C) const {
    each_chunk(C, [&](int i) { *reinterpret_cast<Part*>(row + at(i)) = chunk[i]; });
  }
};

// Blocks of a multiprocessor that keep 48 KB or more on their way: registers for a row of x and, with a branch, another.
constexpr int forward_resident(int P) { return P > 4 ? 5 : P > 2 ? 8 : 12; }

// branch null: the norm of x alone; else sum = x + branch is stored and normalised. A block takes 4/T rows.
template <class Real, int W, int P, int T>
__global__ void __launch_bounds__(forward_threads, forward_resident(P))
    norm_forward(Real* sum, Real* out, float* rstd, const Real* x, const Real* branch, const Real* weight, int64_t N,
                 int64_t C, float eps) {
  using Row = RowOf<Real, W, P, T>;
  constexpr int rows = forward_threads / (32 * T);
  static_assert(T == 1 || rows == 1);  // the sum of several warps is one of the block
  int64_t n = int64_t(blockIdx.x) * rows + threadIdx.x / (32 * T);
  if (n >= N) return;
  Row row, other;
  row.load(x + n * C, C);
  if (branch) {
    other.load(branch + n * C, C);
    Row::each_chunk(C, [&](int i) { row.chunk[i].set([&](int j) { return row.chunk[i][j] + other.chunk[i][j]; }); });
    row.store(sum + n * C, C);
  }
  float squares = 0;
  Row::each_chunk(C, [&](int i) {
#pragma unroll
    for (int j = 0; j < W; ++j) squares += row.chunk[i][j] * row.chunk[i][j];
  });
  if constexpr (T == 1)
    squares = warp_sum(squares);
  else
    squares = block_sum(squares);
  const float r = 1.0f / sqrtf(squares / float(C) + eps);
  other.load(weight, C);
  Row::each_chunk(C, [&](int i) { row.chunk[i].set([&](int j) { return row.chunk[i][j] * r * other.chunk[i][j]; }); });
  row.store(out + n * C, C);
  if (threadIdx.x % (32 * T) == 0) rstd[n] = r;
}

// A block takes blockDim.x / row_threads rows at a time, one chunk of W elements a thread, then the rows gridDim.x times
// as many further on. partial (blocks,C): the weight gradient of the rows of a block. Shared memory: the sums of the
// warps (2,32); then (depth, 2 or 3, threads) chunks, those of x, dout and dresidual of `depth` rows of a thread, which
// nobody else reads; at the end (rows,C) floats in their place.
template <class Real, int W, int depth, bool residual>
__global__ void __launch_bounds__(1024)
    norm_backward(Real* dx, float* partial, const Real* dout, const Real* dresidual, const Real* x, const Real* weight,
                  const float* rstd, int64_t N, int64_t C, int row_threads) {
  using Part = Chunk<Real, W>;
  extern __shared__ uint4 shared_memory[];
  float(*sums)[32] = reinterpret_cast<float(*)[32]>(shared_memory);  // two, so that one barrier a row is enough
  void* const ring = sums + 2;
  const int row = int(threadIdx.x) / row_threads, rows = int(blockDim.x) / row_threads, row_warps = row_threads / 32;
  const int lane = int(threadIdx.x) % 32;
  const int64_t c = int64_t(threadIdx.x % row_threads) * W, block_row = int64_t(blockIdx.x) * rows,
                first = block_row + row, step = int64_t(gridDim.x) * rows;
  const bool live = c < C;
  // Rows of this thread, and of the first of the block: all stay as long for the barrier.
  const int mine = live && first < N ? int(ceil_div(N - first, step)) : 0, rounds = int(ceil_div(N - block_row, step));
  const int stage_size = (residual ? 3 : 2) * int(blockDim.x);
  Part* const slots = static_cast<Part*>(ring) + threadIdx.x;
  int64_t at = first * C + c;  // the element where this thread is
  auto fetch = [&](int round, int rounds_ahead, Part* slot) {
    const int64_t ahead = at + rounds_ahead * step * C;
    auto copy = [&](int tensor, const Real* from) {
      Part* to = slot + tensor * int(blockDim.x);
      if constexpr (sizeof(Part) == 16)
        copy_async(shared_address(to), from);
      else
        *to = *reinterpret_cast<const Part*>(from);
    };
    if (round + rounds_ahead < mine) {
      copy(0, x + ahead), copy(1, dout + ahead);
      if constexpr (residual) copy(2, dresidual + ahead);
    }
    commit_copies();
  };
  for (int i = 0; i < depth - 1; ++i) fetch(0, i, slots + i * stage_size);
  Part w{};
  if (live) w = *reinterpret_cast<const Part*>(weight + c);
  const float* next_rstd = rstd + first;
  float dw[W] = {}, next_r = mine > 0 ? *next_rstd : 0.0f;
  const float share = 1.0f / float(C);
  const int last = (depth - 1) * stage_size;
  for (int round = 0, now = 0; round < rounds; ++round, now = now == last ? 0 : now + stage_size) {
    fetch(round, depth - 1, slots + (now == 0 ? last : now - stage_size));
    const float r = next_r;
    next_rstd += step;
    if (round + 1 < mine) next_r = *next_rstd;
    wait_copies<depth - 1>();
    const Part* slot = slots + now;
    const bool here = round < mine;
    Part xs{}, ds{}, past{};
    if (here) xs = slot[0], ds = slot[blockDim.x];
    float dot = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) dot += ds[j] * w[j] * xs[j];
    dot = warp_sum(dot);
    xs.keep_packed(), ds.keep_packed();
    float* row_sums = sums[round % 2];
    if (lane == 0) row_sums[threadIdx.x / 32] = dot;
    __syncthreads();
    const float mean = warp_sum(lane < row_warps ? row_sums[row * row_warps + lane] : 0.0f) * r * share;
    if (residual && here) past = slot[2 * blockDim.x];
    xs.set([&](int j) {
      const float xhat = xs[j] * r, value = r * (ds[j] * w[j] - xhat * mean);
      dw[j] += ds[j] * xhat;
      return residual ? past[j] + value : value;
    });
    if (here) {
      if constexpr (sizeof(Part) == 16)  // said so, or it becomes four stores
        __stwb(reinterpret_cast<uint4*>(dx + at), reinterpret_cast<const uint4&>(xs));
      else
        *reinterpret_cast<Part*>(dx + at) = xs;
    }
    at += step * C;
  }
  __syncthreads();  // all have read their last chunks
  float* row_sums = static_cast<float*>(ring);
  if (live)
#pragma unroll
    for (int j = 0; j < W; ++j) row_sums[row * C + c + j] = dw[j];
  __syncthreads();
  for (int64_t i = threadIdx.x; i < C; i += blockDim.x) {
    float sum = row_sums[i];
    for (int k = 1; k < rows; ++k) sum += row_sums[k * C + i];
    partial[int64_t(blockIdx.x) * C + i] = sum;
  }
}

template <class Real>
__global__ void add_rows(Real* out, const Real* a, const Real* b, int64_t n) {
  constexpr int width = Pack<Real>::n;
  int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * width;
  if (i + width <= n) {
    Pack<Real> pa = *reinterpret_cast<const Pack<Real>*>(a + i), pb = *reinterpret_cast<const Pack<Real>*>(b + i);
#pragma unroll
    for (int j = 0; j < width; ++j) pa.set(j, pa[j] + pb[j]);
    *reinterpret_cast<Pack<Real>*>(out + i) = pa;
  } else {
    for (; i < n; ++i) out[i] = from_float<Real>(to_float(a[i]) + to_float(b[i]));
  }
}

template <class Real>
[[noreturn]] void fail_too_wide(int64_t C, bool packed) {
  fail("RMSNorm on the GPU: rows of ", C, " elements are too wide (", packed ? 1024 * Pack<Real>::n : 1024,
       " at most)");
}

// Calls f.template operator()<W, P, T>(): chunks of W elements, P of them a lane, T warps a row of C elements.
template <class Real, class F>
void with_row_shape(int64_t C, bool packed, F f) {
  constexpr int W = Pack<Real>::n;
  int64_t chunks = ceil_div(C, 32 * (packed ? W : 1));
  if (packed) {
    if (chunks <= 1) return f.template operator()<W, 1, 1>();
    if (chunks <= 2) return f.template operator()<W, 2, 1>();
    if (chunks <= 3) return f.template operator()<W, 3, 1>();
    if (chunks <= 4) return f.template operator()<W, 4, 1>();
    if (chunks <= 8) return f.template operator()<W, 8, 1>();
    if (chunks <= 16) return f.template operator()<W, 4, 4>();
    if (chunks <= 32) return f.template operator()<W, 8, 4>();
  } else {
    if (chunks <= 4) return f.template operator()<1, 4, 1>();
    if (chunks <= 32) return f.template operator()<1, 8, 4>();
  }
  fail_too_wide<Real>(C, packed);
}

template <class Device, class Real = typename Device::Real>
void forward(Device& dev, Real* sum, Real* out, float* rstd, const Real* x, const Real* branch, const Real* weight,
             int64_t N, int64_t C, double eps) {
  with_row_shape<Real>(C, packable<Real>(C, sum, out, x, branch, weight), [&]<int W, int P, int T>() {
    launch(dev, norm_forward<Real, W, P, T>, dim3(unsigned(ceil_div(N, forward_threads / (32 * T)))), forward_threads,
           0, sum, out, rstd, x, branch, weight, N, C, float(eps));
  });
}

}  // namespace

template <class Device>
void rmsnorm_forward(Device& dev, typename Device::Real* out, typename Device::Acc* rstd,
                     const typename Device::Real* x, const typename Device::Real* weight, int64_t N, int64_t C,
                     double eps) {
  typename Device::Real* none = nullptr;
  forward(dev, none, out, rstd, x, none, weight, N, C, eps);
}

template <class Device>
void residual_rmsnorm_forward(Device& dev, typename Device::Real* sum, typename Device::Real* out,
                              typename Device::Acc* rstd, const typename Device::Real* residual,
                              const typename Device::Real* branch, const typename Device::Real* weight, int64_t N,
                              int64_t C, double eps) {
  forward(dev, sum, out, rstd, residual, branch, weight, N, C, eps);
}

template <class Device>
void rmsnorm_backward(Device& dev, typename Device::Real* dx, Grad<Device> dweight, void* scratch,
                      const typename Device::Real* dout, const typename Device::Real* dresidual,
                      const typename Device::Real* x, const typename Device::Real* weight,
                      const typename Device::Acc* rstd, int64_t N, int64_t C) {
  using Real = typename Device::Real;
  bool packed = packable<Real>(C, dx, dout, dresidual, x, weight);
  auto run = [&]<int W>() {
    int64_t row_threads = ceil_div(C, 32 * W) * 32, rows = std::max<int64_t>(1, backward_threads / row_threads);
    if (row_threads > 1024) fail_too_wide<Real>(C, packed);
    int64_t threads = rows * row_threads, blocks = std::min<int64_t>(ceil_div(N, rows), most_blocks);
    bool wide = threads > backward_threads;  // one row less, which fits the shared memory of any GPU since Ampere
    size_t chunks = size_t((wide ? stages - 1 : stages) * (dresidual ? 3 : 2) * threads);
    size_t shared = 2 * 32 * sizeof(float) + chunks * sizeof(Chunk<Real, W>);
    float* partial = static_cast<float*>(scratch);
    auto kernel = [&]<int depth>() {
      return dresidual ? norm_backward<Real, W, depth, true> : norm_backward<Real, W, depth, false>;
    };
    launch(dev, wide ? kernel.template operator()<stages - 1>() : kernel.template operator()<stages>(),
           dim3(unsigned(blocks)), unsigned(threads), shared, dx, partial, dout, dresidual, x, weight, rstd, N, C,
           row_threads);
    add_partial_rows(dev, dweight, partial, blocks, C, C);
  };
  packed ? run.template operator()<Pack<Real>::n>() : run.template operator()<1>();
}
template <class Device>
size_t rmsnorm_backward_scratch_bytes(int64_t N, int64_t C) {
  return size_t(std::min<int64_t>(N, most_blocks) * C) * sizeof(float);  // a row a block
}

template <class Device>
void residual_add(Device& dev, typename Device::Real* out, const typename Device::Real* a,
                  const typename Device::Real* b, int64_t n) {
  using Real = typename Device::Real;
  launch(dev, add_rows<Real>, dim3(unsigned(ceil_div(n, 256 * Pack<Real>::n))), 256, 0, out, a, b, n);
}

#define INSTANTIATE(Real)                                                                                          \
  template void rmsnorm_forward(Gpu<Real>&, Real*, float*, const Real*, const Real*, int64_t, int64_t, double);    \
  template void residual_rmsnorm_forward(Gpu<Real>&, Real*, Real*, float*, const Real*, const Real*, const Real*,  \
                                         int64_t, int64_t, double);                                                \
  template void rmsnorm_backward(Gpu<Real>&, Real*, Grad<Gpu<Real>>, void*, const Real*, const Real*, const Real*, \
                                 const Real*, const float*, int64_t, int64_t);                                     \
  template size_t rmsnorm_backward_scratch_bytes<Gpu<Real>>(int64_t, int64_t);                                     \
  template void residual_add(Gpu<Real>&, Real*, const Real*, const Real*, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
