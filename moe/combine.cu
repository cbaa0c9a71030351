// Bringing expert rows back to tokens on the GPU: a warp a token, 16 bytes a lane at a time.
#include "moe/combine.h"

#include "llmc/cuda_common.cuh"

namespace {

constexpr int warps = 8;

// W elements at a time; batch rows in flight before the first is used. n_rows: combine_more()'s; or null.
template <class Real, int W>
__global__ void __launch_bounds__(warps * 32)
    combine_rows(Real* out, const Real* rows, const Real* addend, const float* gates, const int32_t* slot_row,
                 const int32_t* n_rows, int64_t N, int K, int64_t C) {
  struct alignas(sizeof(Real) * W) Chunk {
    Real v[W];
  };
  constexpr int batch = 4;
  int64_t t = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (t >= N || (n_rows && *n_rows == 0)) return;
  for (int64_t c = int64_t(threadIdx.x % 32) * W; c < C; c += 32 * W) {
    Chunk start = {};
    if (addend) start = *reinterpret_cast<const Chunk*>(addend + t * C + c);
    float sum[W] = {};
    for (int k0 = 0; k0 < K; k0 += batch) {
      Chunk y[batch];
      float gate[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        int row = k0 + i < K ? slot_row[t * K + k0 + i] : -1;
        gate[i] = row < 0 ? 0 : gates ? gates[t * K + k0 + i] : 1;
        if (row >= 0)
          y[i] = *reinterpret_cast<const Chunk*>(rows + int64_t(row) * C + c);
        else
          for (int j = 0; j < W; ++j) y[i].v[j] = from_float<Real>(0);
      }
#pragma unroll
      for (int i = 0; i < batch; ++i)
#pragma unroll
        for (int j = 0; j < W; ++j) sum[j] += gate[i] * to_float(y[i].v[j]);
    }
#pragma unroll
    for (int j = 0; j < W; ++j) start.v[j] = from_float<Real>(to_float(start.v[j]) + sum[j]);
    *reinterpret_cast<Chunk*>(out + t * C + c) = start;
  }
}

template <class Real>
void launch_combine(GpuBase& dev, Real* out, const Real* rows, const Real* addend, const float* gates,
                    const int32_t* slot_row, const int32_t* n_rows, int64_t N, int64_t K, int64_t C) {
  auto kernel = packable<Real>(C, out, rows, addend) ? combine_rows<Real, Pack<Real>::n> : combine_rows<Real, 1>;
  launch(dev, kernel, dim3(unsigned(ceil_div(N, warps))), warps * 32, 0, out, rows, addend, gates, slot_row, n_rows, N,
         int(K), C);
}

}  // namespace

template <class Device>
void combine(Device& dev, typename Device::Real* out, const typename Device::Real* rows,
             const typename Device::Real* addend, const typename Device::Acc* gates, const int32_t* slot_row, int64_t N,
             int64_t K, int64_t C) {
  launch_combine<typename Device::Real>(dev, out, rows, addend, gates, slot_row, nullptr, N, K, C);
}

template <class Device>
void combine_more(Device& dev, typename Device::Real* out, const typename Device::Real* rows,
                  const typename Device::Acc* gates, const int32_t* slot_row, const int32_t* n_rows, int64_t N,
                  int64_t K, int64_t C) {
  launch_combine<typename Device::Real>(dev, out, rows, out, gates, slot_row, n_rows, N, K, C);
}

#define INSTANTIATE(Real)                                                                                            \
  template void combine(Gpu<Real>&, Real*, const Real*, const Real*, const float*, const int32_t*, int64_t, int64_t, \
                        int64_t);                                                                                    \
  template void combine_more(Gpu<Real>&, Real*, const Real*, const float*, const int32_t*, const int32_t*, int64_t,  \
                             int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
