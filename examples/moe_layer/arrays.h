// Memory of the CPU or the GPU, and a type for bf16: what the example needs and any program already has.
#pragma once
#include <gpt_moe.h>

#include <cmath>
#include <cstdlib>
#include <new>
#ifdef WITH_CUDA
#include <cuda_runtime.h>
#endif

class Bf16 {  // the upper half of a float
  std::uint16_t half = 0;

 public:
  Bf16(double value) : half(std::uint16_t(__builtin_bit_cast(std::uint32_t, float(value)) >> 16)) {}
  operator double() const { return __builtin_bit_cast(float, std::uint32_t(half) << 16); }
};

inline void* allocate([[maybe_unused]] moe::Place place, size_t bytes) {
#ifdef WITH_CUDA
  void* p = nullptr;  // managed: the CPU reads and writes it too
  if (place == moe::Place::cuda) return cudaMallocManaged(&p, bytes) == cudaSuccess ? p : throw std::bad_alloc();
#endif
  return std::aligned_alloc(256, (bytes + 255) / 256 * 256);
}

// n values between -scale and scale that repeat nowhere.
template <class T>
T* array(moe::Place place, std::int64_t n, double scale = 0) {
  T* values = static_cast<T*>(allocate(place, size_t(n) * sizeof(T)));
  for (std::int64_t i = 0; i < n; ++i) values[i] = T(scale * std::sin(0.7 * double(i) * double(i % 1013)));
  return values;
}
