// What the reader and the writer of safetensors share; nobody else includes this.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

constexpr uint64_t kMaxHeader = 100'000'000;  // bytes; the limit of the reference implementation

// A name made fit for an error line: quoted, control characters escaped, not endless.
std::string shown(const std::string& name);

// Elements and bytes of a shape; false for a negative dimension, or more bytes than int64_t can count.
inline bool checked_bytes(const std::vector<int64_t>& shape, size_t element, int64_t& elements, size_t& bytes) {
  constexpr uint64_t limit = uint64_t(std::numeric_limits<int64_t>::max());
  bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  uint64_t n = empty ? 0 : 1;
  for (int64_t d : shape) {
    if (d < 0) return false;
    if (!empty && n > limit / uint64_t(d)) return false;
    n *= uint64_t(d);
  }
  if (n > limit / element) return false;
  elements = int64_t(n);
  bytes = n * element;
  return true;
}

// "model-00001-of-00003.safetensors" for index 0 of 3.
inline std::string shard_name(const std::string& prefix, size_t index, size_t count) {
  char text[64];
  std::snprintf(text, sizeof text, "-%05zu-of-%05zu.safetensors", index + 1, count);
  return prefix + text;
}
