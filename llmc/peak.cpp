#include "llmc/peak.h"

#include <chrono>
#include <vector>

#include "llmc/matmul.h"

template <class Device>
double peak_flops(Device& dev) {
  using Real = typename Device::Real;
  const int64_t n = 1024;
  std::vector<Real> x(n * n, Real(0.5f)), w(n * n, Real(0.25f)), out(n * n);
  std::vector<char> scratch(matmul_scratch_bytes<Device>(n, n, n));
  double best = 0;
  auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 10; ++i) {
    auto start = std::chrono::steady_clock::now();
    matmul_forward(dev, out.data(), scratch.data(), x.data(), w.data(), n, n, n);
    auto end = std::chrono::steady_clock::now();
    best = std::max(best, 2.0 * double(n) * double(n) * double(n) / std::chrono::duration<double>(end - start).count());
    if (end - begin > std::chrono::milliseconds(100)) break;
  }
  return best;
}

template <class Device>
double copy_bandwidth(Device&) {
  constexpr int64_t pieces = 256, bytes = int64_t(1) << 19;  // 128 MiB in all
  std::vector<char> from(pieces * bytes, 1), to(pieces * bytes);
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    auto start = std::chrono::steady_clock::now();
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < pieces; ++p) std::memcpy(&to[p * bytes], &from[p * bytes], bytes);
    auto end = std::chrono::steady_clock::now();
    best = std::max(best, 2.0 * double(pieces * bytes) / std::chrono::duration<double>(end - start).count());
  }
  return best;
}

template double copy_bandwidth(Cpu<float>&);
template double copy_bandwidth(Cpu<double>&);
template double copy_bandwidth(Cpu<bf16>&);
template double peak_flops(Cpu<float>&);
template double peak_flops(Cpu<double>&);
template double peak_flops(Cpu<bf16>&);
