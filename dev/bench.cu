// The laboratory's own device code: random values, and the comparison of tensors.
#include "dev/bench.h"

#include <cmath>

#include "llmc/cuda_common.cuh"
#include "llmc/random.h"

namespace bench {

double fp32_rate(const GpuBase& dev) {
  int device = 0, kilohertz = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, device));
  const int cores = dev.capability == 80 ? 64 : 128;  // of a multiprocessor
  return 2e3 * kilohertz * cores * dev.multiprocessors;
}

// ---- random values ----

namespace {
constexpr int threads = 256, most_blocks = 4096;

unsigned blocks_for(int64_t n) { return unsigned(std::min<int64_t>(most_blocks, ceil_div(n, threads))); }

// Box-Muller from one 64-bit draw: the upper half makes the radius, the lower half the angle.
template <class T>
__global__ void normal_values(T* p, int64_t n, float scale, float mean, uint64_t stream) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t bits = random_bits(1, stream, uint64_t(i));
    float u = (float(uint32_t(bits >> 32) >> 8) + 1.0f) * 0x1p-24f;  // (0, 1]
    float v = float(uint32_t(bits) >> 8) * 0x1p-24f;
    p[i] = from_float<T>(mean + scale * sqrtf(-2.0f * logf(u)) * cospif(2.0f * v));
  }
}

template <class T>
void fill(GpuBase& dev, T* p, int64_t n, double scale, double mean, uint64_t stream) {
  launch(dev, normal_values<T>, blocks_for(n), threads, 0, p, n, float(scale), float(mean), stream);
}

// ---- comparison ----

template <class T>
__device__ double value_of(T v) {
  if constexpr (std::is_same_v<T, bf16>)
    return to_float(v);
  else
    return double(v);
}

// partial (blocks,3): sums of (got - expected)^2 and expected^2, and how many of got are not finite.
template <class A, class B>
__global__ void sum_differences(double* partial, const A* got, const B* expected, int64_t n) {
  double error = 0, norm = 0, bad = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    double g = value_of(got[i]), e = value_of(expected[i]);
    error += (g - e) * (g - e), norm += e * e, bad += isfinite(g) ? 0 : 1;
  }
  error = block_sum(error), norm = block_sum(norm), bad = block_sum(bad);
  if (threadIdx.x == 0) {
    double* mine = partial + 3 * blockIdx.x;
    mine[0] = error, mine[1] = norm, mine[2] = bad;
  }
}

// partial (blocks): the largest |got - expected| / (|expected| + rms).
template <class A, class B>
__global__ void largest_difference(float* partial, const A* got, const B* expected, int64_t n, double rms) {
  float worst = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    double g = value_of(got[i]), e = value_of(expected[i]), d = fabs(g - e);
    if (d > 0) worst = fmaxf(worst, float(d / (fabs(e) + rms)));
  }
  worst = block_max(worst);
  if (threadIdx.x == 0) partial[blockIdx.x] = worst;
}

template <class A, class B>
Difference compare(GpuBase& dev, const A* got, const B* expected, int64_t n) {
  unsigned blocks = blocks_for(n);
  void* partial = dev.allocate(blocks * 3 * sizeof(double));
  std::vector<double> sums(3 * blocks);
  std::vector<float> largest(blocks);
  launch(dev, sum_differences<A, B>, blocks, threads, 0, static_cast<double*>(partial), got, expected, n);
  dev.to_host(sums.data(), partial, sums.size() * sizeof(double));
  double error = 0, norm = 0, bad = 0;
  for (unsigned b = 0; b < blocks; ++b) error += sums[3 * b], norm += sums[3 * b + 1], bad += sums[3 * b + 2];
  double rms = std::sqrt(norm / double(n));
  launch(dev, largest_difference<A, B>, blocks, threads, 0, static_cast<float*>(partial), got, expected, n, rms);
  dev.to_host(largest.data(), partial, largest.size() * sizeof(float));
  dev.release(partial);
  Difference d;
  d.error = error == 0 ? 0 : std::sqrt(error / norm);  // infinite where all of `expected` is 0
  for (float w : largest) d.worst = std::max(d.worst, double(w));
  d.not_finite = int64_t(bad);
  return d;
}

template <class A>
Difference compare(GpuBase& dev, const void* got, const void* expected, DType expected_type, int64_t n) {
  if (expected_type == DType::f64)
    return compare(dev, static_cast<const A*>(got), static_cast<const double*>(expected), n);
  return compare(dev, static_cast<const A*>(got), static_cast<const A*>(expected), n);
}
}  // namespace

void fill_normal(GpuBase& dev, bf16* p, int64_t n, double scale, double mean, uint64_t stream) {
  fill(dev, p, n, scale, mean, stream);
}
void fill_normal(GpuBase& dev, float* p, int64_t n, double scale, double mean, uint64_t stream) {
  fill(dev, p, n, scale, mean, stream);
}

Difference difference(GpuBase& dev, const void* got, DType type, const void* expected, DType expected_type, int64_t n) {
  if (n == 0) return {};
  if (type == DType::bf16) return compare<bf16>(dev, got, expected, expected_type, n);
  if (type == DType::f32) return compare<float>(dev, got, expected, expected_type, n);
  if (type == DType::i32) return compare<int32_t>(dev, got, expected, expected_type, n);
  fail("a comparison of tensors of type ", dtype_name(type), " is not provided for");
}

}  // namespace bench
