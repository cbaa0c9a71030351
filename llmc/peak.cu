#include "llmc/peak.h"

#include <algorithm>

#include "llmc/cuda_common.cuh"
#include "llmc/event_log.h"
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
  double best = 0;
  float fastest = 0;  // milliseconds of the last size
  for (int64_t n = 1024; n <= 8192 && fastest < 5; n *= 2) {
    size_t matrices = 3 * size_t(n * n) * sizeof(Real), scratch = matmul_scratch_bytes<Device>(n, n, n);
    if (matrices + scratch > dev.memory().free / 2) break;
    Real* x = static_cast<Real*>(dev.allocate(matrices + scratch));
    Real *w = x + n * n, *out = w + n * n;
    launch(dev, fill<Real>, 1024, 256, 0, x, 2 * n * n);
    cudaEvent_t start, stop;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    for (int i = 0; i < 5; ++i) {
      CUDA_CHECK(cudaEventRecord(start, dev.stream));
      matmul_forward(dev, out, out + n * n, x, w, n, n, n);
      CUDA_CHECK(cudaEventRecord(stop, dev.stream));
      CUDA_CHECK(cudaEventSynchronize(stop));
      float ms = 0;
      CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
      fastest = i == 0 ? ms : std::min(fastest, ms);
    }
    best = std::max(best, 2.0 * double(n) * double(n) * double(n) / (double(fastest) * 1e-3));
    cudaEventDestroy(start), cudaEventDestroy(stop);
    dev.release(x);
  }
  return std::max(best, 1.0);  // 1: no memory to measure in
}

template <class Device>
double copy_bandwidth(Device& dev) {
  const size_t bytes = std::min(size_t(1) << 30, dev.memory().free / 4) / 256 * 256;
  if (bytes == 0) return 1;  // no memory to measure in
  char* from = static_cast<char*>(dev.allocate(2 * bytes));
  launch(dev, fill<float>, 1024, 256, 0, reinterpret_cast<float*>(from), int64_t(bytes / sizeof(float)));
  GpuEvents log(dev);
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    const size_t start = log.mark();
    dev.copy(from + bytes, from, bytes);
    best = std::max(best, 2e3 * double(bytes) / log.ms(start, log.mark()));
  }
  dev.release(from);
  return best;
}

template double copy_bandwidth(Gpu<float>&);
template double copy_bandwidth(Gpu<bf16>&);
template double peak_flops(Gpu<float>&);
template double peak_flops(Gpu<bf16>&);
