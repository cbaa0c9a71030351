// SwiGLU of the dense MLP on the GPU: a thread takes 8 columns of the gate and the 8 of the up projection beside them.
#include "llmc/swiglu.h"

#include "llmc/cuda_common.cuh"

namespace {

template <class Real>
struct alignas(16) Eight {
  Real v[8];
};

template <class Real>
__global__ void forward(Real* a, const Real* h, int64_t groups) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= groups) return;
  auto gate = reinterpret_cast<const Eight<Real>*>(h)[2 * i], up = reinterpret_cast<const Eight<Real>*>(h)[2 * i + 1];
  Eight<Real> out;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float g = to_float(gate.v[j]);
    out.v[j] = from_float<Real>(g * sigmoid_of(g) * to_float(up.v[j]));
  }
  reinterpret_cast<Eight<Real>*>(a)[i] = out;
}

template <class Real>
__global__ void backward(Real* dh, const Real* da, const Real* h, int64_t groups) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= groups) return;
  auto gate = reinterpret_cast<const Eight<Real>*>(h)[2 * i], up = reinterpret_cast<const Eight<Real>*>(h)[2 * i + 1];
  auto d = reinterpret_cast<const Eight<Real>*>(da)[i];
  Eight<Real> dgate, dup;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float g = to_float(gate.v[j]), s = sigmoid_of(g), dv = to_float(d.v[j]);
    dgate.v[j] = from_float<Real>(dv * to_float(up.v[j]) * s * (1 + g * (1 - s)));
    dup.v[j] = from_float<Real>(dv * g * s);
  }
  reinterpret_cast<Eight<Real>*>(dh)[2 * i] = dgate, reinterpret_cast<Eight<Real>*>(dh)[2 * i + 1] = dup;
}

}  // namespace

template <class Device>
void swiglu_forward(Device& dev, typename Device::Real* a, const typename Device::Real* h, int64_t N, int64_t F) {
  int64_t groups = N * F / swiglu_interleave;
  launch(dev, forward<typename Device::Real>, dim3(unsigned(ceil_div(groups, 256))), 256, 0, a, h, groups);
}

template <class Device>
void swiglu_backward(Device& dev, typename Device::Real* dh, const typename Device::Real* da,
                     const typename Device::Real* h, int64_t N, int64_t F) {
  int64_t groups = N * F / swiglu_interleave;
  launch(dev, backward<typename Device::Real>, dim3(unsigned(ceil_div(groups, 256))), 256, 0, dh, da, h, groups);
}

#define INSTANTIATE(Real)                                                         \
  template void swiglu_forward(Gpu<Real>&, Real*, const Real*, int64_t, int64_t); \
  template void swiglu_backward(Gpu<Real>&, Real*, const Real*, const Real*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
