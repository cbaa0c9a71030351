// The first product of the expert MLPs, h (R,2F) = x[token] W13[expert]^T and a = swiglu(h), from the simplest kernel
// to production in small steps: README.md of this folder walks through them. 0: production, experts_up(). 01 to 05: a
// rung a file; those from 02 on need Hopper. 01 runs where it would take seconds only if asked for by name. cublaslt:
// gather, a cuBLASLt product an expert, activation. Every variant begins with x and the routing plan and ends with h
// and a.
//
//   make -C dev grouped_gemm && dev/grouped_gemm/grouped_gemm [variant] [shape]
#include "dev/grouped_gemm/01_naive.cuh"
#include "dev/grouped_gemm/02_launch_an_expert.cuh"
#include "dev/grouped_gemm/03_grouped.cuh"
#include "dev/grouped_gemm/04_gather.cuh"
#include "dev/grouped_gemm/05_swiglu.cuh"
#include "llmc/cuda_matmul.cuh"
#include "moe/experts_hopper_kernels.h"

namespace {
using namespace bench;

std::vector<MoeShape> shapes() {
  std::vector<MoeShape> some;
  for (const MoeShape& s : moe_shapes())
    for (const char* name : {"gpt124-8x2", "olmoe-64x8", "fine-128x8", "mixtral-8x2"})
      if (s.name == name) some.push_back(s);
  return some;
}

struct Rung {
  const char* name;
  void (*up)(Gpu<bf16>& dev, const ExpertBuffers& b);
  bool hopper;
  double most_flops;             // by default it runs up to this size
  bool copies_x, reads_h_again;  // gathered copy of x, activation in a kernel of its own
};
constexpr double any_size = 1e30;
const Rung rungs[] = {{"01_naive", naive::up, false, 4e11, false, true},
                      {"02_launch_an_expert", launch_an_expert::up, true, any_size, true, true},
                      {"03_grouped", grouped_rows::up, true, any_size, true, true},
                      {"04_gather", gathered::up, true, any_size, false, true},
                      {"05_swiglu", fused::up, true, any_size, false, false}};

void library(Gpu<bf16>& dev, const ExpertBuffers& b, void* scratch) {
  const int64_t C = b.s.C, F = b.s.F;
  dispatch_gather(dev, b.x_rows, b.x, b.offsets, b.row_slot, b.s.R / b.s.K, b.s.K, b.s.E, C);
  for (int64_t e = 0; e < b.s.E; ++e) {
    const int64_t r = b.routing.offsets[e], n = b.routing.offsets[e + 1] - r;
    if (n > 0)
      dense_product(dev, view(b.h + r * 2 * F, 2 * F), scratch, view(b.x_rows + r * C, C), false,
                    view(b.w13 + e * 2 * F * C, C), true, n, 2 * F, C, false);
  }
  swiglu_forward(dev, b.a, b.h, b.s.R, F);
}

Case make(Lab& lab, const MoeShape& shape) {
  auto& dev = lab.dev;
  const ExpertBuffers b = make_buffers(lab, shape);
  void* scratch = lab.memory<char>(int64_t(dense_scratch_bytes()));

  Case c;
  c.shape = shape.name;
  const double R = double(b.s.R), C = double(b.s.C), F = double(b.s.F), flops = 4 * R * C * F;
  // x and the weights are read, h and a written.
  const double bytes = 2.0 * (R / double(b.s.K) * C + double(b.s.E) * 2 * F * C + 3 * R * F);
  auto work = [=](bool copies_x, bool reads_h_again) {
    return Work{flops, bytes + 2.0 * ((copies_x ? 2 * R * C : 0) + (reads_h_again ? 2 * R * F : 0))};
  };
  c.forward = work(false, false);
  c.outputs = {output("h", b.h, 2 * b.s.R * b.s.F), output("a", b.a, b.s.R * b.s.F)};
  c.variants.push_back({"production", "ours", [=, &dev] { production(dev, Product::up, b); }});
  static const bool hopper = [&] {
    const bool runs = hopper::usable(dev, b.s);
    if (!runs) std::printf("rungs 02 to 05 are left out: they need a Hopper GPU and code for sm_90a\n");
    return runs;
  }();
  for (const Rung& rung : rungs)
    if ((hopper || !rung.hopper) && (flops < rung.most_flops || !lab.options.variants.empty())) {
      Variant v{rung.name, std::string("ours-") + rung.name, [=, &dev, &rung] { rung.up(dev, b); }};
      v.forward_work = work(rung.copies_x, rung.reads_h_again);
      if (!rung.hopper) v.forward_work.fp32_flops = std::exchange(v.forward_work.flops, 0);
      c.variants.push_back(v);
    }
  Variant products{"cublaslt", "cublaslt", [=, &dev] { library(dev, b, scratch); }};
  products.is_library = true, products.forward_work = work(true, true);
  c.variants.push_back(products);
  c.reference = [=, &lab] { return reference(lab, Product::up, b); };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "grouped_gemm", shapes(), make, reduced_moe); }
