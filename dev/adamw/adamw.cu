// The update: norm-* is global_norm_partials() with update_decision(), step-* is adamw(), both over all tensors at once.
// The tensors are the experts of gpt124-8x2, 8 of C 768 and F 2048 a layer, with gate and up rows interleaved as in the
// model and bf16 gradients. Bound by memory: the norm reads 2 bytes a parameter; the step reads 4 + 4 + 4 + 2 (master,
// moments, gradient) and writes 4 + 4 + 4 + 2. 0: production. 1: a launch a tensor (naive.cuh). copy: the floor.
//
//   build/adamw [--shapes step-12,norm-12] [--quick]
#include "llmc/adamw.h"

#include <cmath>

#include "dev/adamw/naive.cuh"
#include "dev/bench.h"
#include "llmc/global_norm.h"
#include "moe/experts.h"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t layers, E, C, F;
  bool step;  // else the norm
};
const std::vector<Shape> shapes = {{"norm-1", 1, 8, 768, 2048, false},
                                   {"norm-12", 12, 8, 768, 2048, false},
                                   {"step-1", 1, 8, 768, 2048, true},
                                   {"step-12", 12, 8, 768, 2048, true}};
Shape reduced(Shape s) { return {s.name, 2, 2, s.C, 200, s.step}; }

// One buffer for all layers; state that the update reads and writes.
template <class Device>
struct State {
  typename Device::Real *weight, *grad;
  typename Device::Acc *master, *m, *v;
};

// The views of the experts of all layers: gate, up and down projection of each.
template <class Device>
std::vector<ParameterView<Device>> views_of(const Shape& s, const State<Device>& p, int64_t& n_partials) {
  std::vector<ParameterView<Device>> views;
  n_partials = 0;
  auto add = [&](int64_t base, RowMap map, int64_t rows, int64_t cols) {
    views.push_back({p.weight + base,
                     p.master + base,
                     p.m + base,
                     p.v + base,
                     {p.grad + base, false},
                     {},
                     map,
                     rows,
                     cols,
                     n_partials,
                     true});
    n_partials += (rows + norm_block_rows - 1) / norm_block_rows;
  };
  for (int64_t i = 0; i < s.layers * s.E; ++i) {
    int64_t base = i * 3 * s.F * s.C;
    add(base, {w13_row(0, false), 8, 16}, s.F, s.C);
    add(base, {w13_row(0, true), 8, 16}, s.F, s.C);
    add(base + 2 * s.F * s.C, {0, 1, 1}, s.C, s.F);
  }
  return views;
}

Case make(Lab& lab, const Shape& s) {
  int64_t n = s.layers * s.E * 3 * s.F * s.C, n_partials = 0;
  auto& dev = lab.dev;
  // Gradients are scaled so that the norm is well above 1 and the clip matters; v is a square.
  State<Gpu<bf16>> p{lab.memory<bf16>(n), lab.normal<bf16>(n, 0.01), lab.normal<float>(n, 0.02),
                     lab.normal<float>(n, 1e-4), lab.normal<float>(n, 1e-7, 1e-6)};
  std::vector<ParameterView<Gpu<bf16>>> host_views = views_of(s, p, n_partials);
  const auto* views = lab.upload(host_views);
  auto n_views = int64_t(host_views.size());
  StepParams step;
  step.step = 10, step.learning_rate = 0.01;
  StepStats stats_value;
  stats_value.clip = 0.5;
  const StepParams* params = lab.upload(std::vector<StepParams>{step});
  const std::vector<StepStats> stats_host{stats_value};
  StepStats *stats = lab.upload(stats_host), *fresh_stats = lab.upload(stats_host);
  OutlierState* outliers = lab.upload(std::vector<OutlierState>(1));
  float* partials = lab.memory<float>(n_partials);
  AdamWConfig config;
  UpdateRules rules;

  Case c;
  c.shape = s.name;
  if (!s.step) {
    c.forward.bytes = double(n) * sizeof(bf16);
    c.prepare = [=, &dev] { dev.copy(stats, fresh_stats, sizeof(StepStats)); };
    c.outputs = {output("partials", partials, n_partials)};
    auto decide = [=, &dev] { update_decision(dev, stats, outliers, partials, views, n_views, n_partials, rules); };
    c.variants.push_back({"production", "ours", [=, &dev] {
                            global_norm_partials(dev, partials, views, n_views);
                            decide();
                          }});
    c.variants.push_back({"naive", "ours-naive", [=, &dev] {
                            for (const auto& view : host_views)
                              launch(dev, naive::norm_partials, unsigned(ceil_div(view.rows, norm_block_rows)), 256, 0,
                                     partials, view);
                            decide();
                          }});
  } else {
    c.forward.bytes = double(n) * 28;
    float *master = lab.copy_of(p.master, n), *m = lab.copy_of(p.m, n), *v = lab.copy_of(p.v, n);
    c.prepare = [=, &dev] {
      size_t bytes = size_t(n) * sizeof(float);
      dev.copy(p.master, master, bytes), dev.copy(p.m, m, bytes), dev.copy(p.v, v, bytes);
    };
    c.outputs = {output("weight", p.weight, n), output("master", p.master, n, 0, Before::input),
                 output("m", p.m, n, 0, Before::input), output("v", p.v, n, 0, Before::input)};
    for (Output& o : c.outputs)
      if (o.type == DType::f32) o.error_limit = 1e-4;
    c.variants.push_back({"production", "ours", [=, &dev] { adamw(dev, views, params, stats, n_views, config); }});
    c.variants.push_back({"naive", "ours-naive", [=, &dev] {
                            for (const auto& view : host_views)
                              launch(dev, naive::adamw, unsigned(ceil_div(view.rows * view.cols, 256)), 256, 0, view,
                                     params, stats, config);
                          }});
  }
  c.variants.push_back(copy_floor(lab, c.forward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto grad = lab.host(p.grad, n), master = lab.host(p.master, n), m = lab.host(p.m, n), v = lab.host(p.v, n);
    int64_t count = 0;
    auto cpu_views = views_of<Cpu<double>>(s, {master.data(), grad.data(), master.data(), m.data(), v.data()}, count);
    if (s.step) {
      adamw(cpu, cpu_views.data(), &step, &stats_value, n_views, config);
      return Values{master, master, m, v};
    }
    std::vector<double> sums(n_partials);
    global_norm_partials(cpu, sums.data(), cpu_views.data(), n_views);
    return Values{sums};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "adamw", shapes, make, reduced); }
