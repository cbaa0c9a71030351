// A whole MoE layer, router included: forward, and forward with backward, with the memory that its plan keeps and shares.
// Operations counted: 6*T*K*d*n forward (the experts' three products), 18*T*K*d*n with backward.
//
// Rungs 01 to 04 are a file each. 05_gate_gradient, production and 07_only_x are the model's own layer (moe/layer.h) under
// its policies none, act and up: README.md of this folder walks through them all. Without --shapes the ladder runs at four
// shapes; production alone (--variants production) at all of dev/moe_shapes.h. At the other shapes a rung runs only if
// asked for by name.
//
// --dispatch materialized adds a row for the model's layer that keeps gathered copies of the tokens, as older systems do.
// --policies act,none,up adds rungs 05 (none) and 07 (up) where they would not run. Operations are counted as without
// recomputation, and results must be those of `act` to the last bit.
// --round-rows 128 adds two rows that show what ragged ends of experts cost: the layer with its own choices replayed
// (ours-replayed), and with the nearest choices that give every expert a multiple of 128 rows (ours-rounded-128). That
// is another function of the input: it is compared with the CPU's at the reduced size, and looked at for values that
// are not finite at the full size.
//
//   build/moe_layer [variant] [shape] [--variants production] [--shapes olmoe-64x8,blaze2,...]
//                   [--dispatch materialized] [--policies act,none,up] [--round-rows 128] [--quick]
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <sstream>

#include "dev/bench.h"
#include "dev/moe_layer/01_loop_over_experts.cuh"
#include "dev/moe_layer/02_materialized.cuh"
#include "dev/moe_layer/03_gather_in_loads.cuh"
#include "dev/moe_layer/04_fused_activation.cuh"
#include "dev/moe_layer/layer_program.h"
#include "dev/moe_layer/round_rows.h"

namespace {
using namespace bench;
using ladder::Letters;
using ladder::Steps;
using GpuLayer = LayerProgram<Gpu<bf16>>;
constexpr double MiB = double(1 << 20);

// ---- rows of the table ----

// What is kept in bf16 between forward and backward besides x: so many bytes for each element of (R,C) and of (R,F).
struct KeptBytes {
  int of_rows_c, of_rows_f;
  size_t bytes(const MoeShape& s) const {
    return size_t(2 * s.T * s.d + s.rows() * (of_rows_c * s.d + of_rows_f * s.n));
  }
  std::string text() const {
    std::string text = "2NC";
    if (of_rows_c) text += " + " + std::to_string(of_rows_c) + "NKC";
    if (of_rows_f) text += " + " + std::to_string(of_rows_f) + "NKF";
    return text;
  }
};

// A way to run the layer.
struct Row {
  std::string name, impl;
  KeptBytes kept;
  LayerSettings settings = {};
  const Rung<Gpu<bf16>>* rung = nullptr;  // null: the model's layer, with these settings
  Steps (*forward_steps)(const Letters&) = nullptr;
  Steps (*backward_steps)(const Letters&) = nullptr;
  bool same_bits = false;                         // as production
  bool own_function = false;                      // another result than production's
  size_t base = 0;                                // number of the row that this is a variation of
  const std::vector<int32_t>* choices = nullptr;  // to replay
};

// The model's layer: rung 4 without the pass over Y; forward the same.
Steps backward_steps(const Letters& l) {
  Steps steps = fused_activation::backward_steps(l);
  steps.erase(steps.begin());
  return steps;
}
Steps backward_steps_of_up(const Letters& l) {
  Steps steps = backward_steps(l);
  steps.insert(steps.begin(), fused_activation::forward_steps(l)[1]);  // up, and SwiGLU
  return steps;
}

Row rung(const char* name, KeptBytes kept) { return {name, std::string("ours-") + name, kept}; }
// Production first, then the rungs in order.
std::vector<Row> ladder_rows() {
  std::vector<Row> rows = {
      {"production", "ours", {0, 4}},     rung("01_loop_over_experts", {4, 6}), rung("02_materialized", {4, 6}),
      rung("03_gather_in_loads", {2, 6}), rung("04_fused_activation", {2, 6}),  rung("05_gate_gradient", {0, 6}),
      rung("07_only_x", {0, 0})};
  for (Row& row : rows) row.forward_steps = fused_activation::forward_steps, row.backward_steps = backward_steps;
  auto own_passes = [](Row& row, const Rung<Gpu<bf16>>& passes, auto forward, auto backward) {
    row.rung = &passes, row.forward_steps = forward, row.backward_steps = backward;
  };
  own_passes(rows[1], loop_over_experts::rung, loop_over_experts::forward_steps, loop_over_experts::backward_steps);
  own_passes(rows[2], materialized::rung, materialized::forward_steps, materialized::backward_steps);
  own_passes(rows[3], gather_in_loads::rung, gather_in_loads::forward_steps, gather_in_loads::backward_steps);
  own_passes(rows[4], fused_activation::rung, fused_activation::forward_steps, fused_activation::backward_steps);
  rows[5].settings.policy = Recompute::none, rows[5].same_bits = true;
  rows[6].settings.policy = Recompute::up, rows[6].same_bits = true, rows[6].backward_steps = backward_steps_of_up;
  return rows;
}
bool is_ladder_shape(const std::string& shape) {
  for (const char* name : {"gpt124-8x2", "olmoe-64x8", "qwen3-128x8", "fine-128x8"})
    if (shape == name) return true;
  return false;
}

// What the options ask for.
struct Asked {
  std::vector<Row> ladder = ladder_rows();
  std::vector<std::string> variants;            // the names of all its rows
  std::vector<std::string> by_name, by_policy;  // rungs
  bool materialized = false;
  int64_t multiple = 0;  // of rows, 0: no rounding

