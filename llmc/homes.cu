// Sums of gradients that several ranks sent: every part is read once.
#include "llmc/homes.h"

#include "llmc/cuda_common.cuh"

namespace {

template <class T>
__global__ void __launch_bounds__(256) sum_kernel(float* out, SumParts parts, bool add, int64_t n) {
  const int64_t step = int64_t(gridDim.x) * 256;
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < n; i += step) {
    float sum = add ? out[i] : 0;
    for (int r = 0; r < parts.n; ++r) {
      const float value = to_float(static_cast<const T*>(parts.part[r])[i]);
      sum = r == 0 && !add ? value : sum + value;
    }
    out[i] = sum;
  }
}

}  // namespace

template <class Device>
void sum_parts(Device& dev, typename Device::Acc* out, SumParts parts, bool wide, bool add, int64_t n) {
  if (n == 0) return;
  const dim3 grid(unsigned(std::min<int64_t>((n + 255) / 256, int64_t(dev.multiprocessors) * 32)));
  if (wide)
    launch(dev, sum_kernel<float>, grid, 256, 0, out, parts, add, n);
  else
    launch(dev, sum_kernel<typename Device::Real>, grid, 256, 0, out, parts, add, n);
}

#define INSTANTIATE(Real) template void sum_parts(Gpu<Real>&, float*, SumParts, bool, bool, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
