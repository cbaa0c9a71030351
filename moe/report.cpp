#include "moe/report.h"

#include <algorithm>
#include <cstdio>
#include <fstream>

PlanSummary summarize(const Plan& plan, const ModelConfig& config) {
  PlanSummary s;
  for (int c = 0; c < n_category; ++c) s.bytes[c] = plan.category_bytes(Category(c));
  s.total = plan.arena_bytes();
  for (int l = 0; l < config.n_layer; ++l) s.layers.push_back({config.is_dense(l) ? "mlp" : "moe", 0, 0, 0, 0, 0, 0});
  for (const TensorInfo& t : plan.tensors()) {  // one pass: a large model has tens of thousands of tensors
    if (t.layer < 0) continue;
    auto& layer = s.layers[t.layer];
    if (t.category == Category::saved) (t.part == "attention" ? layer.attention_saved : layer.saved) += t.bytes;
    if (t.category == Category::metadata) layer.metadata += t.bytes;
    if (t.category == Category::weights) layer.weights += t.bytes;
    if (t.category == Category::gradients) layer.gradients += t.bytes;
    if (t.category == Category::optimizer) layer.optimizer += t.bytes;
  }
  return s;
}

std::string readable_bytes(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int u = 0;
  while (bytes >= 1024 && u < 4) bytes /= 1024, ++u;
  char text[64];
  std::snprintf(text, sizeof text, u == 0 ? "%.0f %s" : "%.2f %s", bytes, units[u]);
  return text;
}

std::string memory_report(const PlanSummary& ours, const PlanSummary& other, const ModelConfig& config,
                          const RunOptions& run, size_t real_bytes) {
  std::string text;
  char line[256];
  auto add = [&](auto... args) {
    std::snprintf(line, sizeof line, args...);
    text += line;
  };
  const Stage stage = stage_of(config, run);
  const int64_t N = run.tokens(), F = config.d_expert / run.parallel.layout.etp;
  const char* other_name = name_of(other_dispatch(run.dispatch));
  add("memory plan: %lld parameters (%lld active), micro-batch %lld x %lld tokens, %lld a step, dispatch %s\n",
      (long long)config.parameters(), (long long)config.active_parameters(), (long long)run.B, (long long)run.T,
      (long long)run.micro_steps, name_of(run.dispatch));
  if (!stage.alone())
    add("a rank of stage %d of %d: layers %lld to %lld, micro-batches under way: %d\n", stage.index, stage.stages,
        (long long)stage.begin, (long long)stage.end - 1, stage.slots);
  for (size_t l = size_t(stage.begin); l < size_t(stage.end); ++l) {
    const auto& layer = ours.layers[l];
    add("layer %zu weights %zu gradients %zu optimizer %zu\n", l, layer.weights, layer.gradients, layer.optimizer);
    add("layer %zu attention saved %zu\n", l, layer.attention_saved);
    if (layer.part == "moe") {
      add("layer %zu moe saved %zu metadata %zu\n", l, layer.saved, layer.metadata);
      add("layer %zu moe with %s saved %zu\n", l, other_name, other.layers[l].saved);
    } else {
      add("layer %zu mlp saved %zu\n", l, layer.saved);
    }
  }
  add("%-22s %20s %12s   %20s\n", "bytes", name_of(run.dispatch), "", other_name);
  for (int c = 0; c < n_category; ++c)
    add("%-22s %20zu %12s   %20zu\n", category_name(Category(c)), ours.bytes[c],
        readable_bytes(double(ours.bytes[c])).c_str(), other.bytes[c]);
  add("%-22s %20zu %12s   %20zu\n", "total", ours.total, readable_bytes(double(ours.total)).c_str(), other.total);
  if (real_bytes == 2)
    add("gradients: of matrices %s (--grad-dtype), of routers, norms and the head fp32%s\n",
        run.wide_gradients ? "fp32" : "bf16", config.tied ? "; a tied embedding has one more, of the head" : "");
  if (!run.parallel.alone())
    text += "gradients: those of this rank's weights, and their sums over the ranks where its optimizer state is\n";
  for (size_t l = size_t(stage.begin); l < size_t(stage.end); ++l) {
    if (ours.layers[l].part != "moe") continue;
    if (const ExpertRanks ranks = run.expert_ranks(config); ranks.ranks > 1) {
      const ExpertRows rows = expert_rows(ranks, run.row_headroom);
      if (ranks.extra_slots)
        add("a rank has slots for %lld experts: its share, %lld more to place experts in, and %lld for shadows\n",
            (long long)ranks.slots(), (long long)run.extra_slots, (long long)run.shadow_slots);
      add("a rank's experts have memory for %lld rows (%g times its share of %lld); a step with more takes up to %lld "
          "passes\n",
          (long long)rows.a_pass, run.row_headroom, (long long)ranks.share(), (long long)rows.passes());
    }
    size_t formula = size_t(stage.slots) * real_bytes * size_t(N) * size_t(config.d_model + 2 * config.top_k * F);
    const char* name = real_bytes == 2 ? "2NC + 4NKF" : real_bytes == 4 ? "4NC + 8NKF" : "8NC + 16NKF";
    const std::string times = stage.slots > 1 ? std::to_string(stage.slots) + " x (" + name + ")" : name;
    add("a MoE layer keeps %zu (recompute %s); %s = %zu; %s keeps %zu\n", ours.layers[l].saved,
        name_of(run.policy(int64_t(l))), times.c_str(), formula, other_name, other.layers[l].saved);
    if (const ExpertRanks ranks = run.expert_ranks(config); ranks.ranks > 1) {
      const int64_t R = expert_rows(ranks, run.row_headroom).a_pass;
      add("that formula is of the share of %lld rows; of the %lld that there is memory for (--row-headroom) it is "
          "%zu\n",
          (long long)ranks.share(), (long long)R,
          size_t(stage.slots) * real_bytes * size_t(N * config.d_model + 2 * R * F));
    }
    break;
  }
  return text;
}

