// SwiGLU and its backward pass, element by element. Bound by memory: of N*F values each, forward moves 3, backward 5.
// 0: production. 1: a thread an element (naive.cuh). copy: the floor.
//
//   build/swiglu [--shapes 65536x2048,...] [--quick]
#include "llmc/swiglu.h"

#include "dev/bench.h"
#include "dev/swiglu/naive.cuh"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, F;
};
const std::vector<Shape> shapes = {
    {"32768x2048", 32768, 2048}, {"65536x2048", 65536, 2048}, {"32768x8192", 32768, 8192}};
Shape reduced(Shape s) { return {s.name, 500, s.F}; }

Case make(Lab& lab, const Shape& s) {
  int64_t N = s.N, F = s.F;
  auto& dev = lab.dev;
  bf16 *h = lab.normal<bf16>(N * 2 * F), *da = lab.normal<bf16>(N * F);
  bf16 *a = lab.memory<bf16>(N * F), *dh = lab.memory<bf16>(N * 2 * F);

  Case c;
  c.shape = s.name;
  c.forward.bytes = 3.0 * double(N * F) * sizeof(bf16), c.backward.bytes = 5.0 * double(N * F) * sizeof(bf16);
  c.outputs = {output("a", a, N * F), output("dh", dh, N * 2 * F, 1)};
  c.variants.push_back({"production", "ours", [=, &dev] { swiglu_forward(dev, a, h, N, F); },
                        [=, &dev] { swiglu_backward(dev, dh, da, h, N, F); }});
  unsigned blocks = unsigned(ceil_div(N * F, 256));
  c.variants.push_back({"naive", "ours-naive", [=, &dev] { launch(dev, naive::forward, blocks, 256, 0, a, h, N * F); },
                        [=, &dev] { launch(dev, naive::backward, blocks, 256, 0, dh, da, h, N * F); }});
  c.variants.push_back(copy_floor(lab, c.forward, c.backward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto h_host = lab.host(h, N * 2 * F), da_host = lab.host(da, N * F);
    std::vector<double> a_host(N * F), dh_host(N * 2 * F);
    swiglu_forward(cpu, a_host.data(), h_host.data(), N, F);
    swiglu_backward(cpu, dh_host.data(), da_host.data(), h_host.data(), N, F);
    return Values{a_host, dh_host};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "swiglu", shapes, make, reduced); }
