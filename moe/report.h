// The memory report: what a plan will take, before anything is allocated.
#pragma once
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "moe/model.h"

// A plan reduced to what the report says, so that plans of any device can be compared.
struct PlanSummary {
  struct Layer {
    std::string part;  // "moe" or "mlp"
    size_t attention_saved, saved, metadata, weights, gradients, optimizer;
  };
  size_t bytes[n_category];
  size_t total;
  std::vector<Layer> layers;
};
PlanSummary summarize(const Plan& plan, const ModelConfig& config);

// The report as text, in bytes. A layer: `layer 0 moe saved 117440512 metadata 541700`, what attention saves, and its
// weights, gradients and optimizer state. Then a table by category beside the same plan with the other --dispatch, what
// the gradients are of, and 2NC + 4NKF (s/2 times that for storage of s bytes) beside what a MoE layer keeps.
std::string memory_report(const PlanSummary& ours, const PlanSummary& other, const ModelConfig& config,
                          const RunOptions& run, size_t real_bytes);

// The same as an object, which a run keeps as memory.json: what is trained, how, and bytes by category with either dispatch.
nlohmann::ordered_json memory_record(const PlanSummary& ours, const PlanSummary& other, const ModelConfig& config,
                                     const RunOptions& run);

// Bytes as "12.34 GiB", "3.2 MiB", "17 B".
std::string readable_bytes(double bytes);

// Memory that this machine can still give, in bytes: MemAvailable of /proc/meminfo, or the container's limit
// (cgroup v2), the smaller; 0 where unknown.
size_t available_memory();

// The cheapest recompute policy, layer by layer, whose plan needs at most `budget` bytes: `act` for the first layers,
// then `up`, then `block`, adding one layer at a time; starts from `none`. plan_bytes plans a model with those policies.
// Empty if not even `block` everywhere fits.
std::vector<Recompute> choose_recompute(int64_t n_layer, size_t budget,
                                        const std::function<size_t(const std::vector<Recompute>&)>& plan_bytes);
