#include "llmc/step.h"

#include "llmc/cuda_common.cuh"

namespace {
__global__ void reset(StepStats* stats, StepStats fresh) { *stats = fresh; }

__global__ void add(float* to, const float* from, int64_t n) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    to[i] += from[i];
}
}  // namespace

template <class Device>
void reset_stats(Device& dev, StepStats* stats) {
  launch(dev, reset, 1, 1, 0, stats, StepStats());
}

template <class Device>
void add_to(Device& dev, typename Device::Acc* to, const typename Device::Acc* from, int64_t n) {
  launch(dev, add, dim3(unsigned(dev.multiprocessors * 8)), 256, 0, to, from, n);
}

#define INSTANTIATE(Real)                            \
  template void reset_stats(Gpu<Real>&, StepStats*); \
  template void add_to(Gpu<Real>&, float*, const float*, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
