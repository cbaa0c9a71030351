// A whole MoE layer, router included: forward, and forward with backward, with the memory that its plan keeps and shares.
// Operations counted: 6*T*K*d*n forward (the experts' three products), 18*T*K*d*n with backward.
//
// --dispatch materialized adds a row for the layer that keeps gathered copies of the tokens, as older systems do.
// --policies act,none,up adds rows for the layer that keeps A as well (none: ours-keep-a) and for the one that keeps x
// alone and multiplies twice (up: ours-recompute-up). Operations are counted as without recomputation, and results must
// be those of `act` to the last bit.
// --round-rows 128 adds two rows that show what ragged ends of experts cost: the layer with its own choices replayed
// (ours-replayed), and with the nearest choices that give every expert a multiple of 128 rows (ours-rounded-128). That
// is another function of the input: it is compared with the CPU's at the reduced size, and looked at for values that
// are not finite at the full size.
//
//   build/moe_layer [--shapes olmoe-64x8,blaze2,...] [--dispatch materialized] [--policies act,none,up]
//                   [--round-rows 128] [--quick]
#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <sstream>

#include "dev/bench.h"
#include "dev/moe_layer/layer_program.h"
#include "dev/moe_layer/round_rows.h"

namespace {
using namespace bench;
using GpuLayer = LayerProgram<Gpu<bf16>>;
constexpr double MiB = double(1 << 20);

// A way to run the layer.
struct Row {
  std::string name, impl;
  LayerSettings settings;
  std::string kept;                               // bytes between forward and backward, as a formula
  const std::vector<int32_t>* choices = nullptr;  // to replay
  bool same_bits = false;                         // as production
  bool own_function = false;                      // another result than production's
};

// Random weights and inputs: a function of the tensor alone, so that two layers of the same shape are alike. The residual
// stream is small, so that it does not hide the experts' share of the output from the check.
std::unique_ptr<GpuLayer> make_layer(Lab& lab, const MoeShape& shape, const Row& row) {
  auto made = std::make_unique<GpuLayer>(lab.dev, shape, row.settings);
  GpuLayer& layer = *made;
  if (row.choices) lab.dev.to_device(layer.replay.data(), row.choices->data(), row.choices->size() * sizeof(int32_t));
  uint64_t stream = 1000;
  for (auto* x : {&layer.input, &layer.dout}) fill_normal(lab.dev, x->data(), x->size(), 1, 0, ++stream);
  fill_normal(lab.dev, layer.residual.data(), layer.residual.size(), 0.05, 0, ++stream);
  for (auto* w : {&layer.wg, &layer.w13, &layer.w2}) fill_normal(lab.dev, w->data(), w->size(), 0.02, 0, ++stream);
  return made;
}
void zero_gradients(GpuLayer& layer) {
  for (const auto* g : {&layer.dwg, &layer.dw13, &layer.dw2}) layer.dev.zero(g->tensor()->data, g->tensor()->bytes);
}

// Results of both programs, each copied before the next run overwrites it.
using Results = std::vector<Output>;
Results run_both(Lab& lab, GpuLayer& layer) {
  Results r;
  auto keep = [&](const char* name, auto* data, int64_t n) { r.push_back(output(name, lab.copy_of(data, n), n)); };
  layer.poison();
  layer.run(GpuLayer::forward_only);
  keep("out", layer.out.data(), layer.out.size());
  zero_gradients(layer), layer.poison();
  layer.run(GpuLayer::forward_backward);
  keep("dx", layer.dinput.data(), layer.dinput.size());
  keep("dWg", layer.dwg.wide.data(), layer.dwg.wide.size());
  keep("dW13", layer.dw13.narrow.data(), layer.dw13.narrow.size());
  keep("dW2", layer.dw2.narrow.data(), layer.dw2.narrow.size());
  for (Output& o : r) o.error_limit = 0.02;  // several roundings to bf16 one after another
  return r;
}

// The same layer on the CPU, in double.
Values run_on_cpu(Lab& lab, GpuLayer& layer) {
  Cpu<double> cpu;
  LayerProgram<Cpu<double>> other(cpu, layer.shape, layer.settings);
  auto hand_over = [&](const Tensor<double>& to, const Tensor<bf16>& from) {
    auto values = lab.host(from.data(), from.size());
    std::copy(values.begin(), values.end(), to.data());
  };
  hand_over(other.input, layer.input), hand_over(other.residual, layer.residual), hand_over(other.dout, layer.dout);
  hand_over(other.wg, layer.wg), hand_over(other.w13, layer.w13), hand_over(other.w2, layer.w2);
  if (layer.replay) lab.dev.to_host(other.replay.data(), layer.replay.data(), layer.replay.info->bytes);
  auto values = [](const Tensor<double>& t) { return std::vector<double>(t.data(), t.data() + t.size()); };
  other.run(LayerProgram<Cpu<double>>::forward_only);
  Values results{values(other.out)};
  other.run(LayerProgram<Cpu<double>>::forward_backward);  // gradients start at 0, as the arena leaves them
  for (const Tensor<double>& t : {other.dinput, other.dwg.wide, other.dw13.narrow, other.dw2.narrow})
    results.push_back(values(t));
  return results;
}

bool check_reduced(Lab& lab, const MoeShape& shape, const Row& row) {
  const auto layer = make_layer(lab, shape, row);
  Results got = run_both(lab, *layer);
  Values expected = run_on_cpu(lab, *layer);
  bool good = true;
  for (size_t i = 0; i < expected.size(); ++i) {
    const Output& o = got[i];
    good &= lab.accept("moe_layer " + shape.name + " " + row.name + " against the CPU,", o,
                       difference(lab.dev, o.data, o.type, lab.upload(expected[i]), DType::f64, o.n));
  }
  return good;
}

// The router's choices (N,K), and the nearest that give experts a multiple of rows.
struct Routings {
  std::vector<int32_t> own;
  RoundedRouting rounded;
};
Routings round_routing(Lab& lab, const MoeShape& shape, int64_t multiple) {
  const auto layer = make_layer(lab, shape, {});
  layer->run(GpuLayer::forward_backward);
  const int64_t N = shape.T, K = shape.K;
  Routings r{lab.host<int32_t>(layer->saved.top_k_index.data(), N * K), {}};
  r.rounded = round_rows(r.own, lab.host<float>(layer->saved.gates.data(), N * K), N, K, shape.E, multiple);
  return r;
}

struct Measured {
  Timing forward, both;
  double slower = 0;  // than `base`, forward and backward: times taken in turns
  size_t saved, metadata, transient, arena;
  bool good = true;
};

// `first`: results of variant 0 to compare with; filled by it. `base`: the layer that this is a variation of, or null.
Measured measure(Lab& lab, GpuLayer& layer, const Row& row, std::optional<Results>& first, GpuLayer* base) {
  const MoeShape& shape = layer.shape;
  Measured m;
  Results got = run_both(lab, layer);
  if (!first) first = got;
  const Results& expected = row.own_function ? got : *first;
  for (size_t i = 0; i < got.size(); ++i) {
    Output& o = got[i];
    if (row.same_bits) o.error_limit = o.worst_limit = 0;
    m.good &= lab.accept("moe_layer " + shape.name + " " + row.name + ",", o,
                         difference(lab.dev, o.data, o.type, expected[i].data, o.type, o.n));
  }
  m.forward = lab.time([&] { layer.run(GpuLayer::forward_only); });
  std::vector<Lab::Timed> both{{[&] { layer.run(GpuLayer::forward_backward); }}};
  if (base) both.push_back({[=] { base->run(GpuLayer::forward_backward); }});
  const auto times = lab.time_in_turns(both);
  m.both = times[0];
  if (base) m.slower = times[0].median / times[1].median - 1;
  m.saved = layer.saved_bytes(), m.metadata = layer.metadata_bytes();
  m.transient = layer.transient_bytes(), m.arena = layer.arena->allocated_bytes();
  if (m.saved != layer.expected_bytes() + m.metadata) {
    lab.fail_with("moe_layer " + shape.name + " " + row.name + ": the plan keeps " + std::to_string(m.saved) +
                  " bytes, " + std::to_string(m.metadata) + " of them metadata, and not " + row.kept + " = " +
                  std::to_string(layer.expected_bytes()));
    m.good = false;
  }
  return m;
}

// `base`: the row that this one is a variation of, itself where it is none.
void report(Lab& lab, const MoeShape& s, const Row& row, const Measured& m, const Measured& production,
            const Row& base) {
  double work = 6.0 * double(s.rows()) * double(s.d) * double(s.n);
  double forward_rate = work / m.forward.median * 1e-9, both_rate = 3 * work / m.both.median * 1e-9;
  double percent = 100 * lab.floor_ms({3 * work, 0}) / m.both.median;
  std::printf(
      "  %-12s forward %8.3f ms (%8.3f-%8.3f) %6.1f TF | forward+backward %8.3f ms (%8.3f-%8.3f) %6.1f TF %5.1f%%\n"
      "  %-12s saved %.1f MiB, of which metadata %.2f (%s = %.1f) | transient %.1f MiB | arena %.2f GiB%s\n",
      row.name.c_str(), m.forward.median, m.forward.p10, m.forward.p90, forward_rate, m.both.median, m.both.p10,
      m.both.p90, both_rate, percent, "", double(m.saved) / MiB, double(m.metadata) / MiB, row.kept.c_str(),
      double(m.saved - m.metadata) / MiB, double(m.transient) / MiB, double(m.arena) / MiB / 1024,
      m.good ? "" : "  FAIL");
  if (row.name != base.name)
    std::printf("  %-12s forward+backward takes %+.2f%% time against %s, in turns\n", "", 100 * m.slower,
                base.name.c_str());
  std::fflush(stdout);
  if (!m.good) return;
  Record r;
  r.set("bench", "moe_layer").set("shape", s.name).set("impl", row.impl);
  r.set("variant", row.name).set("fwd_ms", m.forward.median).set("fwdbwd_ms", m.both.median);
  r.set("p10_ms", m.both.p10).set("p90_ms", m.both.p90);
  r.set("fwd_tflops", forward_rate).set("fwdbwd_tflops", both_rate).set("percent_of_ceiling", percent);
  const bool varies = row.name != base.name;
  if (!varies || base.impl == "ours")  // times of one sitting only
    r.set("ratio_to_production", varies ? 1 / (1 + m.slower) : production.both.median / m.both.median);
  if (varies) r.set("slowdown_percent", 100 * m.slower).set("slower_than", base.name);
  r.set("saved_MiB", double(m.saved) / MiB).set("transient_MiB", double(m.transient) / MiB);
  r.set("tokens_per_s", double(s.T) / m.both.median * 1e3).set("peak_GiB", double(m.arena) / MiB / 1024);
  lab.write(std::move(r));
}

// The rows that the options ask for, production first; those with a routing of their own come later.
std::vector<Row> asked_rows(const Options& options) {
  std::vector<Row> rows{{name_of(Dispatch::zero_buffer), "ours", {}, "2NC + 4NKF"}};
  const std::string& dispatch = options.own.at("dispatch");
  if (dispatch == name_of(Dispatch::materialized))
    rows.push_back({dispatch, "ours-materialized", {.dispatch = Dispatch::materialized}, "2NC + 2NKC + 4NKF"});
  else if (dispatch != name_of(Dispatch::zero_buffer))
    fail("--dispatch '", dispatch, "' is not one of zero_buffer, materialized");
  std::istringstream policies(options.own.at("policies"));
  for (std::string policy; std::getline(policies, policy, ',');) {
    if (policy == name_of(Recompute::none))
      rows.push_back({"keep-a", "ours-keep-a", {.policy = Recompute::none}, "2NC + 6NKF", nullptr, true});
    else if (policy == name_of(Recompute::up))
      rows.push_back({"recompute-up", "ours-recompute-up", {.policy = Recompute::up}, "2NC", nullptr, true});
    else if (policy != name_of(Recompute::act))
      fail("--policies: '", policy, "' is not one of act, none, up");
  }
  return rows;
}

// The layer with its own choices, and with rounded ones.
std::vector<Row> replaying_rows(const Row& production, const Routings& routings, int64_t multiple) {
  Row own = production;
  own.name = "replayed", own.impl = "ours-replayed", own.settings.replays = true, own.choices = &routings.own;
  Row rounded = own;
  rounded.name = "rounded-" + std::to_string(multiple), rounded.impl = "ours-" + rounded.name;
  rounded.choices = &routings.rounded.chosen, rounded.own_function = true;
  return {own, rounded};
}

void run_rounded(Lab& lab, const MoeShape& s, const Row& plain, int64_t multiple, const Measured& production,
                 GpuLayer& production_layer, std::optional<Results>& first) {
  bool good = true;
  {
    const MoeShape small = reduced_moe(s);
    const Routings routings = round_routing(lab, small, multiple);
    for (const Row& row : replaying_rows(plain, routings, multiple)) good &= check_reduced(lab, small, row);
  }
  const Routings routings = round_routing(lab, s, multiple);
  std::printf("  rounded to %lld rows: %.2f%% of the slots have another expert; experts that are still ragged: %lld\n",
              (long long)multiple, 100.0 * double(routings.rounded.moved) / double(s.rows()),
              (long long)routings.rounded.ragged);
  const auto rows = replaying_rows(plain, routings, multiple);
  const Row* bases[] = {&plain, &rows[0]};
  GpuLayer* base_layer = &production_layer;
  std::vector<std::unique_ptr<GpuLayer>> layers;
  for (size_t i = 0; i < rows.size(); ++i) {
    layers.push_back(make_layer(lab, s, rows[i]));
    Measured m = measure(lab, *layers[i], rows[i], first, base_layer);
    m.good &= good;
    report(lab, s, rows[i], m, production, *bases[i]);
    base_layer = layers[i].get();
  }
}

int run(int argc, char** argv) {
  Lab lab("moe_layer",
          parse_options(argc, argv, {{"dispatch", "zero_buffer"}, {"policies", "act"}, {"round-rows", ""}}));
  const std::vector<Row> rows = asked_rows(lab.options);
  const int64_t multiple = lab.options.own.at("round-rows").empty() ? 0 : lab.options.number("round-rows");
  lab.matmul_rate();
  for (const MoeShape& s : moe_shapes()) {
    if (!lab.wants_shape(s.name)) continue;
    std::printf("moe_layer %s: T %lld, d %lld, n %lld, E %lld, K %lld\n", s.name.c_str(), (long long)s.T,
                (long long)s.d, (long long)s.n, (long long)s.E, (long long)s.K);
    try {
      // At the reduced size only production: the others are compared with it, at full size.
      const bool good = check_reduced(lab, reduced_moe(s), rows[0]);
      lab.release();
      std::optional<Results> first;
      std::optional<Measured> production;
      std::unique_ptr<GpuLayer> base;
      for (const Row& row : rows) {
        auto layer = make_layer(lab, s, row);
        Measured m = measure(lab, *layer, row, first, base.get());
        m.good &= good;
        if (!production) production = m;
        report(lab, s, row, m, *production, rows[0]);
        if (!base) base = std::move(layer);
      }
      if (multiple) run_rounded(lab, s, rows[0], multiple, *production, *base, first);
    } catch (const std::bad_alloc&) { lab.fail_with("moe_layer " + s.name + ": this GPU has no room for it"); }
    lab.release();
  }
  return lab.exit_code();
}
}  // namespace

int main(int argc, char** argv) {
  return guarded("moe_layer", [&] { return run(argc, argv); });
}
