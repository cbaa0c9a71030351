// A device: where tensors live and ops run. Every op is declared once as a template over the device; Cpu<Real> is the
// readable reference and a working backend.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmc/types.h"

// What went wrong inside an op, written by the device and read by the host after the step: ops cannot throw, because on
// a GPU nobody waits for them. The first fault wins.
struct DeviceStatus {
  enum Code : int32_t { ok = 0, token_out_of_range = 1, expert_out_of_range = 2, peer_late = 3 };
  int32_t code = ok;
  int32_t layer = -1;
  int64_t token = -1;  // position in the micro-batch; peer_late: the seconds that were waited
  int64_t value = 0;   // the offending value; peer_late: the rank that did not come
};

// The host's processors and memory.
//   Real  storage type of weights and activations: float, double, or bf16 (rounded where the GPU rounds)
//   Acc   type of every sum, of router, norms, losses, master weights and moments: double for double, else float
template <class Real_>
struct Cpu {
  using Real = Real_;
  using Acc = std::conditional_t<std::is_same_v<Real_, double>, double, float>;
  static constexpr const char* name = "cpu";
  static constexpr bool has_graphs = false;
  using Graph = std::nullptr_t;

  bool plain_matmul = false;  // the plain loop instead of the library (slower; the order of every sum is then ours)
  DeviceStatus* status = nullptr;
  int layer = -1;  // of the op being run, for the status

  void* allocate(size_t bytes) {
    void* p = nullptr;  // exactly `bytes`: an overrun by one is an overrun
    if (posix_memalign(&p, alignment, bytes)) throw std::bad_alloc();
    return p;
  }
  void release(void* p) { std::free(p); }
  void zero(void* p, size_t bytes) { std::memset(p, 0, bytes); }
  void fill_byte(void* p, int byte, size_t bytes) { std::memset(p, byte, bytes); }
  void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
  void to_device(void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
  void to_host(void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
  // Rows of `width` bytes, `device_pitch` apart on the device, one after another on the host.
  void rows_to_device(void* device, size_t device_pitch, const void* host, size_t width, size_t rows) {
    for (size_t i = 0; i < rows; ++i)
      std::memcpy(static_cast<char*>(device) + i * device_pitch, static_cast<const char*>(host) + i * width, width);
  }
  void rows_to_host(void* host, const void* device, size_t device_pitch, size_t width, size_t rows) {
    for (size_t i = 0; i < rows; ++i)
      std::memcpy(static_cast<char*>(host) + i * width, static_cast<const char*>(device) + i * device_pitch, width);
  }
  // As on a device that works while the host goes on: see gpu.h.
  void stage(void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
  using Fetch = std::function<std::vector<char>()>;
  Fetch fetch(const std::vector<std::pair<const void*, size_t>>& pieces) {
    std::vector<char> bytes;
    for (auto [p, n] : pieces) bytes.insert(bytes.end(), static_cast<const char*>(p), static_cast<const char*>(p) + n);
    return [bytes] { return bytes; };
  }
  void synchronize() {}
  void fault(DeviceStatus::Code code, int64_t token, int64_t value) {
    if (!status) return;
    bool earlier =
        status->code == code && status->layer == layer && token < status->token;  // threads come in any order
    if (status->code == DeviceStatus::ok || earlier) *status = {code, layer, token, value};
  }

  static constexpr size_t alignment = 256;
  static constexpr int64_t classifier_bytes = int64_t(64) << 20;  // of logits at a time
};
