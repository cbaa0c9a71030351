// SwiGLU and its backward pass, element by element. Bound by memory: of N*F values each, forward moves 3, backward 5.
// 0: production. 01 to 03: a rung a file (README.md). copy: the floor.
//
//   dev/swiglu/swiglu [variant] [shape]
#include "llmc/swiglu.h"

#include "dev/bench.h"
#include "dev/swiglu/01_thread_an_element.cuh"
#include "dev/swiglu/02_pairs.cuh"
#include "dev/swiglu/03_resident_blocks.cuh"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, F;
};
// 1368 is 8/3 of 512, as models with a SwiGLU choose it, rounded up to a multiple of 8 and no more.
const std::vector<Shape> shapes = {
    {"8192x1368", 8192, 1368}, {"32768x2048", 32768, 2048}, {"65536x2048", 65536, 2048}, {"32768x8192", 32768, 8192}};
// Of the odd width enough rows that rung 03 goes around (an H100 has 135168 threads at work, these are 137655 groups of
// eight), and no whole number of blocks.
Shape reduced(Shape s) { return {s.name, s.F == 1368 ? 805 : 37, s.F}; }
constexpr double forward_operations = 20,
                 backward_operations = 26;  // an element; an exponential and a division in each

struct Rung {
  const char* name;
  void (*forward)(GpuBase& dev, bf16* a, const bf16* h, int64_t N, int64_t F);
  void (*backward)(GpuBase& dev, bf16* dh, const bf16* da, const bf16* h, int64_t N, int64_t F);  // or null
};
const Rung rungs[] = {{"01_thread_an_element", thread_an_element::forward, thread_an_element::backward},
                      {"02_pairs", pairs::forward, pairs::backward},
                      {"03_resident_blocks", resident_blocks::forward, resident_blocks::backward}};

Case make(Lab& lab, const Shape& s) {
  const int64_t N = s.N, F = s.F;
  auto& dev = lab.dev;
  bf16 *h = lab.normal<bf16>(N * 2 * F), *da = lab.normal<bf16>(N * F);
  bf16 *a = lab.memory<bf16>(N * F), *dh = lab.memory<bf16>(N * 2 * F);

  Case c;
  c.shape = s.name;
  const double values = double(N * F);
  c.forward.bytes = 3 * values * sizeof(bf16), c.backward.bytes = 5 * values * sizeof(bf16);
  c.outputs = {output("a", a, N * F), output("dh", dh, N * 2 * F, 1)};
  c.variants.push_back({"production", "ours", [=, &dev] { swiglu_forward(dev, a, h, N, F); },
                        [=, &dev] { swiglu_backward(dev, dh, da, h, N, F); }});
  for (const Rung& rung : rungs) {
    Variant v{rung.name, std::string("ours-") + rung.name, [=, &dev, &rung] { rung.forward(dev, a, h, N, F); }};
    if (rung.backward) v.backward = [=, &dev, &rung] { rung.backward(dev, dh, da, h, N, F); };
    c.variants.push_back(v);
  }
  for (Variant& v : c.variants) {
    v.forward_work = {0, c.forward.bytes, forward_operations * values};
    v.backward_work = {0, c.backward.bytes, backward_operations * values};
  }
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
