// Pipeline parallelism: each stage has consecutive layers, and micro-batches pass through the stages one behind another,
// activations to the next stage, their gradients back to the previous one.
//
// The order is 1F1B (Narayanan et al. 2019, PipeDream-Flush): a stage runs as many forward programs as it takes until the
// first gradient comes back, then one backward, one forward in turn, then the remaining backwards. So a stage holds the
// activations of at most as many micro-batches as there are stages from it to the last, in slots; gradients are added up in
// the order of the micro-batches, as in one process.
#pragma once
#include <vector>

#include "moe/run_options.h"

// What of the model, and of the work on it, a rank has.
struct Stage {
  int index = 0, stages = 1;
  int64_t begin = 0, end = 0;  // layers
  int slots = 1;               // micro-batches whose activations it holds at a time

  bool alone() const { return stages == 1; }
  bool first() const { return index == 0; }          // has the embedding
  bool last() const { return index == stages - 1; }  // has the final norm and the head
  bool has(int64_t layer) const { return begin <= layer && layer < end; }
  int slot(int64_t micro) const { return int(micro % slots); }
};
Stage stage_of(const ModelConfig& config, const RunOptions& options);

// A part of a stage's step: transfers with its neighbours, all of them at once, and then a program. Numbers are of
// micro-batches; -1: none.
struct PipelineAction {
  int64_t send_output = -1, receive_gradient = -1;  // to and from the next stage
  int64_t send_gradient = -1, receive_input = -1;   // to and from the previous stage
  int64_t forward = -1, backward = -1;              // one of them, or none
};
// What stage `stage` of `stages` does in a step of `micro_steps` micro-batches. Transfers may be synchronous: a send need
// not return before the neighbour receives.
std::vector<PipelineAction> pipeline_schedule(int stage, int stages, int64_t micro_steps);

// Passes activations and gradients as an action says.
template <class Model>
void transfer(Model& model, const PipelineAction& a) {
  std::vector<Piece> sends, receives;
  auto add = [](std::vector<Piece>& pieces, int stage, auto tensor) {
    pieces.emplace_back(stage, tensor.data(), tensor.size());
  };
  const int before = model.stage.index - 1, after = model.stage.index + 1;
  if (a.send_output >= 0) add(sends, after, model.stage_output());
  if (a.receive_gradient >= 0) add(receives, after, model.stage_gradient());
  if (a.send_gradient >= 0) add(sends, before, model.stage_gradient());
  if (a.receive_input >= 0) add(receives, before, model.stage_input(model.stage.slot(a.receive_input)));
  if (sends.size() + receives.size()) model.parallel[Group::pp].exchange(sends, receives, "activations of a stage");
}

// The micro-batches of a step through this rank's stage. begin(micro): called before the forward program of a
// micro-batch, sets what it is given. watched(f) calls f, in which the host may wait for its GPU.
template <class Model, class Begin, class Watched>
void run_pipeline(Model& model, Begin begin, Watched watched) {
  const Stage& stage = model.stage;
  for (const PipelineAction& a : pipeline_schedule(stage.index, stage.stages, model.options.micro_steps)) {
    watched([&] {
      if (a.forward >= 0) begin(a.forward);
      transfer(model, a);
      if (a.forward >= 0) model.forward(stage.slot(a.forward));
      if (a.backward >= 0) model.backward(stage.slot(a.backward));
    });
  }
}

// As model.evaluate(), of all stages together: the loss is on the last one, 0 elsewhere.
template <class Model>
void evaluate_stages(Model& model) {
  PipelineAction before, after;
  if (!model.stage.first()) before.receive_input = 0;
  if (!model.stage.last()) after.send_output = 0;
  transfer(model, before);
  model.evaluate();
  transfer(model, after);
}
