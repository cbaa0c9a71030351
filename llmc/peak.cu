#include "llmc/peak.h"

#include <algorithm>

#include "llmc/cuda_common.cuh"
#include "llmc/matmul.h"

namespace {
// Numbers in [-1, 1) that look random: power, and so speed, depends on the bits.
template <class Real>
__global__ void fill(Real* p, int64_t n) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint32_t bits = uint32_t(i) * 2654435761u;
    bits = (bits ^ bits >> 15) * 2246822519u;
    p[i] = from_float<Real>(float(bits >> 8) * (2.0f / 16777216.0f) - 1.0f);
  }
}
}  // namespace

template <class Device>
double peak_flops(Device& dev) {
  using Real = typename Device::Real;
  int64_t n = 8192;
  size_t scratch = matmul_scratch_bytes<Device>(n, n, n);
  while (n > 1024 && 3 * size_t(n * n) * sizeof(Real) + scratch > dev.memory().free / 2) n /= 2;
  Real* x = static_cast<Real*>(dev.allocate(3 * size_t(n * n) * sizeof(Real) + scratch));
  Real *w = x + n * n, *out = w + n * n;
  launch(dev, fill<Real>, 1024, 256, 0, x, 2 * n * n);
  cudaEvent_t start, stop;
  CUDA_CHECK(cudaEventCreate(&start));
  CUDA_CHECK(cudaEventCreate(&stop));
  double best = 0;
  for (int i = 0; i < 10; ++i) {
    CUDA_CHECK(cudaEventRecord(start, dev.stream));
    matmul_forward(dev, out, out + n * n, x, w, n, n, n);
    CUDA_CHECK(cudaEventRecord(stop, dev.stream));
    CUDA_CHECK(cudaEventSynchronize(stop));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
    best = std::max(best, 2.0 * double(n) * double(n) * double(n) / (double(ms) * 1e-3));
  }
  cudaEventDestroy(start), cudaEventDestroy(stop);
  dev.release(x);
  return best;
}

template double peak_flops(Gpu<float>&);
template double peak_flops(Gpu<bf16>&);
