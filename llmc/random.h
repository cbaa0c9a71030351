// Counter-based random numbers: a value is a pure function of (seed, stream, index). No generator state exists, so no
// layout of processes, threads or batches can change any value.
#pragma once
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string_view>

// The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014):
// a bijection on 64 bits in which every input bit reaches every output bit.
constexpr uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// 64 random bits of (seed, stream, index).
constexpr uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
  uint64_t z = mix64(seed + 0x9E3779B97F4A7C15ull);
  z = mix64(z ^ (stream + 0xD1B54A32D192ED03ull));
  return mix64(z ^ (index * 0x9E3779B97F4A7C15ull + 0x8CB92BA72F3D8DD7ull));
}

// Uniform in [0, 1), 53 bits.
constexpr double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  return double(random_bits(seed, stream, index) >> 11) * 0x1p-53;
}

// Standard normal (Box-Muller; one value for two uniforms).
inline double random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
  double u = 1.0 - random_uniform(seed, stream, 2 * index);  // (0, 1]
  double v = random_uniform(seed, stream, 2 * index + 1);
  return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
}

// FNV-1a of a name: the stream of a logical tensor.
constexpr uint64_t hash_name(std::string_view name) {
  uint64_t h = 0xCBF29CE484222325ull;
  for (char c : name) h = (h ^ uint8_t(c)) * 0x100000001B3ull;
  return h;
}
