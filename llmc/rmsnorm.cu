// RMSNorm on the GPU. Forward: a warp a row, the row held in registers between its two uses. Backward: a block walks over
// 32 rows, one 16-byte chunk a thread, so that the weight gradient of a thread's columns stays in registers; the next row
// is on its way while the sum over this one is made.
#include "llmc/rmsnorm.h"

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_reduce.cuh"

namespace {

constexpr int warps = 8, backward_rows = 32;  // rows of a block whose weight gradient is summed before the blocks are

// A warp's part of a row: P chunks of W elements a lane, chunk i of a lane starting at element (i*32 + lane) * W.
template <class Real, int W, int P>
struct RowOf {
  struct alignas(sizeof(Real) * W) Chunk {
    Real v[W];
  };
  Chunk chunk[P];
  __device__ static int64_t at(int i) { return int64_t(i * 32 + int(threadIdx.x % 32)) * W; }
  __device__ void load(const Real* row, int64_t C) {
#pragma unroll
    for (int i = 0; i < P; ++i)
      if (at(i) < C) chunk[i] = *reinterpret_cast<const Chunk*>(row + at(i));
  }
  __device__ void store(Real* row, int64_t C) const {
#pragma unroll
    for (int i = 0; i < P; ++i)
      if (at(i) < C) *reinterpret_cast<Chunk*>(row + at(i)) = chunk[i];
  }
  __device__ float get(int i, int j) const { return to_float(chunk[i].v[j]); }
  __device__ void set(int i, int j, float value) { chunk[i].v[j] = from_float<Real>(value); }
};
// Calls f(i, j) for this lane's elements.
template <class Row, int W, int P, class F>
__device__ void each_element(int64_t C, F f) {
#pragma unroll
  for (int i = 0; i < P; ++i)
    if (Row::at(i) < C)
#pragma unroll
      for (int j = 0; j < W; ++j) f(i, j);
}

// branch null: the norm of x alone; else sum = x + branch is stored and normalised.
template <class Real, int W, int P>
__global__ void __launch_bounds__(warps * 32)
    norm_forward(Real* sum, Real* out, float* rstd, const Real* x, const Real* branch, const Real* weight, int64_t N,
                 int64_t C, float eps) {
  using Row = RowOf<Real, W, P>;
  int64_t n = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (n >= N) return;
  Row row, other;
  row.load(x + n * C, C);
  if (branch) {
    other.load(branch + n * C, C);
    each_element<Row, W, P>(C, [&](int i, int j) { row.set(i, j, row.get(i, j) + other.get(i, j)); });
    row.store(sum + n * C, C);
  }
  float squares = 0;
  each_element<Row, W, P>(C, [&](int i, int j) { squares += row.get(i, j) * row.get(i, j); });
  float r = 1.0f / sqrtf(warp_sum(squares) / float(C) + eps);
  other.load(weight, C);
  each_element<Row, W, P>(C, [&](int i, int j) { row.set(i, j, row.get(i, j) * r * other.get(i, j)); });
  row.store(out + n * C, C);
  if (threadIdx.x % 32 == 0) rstd[n] = r;
}

// partial (blocks,C): the weight gradient of backward_rows rows. One chunk of W elements a thread.
template <class Real, int W>
__global__ void norm_backward(Real* dx, float* partial, const Real* dout, const Real* dresidual, const Real* x,
                              const Real* weight, const float* rstd, int64_t N, int64_t C) {
  struct alignas(sizeof(Real) * W) Chunk {
    Real v[W];
  };
  __shared__ float sums[2][32];  // of the warps; two, so that one barrier a row is enough
  const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  const int64_t c = int64_t(threadIdx.x) * W, first = int64_t(blockIdx.x) * backward_rows;
  const int64_t end = min(N, first + backward_rows);
  const bool live = c < C;
  auto load = [&](const Real* p) { return *reinterpret_cast<const Chunk*>(p + c); };
  Chunk w{}, xs{}, ds{}, past{};
  if (live) w = load(weight), xs = load(x + first * C), ds = load(dout + first * C);
  float dw[W] = {};
  for (int64_t n = first; n < end; ++n) {
    Chunk next_x{}, next_d{};
    if (live && n + 1 < end) next_x = load(x + (n + 1) * C), next_d = load(dout + (n + 1) * C);
    if (live && dresidual) past = load(dresidual + n * C);
    float r = rstd[n], dot = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) dot += to_float(ds.v[j]) * to_float(w.v[j]) * to_float(xs.v[j]);
    dot = warp_sum(live ? dot : 0.0f);
    float* row_sums = sums[n % 2];
    if (threadIdx.x % 32 == 0) row_sums[warp] = dot;
    __syncthreads();
    float mean = 0;
    for (int i = 0; i < n_warps; ++i) mean += row_sums[i];
    mean *= r / float(C);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      float xhat = to_float(xs.v[j]) * r, d = to_float(ds.v[j]);
      dw[j] += d * xhat;
      float value = r * (d * to_float(w.v[j]) - xhat * mean);
      xs.v[j] = from_float<Real>(dresidual ? to_float(past.v[j]) + value : value);
    }
    if (live) *reinterpret_cast<Chunk*>(dx + n * C + c) = xs;
    xs = next_x, ds = next_d;
  }
  if (live)
    for (int j = 0; j < W; ++j) partial[int64_t(blockIdx.x) * C + c + j] = dw[j];
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