nlohmann::ordered_json memory_record(const PlanSummary& ours, const PlanSummary& other, const ModelConfig& config,
                                     const RunOptions& run) {
  nlohmann::ordered_json bytes, policies;
  for (auto [dispatch, summary] : {std::pair{run.dispatch, &ours}, {other_dispatch(run.dispatch), &other}}) {
    for (int c = 0; c < n_category; ++c) bytes[name_of(dispatch)][category_name(Category(c))] = summary->bytes[c];
    bytes[name_of(dispatch)]["total"] = summary->total;
  }
  for (int64_t l = 0; l < config.n_layer; ++l) policies.push_back(name_of(run.policy(l)));
  return {{"preset", preset_of(config)},
          {"parameters", config.parameters()},
          {"active_parameters", config.active_parameters()},
          {"batch_size", run.B},
          {"seq_len", run.T},
          {"micro_steps", run.micro_steps},
          {"ranks", run.parallel.layout.world()},
          {"dispatch", name_of(run.dispatch)},
          {"recompute", policies},
          {"bytes", bytes}};
}

size_t available_memory() {
  size_t available = 0;
  std::ifstream file("/proc/meminfo");
  std::string key, rest;
  for (size_t kib; file >> key >> kib; std::getline(file, rest))
    if (key == "MemAvailable:") available = kib * 1024;
  size_t limit = 0;  // "max", no limit, reads as no number
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit) available = available ? std::min(available, limit) : limit;
  return available;
}

std::vector<Recompute> choose_recompute(int64_t L, size_t budget,
                                        const std::function<size_t(const std::vector<Recompute>&)>& plan_bytes) {
  // Steps of the ladder: all none; 1..L layers act; then 1..L of them up; then block. More steps never need more memory,
  // so the first that fits is found by bisection.
  auto policies = [&](int64_t step) {
    std::vector<Recompute> p(L, Recompute::none);
    for (int64_t l = 0; l < L; ++l) p[l] = Recompute(step / L + (l < step % L ? 1 : 0));
    return p;
  };
  int64_t low = 0, high = 3 * L;
  if (plan_bytes(policies(high)) > budget) return {};
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (plan_bytes(policies(middle)) <= budget)
      high = middle;
    else
      low = middle + 1;
  }
  return policies(low);
}
