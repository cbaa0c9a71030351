// The router, against the time that reading x takes: its product is thin (E columns), so the op should be bound by the
// bytes of x forward, and of x and dx backward. 0: production. 01 to 03: a rung a file (README.md). copy: the floor.
//
//   dev/router/router [variant] [shape]
#include "moe/router.h"

#include <algorithm>
#include <limits>

#include "dev/bench.h"
#include "dev/router/01_thread_a_token.cuh"
#include "dev/router/02_warp_a_token.cuh"
#include "dev/router/03_product_then_choose.cuh"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, C, E, K;
  Gate gate = Gate::softmax;
  RouterShape router() const { return {N, C, E, K, 1, gate, true, 2.5, 0.01, 0.001}; }
};
const std::vector<Shape> shapes = {{"gpt124-8x2", 65536, 768, 8, 2},
                                   {"mixtral-8x2-64k", 65536, 4096, 8, 2},  // x: 512 MiB
                                   {"olmoe-64x8", 32768, 2048, 64, 8},
                                   {"fine-128x8", 24576, 1536, 128, 8},
                                   {"dsv3-256x8-sigmoid", 8192, 2048, 256, 8, Gate::sigmoid}};
// No whole number of tiles of tokens or of columns.
Shape reduced(Shape s) {
  s.N = 733, s.C = 328;
  return s;
}

Case make(Lab& lab, const Shape& shape) {
  const RouterShape s = shape.router();
  const int64_t N = s.N, C = s.C, E = s.E, K = s.K;
  const bool sigmoid = s.gate == Gate::sigmoid;
  auto& dev = lab.dev;
  bf16 *x = lab.normal<bf16>(N * C), *wg = lab.normal<bf16>(E * C, 0.02), *dx = lab.memory<bf16>(N * C);
  float *gates = lab.memory<float>(N * K), *lse = lab.memory<float>(N), *group_prob = lab.memory<float>(E);
  float *dgates = lab.normal<float>(N * K), *dwg = lab.memory<float>(E * C);
  const float* bias = sigmoid ? lab.normal<float>(E, 0.05) : nullptr;
  int32_t *chosen = lab.memory<int32_t>(N * K), *group_count = lab.memory<int32_t>(E);
  char* scratch = lab.memory<char>(int64_t(router_scratch_bytes<Gpu<bf16>>(s)));
  const StepParams step;
  const StepParams* params = lab.upload(std::vector<StepParams>{step});

  Case c;
  c.shape = shape.name;
  const double matrix = double(N * C) * sizeof(bf16), product = 2.0 * double(N) * double(C) * double(E);
  c.forward.bytes = matrix, c.backward.bytes = 2 * matrix;
  // Two logits that agree to the last bits may change places, and with them their tokens' rows of dx: a few such tokens
  // pass.
  constexpr double any = std::numeric_limits<double>::infinity();
  c.outputs = {output("gates", gates, N * K),
               {"top_k_index", chosen, DType::i32, N * K, 0, Before::poison, 0.02, any},
               output("lse", lse, N),
               output("group_prob", group_prob, E),
               {"group_count", group_count, DType::i32, E, 0, Before::poison, 0.02, any},
               {"dx", dx, DType::bf16, N * C, 1, Before::poison, 0.06, any},
               {"dwg", dwg, DType::f32, E * C, 1, Before::gradient, 0.06, any}};
  const std::function<void()> forward = [=, &dev] {
    const int32_t* no_replay = nullptr;
    router_forward(dev, gates, chosen, lse, group_prob, group_count, scratch, x, wg, bias, no_replay, s);
  };
  const std::function<void()> backward = [=, &dev] {
    const Grad<Gpu<bf16>> gradient{dwg, true};
    router_backward(dev, dx, gradient, scratch, dgates, gates, chosen, lse, group_count, x, wg, params, s);
  };
  // The weights, and what is written for every token.
  const double small = double(E * C) * sizeof(bf16) + double(N * (2 * K + 1)) * sizeof(float);
  const double logits = 2 * double(N * E) * sizeof(float), parts = 2 * double(N * 3 * E) * sizeof(bf16);
  const Work library_forward{product, matrix + small + logits, 0},
      library_backward{7 * product, 3 * matrix + small + logits + 2 * parts, 0};

  Variant production{"production", "ours", forward, backward};
  // With many experts production takes the library's product too (moe/router.cu: most_forward, most_backward).
  production.forward_work = E <= 32 ? Work{product, matrix + small, 0} : library_forward;
  production.backward_work = E <= 128 ? Work{6 * product, 3 * matrix + small + parts, 0} : library_backward;
  c.variants.push_back(production);

  Variant thread{"01_thread_a_token", "ours-01_thread_a_token", [=, &dev] {
                   thread_a_token::forward(dev, gates, chosen, lse, group_prob, group_count, x, wg, bias, s);
                 }};
  constexpr double fits_l2 = 40e6;
  thread.forward_work = {0, (matrix > fits_l2 ? double(E) : 1.0) * matrix + small, product};
  c.variants.push_back(thread);

  Variant warp{"02_warp_a_token", "ours-02_warp_a_token",
               [=, &dev] { warp_a_token::forward(dev, gates, chosen, lse, group_prob, group_count, x, wg, bias, s); }};
  warp.forward_work = {0, matrix + small, product};
  c.variants.push_back(warp);

  Variant library{"03_product_then_choose", "ours-03_product_then_choose",
                  [=, &dev] { product_then_choose::run(dev, forward); },
                  [=, &dev] { product_then_choose::run(dev, backward); }};
  library.forward_work = library_forward, library.backward_work = library_backward;
  c.variants.push_back(library);
  c.variants.push_back(copy_floor(lab, c.forward, c.backward));

  c.reference = [=, &lab] {
    Cpu<double> cpu;
    const auto x_host = lab.host(x, N * C), wg_host = lab.host(wg, E * C), dgates_host = lab.host(dgates, N * K);
    const auto bias_host = bias ? lab.host(bias, E) : std::vector<double>();
    std::vector<double> g(N * K), l(N), prob(E), dx_host(N * C), dwg_host(E * C);
    std::vector<int32_t> index(N * K), count(E);
    std::vector<char> work(router_scratch_bytes<Cpu<double>>(s));
    router_forward(cpu, g.data(), index.data(), l.data(), prob.data(), count.data(), work.data(), x_host.data(),
                   wg_host.data(), bias ? bias_host.data() : nullptr, nullptr, s);
    router_backward(cpu, dx_host.data(), Grad<Cpu<double>>{dwg_host.data(), true}, work.data(), dgates_host.data(),
                    g.data(), index.data(), l.data(), count.data(), x_host.data(), wg_host.data(), &step, s);
    return Values{g, Lab::to(index), l, prob, Lab::to(count), dx_host, dwg_host};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "router", shapes, make, reduced); }
