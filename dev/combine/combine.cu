// Expert rows back to tokens: with gates as the forward pass has it, without as the backward pass does. Bound by memory:
// K rows and the addend of every token are read, one row is written. 0: production. 1: a thread an element (naive.cuh).
// fp32_atomics, bf16_atomics: rows are added where they belong (atomics.cuh), which does not repeat its bits.
// copy: the floor.
//
// Shapes "...+norm": the combine of a layer and the RMSNorm of the next. 0: production, two launches. fused_norm: one
// (fused_norm.cuh). copy: the floor of the one.
//
//   build/combine [--shapes gpt124-8x2,gpt124-8x2+norm,...] [--variants fp32_atomics,...] [--quick]
#include "moe/combine.h"

#include "dev/combine/atomics.cuh"
#include "dev/combine/fused_norm.cuh"
#include "dev/combine/naive.cuh"
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
  for (const MoeShape& s : moe_shapes()) all.push_back({s.name, s, false}), all.push_back({s.name + "+norm", s, true});
  return all;
}
Shape reduced(Shape s) { return {s.name, reduced_moe(s.moe), s.norm}; }

Case make_combine(Lab& lab, const Shape& shape) {
  int64_t N = shape.moe.T, K = shape.moe.K, C = shape.moe.d;
  auto& dev = lab.dev;
  Routing routing = make_routing(lab, N, K, shape.moe.E);
  const int32_t *slot_row = routing.plan.slot_row, *row_slot = routing.plan.row_slot;
  bf16 *rows = lab.normal<bf16>(N * K * C), *addend = lab.normal<bf16>(N * C);
  float *gates = lab.normal<float>(N * K), *sum = lab.memory<float>(N * C);
  bf16 *out = lab.memory<bf16>(N * C), *dx = lab.memory<bf16>(N * C);

  Case c;
  c.shape = shape.name;
  c.forward.bytes = c.backward.bytes = double((K + 2) * N * C) * sizeof(bf16);
  c.outputs = {output("out", out, N * C), output("dx", dx, N * C, 1)};
  const float* none = nullptr;
  c.variants.push_back({"production", "ours", [=, &dev] { combine(dev, out, rows, addend, gates, slot_row, N, K, C); },
                        [=, &dev] { combine(dev, dx, rows, addend, none, slot_row, N, K, C); }});
  auto simple = [=, &dev](bf16* to, const float* with) {
    launch(dev, naive::combine, unsigned(ceil_div(N * C, 256)), 256, 0, to, rows, addend, with, slot_row, N, K, C);
  };
  c.variants.push_back({"naive", "ours-naive", [=] { simple(out, gates); }, [=] { simple(dx, none); }});
  auto fp32 = [=, &dev](bf16* to, const float* with) {
    atomics::combine_fp32(dev, to, sum, rows, addend, with, row_slot, N, K, C);
  };
  c.variants.push_back(
      {"fp32_atomics", "ours-nondeterministic-fp32-atomics", [=] { fp32(out, gates); }, [=] { fp32(dx, none); }});
  auto narrow = [=, &dev](bf16* to, const float* with) {
    atomics::combine_bf16(dev, to, rows, addend, with, row_slot, N, K, C);
  };
  c.variants.push_back(
      {"bf16_atomics", "ours-nondeterministic-bf16-atomics", [=] { narrow(out, gates); }, [=] { narrow(dx, none); }});
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
  int64_t N = shape.moe.T, K = shape.moe.K, C = shape.moe.d;
  auto& dev = lab.dev;
  Routing routing = make_routing(lab, N, K, shape.moe.E);
  const int32_t* slot_row = routing.plan.slot_row;
  bf16 *rows = lab.normal<bf16>(N * K * C), *addend = lab.normal<bf16>(N * C), *weight = lab.normal<bf16>(C, 0.1, 1);
  float *gates = lab.normal<float>(N * K), *rstd = lab.memory<float>(N);
  bf16 *sum = lab.memory<bf16>(N * C), *out = lab.memory<bf16>(N * C);

  Case c;
  c.shape = shape.name;
  c.forward.bytes = double((K + 3) * N * C) * sizeof(bf16);
  c.outputs = {output("sum", sum, N * C), output("out", out, N * C), output("rstd", rstd, N)};
  c.variants.push_back({"production", "ours", [=, &dev] {
                          combine(dev, sum, rows, addend, gates, slot_row, N, K, C);
                          rmsnorm_forward(dev, out, rstd, sum, weight, N, C, eps);
                        }});
  c.variants.push_back({"fused_norm", "ours-fused-norm", [=, &dev] {
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
