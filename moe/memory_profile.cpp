#include "moe/memory_profile.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <tuple>

namespace {
constexpr double op_us = 1000;  // an op in the file

const PlannedProgram& program_at(const Plan& plan, int64_t tick) {
  const auto& all = plan.programs();
  size_t i = 0;
  while (i + 1 < all.size() && all[i + 1].first <= tick) ++i;
  return all[i];
}

std::string title(const PlannedOp& op) {
  return std::string("'") + op.name + "'" + (op.layer >= 0 ? " of layer " + std::to_string(op.layer) : "");
}

// Workspace that lives at a tick and is not there all the time, largest first.
std::vector<const TensorInfo*> workspace_at(const Plan& plan, int64_t tick) {
  std::vector<const TensorInfo*> all;
  for (const TensorInfo& t : plan.tensors())
    if (!t.persistent && t.category == Category::workspace && t.first >= 0 && t.first <= tick && tick <= t.last)
      all.push_back(&t);
  std::stable_sort(all.begin(), all.end(), [](auto* a, auto* b) { return a->bytes > b->bytes; });
  return all;
}

// "0-3, 5" of {0, 1, 2, 3, 5}.
std::string ranges(const std::vector<int64_t>& layers) {
  std::string text;
  for (size_t i = 0, end = 0; i < layers.size(); i = end) {
    for (end = i + 1; end < layers.size() && layers[end] == layers[end - 1] + 1;) ++end;
    text += (text.empty() ? "" : ", ") + std::to_string(layers[i]);
    if (end - i > 1) text += "-" + std::to_string(layers[end - 1]);
  }
  return text.size() <= 24 ? text : text.substr(0, 20) + " ...";
}

// Layers that keep the same, and what each of them keeps.
struct LayerKind {
  std::vector<int64_t> layers;
  std::string part, policy;
  size_t attention, mlp, metadata;
};
std::vector<LayerKind> layer_kinds(const Plan& plan, const ModelConfig& config, const RunOptions& run) {
  const PlanSummary summary = summarize(plan, config);
  const Stage stage = stage_of(config, run);
  std::vector<LayerKind> kinds;
  for (int64_t l = stage.begin; l < stage.end; ++l) {
    const auto& s = summary.layers[size_t(l)];
    const LayerKind kind{{l}, s.part, name_of(run.policy(l)), s.attention_saved, s.saved, s.metadata};
    auto key = [](const LayerKind& k) { return std::tie(k.part, k.policy, k.attention, k.mlp, k.metadata); };
    auto same = std::find_if(kinds.begin(), kinds.end(), [&](const LayerKind& k) { return key(k) == key(kind); });
    if (same == kinds.end())
      kinds.push_back(kind);
    else
      same->layers.push_back(l);
  }
  return kinds;
}

// Cases that need less than the run: the one that repeats least, and the one that needs least.
std::vector<const PlannedCase*> lower(const std::vector<PlannedCase>& cases) {
  const PlannedCase *cheapest = nullptr, *least = nullptr;
  for (const PlannedCase& c : cases) {
    if (c.total >= cases[0].total) continue;
    if (!cheapest || c.operations.recomputed < cheapest->operations.recomputed) cheapest = &c;
    if (!least || c.total < least->total) least = &c;
  }
  std::vector<const PlannedCase*> found;
  if (cheapest) found.push_back(cheapest);
  if (least != cheapest) found.push_back(least);
  return found;
}
}  // namespace

size_t MemoryTimeline::alive_bytes(int64_t tick) const {
  size_t sum = 0;
  for (size_t bytes : alive[size_t(tick)]) sum += bytes;
  return sum;
}

MemoryTimeline memory_timeline(const Plan& plan) {
  MemoryTimeline m;
  const size_t ticks = size_t(plan.ticks());
  m.alive.resize(ticks), m.extent.assign(ticks, plan.persistent_bytes());
  for (const TensorInfo& t : plan.tensors()) {
    if (!t.persistent && t.first < 0) continue;  // nobody uses it: it has no place
    const size_t first = t.persistent ? 0 : size_t(t.first), last = t.persistent ? ticks - 1 : size_t(t.last);
    const size_t end = t.offset + (t.bytes + Plan::alignment - 1) / Plan::alignment * Plan::alignment;
    for (size_t tick = first; tick <= last; ++tick) {
      m.alive[tick][size_t(t.category)] += t.bytes;
      m.extent[tick] = std::max(m.extent[tick], end);
    }
  }
  auto better = [&](int64_t a, int64_t b) {
    return std::pair(m.extent[size_t(a)], m.alive_bytes(a)) > std::pair(m.extent[size_t(b)], m.alive_bytes(b));
  };
  for (int64_t tick = 1; tick < plan.ticks(); ++tick)
    if (better(tick, m.peak)) m.peak = tick;
  return m;
}

