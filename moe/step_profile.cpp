#include "moe/step_profile.h"

#include <algorithm>
#include <cstdio>
#include <map>

#include "llmc/trace.h"

namespace {
double median(std::vector<double> values) {
  auto middle = values.begin() + std::ptrdiff_t(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}
OpWork work_of(const TimedOp& op, const Plan& plan, const OpWorks& works) {
  return op.tick < 0 ? OpWork{} : works(plan.ops()[size_t(op.tick)]);
}
const char* kind_of(const TimedOp& op) {
  return communicates(op.name) ? "communication" : op.tick < 0 ? "host" : op.recomputing ? "recomputation" : "op";
}
double percent(double floor_ms, double ms) { return ms > 0 ? 100 * floor_ms / ms : 0; }
}  // namespace

double step_ms(const TimedStep& step) { return step.empty() ? 0 : step.back().begin_ms + step.back().ms; }

std::vector<OpTime> op_times(const std::vector<TimedStep>& steps, const Plan& plan, const OpWorks& works,
                             const Ceilings& ceilings) {
  std::map<std::string, OpTime> times;
  std::map<std::string, std::vector<double>> ms;
  for (size_t s = 0; s < steps.size(); ++s)
    for (const TimedOp& op : steps[s]) {
      const std::string name = op.name + (op.recomputing ? " (recomputed)" : "");
      auto& sums = ms[name];
      sums.resize(steps.size());  // a step in which it did not run took 0
      sums[s] += op.ms;
      if (s + 1 < steps.size()) continue;
      OpTime& t = times[name];
      const OpWork work = work_of(op, plan, works);
      t.op = name, ++t.calls, t.work += work;
      t.floor_ms += work.floor_ms(ceilings.flops_per_s, ceilings.bytes_per_s);
    }
  std::vector<OpTime> sorted;
  for (auto& [name, t] : times) t.ms = median(ms[name]), sorted.push_back(t);
  std::sort(sorted.begin(), sorted.end(), [](const OpTime& a, const OpTime& b) { return a.ms > b.ms; });
  return sorted;
}

std::vector<std::string> op_table(const std::vector<OpTime>& times) {
  std::vector<std::string> lines;
  char line[200];
  auto add = [&](const char* op, const std::string& calls, double ms, double share, const OpWork& work, double floor) {
    auto rate = [&](double amount, double scale) {
      char text[24] = "-";
      if (amount > 0 && ms > 0) std::snprintf(text, sizeof text, "%.3g", amount / ms * 1e3 * scale);
      return std::string(text);
    };
    char ceiling[24] = "-";
    if (floor > 0) std::snprintf(ceiling, sizeof ceiling, "%.1f%%", percent(floor, ms));
    std::snprintf(line, sizeof line, "  %-38s %6s %10.3f %6.1f%% %10s %10s %10s", op, calls.c_str(), ms, share,
                  rate(work.flops, 1e-12).c_str(), rate(work.bytes, 1e-9).c_str(), ceiling);
    lines.emplace_back(line);
  };
  std::snprintf(line, sizeof line, "  %-38s %6s %10s %7s %10s %10s %10s", "op", "calls", "ms", "share", "TFLOP/s",
                "GB/s", "of ceiling");
  lines.emplace_back(line);
  double total = 0, floor = 0;
  OpWork work;
  for (const OpTime& t : times) total += t.ms, floor += t.floor_ms, work += t.work;
  for (const OpTime& t : times)
    add(t.op.c_str(), std::to_string(t.calls), t.ms, percent(t.ms, total), t.work, t.floor_ms);
  add("sum of the ops", "", total, 100, work, floor);
  return lines;
}

void write_profile(const std::string& path, const std::vector<TimedStep>& steps, int64_t first, const Plan& plan,
                   const OpWorks& works, const Ceilings& ceilings, const std::vector<OpTime>& times,
                   const std::string& about) {
  using Json = Trace::Json;
  Trace trace;
  trace.group(1, about), trace.track(1, 1, "steps, layers, ops");
  double begin_us = 0;
  Json all_ms = Json::array();
  for (size_t s = 0; s < steps.size(); ++s) {
    const double ms = step_ms(steps[s]);
    trace.slice(1, 1, "step " + std::to_string(first + int64_t(s)), "step", begin_us, 1e3 * ms);
    std::vector<Trace::Op> ops;
    for (const TimedOp& op : steps[s]) {
      const OpWork work = work_of(op, plan, works);
      Json args{{"layer", op.layer}};
      if (work.flops > 0) args["flops"] = work.flops, args["TFLOP/s"] = work.flops / op.ms * 1e-9;
      if (work.bytes > 0) args["bytes"] = work.bytes, args["GB/s"] = work.bytes / op.ms * 1e-6;
      if (const double floor = work.floor_ms(ceilings.flops_per_s, ceilings.bytes_per_s); floor > 0)
        args["percent of ceiling"] = percent(floor, op.ms);
      ops.push_back({op.name, kind_of(op), op.layer, begin_us + 1e3 * op.begin_ms, 1e3 * op.ms, args});
    }
    trace.ops(1, 1, ops);
    begin_us += 1e3 * ms, all_ms.push_back(ms);
  }
  Json other{{"what", "time profile of train_gpt_moe"},
             {"run", about},
             {"matmul_flops_per_s", ceilings.flops_per_s},
             {"copy_bytes_per_s", ceilings.bytes_per_s},
             {"step_ms", all_ms}};
  other["ops"] = Json::array();
  for (const OpTime& t : times)
    other["ops"].push_back({{"op", t.op},
                            {"calls", t.calls},
                            {"ms", t.ms},
                            {"flops", t.work.flops},
                            {"bytes", t.work.bytes},
                            {"floor_ms", t.floor_ms}});
  trace.write(path, other);
}
