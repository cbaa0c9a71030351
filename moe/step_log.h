// What a run says about its steps: a line on the terminal, a line in main.log, an object in log.jsonl, an event for
// TensorBoard.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "llmc/step.h"
#include "llmc/tensorboard.h"
#include "moe/config.h"

struct StepReport {
  int64_t step = 0, total_steps = 0;
  StepStats stats;
  double learning_rate = 0, milliseconds = 0, tokens_per_s = 0, mfu = 0;
  size_t memory_bytes = 0;                        // allocated by the plan
  std::vector<std::vector<int32_t>> expert_load;  // per layer (E) selections of the step; empty for dense layers
  std::string skipped;                            // why the update was skipped; empty: it was not
};

// Largest over mean load of the worst layer; 1 at balance.
double max_over_mean(const std::vector<std::vector<int32_t>>& expert_load);

nlohmann::ordered_json step_record(const StepReport& r);
// Scalars under the names that they have in log.jsonl. Histograms expert_load/layer_L (selections by expert) at every
// so many steps, and at the last, that a run has about 500, which is how many TensorBoard keeps.
EventSummary step_event(const StepReport& r);
// "step  120/1500 | loss 2.345678 aux ... " ; with last_step not 0, for a terminal, "| 1m23s left" at the end:
// the time until that step.
std::string step_line(const StepReport& r, int64_t last_step);

// Floating-point operations that training takes a token, forward and backward: 6 for each parameter the token meets, and
// causal attention, 6*L*T*NH*HD.
double training_flops_per_token(const ModelConfig& c, int64_t T);
