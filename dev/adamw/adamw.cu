// AdamW over all parameters of a model (model_table.h), with bf16 weights and fp32 masters; README.md of this folder
// walks through it. Bound by memory: 4 + 4 + 4 bytes a parameter (master and moments) are read and written, the
// gradient read (2 bytes; 4 of the embedding and the classifier), the weight written (2). 0: production. 01, 02: a rung
// a file. copy: the floor.
//
//   dev/adamw/adamw [variant] [shape]
#include "llmc/adamw.h"

#include <algorithm>

#include "dev/adamw/01_scalar.cuh"
#include "dev/adamw/02_vector.cuh"
#include "dev/adamw/model_table.h"
#include "dev/bench.h"

namespace {
using namespace bench;

Case make(Lab& lab, const ModelShape& s) {
  int64_t n = s.parameters(), wide = s.wide(), n_partials = 0;
  auto& dev = lab.dev;
  // v is a square. Masters move by about the learning rate, so their change is well above their tolerance.
  ModelState<Gpu<bf16>> p{.weight = lab.memory<bf16>(n),
                          .grad = lab.normal<bf16>(n - wide, 0.01),
                          .wide_grad = lab.normal<float>(std::max<int64_t>(wide, 1), 0.01),
                          .master = lab.normal<float>(n, 0.02),
                          .m = lab.normal<float>(n, 1e-4),
                          .v = lab.normal<float>(n, 1e-7, 1e-6)};
  std::vector<ParameterView<Gpu<bf16>>> host_views = model_views(s, p, n_partials);
  const auto* views = lab.upload(host_views);
  auto n_views = int64_t(host_views.size());
  StepParams step;
  step.step = 10, step.learning_rate = 0.01;
  StepStats decided;
  decided.clip = 0.5;
  const StepParams* params = lab.upload(std::vector<StepParams>{step});
  const StepStats* stats = lab.upload(std::vector<StepStats>{decided});
  AdamWConfig config;

  Case c;
  c.shape = s.name;
  c.forward = {.bytes = double(n) * 28 + double(wide) * 2, .fp32_flops = double(n) * 20};
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
  c.variants.push_back(
      {"01_scalar", "ours-01_scalar", [=, &dev] { scalar::adamw(dev, host_views, params, stats, config); }});
  c.variants.push_back(
      {"02_vector", "ours-02_vector", [=, &dev] { vector::adamw(dev, host_views, params, stats, config); }});
  c.variants.push_back(copy_floor(lab, c.forward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto grad = lab.host(p.grad, n - wide), wide_grad = lab.host(p.wide_grad, std::max<int64_t>(wide, 1));
    auto master = lab.host(p.master, n), m = lab.host(p.m, n), v = lab.host(p.v, n);
    int64_t count = 0;
    ModelState<Cpu<double>> state{.weight = master.data(),
                                  .grad = grad.data(),
                                  .wide_grad = wide_grad.data(),
                                  .master = master.data(),
                                  .m = m.data(),
                                  .v = v.data()};
    auto cpu_views = model_views(s, state, count);
    adamw(cpu, cpu_views.data(), &step, &decided, n_views, config);
    return Values{master, master, m, v};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "adamw", model_shapes(), make, reduced_model); }
