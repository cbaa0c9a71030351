// Times the ops of an executor: a mark on the device's time line after each, so that what lies between two marks is an op
// with the gap before it, and the times add up to the whole.
#pragma once
#include "llmc/event_log.h"
#include "llmc/plan.h"

struct TimedOp {
  std::string name;
  int layer = -1;
  bool recomputing = false;
  int64_t tick = -1;            // place in plan.ops(); -1: not an op, but what the host did between ops (note())
  double begin_ms = 0, ms = 0;  // since start()
};

// While it lives the executor's programs run op by op, with the same bits. One at a time.
template <class Device>
class OpTimer {
 public:
  OpTimer(Device& dev, Executor<Device>& x) : x_(x), log_(dev) {
    x_.before = [](const char* name, int) { EventLog<Device>::begin_range(name); };
    x_.observer = [this](const char* name, int layer) {
      EventLog<Device>::end_range();
      add({name, layer, x_.recomputing, x_.tick()});
    };
  }
  ~OpTimer() { x_.before = x_.observer = nullptr; }
  OpTimer(const OpTimer&) = delete;
  OpTimer& operator=(const OpTimer&) = delete;

  // Forgets what was timed; from here on everything counts.
  void start() { ops_.clear(), log_.clear(), log_.mark(); }
  // What has passed since the last mark was no op, but this.
  void note(const char* name) { add({name}); }
  // All since start(), in order. Waits for the device.
  std::vector<TimedOp> finish() {
    for (size_t i = 0; i < ops_.size(); ++i) {
      ops_[i].ms = log_.ms(i, i + 1);
      ops_[i].begin_ms = i ? ops_[i - 1].begin_ms + ops_[i - 1].ms : 0;
    }
    return ops_;
  }

 private:
  void add(TimedOp op) { ops_.push_back(std::move(op)), log_.mark(); }

  Executor<Device>& x_;
  EventLog<Device> log_;
  std::vector<TimedOp> ops_;
};