  explicit Asked(const Options& options) {
    for (const Row& row : ladder) variants.push_back(row.name);
    by_name = match_variants(options.variants, variants);
    const std::string& dispatch = options.own.at("dispatch");
    materialized = dispatch == name_of(Dispatch::materialized);
    if (!materialized && dispatch != name_of(Dispatch::zero_buffer))
      fail("--dispatch '", dispatch, "' is not one of zero_buffer, materialized");
    std::istringstream policies(options.own.at("policies"));
    for (std::string policy; std::getline(policies, policy, ',');) {
      if (policy == name_of(Recompute::none))
        by_policy.push_back("05_gate_gradient");
      else if (policy == name_of(Recompute::up))
        by_policy.push_back("07_only_x");
      else if (policy != name_of(Recompute::act))
        fail("--policies: '", policy, "' is not one of act, none, up");
    }
    if (!options.own.at("round-rows").empty()) multiple = options.number("round-rows");
  }
  bool only_production() const {
    auto is_production = [&](const std::string& name) { return name == ladder[0].name; };
    return !by_name.empty() && std::all_of(by_name.begin(), by_name.end(), is_production);
  }
  // Production first; those with a routing of their own come later.
  std::vector<Row> rows(const std::string& shape) const {
    auto has = [](const std::vector<std::string>& names, const std::string& name) {
      return std::find(names.begin(), names.end(), name) != names.end();
    };
    std::vector<Row> some;
    for (const Row& row : ladder)
      if (row.impl == "ours" || has(by_name, row.name) || has(by_policy, row.name) ||
          (by_name.empty() && is_ladder_shape(shape)))
        some.push_back(row);
    if (materialized) {
      const char* name = name_of(Dispatch::materialized);
      some.push_back({name, std::string("ours-") + name, {2, 4}, {.dispatch = Dispatch::materialized}});
    }
    return some;
  }
};

// ---- running a layer ----

// Random weights and inputs: a function of the tensor alone, so that two layers of the same shape are alike. The residual
// stream is small, so that it does not hide the experts' share of the output from the check.
std::unique_ptr<GpuLayer> make_layer(Lab& lab, const MoeShape& shape, const Row& row) {
  auto made = std::make_unique<GpuLayer>(lab.dev, shape, row.settings, row.rung);
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

// Runs both programs and shows each result, with its number, before anything overwrites it. Whether all are accepted.
bool run_both(GpuLayer& layer, const std::function<bool(size_t, const Output&)>& accepts) {
  bool good = true;
  size_t number = 0;
  auto show = [&](const char* name, auto* data, int64_t n) {
    Output o = output(name, data, n);
    o.error_limit = 0.02;  // several roundings to bf16 one after another
    good &= accepts(number++, o);
  };
  layer.poison();
  layer.run(GpuLayer::forward_only);
  show("out", layer.out.data(), layer.out.size());
  zero_gradients(layer), layer.poison();
  layer.run(GpuLayer::forward_backward);
  show("dx", layer.dinput.data(), layer.dinput.size());
  show("dWg", layer.dwg.wide.data(), layer.dwg.wide.size());
  show("dW13", layer.dw13.narrow.data(), layer.dw13.narrow.size());
  show("dW2", layer.dw2.narrow.data(), layer.dw2.narrow.size());
  return good;
}

// The model's layer on the CPU, in double, with the inputs of this one: results in the order of run_both().
Values run_on_cpu(Lab& lab, GpuLayer& layer) {
  Cpu<double> cpu;
  LayerProgram<Cpu<double>> other(cpu, layer.shape, {.replays = layer.settings.replays});
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

// The router's choices (N,K), and the nearest that give experts a multiple of rows.
struct Routings {
  std::vector<int32_t> own;
  RoundedRouting rounded;
};
Routings round_routing(Lab& lab, const MoeShape& shape, const Row& production, int64_t multiple) {
  const auto layer = make_layer(lab, shape, production);
  layer->run(GpuLayer::forward_backward);
  const int64_t N = shape.T, K = shape.K;
  Routings r{lab.host<int32_t>(layer->saved.top_k_index.data(), N * K), {}};
  r.rounded = round_rows(r.own, lab.host<float>(layer->saved.gates.data(), N * K), N, K, shape.E, multiple);
  return r;
}
// Adds the layer with its own choices, and with rounded ones.
void add_replaying_rows(std::vector<Row>& rows, const Routings& routings, int64_t multiple) {
  Row own = rows[0];
  own.name = "replayed", own.impl = "ours-replayed", own.settings.replays = true, own.choices = &routings.own;
  rows.push_back(own);
  Row rounded = own;
  rounded.name = "rounded-" + std::to_string(multiple), rounded.impl = "ours-" + rounded.name;
  rounded.choices = &routings.rounded.chosen, rounded.own_function = true, rounded.base = rows.size() - 1;
  rows.push_back(rounded);
}

// ---- checks ----

// Every row at a size that the CPU is quick at. One reference serves all that compute the same from the same choices.
std::vector<bool> check_reduced(Lab& lab, const MoeShape& shape, const std::vector<Row>& rows) {
  std::vector<bool> good;
  std::vector<double*> expected;
  for (const Row& row : rows) {
    const auto layer = make_layer(lab, shape, row);
    if (expected.empty() || row.choices) {
      expected.clear();
      for (const std::vector<double>& values : run_on_cpu(lab, *layer)) expected.push_back(lab.upload(values));
    }
    good.push_back(run_both(*layer, [&](size_t i, const Output& o) {
      return lab.accept("moe_layer " + shape.name + " " + row.name + " against the CPU,", o,
                        difference(lab.dev, o.data, o.type, expected[i], DType::f64, o.n));
    }));
  }
  return good;
}

// One row at full size against production's results, which the first call fills in; and what it keeps.
bool check_full(Lab& lab, GpuLayer& layer, const Row& row, std::vector<void*>& first) {
  const bool fills = first.empty();
  const std::string what = "moe_layer " + layer.shape.name + " " + row.name;
  bool good = run_both(layer, [&](size_t i, Output o) {
    if (fills) first.push_back(lab.copy_of(static_cast<char*>(o.data), o.n * int64_t(dtype_size(o.type))));
    if (row.same_bits) o.error_limit = o.worst_limit = 0;
    const void* expected = row.own_function ? o.data : first[i];
    return lab.accept(what + ",", o, difference(lab.dev, o.data, o.type, expected, o.type, o.n));
  });
  const size_t saved = layer.saved_bytes(), metadata = layer.metadata_bytes();
  if (saved != row.kept.bytes(layer.shape) + metadata) {
    lab.fail_with(what + ": the plan keeps " + std::to_string(saved) + " bytes, " + std::to_string(metadata) +
                  " of them metadata, and not " + row.kept.text() + " = " +
                  std::to_string(row.kept.bytes(layer.shape)));
    good = false;
  }
  return good;
}

// ---- report ----

struct Times {
  Timing forward, both;
};
struct Prediction {
  double ms = 0, bytes = 0, flops = 0;
};
Prediction predict(Lab& lab, const Steps& steps) {
  Prediction p;
  for (const Work& w : steps) p.ms += lab.floor_ms(w), p.bytes += w.bytes, p.flops += w.flops;
  return p;
}

// production: its times; base: those of the row that this one is a variation of, itself where it is none.
void report(Lab& lab, const GpuLayer& layer, const Row& row, const Times& t, const Times& production, const Row& base,
            const Times& base_times, bool good) {
  const MoeShape& s = layer.shape;
  double work = 6.0 * double(s.rows()) * double(s.d) * double(s.n);
  double forward_rate = work / t.forward.median * 1e-9, both_rate = 3 * work / t.both.median * 1e-9;
  double percent = 100 * lab.floor_ms({3 * work, 0}) / t.both.median;
  const size_t saved = layer.saved_bytes(), metadata = layer.metadata_bytes(), transient = layer.transient_bytes(),
               arena = layer.arena->allocated_bytes();
  std::printf(
      "  %-20s forward %8.3f ms (%8.3f-%8.3f) %6.1f TF | forward+backward %8.3f ms (%8.3f-%8.3f) %6.1f TF %5.1f%%\n"
      "  %-20s saved %.1f MiB, of which metadata %.2f (%s = %.1f) | transient %.1f MiB | arena %.2f GiB%s\n",
      row.name.c_str(), t.forward.median, t.forward.p10, t.forward.p90, forward_rate, t.both.median, t.both.p10,
      t.both.p90, both_rate, percent, "", double(saved) / MiB, double(metadata) / MiB, row.kept.text().c_str(),
      double(saved - metadata) / MiB, double(transient) / MiB, double(arena) / MiB / 1024, good ? "" : "  FAIL");
  const bool varies = row.name != base.name;
  const double slowdown = 100 * (t.both.median / base_times.both.median - 1);
  if (varies) std::printf("  %-20s forward+backward takes %+.2f%% time against %s\n", "", slowdown, base.name.c_str());
  Record r;
  r.set("bench", "moe_layer").set("shape", s.name).set("impl", row.impl);
  r.set("variant", row.name).set("fwd_ms", t.forward.median).set("fwdbwd_ms", t.both.median);
  r.set("p10_ms", t.both.p10).set("p90_ms", t.both.p90);
  r.set("fwd_tflops", forward_rate).set("fwdbwd_tflops", both_rate).set("percent_of_ceiling", percent);
  r.set("ratio_to_production", production.both.median / t.both.median);
  if (varies) r.set("slowdown_percent", slowdown).set("slower_than", base.name);
  r.set("saved_MiB", double(saved) / MiB).set("transient_MiB", double(transient) / MiB);
  r.set("tokens_per_s", double(s.T) / t.both.median * 1e3).set("peak_GiB", double(arena) / MiB / 1024);
  if (row.forward_steps) {
    const Letters letters(s);
    Steps steps = row.forward_steps(letters);
    const Prediction forward = predict(lab, steps);
    const Steps backward = row.backward_steps(letters);
    steps.insert(steps.end(), backward.begin(), backward.end());
    const Prediction both = predict(lab, steps);
    std::printf("  %-20s predicted: forward %.3f ms, %.0f MB | forward+backward %.3f ms, %.0f MB\n", "", forward.ms,
                forward.bytes * 1e-6, both.ms, both.bytes * 1e-6);
    r.set("fwd_predicted_ms", forward.ms).set("fwdbwd_predicted_ms", both.ms);
    r.set("fwd_predicted_bytes", forward.bytes).set("fwdbwd_predicted_bytes", both.bytes);
    r.set("fwd_predicted_flops", forward.flops).set("fwdbwd_predicted_flops", both.flops);
  }
  std::fflush(stdout);
  if (good) lab.write(std::move(r));
}

// ---- a shape ----

void run_shape(Lab& lab, const MoeShape& s, const Asked& asked) {
  const std::vector<Row> common = asked.rows(s.name);
  std::vector<Row> rows = common;
  Routings routings;
  auto add_rounded = [&](const MoeShape& shape) {
    rows = common;
    if (!asked.multiple) return;
    routings = round_routing(lab, shape, rows[0], asked.multiple);
    add_replaying_rows(rows, routings, asked.multiple);
  };
  add_rounded(reduced_moe(s));
  std::vector<bool> good = check_reduced(lab, reduced_moe(s), rows);
  lab.release();
  if (lab.options.check_only) return;

  add_rounded(s);
  if (asked.multiple)
    std::printf(
        "  rounded to %lld rows: %.2f%% of the slots have another expert; experts that are still ragged: %lld\n",
        (long long)asked.multiple, 100.0 * double(routings.rounded.moved) / double(s.rows()),
        (long long)routings.rounded.ragged);
  std::vector<std::unique_ptr<GpuLayer>> layers;
  std::vector<void*> first;
  std::vector<Lab::Timed> bodies;  // all take turns
  for (size_t i = 0; i < rows.size(); ++i) {
    layers.push_back(make_layer(lab, s, rows[i]));
    GpuLayer* layer = layers.back().get();
    if (!check_full(lab, *layer, rows[i], first)) good[i] = false;
    bodies.push_back({[=] { layer->run(GpuLayer::forward_only); }});
    bodies.push_back({[=] { layer->run(GpuLayer::forward_backward); }});
  }
  const std::vector<Timing> measured = lab.time_in_turns(bodies);
  auto times = [&](size_t row) { return Times{measured[2 * row], measured[2 * row + 1]}; };
  for (size_t i = 0; i < rows.size(); ++i)
    report(lab, *layers[i], rows[i], times(i), times(0), rows[rows[i].base], times(rows[i].base), good[i]);
}

int run(int argc, char** argv) {
  Options options = parse_options(argc, argv, {{"dispatch", "zero_buffer"}, {"policies", "act"}, {"round-rows", ""}});
  const Asked asked(options);
  std::vector<std::string> shapes;
  for (const MoeShape& s : moe_shapes()) shapes.push_back(s.name);
  if (settle_names(options, asked.variants, shapes)) return 0;
  if (!options.variants.empty())
    options.variants.clear(), options.positional = true;  // asked has them; not a whole run
  Lab lab("moe_layer", options);
  if (!options.check_only) lab.matmul_rate(), lab.copy_bandwidth();
  for (const MoeShape& s : moe_shapes()) {
    if (!lab.wants_shape(s.name)) continue;
    if (options.shapes.empty() && !asked.only_production() && !is_ladder_shape(s.name)) continue;
    std::printf("moe_layer %s: T %lld, d %lld, n %lld, E %lld, K %lld\n", s.name.c_str(), (long long)s.T,
                (long long)s.d, (long long)s.n, (long long)s.E, (long long)s.K);
    try {
      run_shape(lab, s, asked);
    } catch (const std::bad_alloc&) {
      lab.fail_with("moe_layer " + s.name + ": this GPU has no room for all its rows at once; name some");
    }
    lab.release();
  }
  return lab.exit_code();
}
}  // namespace

int main(int argc, char** argv) {
  return guarded("moe_layer", [&] { return run(argc, argv); });
}
