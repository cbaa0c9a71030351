// Residual addition with RMSNorm, and its backward pass. Bound by memory: forward reads two tensors (N,C) and writes two,
// backward reads three and writes one. 0: production. 1: a block a row, atomics (naive.cuh). copy: the floor.
//
//   build/rmsnorm [--shapes 65536x768,...] [--quick]
#include "llmc/rmsnorm.h"

#include "dev/bench.h"
#include "dev/rmsnorm/naive.cuh"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, C;
};
const std::vector<Shape> shapes = {
    {"32768x768", 32768, 768}, {"32768x2048", 32768, 2048}, {"131072x2048", 131072, 2048}};
Shape reduced(Shape s) { return {s.name, 1000, s.C}; }
constexpr double eps = 1e-6;

Case make(Lab& lab, const Shape& s) {
  int64_t N = s.N, C = s.C;
  auto& dev = lab.dev;
  bf16 *residual = lab.normal<bf16>(N * C), *branch = lab.normal<bf16>(N * C), *weight = lab.normal<bf16>(C, 0.2, 1);
  bf16 *dout = lab.normal<bf16>(N * C), *dresidual = lab.normal<bf16>(N * C);
  bf16 *sum = lab.memory<bf16>(N * C), *out = lab.memory<bf16>(N * C), *dx = lab.memory<bf16>(N * C);
  float *rstd = lab.memory<float>(N), *dweight = lab.memory<float>(C);
  char* scratch = lab.memory<char>(int64_t(rmsnorm_backward_scratch_bytes<Gpu<bf16>>(N, C)));

  Case c;
  c.shape = s.name;
  c.forward.bytes = c.backward.bytes = 4.0 * double(N * C) * sizeof(bf16) + double(N) * sizeof(float);
  c.outputs = {output("sum", sum, N * C), output("out", out, N * C), output("rstd", rstd, N),
               output("dx", dx, N * C, 1), output("dweight", dweight, C, 1, Before::gradient)};
  c.variants.push_back(
      {"production", "ours",
       [=, &dev] { residual_rmsnorm_forward(dev, sum, out, rstd, residual, branch, weight, N, C, eps); },
       [=, &dev] {
         Grad<Gpu<bf16>> gradient{dweight, true};
         rmsnorm_backward(dev, dx, gradient, scratch, dout, dresidual, sum, weight, rstd, N, C);
       }});
  c.variants.push_back(
      {"naive", "ours-naive",
       [=, &dev] {
         launch(dev, naive::forward, unsigned(N), 256, 0, sum, out, rstd, residual, branch, weight, C, float(eps));
       },
       [=, &dev] {
         launch(dev, naive::backward, unsigned(N), 256, 0, dx, dweight, dout, dresidual, sum, weight, rstd, C);
       }});
  c.variants.push_back(copy_floor(lab, c.forward, c.backward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto a = lab.host(residual, N * C), b = lab.host(branch, N * C), w = lab.host(weight, C);
    auto d = lab.host(dout, N * C), dr = lab.host(dresidual, N * C);
    std::vector<double> x(N * C), y(N * C), r(N), gradient_x(N * C), gradient_w(C);
    std::vector<char> work(rmsnorm_backward_scratch_bytes<Cpu<double>>(N, C));
    residual_rmsnorm_forward(cpu, x.data(), y.data(), r.data(), a.data(), b.data(), w.data(), N, C, eps);
    rmsnorm_backward(cpu, gradient_x.data(), Grad<Cpu<double>>{gradient_w.data(), true}, work.data(), d.data(),
                     dr.data(), x.data(), w.data(), r.data(), N, C);
    return Values{x, y, r, gradient_x, gradient_w};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "rmsnorm", shapes, make, reduced); }
