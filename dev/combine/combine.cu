// Expert rows back to tokens: with gates as the forward pass has it, without as the backward pass does. Bound by
// memory: K rows and the addend of every token are read, one row is written. 0: production. 01 to 04: a rung a file
// (README.md); 02 and 03 do not repeat their bits. copy: the floor.
//
// Shapes "...+norm": the combine of a layer and the RMSNorm of the next. 0: production, two launches. 05_fused_norm:
// one. copy: the floor of the one.
//
//   dev/combine/combine [variant] [shape]
#include "moe/combine.h"

#include "dev/combine/01_thread_an_element.cuh"
#include "dev/combine/02_fp32_atomics.cuh"
#include "dev/combine/03_bf16_atomics.cuh"
#include "dev/combine/04_gather_sum.cuh"
#include "dev/combine/05_fused_norm.cuh"
#include "dev/moe_shapes.h"
#include "dev/routing.h"
#include "llmc/rmsnorm.h"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  MoeShape moe;
  bool norm;
};
std::vector<Shape> all_shapes() {
  std::vector<Shape> all;
  for (const char* name : {"blaze1", "gpt124-8x2", "mixtral-8x2", "olmoe-64x8"})
    for (const MoeShape& s : moe_shapes())
      if (s.name == name) all.push_back({s.name, s, false}), all.push_back({s.name + "+norm", s, true});
  return all;
}
// The width stays: it chooses the kernel of 05_fused_norm. 37 tokens are no whole number of blocks.
Shape reduced(Shape s) {
  s.moe.T = 37;
  return s;
}

Case make_combine(Lab& lab, const Shape& shape) {
  const int64_t N = shape.moe.T, K = shape.moe.K, C = shape.moe.d;
  auto& dev = lab.dev;
  const Routing routing = make_routing(lab, N, K, shape.moe.E);
  const int32_t *slot_row = routing.plan.slot_row, *row_slot = routing.plan.row_slot;
  bf16 *rows = lab.normal<bf16>(N * K * C), *addend = lab.normal<bf16>(N * C);
  float *gates = lab.normal<float>(N * K), *sum = lab.memory<float>(N * C);
  bf16 *out = lab.memory<bf16>(N * C), *dx = lab.memory<bf16>(N * C);

  Case c;
  c.shape = shape.name;
  const double additions = double(2 * K * N * C);
  c.forward = c.backward = {.bytes = double((K + 2) * N * C) * sizeof(bf16), .fp32_flops = additions};
  c.outputs = {output("out", out, N * C), output("dx", dx, N * C, 1)};
  // bytes: of an element of out.
  auto add = [&](const char* name, std::string impl, int64_t bytes, std::function<void(bf16*, const float*)> run) {
    Variant v{name, std::move(impl), [=] { run(out, gates); }, [=] { run(dx, nullptr); }};
    v.forward_work = v.backward_work = {0, double(bytes * N * C), additions};
    c.variants.push_back(std::move(v));
  };
  const int64_t least = 2 * K + 4;
  add("production", "ours", least,
      [=, &dev](bf16* to, const float* with) { combine(dev, to, rows, addend, with, slot_row, N, K, C); });
  add("01_thread_an_element", "ours-01_thread_an_element", least, [=, &dev](bf16* to, const float* with) {
    thread_an_element::combine(dev, to, rows, addend, with, slot_row, N, K, C);
  });
  add("02_fp32_atomics", "ours-02_fp32_atomics", 10 * K + 12, [=, &dev](bf16* to, const float* with) {
    atomics::combine(dev, to, sum, rows, addend, with, row_slot, N, K, C);
  });
  add("03_bf16_atomics", "ours-03_bf16_atomics", 6 * K + 4, [=, &dev](bf16* to, const float* with) {
    bf16_atomics::combine(dev, to, rows, addend, with, row_slot, N, K, C);
  });
  add("04_gather_sum", "ours-04_gather_sum", least,
      [=, &dev](bf16* to, const float* with) { gather_sum::combine(dev, to, rows, addend, with, slot_row, N, K, C); });
  c.variants.push_back(copy_floor(lab, c.forward, c.backward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto y = lab.host(rows, N * K * C), a = lab.host(addend, N * C), g = lab.host(gates, N * K);
    std::vector<double> forward(N * C), backward(N * C);
    combine(cpu, forward.data(), y.data(), a.data(), g.data(), routing.slot_row.data(), N, K, C);
    combine(cpu, backward.data(), y.data(), a.data(), nullptr, routing.slot_row.data(), N, K, C);
    return Values{forward, backward};
  };
  return c;
}

Case make_combine_norm(Lab& lab, const Shape& shape) {
  constexpr double eps = 1e-6;
  const int64_t N = shape.moe.T, K = shape.moe.K, C = shape.moe.d;
  auto& dev = lab.dev;
  const Routing routing = make_routing(lab, N, K, shape.moe.E);
  const int32_t* slot_row = routing.plan.slot_row;
  bf16 *rows = lab.normal<bf16>(N * K * C), *addend = lab.normal<bf16>(N * C), *weight = lab.normal<bf16>(C, 0.1, 1);
  float *gates = lab.normal<float>(N * K), *rstd = lab.memory<float>(N);
  bf16 *sum = lab.memory<bf16>(N * C), *out = lab.memory<bf16>(N * C);

  Case c;
  c.shape = shape.name;
  const double operations = double((2 * K + 4) * N * C);
  c.forward = {.bytes = double((K + 3) * N * C) * sizeof(bf16), .fp32_flops = operations};
  c.outputs = {output("sum", sum, N * C), output("out", out, N * C), output("rstd", rstd, N)};
  Variant production{"production", "ours", [=, &dev] {
                       combine(dev, sum, rows, addend, gates, slot_row, N, K, C);
                       rmsnorm_forward(dev, out, rstd, sum, weight, N, C, eps);
                     }};
  production.forward_work = {0, double((K + 4) * N * C) * sizeof(bf16), operations};
  c.variants.push_back(production);
  c.variants.push_back({"05_fused_norm", "ours-05_fused_norm", [=, &dev] {
                          fused_norm::combine_and_norm(dev, sum, out, rstd, rows, addend, gates, slot_row, weight, N, K,
                                                       C, eps);
                        }});
  c.variants.push_back(copy_floor(lab, c.forward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto y = lab.host(rows, N * K * C), a = lab.host(addend, N * C), g = lab.host(gates, N * K),
         w = lab.host(weight, C);
    std::vector<double> stream(N * C), normal(N * C), r(N);
    combine(cpu, stream.data(), y.data(), a.data(), g.data(), routing.slot_row.data(), N, K, C);
    rmsnorm_forward(cpu, normal.data(), r.data(), stream.data(), w.data(), N, C, eps);
    return Values{stream, normal, r};
  };
  return c;
}

Case make(Lab& lab, const Shape& shape) {
  return shape.norm ? make_combine_norm(lab, shape) : make_combine(lab, shape);
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "combine", all_shapes(), make, reduced); }
