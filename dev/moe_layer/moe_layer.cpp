// A whole MoE layer, router included: forward, and forward with backward, with the memory that its plan keeps and shares.
// Operations counted: 6*T*K*d*n forward (the experts' three products), 18*T*K*d*n with backward.
//
// --dispatch materialized adds a row for the layer that keeps gathered copies of the tokens, as older systems do.
//
//   build/moe_layer [--shapes olmoe-64x8,blaze2,...] [--dispatch materialized] [--quick]
#include <algorithm>
#include <cstdio>
#include <optional>

#include "dev/bench.h"
#include "dev/moe_layer/layer_program.h"

namespace {
using namespace bench;
using GpuLayer = LayerProgram<Gpu<bf16>>;
constexpr double MiB = double(1 << 20);

// Random weights and inputs: a function of the tensor alone, so that two layers of the same shape are alike. The residual
// stream is small, so that it does not hide the experts' share of the output from the check.
void fill_layer(Lab& lab, GpuLayer& layer) {
  uint64_t stream = 1000;
  for (auto* x : {&layer.input, &layer.dout}) fill_normal(lab.dev, x->data(), x->size(), 1, 0, ++stream);
  fill_normal(lab.dev, layer.residual.data(), layer.residual.size(), 0.05, 0, ++stream);
  for (auto* w : {&layer.wg, &layer.w13, &layer.w2}) fill_normal(lab.dev, w->data(), w->size(), 0.02, 0, ++stream);
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
  LayerProgram<Cpu<double>> other(cpu, layer.shape, layer.dispatch);
  auto hand_over = [&](const Tensor<double>& to, const Tensor<bf16>& from) {
    auto values = lab.host(from.data(), from.size());
    std::copy(values.begin(), values.end(), to.data());
  };
  hand_over(other.input, layer.input), hand_over(other.residual, layer.residual), hand_over(other.dout, layer.dout);
  hand_over(other.wg, layer.wg), hand_over(other.w13, layer.w13), hand_over(other.w2, layer.w2);
  auto values = [](const Tensor<double>& t) { return std::vector<double>(t.data(), t.data() + t.size()); };
  other.run(LayerProgram<Cpu<double>>::forward_only);
  Values results{values(other.out)};
  other.run(LayerProgram<Cpu<double>>::forward_backward);  // gradients start at 0, as the arena leaves them
  for (const Tensor<double>& t : {other.dinput, other.dwg.wide, other.dw13.narrow, other.dw2.narrow})
    results.push_back(values(t));
  return results;
}

bool check_reduced(Lab& lab, const MoeShape& shape, Dispatch dispatch) {
  GpuLayer layer(lab.dev, reduced_moe(shape), dispatch);
  fill_layer(lab, layer);
  Results got = run_both(lab, layer);
  Values expected = run_on_cpu(lab, layer);
  bool good = true;
  for (size_t i = 0; i < expected.size(); ++i) {
    const Output& o = got[i];
    good &= lab.accept("moe_layer " + shape.name + " " + name_of(dispatch) + " against the CPU,", o,
                       difference(lab.dev, o.data, o.type, lab.upload(expected[i]), DType::f64, o.n));
  }
  lab.release();
  return good;
}

struct Measured {
  Timing forward, both;
  size_t saved, metadata, transient, arena;
  bool good = true;
};

// `first`: results of variant 0 to compare with; filled by it.
Measured measure(Lab& lab, const MoeShape& shape, Dispatch dispatch, std::optional<Results>& first) {
  GpuLayer layer(lab.dev, shape, dispatch);
  fill_layer(lab, layer);
  Measured m;
  Results got = run_both(lab, layer);
  if (!first) first = got;
  for (size_t i = 0; i < got.size(); ++i) {
    const Output& o = got[i];
    m.good &= lab.accept("moe_layer " + shape.name + " " + name_of(dispatch) + ",", o,
                         difference(lab.dev, o.data, o.type, (*first)[i].data, o.type, o.n));
  }
  m.forward = lab.time([&] { layer.run(GpuLayer::forward_only); });
  m.both = lab.time([&] { layer.run(GpuLayer::forward_backward); });
  m.saved = layer.saved_bytes(), m.metadata = layer.metadata_bytes();
  m.transient = layer.transient_bytes(), m.arena = layer.arena->allocated_bytes();
  return m;
}

void report(Lab& lab, const MoeShape& s, Dispatch dispatch, const Measured& m, const Measured& production) {
  double work = 6.0 * double(s.rows()) * double(s.d) * double(s.n);
  double forward_rate = work / m.forward.median * 1e-9, both_rate = 3 * work / m.both.median * 1e-9;
  double percent = 100 * lab.floor_ms({3 * work, 0}) / m.both.median;
  bool ours = dispatch == Dispatch::zero_buffer;
  double formula = 2.0 * double(s.T) * double(s.d) + 4.0 * double(s.rows()) * double(s.n);
  std::printf(
      "  %-12s forward %8.3f ms (%8.3f-%8.3f) %6.1f TF | forward+backward %8.3f ms (%8.3f-%8.3f) %6.1f TF %5.1f%%\n"
      "  %-12s saved %.1f MiB, of which metadata %.2f (2NC + 4NKF = %.1f) | transient %.1f MiB | arena %.2f GiB%s\n",
      name_of(dispatch), m.forward.median, m.forward.p10, m.forward.p90, forward_rate, m.both.median, m.both.p10,
      m.both.p90, both_rate, percent, "", double(m.saved) / MiB, double(m.metadata) / MiB, formula / MiB,
      double(m.transient) / MiB, double(m.arena) / MiB / 1024, m.good ? "" : "  FAIL");
  std::fflush(stdout);
  if (!m.good) return;
  Record r;
  r.set("bench", "moe_layer").set("shape", s.name).set("impl", ours ? "ours" : "ours-materialized");
  r.set("variant", name_of(dispatch)).set("fwd_ms", m.forward.median).set("fwdbwd_ms", m.both.median);
  r.set("p10_ms", m.both.p10).set("p90_ms", m.both.p90);
  r.set("fwd_tflops", forward_rate).set("fwdbwd_tflops", both_rate).set("percent_of_ceiling", percent);
  r.set("ratio_to_production", production.both.median / m.both.median);
  r.set("saved_MiB", double(m.saved) / MiB).set("transient_MiB", double(m.transient) / MiB);
  r.set("tokens_per_s", double(s.T) / m.both.median * 1e3).set("peak_GiB", double(m.arena) / MiB / 1024);
  lab.write(std::move(r));
}

int run(int argc, char** argv) {
  Lab lab("moe_layer", parse_options(argc, argv, {{"dispatch", "zero_buffer"}}));
  std::vector<Dispatch> dispatches{Dispatch::zero_buffer};
  const std::string& asked = lab.options.own.at("dispatch");
  if (asked == name_of(Dispatch::materialized))
    dispatches.push_back(Dispatch::materialized);
  else if (asked != name_of(Dispatch::zero_buffer))
    fail("--dispatch '", asked, "' is not one of zero_buffer, materialized");
  lab.matmul_rate();
  for (const MoeShape& s : moe_shapes()) {
    if (!lab.wants_shape(s.name)) continue;
    std::printf("moe_layer %s: T %lld, d %lld, n %lld, E %lld, K %lld\n", s.name.c_str(), (long long)s.T,
                (long long)s.d, (long long)s.n, (long long)s.E, (long long)s.K);
    try {
      std::optional<Results> first;
      std::optional<Measured> production;
      for (Dispatch d : dispatches) {
        bool good = first || check_reduced(lab, s, d);  // materialized is compared with zero_buffer, at full size
        Measured m = measure(lab, s, d, first);
        m.good &= good;
        if (!production) production = m;
        report(lab, s, d, m, *production);
      }
    } catch (const std::bad_alloc&) { lab.fail_with("moe_layer " + s.name + ": this GPU has no room for it"); }
    lab.release();
  }
  return lab.exit_code();
}
}  // namespace

int main(int argc, char** argv) {
  return guarded("moe_layer", [&] { return run(argc, argv); });
}
