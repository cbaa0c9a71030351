// --profile: the time of a step by op, held against what each op has to do (op_work.h) and what the machine reaches.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "llmc/op_timer.h"
#include "moe/op_work.h"

// What the machine reaches: operations a second of a large matrix product, bytes a second of a copy (llmc/peak.h).
struct Ceilings {
  double flops_per_s, bytes_per_s;
};

using TimedStep = std::vector<TimedOp>;

// All calls of an op in a step; recomputation by itself.
struct OpTime {
  std::string op;
  int64_t calls = 0;
  double ms = 0;  // median over the steps
  OpWork work;
  double floor_ms = 0;  // the least that the ceilings allow; 0: nothing to hold the time against
};
// Longest first.
std::vector<OpTime> op_times(const std::vector<TimedStep>& steps, const Plan& plan, const OpWorks& works,
                             const Ceilings& ceilings);
double step_ms(const TimedStep& step);

// The ops as a table, a line each, and their sum.
std::vector<std::string> op_table(const std::vector<OpTime>& times);

// The file (llmc/trace.h): the steps one after the other, in them layers and ops with their rates. first: number
// of the first step; about: what run it is.
void write_profile(const std::string& path, const std::vector<TimedStep>& steps, int64_t first, const Plan& plan,
                   const OpWorks& works, const Ceilings& ceilings, const std::vector<OpTime>& times,
                   const std::string& about);

// Picks the steps of a run that are timed op by op: after a few that warm up, the next few.
template <class Device>
class StepProfiler {
 public:
  static constexpr int64_t warm_up = 3, most = 5;

  StepProfiler(Device& dev, Executor<Device>& x, int64_t steps_done)
      : dev_(dev), x_(x), first_(steps_done + warm_up + 1) {}

  bool due(int64_t step) const { return step >= first_ && step < first_ + most; }
  int64_t first() const { return first_; }
  void begin() { timer_ = std::make_unique<OpTimer<Device>>(dev_, x_), timer_->start(); }
  // What has passed since the last op of a step that is timed.
  void note(const char* name) {
    if (timer_) timer_->note(name);
  }
  // Waits for the device.
  void end() { steps_.push_back(timer_->finish()), timer_.reset(); }
  bool done() const { return int64_t(steps_.size()) == most; }
  const std::vector<TimedStep>& steps() const { return steps_; }

 private:
  Device& dev_;
  Executor<Device>& x_;
  int64_t first_;
  std::unique_ptr<OpTimer<Device>> timer_;
  std::vector<TimedStep> steps_;
};
