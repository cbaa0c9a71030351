// Number types: bf16, and the names under which files and reports know each type.
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "llmc/error.h"

// Functions that CUDA kernels share with the CPU code.
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// bfloat16: the upper half of an IEEE float. Conversion from float rounds to nearest, ties to even; NaN stays NaN.
struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float value) {
    uint32_t u = std::bit_cast<uint32_t>(value);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    bits = uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? (u >> 16) | 0x40u : rounded);
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

enum class DType { f64, f32, bf16, i32, u8 };

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return DType::f64;
  if constexpr (std::is_same_v<T, float>) return DType::f32;
  if constexpr (std::is_same_v<T, ::bf16>) return DType::bf16;
  if constexpr (std::is_same_v<T, int32_t>) return DType::i32;
  return DType::u8;
}

constexpr size_t dtype_size(DType d) {
  switch (d) {
    case DType::f64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
      return 2;
    default:
      return 1;
  }
}

// The spelling of safetensors headers: F64, F32, BF16, I32, U8.
constexpr const char* dtype_name(DType d) {
  switch (d) {
    case DType::f64:
      return "F64";
    case DType::f32:
      return "F32";
    case DType::bf16:
      return "BF16";
    case DType::i32:
      return "I32";
    default:
      return "U8";
  }
}
