#include "llmc/step.h"

#include "llmc/device.h"

template <class Device>
void reset_stats(Device&, StepStats* stats) {
  *stats = StepStats();
}

template <class Device>
void add_to(Device&, typename Device::Acc* to, const typename Device::Acc* from, int64_t n) {
#pragma omp parallel for
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

#define INSTANTIATE(Real)                            \
  template void reset_stats(Cpu<Real>&, StepStats*); \
  template void add_to(Cpu<Real>&, Cpu<Real>::Acc*, const Cpu<Real>::Acc*, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