std::string memory_summary(const Plan& plan, const MemoryTimeline& timeline, const ModelConfig& config,
                           const RunOptions& run, const std::vector<PlannedCase>& cases) {
  std::string text;
  char line[320];
  auto add = [&](auto... args) {
    std::snprintf(line, sizeof line, args...);
    text += line;
  };
  auto readable = [](size_t bytes) { return readable_bytes(double(bytes)); };
  const Stage stage = stage_of(config, run);
  const int64_t peak = timeline.peak;
  add("memory profile: micro-batch %lld x %lld tokens, dispatch %s", (long long)run.B, (long long)run.T,
      name_of(run.dispatch));
  if (!stage.alone())
    add(", a rank of stage %d of %d, micro-batches under way: %d", stage.index, stage.stages, stage.slots);
  add("\npeak %zu bytes (%s) at op %lld of %lld: %s, %s\n", timeline.extent[size_t(peak)],
      readable(timeline.extent[size_t(peak)]).c_str(), (long long)peak + 1, (long long)plan.ticks(),
      title(plan.ops()[size_t(peak)]).c_str(), program_at(plan, peak).name.c_str());
  for (int c = 0; c < n_category; ++c) {
    const size_t bytes = timeline.alive[size_t(peak)][size_t(c)], most = plan.category_bytes(Category(c));
    add("  %-22s %16zu %12s", category_name(Category(c)), bytes, readable(bytes).c_str());
    if (Category(c) == Category::workspace) {
      const auto tensors = workspace_at(plan, peak);
      for (size_t i = 0; i < std::min<size_t>(3, tensors.size()); ++i)
        add("%s %s %s", i ? "," : "  largest:", tensors[i]->name.c_str(), readable(tensors[i]->bytes).c_str());
    } else if (bytes != most) {
      add("  of %zu in all", most);
    }
    text += "\n";
  }
  add("  %-22s %16zu %12s  gaps, and rounding to %zu bytes\n", "between tensors", timeline.between_bytes(peak),
      readable(timeline.between_bytes(peak)).c_str(), Plan::alignment);

  add("%-34s %14s %16s %14s\n", "kept for backward, each", "attention", "MoE or MLP", "metadata");
  size_t in_layers = 0;
  for (const LayerKind& k : layer_kinds(plan, config, run)) {
    const std::string name = (k.layers.size() > 1 ? "layers " : "layer ") + ranges(k.layers);
    add("  %-32s %14zu %16zu %14zu\n", (name + " (" + k.part + ", " + k.policy + ")").c_str(), k.attention, k.mlp,
        k.metadata);
    in_layers += k.layers.size() * (k.attention + k.mlp);
  }
  add("  %-32s %14zu\n", "outside layers", plan.category_bytes(Category::saved) - in_layers);

  add("%-24s %16s %12s %12s %22s\n", "bytes", "total", "difference", "kept", "operations repeated");
  for (const PlannedCase& c : cases) {
    const bool less = c.total < cases[0].total;
    const size_t difference = less ? cases[0].total - c.total : c.total - cases[0].total;
    add("  %-22s %16zu %12s %12s %10.3g TFLOP %5.1f%%\n", c.name.c_str(), c.total,
        difference ? ((less ? "-" : "+") + readable(difference)).c_str() : "0", readable(c.kept).c_str(),
        c.operations.recomputed * 1e-12, 100 * c.operations.share());
  }
  text +=
      "(kept: for backward, in all, metadata included. Operations: of a micro-step, and as a share of the rest of "
      "it)\n";
  for (const PlannedCase* c : lower(cases))
    add("lowers the peak: %s, by %s for %.1f%% more operations\n", c->name.c_str(),
        readable(cases[0].total - c->total).c_str(),
        std::max(0.0, 100 * (c->operations.share() - cases[0].operations.share())));
  if (lower(cases).empty()) text += "none of these lowers the peak\n";
  return text;
}

