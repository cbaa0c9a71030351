// Expert rows back to tokens: with gates as the forward pass has it, without as the backward pass does. Bound by memory:
// K rows and the addend of every token are read, one row is written. 0: production. 1: a thread an element (naive.cuh).
// copy: the floor.
//
//   build/combine [--shapes gpt124-8x2,...] [--quick]
#include "moe/combine.h"

#include "dev/combine/naive.cuh"
#include "dev/moe_shapes.h"
#include "dev/routing.h"

namespace {
using namespace bench;

Case make(Lab& lab, const MoeShape& s) {
  int64_t N = s.T, K = s.K, C = s.d;
  auto& dev = lab.dev;
  Routing routing = make_routing(lab, N, K, s.E);
  const int32_t* slot_row = routing.plan.slot_row;
  bf16 *rows = lab.normal<bf16>(N * K * C), *addend = lab.normal<bf16>(N * C);
  float* gates = lab.normal<float>(N * K);
  bf16 *out = lab.memory<bf16>(N * C), *dx = lab.memory<bf16>(N * C);

  Case c;
  c.shape = s.name;
  c.forward.bytes = c.backward.bytes = double((K + 2) * N * C) * sizeof(bf16);
  c.outputs = {output("out", out, N * C), output("dx", dx, N * C, 1)};
  const float* none = nullptr;
  c.variants.push_back({"production", "ours", [=, &dev] { combine(dev, out, rows, addend, gates, slot_row, N, K, C); },
                        [=, &dev] { combine(dev, dx, rows, addend, none, slot_row, N, K, C); }});
  auto simple = [=, &dev](bf16* to, const float* with) {
    launch(dev, naive::combine, unsigned(ceil_div(N * C, 256)), 256, 0, to, rows, addend, with, slot_row, N, K, C);
  };
  c.variants.push_back({"naive", "ours-naive", [=] { simple(out, gates); }, [=] { simple(dx, none); }});
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
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "combine", moe_shapes(), make, reduced_moe); }
