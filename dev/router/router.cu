// The router, against the time that reading x takes: its product is thin (E columns), so the op should be bound by the
// bytes of x forward, and of x and dx backward. 0: production. 1: a block a token, forward only (naive.cuh).
// copy: the floor.
//
//   build/router [--shapes gpt124-8x2,...] [--quick]
#include "moe/router.h"

#include <limits>

#include "dev/bench.h"
#include "dev/moe_shapes.h"
#include "dev/router/naive.cuh"

namespace {
using namespace bench;

Case make(Lab& lab, const MoeShape& shape) {
  RouterShape s = shape.router();
  int64_t N = s.N, C = s.C, E = s.E, K = s.K;
  auto& dev = lab.dev;
  bf16 *x = lab.normal<bf16>(N * C), *wg = lab.normal<bf16>(E * C, 0.02), *dx = lab.memory<bf16>(N * C);
  float *gates = lab.memory<float>(N * K), *lse = lab.memory<float>(N), *group_prob = lab.memory<float>(E);
  float *dgates = lab.normal<float>(N * K), *dwg = lab.memory<float>(E * C);
  int32_t *chosen = lab.memory<int32_t>(N * K), *group_count = lab.memory<int32_t>(E);
  char* scratch = lab.memory<char>(int64_t(router_scratch_bytes<Gpu<bf16>>(s)));
  StepParams step;
  const StepParams* params = lab.upload(std::vector<StepParams>{step});

  Case c;
  c.shape = shape.name;
  c.forward.bytes = double(N * C) * sizeof(bf16), c.backward.bytes = 2 * c.forward.bytes;
  // Two logits that agree to the last bits may change places, and their tokens' rows with them: a few such tokens pass.
  constexpr double any = std::numeric_limits<double>::infinity();
  c.outputs = {output("gates", gates, N * K),
               {"top_k_index", chosen, DType::i32, N * K, 0, Before::poison, 0.02, any},
               output("lse", lse, N),
               output("group_prob", group_prob, E),
               {"group_count", group_count, DType::i32, E, 0, Before::poison, 0.02, any},
               output("dx", dx, N * C, 1),
               output("dwg", dwg, E * C, 1, Before::gradient)};
  const float* no_bias = nullptr;
  const int32_t* no_replay = nullptr;
  c.variants.push_back(
      {"production", "ours",
       [=, &dev] {
         router_forward(dev, gates, chosen, lse, group_prob, group_count, scratch, x, wg, no_bias, no_replay, s);
       },
       [=, &dev] {
         Grad<Gpu<bf16>> gradient{dwg, true};
         router_backward(dev, dx, gradient, scratch, dgates, gates, chosen, lse, group_count, x, wg, params, s);
       }});
  c.variants.push_back({"naive", "ours-naive", [=, &dev] {
                          dev.zero(group_prob, size_t(E) * sizeof(float));
                          dev.zero(group_count, size_t(E) * sizeof(int32_t));
                          launch(dev, naive::router, unsigned(N), 256, 0, gates, chosen, lse, group_prob, group_count,
                                 x, wg, s);
                        }});
  c.variants.push_back(copy_floor(lab, c.forward, c.backward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto x_host = lab.host(x, N * C), wg_host = lab.host(wg, E * C), dgates_host = lab.host(dgates, N * K);
    std::vector<double> g(N * K), l(N), prob(E), dx_host(N * C), dwg_host(E * C);
    std::vector<int32_t> index(N * K), count(E);
    std::vector<char> work(router_scratch_bytes<Cpu<double>>(s));
    router_forward(cpu, g.data(), index.data(), l.data(), prob.data(), count.data(), work.data(), x_host.data(),
                   wg_host.data(), nullptr, nullptr, s);
    router_backward(cpu, dx_host.data(), Grad<Cpu<double>>{dwg_host.data(), true}, work.data(), dgates_host.data(),
                    g.data(), index.data(), l.data(), count.data(), x_host.data(), wg_host.data(), &step, s);
    return Values{g, Lab::to(index), l, prob, Lab::to(count), dx_host, dwg_host};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "router", moe_shapes(), make, reduced_moe); }