void write_memory_trace(const std::string& path, const Plan& plan, const MemoryTimeline& timeline,
                        const ModelConfig& config, const RunOptions& run, const std::vector<PlannedCase>& cases) {
  using Json = Trace::Json;
  enum { steps = 1, bytes = 2, lives = 3 };
  Trace trace;
  trace.group(steps, "programs, layers, ops (an op: 1 ms)"), trace.track(steps, 1, "ops");
  trace.group(bytes, "bytes in the arena"), trace.group(lives, "tensors");

  const auto& programs = plan.programs();
  for (size_t p = 0; p < programs.size(); ++p) {
    const int64_t end = p + 1 < programs.size() ? programs[p + 1].first : plan.ticks();
    trace.slice(steps, 1, programs[p].name, "program", double(programs[p].first) * op_us,
                double(end - programs[p].first) * op_us);
    std::vector<Trace::Op> ops;
    for (int64_t t = programs[p].first; t < end; ++t) {
      const PlannedOp& op = plan.ops()[size_t(t)];
      const char* kind = op.extra ? "further pass" : op.recomputing ? "recomputation" : "op";
      ops.push_back(
          {op.name, kind, op.layer, double(t) * op_us, op_us, Json{{"alive_bytes", timeline.alive_bytes(t)}}});
    }
    trace.ops(steps, 1, ops);
  }

  Json before;
  for (int64_t t = 0; t < plan.ticks(); ++t) {
    Json values;
    for (int c = 0; c < n_category; ++c) values[category_name(Category(c))] = timeline.alive[size_t(t)][size_t(c)];
    values["between tensors"] = timeline.between_bytes(t);
    if (values != before) trace.counter(bytes, "arena", double(t) * op_us, values);
    before = values;
  }

  // What lives from start to end: one for each category and layer.
  const double end = double(plan.ticks()) * op_us;
  std::map<std::pair<int, int>, size_t> persistent;
  for (const TensorInfo& t : plan.tensors())
    if (t.persistent) persistent[{int(t.category), t.layer}] += t.bytes;
  for (const auto& [key, n] : persistent)
    trace.life(lives, std::string("all the time: ") + category_name(Category(key.first)), "persistent", 0, end,
               {{"layer", key.second}, {"bytes", n}});
  for (const TensorInfo& t : plan.tensors())
    if (!t.persistent && t.first >= 0)
      trace.life(lives, t.name, category_name(t.category), double(t.first) * op_us, double(t.last + 1) * op_us,
                 {{"layer", t.layer},
                  {"bytes", t.bytes},
                  {"offset", t.offset},
                  {"shape", t.shape},
                  {"dtype", dtype_name(t.dtype)}});

  Json peak{{"op", plan.ops()[size_t(timeline.peak)].name},
            {"layer", plan.ops()[size_t(timeline.peak)].layer},
            {"tick", timeline.peak},
            {"bytes", timeline.extent[size_t(timeline.peak)]},
            {"lowered_by", Json::array()}};
  for (const PlannedCase* c : lower(cases))
    peak["lowered_by"].push_back({{"case", c->name}, {"bytes", cases[0].total - c->total}});
  trace.mark(steps, "peak", double(timeline.peak) * op_us, peak);
  trace.mark(bytes, "peak", double(timeline.peak) * op_us, peak);

  Json about{
      {"what", "memory plan of a step of train_gpt_moe"}, {"us_per_op", op_us}, {"total_bytes", plan.arena_bytes()}};
  for (int c = 0; c < n_category; ++c) about["bytes"][category_name(Category(c))] = plan.category_bytes(Category(c));
  about["peak"] = peak;
  about["layers"] = Json::array();
  for (const LayerKind& k : layer_kinds(plan, config, run))
    about["layers"].push_back({{"layers", k.layers},
                               {"part", k.part},
                               {"recompute", k.policy},
                               {"attention_saved", k.attention},
                               {"saved", k.mlp},
                               {"metadata", k.metadata}});
  for (const PlannedCase& c : cases)
    about["cases"].push_back({{"case", c.name},
                              {"total_bytes", c.total},
                              {"kept_bytes", c.kept},
                              {"flops_of_a_micro_step", c.operations.step},
                              {"flops_repeated", c.operations.recomputed}});
  trace.write(path, about);
}
