#include "llmc/swiglu.h"

#include "llmc/swiglu_row.h"

namespace {
constexpr int64_t chunk = 256;  // columns converted at a time
}

template <class Device>
void swiglu_forward(Device&, typename Device::Real* a, const typename Device::Real* h, int64_t N, int64_t F) {
  using Acc = typename Device::Acc;
#pragma omp parallel for
  for (int64_t n = 0; n < N; ++n)
    for (int64_t f0 = 0; f0 < F; f0 += chunk) {
      int64_t f = std::min(chunk, F - f0);
      Acc row[chunk];
      swiglu_row(row, h + n * 2 * F + 2 * f0, f);
      for (int64_t i = 0; i < f; ++i) a[n * F + f0 + i] = typename Device::Real(row[i]);
    }
}

template <class Device>
void swiglu_backward(Device&, typename Device::Real* dh, const typename Device::Real* da,
                     const typename Device::Real* h, int64_t N, int64_t F) {
  using Acc = typename Device::Acc;
#pragma omp parallel for
  for (int64_t n = 0; n < N; ++n)
    for (int64_t f0 = 0; f0 < F; f0 += chunk) {
      int64_t f = std::min(chunk, F - f0);
      Acc row[chunk];
      for (int64_t i = 0; i < f; ++i) row[i] = Acc(da[n * F + f0 + i]);
      swiglu_backward_row(dh + n * 2 * F + 2 * f0, row, h + n * 2 * F + 2 * f0, Acc(1), f);
    }
}

#define INSTANTIATE(Real)                                                         \
  template void swiglu_forward(Cpu<Real>&, Real*, const Real*, int64_t, int64_t); \
  template void swiglu_backward(Cpu<Real>&, Real*, const Real*, const Real*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