// Calls f.template operator()<W, P>() with the smallest P that holds a row of C elements, W elements a chunk.
template <class Real, class F>
void with_row_shape(int64_t C, bool packed, F f) {
  constexpr int W = Pack<Real>::n;
  int64_t chunks = ceil_div(C, 32 * (packed ? W : 1));
  if (packed) {
    if (chunks <= 1) return f.template operator()<W, 1>();
    if (chunks <= 2) return f.template operator()<W, 2>();
    if (chunks <= 3) return f.template operator()<W, 3>();
    if (chunks <= 4) return f.template operator()<W, 4>();
    if (chunks <= 8) return f.template operator()<W, 8>();
    if (chunks <= 16) return f.template operator()<W, 16>();
    if (chunks <= 32) return f.template operator()<W, 32>();
  } else {
    if (chunks <= 4) return f.template operator()<1, 4>();
    if (chunks <= 32) return f.template operator()<1, 32>();
  }
  fail_too_wide<Real>(C, packed);
}

template <class Device, class Real = typename Device::Real>
void forward(Device& dev, Real* sum, Real* out, float* rstd, const Real* x, const Real* branch, const Real* weight,
             int64_t N, int64_t C, double eps) {
  with_row_shape<Real>(C, packable<Real>(C, sum, out, x, branch, weight), [&]<int W, int P>() {
    launch(dev, norm_forward<Real, W, P>, dim3(unsigned(ceil_div(N, warps))), warps * 32, 0, sum, out, rstd, x, branch,
           weight, N, C, float(eps));
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
  float* partial = static_cast<float*>(scratch);
  int64_t blocks = ceil_div(N, backward_rows);
  bool packed = packable<Real>(C, dx, dout, dresidual, x, weight);
  int64_t threads = ceil_div(C / (packed ? Pack<Real>::n : 1), 32) * 32;
  if (threads > 1024) fail_too_wide<Real>(C, packed);
  launch(dev, packed ? norm_backward<Real, Pack<Real>::n> : norm_backward<Real, 1>, dim3(unsigned(blocks)),
         unsigned(threads), 0, dx, partial, dout, dresidual, x, weight, rstd, N, C);
  add_partial_rows(dev, dweight, partial, blocks, C, C);
}
template <class Device>
size_t rmsnorm_backward_scratch_bytes(int64_t N, int64_t C) {
  return size_t(ceil_div(N, backward_rows) * C) * sizeof(float);
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
