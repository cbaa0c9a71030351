// Marks on the time line of a device, and the milliseconds between them; named ranges for Nsight.
#pragma once
#include <chrono>
#include <type_traits>
#include <vector>

#include "llmc/gpu.h"

struct CUevent_st;  // what a cudaEvent_t points to

// Events on a GPU's stream: nothing waits until times are asked for. Ranges (NVTX) are what `nsys profile` shows of the
// host's time line, and what it relates kernels to.
class GpuEvents {
 public:
  explicit GpuEvents(GpuBase& dev) : dev_(dev) {}
  ~GpuEvents();
  GpuEvents(const GpuEvents&) = delete;
  GpuEvents& operator=(const GpuEvents&) = delete;

  size_t mark();                            // puts an event on the stream and returns its number
  double ms(size_t from, size_t to) const;  // milliseconds between two marks; waits for the later one
  void clear() { used_ = 0; }               // numbers start at 0 again

  static void begin_range(const char* name);
  static void end_range();

 private:
  GpuBase& dev_;
  std::vector<CUevent_st*> events_;
  size_t used_ = 0;
};

// The same where ops are done when they return.
class HostEvents {
 public:
  template <class Device>
  explicit HostEvents(Device&) {}

  size_t mark() { return times_.push_back(std::chrono::steady_clock::now()), times_.size() - 1; }
  double ms(size_t from, size_t to) const {
    return std::chrono::duration<double, std::milli>(times_[to] - times_[from]).count();
  }
  void clear() { times_.clear(); }

  static void begin_range(const char*) {}
  static void end_range() {}

 private:
  std::vector<std::chrono::steady_clock::time_point> times_;
};

template <class Device>
using EventLog = std::conditional_t<std::is_base_of_v<GpuBase, Device>, GpuEvents, HostEvents>;
