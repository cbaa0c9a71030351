// The norm of a model's whole gradient (dev/adamw/model_table.h), by which it is clipped; README.md of this folder
// walks through it. Bound by memory: each gradient is read once, 2 bytes (4 of the embedding and the classifier). 0:
// production, global_norm_partials() with update_decision(), which also runs the outlier detector. 01, 02: a rung a
// file. copy: the floor.
//
//   dev/global_norm/global_norm [variant] [shape]
#include "llmc/global_norm.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "dev/adamw/model_table.h"
#include "dev/bench.h"
#include "dev/global_norm/01_atomic.cuh"
#include "dev/global_norm/02_two_stage.cuh"

namespace {
using namespace bench;

// The norm that production decided by, to where it is compared: one thread, about two microseconds.
__global__ void read_norm(float* norm, const StepStats* stats) { *norm = float(stats->grad_norm); }

Case make(Lab& lab, const ModelShape& s) {
  int64_t n = s.parameters(), wide = s.wide(), n_partials = 0;
  auto& dev = lab.dev;
  ModelState<Gpu<bf16>> p{};
  p.grad = lab.normal<bf16>(n - wide, 0.01), p.wide_grad = lab.normal<float>(std::max<int64_t>(wide, 1), 0.01);
  std::vector<ParameterView<Gpu<bf16>>> host_views = model_views(s, p, n_partials);
  const auto* views = lab.upload(host_views);
  auto n_views = int64_t(host_views.size());
  std::vector<int64_t> first;
  for (const auto& view : host_views) first.push_back(view.first_partial);
  first.push_back(n_partials);
  const int64_t* first_partials = lab.upload(first);
  // The detector's window is full, as in all but the first steps of a training run.
  OutlierState window;
  window.count = OutlierState::window;
  for (int64_t i = 0; i < OutlierState::window; ++i) window.loss[i] = 3 + i % 2, window.norm[i] = 1 + i % 3;
  const std::vector<StepStats> at_start(1);
  StepStats *stats = lab.upload(at_start), *fresh_stats = lab.upload(at_start);
  OutlierState* outliers = lab.upload(std::vector<OutlierState>{window});
  float *partials = lab.memory<float>(n_partials), *norm = lab.memory<float>(1);

  Case c;
  c.shape = s.name;
  c.forward = {.bytes = double(n - wide) * sizeof(bf16) + double(wide) * sizeof(float), .fp32_flops = double(n) * 2};
  c.prepare = [=, &dev] { dev.copy(stats, fresh_stats, sizeof(StepStats)); };
  c.outputs = {output("norm", norm, 1), output("partials", partials, n_partials)};
  for (Output& o : c.outputs) o.error_limit = o.worst_limit = 1e-3;
  c.variants.push_back({"production", "ours", [=, &dev] {
                          global_norm_partials(dev, partials, views, n_views);
                          update_decision(dev, stats, outliers, partials, first_partials, n_views, UpdateRules{});
                          launch(dev, read_norm, 1, 1, 0, norm, stats);
                        }});
  Variant atomics{"01_atomic", "ours-01_atomic", [=, &dev] { atomic::global_norm(dev, norm, host_views); }};
  atomics.missing = {"partials"};
  c.variants.push_back(std::move(atomics));
  c.variants.push_back({"02_two_stage", "ours-02_two_stage",
                        [=, &dev] { two_stage::global_norm(dev, norm, partials, host_views, n_partials); }});
  c.variants.push_back(copy_floor(lab, c.forward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto grad = lab.host(p.grad, n - wide), wide_grad = lab.host(p.wide_grad, std::max<int64_t>(wide, 1));
    int64_t count = 0;
    ModelState<Cpu<double>> state{};
    state.grad = grad.data(), state.wide_grad = wide_grad.data();
    auto cpu_views = model_views(s, state, count);
    std::vector<double> sums(n_partials);
    global_norm_partials(cpu, sums.data(), cpu_views.data(), n_views);
    return Values{{std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0))}, sums};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "global_norm", model_shapes(), make, reduced_model); }
