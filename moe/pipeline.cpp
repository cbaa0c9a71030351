#include "moe/pipeline.h"

#include <algorithm>
#include <tuple>

Stage stage_of(const ModelConfig& config, const RunOptions& options) {
  const Layout& layout = options.parallel.layout;
  Stage s;
  s.index = options.parallel.here.pp, s.stages = layout.pp;
  std::tie(s.begin, s.end) = layers_of(layout, config, s.index);
  if (options.train) s.slots = int(std::min<int64_t>(s.stages - s.index, options.micro_steps));
  return s;
}

std::vector<PipelineAction> pipeline_schedule(int stage, int stages, int64_t micro_steps) {
  const bool first = stage == 0, last = stage == stages - 1;
  const int64_t warm_up = std::min<int64_t>(stages - 1 - stage, micro_steps), steady = micro_steps - warm_up;
  std::vector<PipelineAction> actions;
  // In the steady state a stage sends an output where its neighbour sends a gradient: each send goes with the receive that
  // follows it, or both sides would wait for the other to receive.
  PipelineAction next;
  auto run = [&](int64_t PipelineAction::*program, int64_t micro) {
    next.*program = micro;
    actions.push_back(next), next = {};
  };
  auto flush = [&] {
    if (next.send_output >= 0 || next.send_gradient >= 0) actions.push_back(next), next = {};
  };
  for (int64_t m = 0; m < warm_up; ++m) {
    if (!first) next.receive_input = m;
    run(&PipelineAction::forward, m);
    next.send_output = m;  // there is a next stage: else nothing is ahead
    flush();
  }
  if (steady > 0 && !first) next.receive_input = warm_up;
  for (int64_t i = 0; i < steady; ++i) {
    run(&PipelineAction::forward, warm_up + i);
    if (!last) next.send_output = warm_up + i, next.receive_gradient = i;
    run(&PipelineAction::backward, i);
    if (!first) next.send_gradient = i;
    if (!first && i + 1 < steady) next.receive_input = warm_up + i + 1;
    if (i + 1 == steady) flush();
  }
  for (int64_t m = steady; m < micro_steps; ++m) {
    next.receive_gradient = m;
    run(&PipelineAction::backward, m);
    if (!first) next.send_gradient = m;
    flush();
  }
  return actions;
}
