// --memory-profile: what lives in the arena at each op of a step, where the peak is, and what would lower it. All of it is
// read off plans, this run's and those of its alternatives: of nothing that is not what would be allocated.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "llmc/trace.h"
#include "moe/op_work.h"
#include "moe/report.h"

// By tick of the plan's clock, programs one after the other as they were planned.
struct MemoryTimeline {
  std::vector<std::array<size_t, n_category>> alive;  // bytes of the tensors that live, by category
  std::vector<size_t> extent;                         // end of the last of them: what the arena must have
  int64_t peak = 0;  // of the ticks whose extent is the whole arena the one at which most bytes live

  size_t alive_bytes(int64_t tick) const;
  // Of the extent what is no tensor: gaps that nothing fits into, and rounding to Plan::alignment.
  size_t between_bytes(int64_t tick) const { return extent[size_t(tick)] - alive_bytes(tick); }
};
MemoryTimeline memory_timeline(const Plan& plan);

// A plan, by what it costs.
struct PlannedCase {
  std::string name;            // "recompute up"
  size_t total = 0, kept = 0;  // bytes of the arena; of these, what is kept for backward, routing metadata included
  OpWorks::Operations operations;
};

// The screen: peak and what lives there, what each layer keeps (equal layers in one line), and the cases with what they
// save and cost. cases[0] is the run as it is.
std::string memory_summary(const Plan& plan, const MemoryTimeline& timeline, const ModelConfig& config,
                           const RunOptions& run, const std::vector<PlannedCase>& cases);
// The file (llmc/trace.h), in which an op takes a millisecond: programs, layers and ops; bytes by category; the life of
// every tensor; the peak, with the cases that lower it.
void write_memory_trace(const std::string& path, const Plan& plan, const MemoryTimeline& timeline,
                        const ModelConfig& config, const RunOptions& run, const std::vector<PlannedCase>& cases);

// Plans the run and its alternatives, writes the file and returns the screen.
template <class Device>
std::string memory_profile(Device& dev, const ModelConfig& config, const RunOptions& run, const std::string& path) {
  Trace::check(path);
  std::vector<PlannedCase> cases;
  auto plan_case = [&](const std::string& name, const RunOptions& r) {
    Plan plan = Model<Device>(dev, config, r).plan;
    cases.push_back({name, plan.arena_bytes(),
                     plan.category_bytes(Category::saved) + plan.category_bytes(Category::metadata),
                     OpWorks(config, r, plan, sizeof(typename Device::Real)).operations()});
    return plan;
  };
  const Plan plan = plan_case("this run", run);
  for (Recompute p : {Recompute::none, Recompute::act, Recompute::up, Recompute::block}) {
    RunOptions other = run;
    other.recompute.assign(size_t(config.n_layer), p);
    plan_case(std::string("recompute ") + name_of(p), other);
  }
  RunOptions other = run;
  other.dispatch = other_dispatch(run.dispatch);
  plan_case(std::string("dispatch ") + name_of(other.dispatch), other);
  const MemoryTimeline timeline = memory_timeline(plan);
  write_memory_trace(path, plan, timeline, config, run, cases);
  return memory_summary(plan, timeline, config, run, cases);
}
