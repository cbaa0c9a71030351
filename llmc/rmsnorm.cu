// RMSNorm on the GPU: a warp a row, the row held in registers between its two uses.
#include "llmc/rmsnorm.h"

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_reduce.cuh"

namespace {

constexpr int warps = 8, backward_rows = 64;  // rows of a block whose weight gradient is summed before the blocks are

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
__global__ void __launch_bounds__(warps * 32) norm_forward(Real* sum, Real* out, float* rstd, const Real* x,
                                                           const Real* branch, const Real* weight, int64_t N, int64_t C,
                                                           float eps) {
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

// partial (blocks,C): the weight gradient of backward_rows rows. Each warp keeps its sums in shared memory, element
// (i,j) of lane l at ((i*W + j)*32 + l), so that a warp always touches 32 banks.
template <class Real, int W, int P>
__global__ void __launch_bounds__(warps * 32) norm_backward(Real* dx, float* partial, const Real* dout,
                                                            const Real* dresidual, const Real* x, const Real* weight,
                                                            const float* rstd, int64_t N, int64_t C) {
  using Row = RowOf<Real, W, P>;
  extern __shared__ float shared[];
  constexpr int width = P * W * 32;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
  float* mine = shared + warp * width + lane;
  for (int k = 0; k < P * W; ++k) mine[k * 32] = 0;
  int64_t end = min(N, (int64_t(blockIdx.x) + 1) * backward_rows);
  for (int64_t n = int64_t(blockIdx.x) * backward_rows + warp; n < end; n += n_warps) {
    Row xs, ds, w, past;
    xs.load(x + n * C, C), ds.load(dout + n * C, C), w.load(weight, C);
    if (dresidual) past.load(dresidual + n * C, C);
    float r = rstd[n], dot = 0;
    each_element<Row, W, P>(C, [&](int i, int j) { dot += ds.get(i, j) * w.get(i, j) * xs.get(i, j); });
    float mean = warp_sum(dot) * r / float(C);
    each_element<Row, W, P>(C, [&](int i, int j) {
      float xhat = xs.get(i, j) * r, d = ds.get(i, j);
      mine[(i * W + j) * 32] += d * xhat;
      float dxv = r * (d * w.get(i, j) - xhat * mean);
      xs.set(i, j, dresidual ? past.get(i, j) + dxv : dxv);
    });
    xs.store(dx + n * C, C);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < width; k += blockDim.x) {
    int l = k % 32, i = k / 32 / W, j = k / 32 % W;
    int64_t c = int64_t(i * 32 + l) * W + j;
    float sum = 0;
    for (int w = 0; w < n_warps; ++w) sum += shared[w * width + k];
    if (c < C) partial[int64_t(blockIdx.x) * C + c] = sum;
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
  fail("RMSNorm on the GPU: rows of ", C, " elements are too wide (", packed ? 32 * 32 * W : 1024, " at most)");
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
  with_row_shape<Real>(C, packable<Real>(C, dx, dout, dresidual, x, weight), [&]<int W, int P>() {
    int n_warps = P * W <= 64 ? warps : 2;  // wide rows: what fits in 64 KiB
    launch(dev, norm_backward<Real, W, P>, dim3(unsigned(blocks)), n_warps * 32,
           size_t(n_warps) * P * W * 32 * sizeof(float), dx, partial, dout, dresidual, x, weight, rstd, N, C);
  });
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

#define INSTANTIATE(Real)                                                                                         \
  template void rmsnorm_forward(Gpu<Real>&, Real*, float*, const Real*, const Real*, int64_t, int64_t, double);   \
  template void residual_rmsnorm_forward(Gpu<Real>&, Real*, Real*, float*, const Real*, const Real*, const Real*, \
                                         int64_t, int64_t, double);                                               \
  template void rmsnorm_backward(Gpu<Real>&, Real*, Grad<Gpu<Real>>, void*, const Real*, const Real*, const Real*, \
                                 const Real*, const float*, int64_t, int64_t);                                    \
  template size_t rmsnorm_backward_scratch_bytes<Gpu<Real>>(int64_t, int64_t);                                    \
  template void residual_add(Gpu<Real>&, Real*, const Real*, const Real*, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
