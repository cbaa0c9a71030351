// RMSNorm and its backward pass, from a thread a row to what the trainer runs: README.md of this folder walks through
// them. Bound by memory: forward reads one tensor (N,C) and writes one, backward reads two and writes one. 0:
// production. 01 to 03: a rung a file. copy: the floor.
//
// Shapes "...+residual": the sum of the residual stream and a branch, and the norm of the sum, which is what a layer
// does; forward reads two tensors and writes two, backward reads three and writes one. 0: production, one launch.
// two_launches: the sum by itself, then the norm of it; backward the norm's, then the sum.
//
//   dev/rmsnorm/rmsnorm [variant] [shape]
#include "llmc/rmsnorm.h"

#include "dev/bench.h"
#include "dev/rmsnorm/01_thread_a_row.cuh"
#include "dev/rmsnorm/02_block_a_row.cuh"
#include "dev/rmsnorm/03_warp_a_row.cuh"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, C;
  bool residual;
};
const std::vector<Shape> shapes = {{"32768x768", 32768, 768, false},
                                   {"32768x2048", 32768, 2048, false},
                                   {"131072x2048", 131072, 2048, false},
                                   {"32768x768+residual", 32768, 768, true},
                                   {"131072x2048+residual", 131072, 2048, true}};
// Neither a whole number of warps nor of the rows that share a partial sum.
Shape reduced(Shape s) { return {s.name, 203, s.C, s.residual}; }
constexpr double eps = 1e-6;

Work moves(int64_t N, int64_t C, int tensors) {
  const double values = double(tensors) * double(N * C);  // two operations for each that is moved, about
  return {.bytes = values * sizeof(bf16) + double(N) * sizeof(float), .fp32_flops = 2 * values};
}

Case make_norm(Lab& lab, const Shape& s) {
  int64_t N = s.N, C = s.C;
  auto& dev = lab.dev;
  bf16 *x = lab.normal<bf16>(N * C), *weight = lab.normal<bf16>(C, 0.2, 1), *dout = lab.normal<bf16>(N * C);
  bf16 *out = lab.memory<bf16>(N * C), *dx = lab.memory<bf16>(N * C), *none = nullptr;
  float *rstd = lab.memory<float>(N), *dweight = lab.memory<float>(C);
  float* partial = lab.memory<float>(warp_a_row::partials(N) * C);
  char* scratch = lab.memory<char>(int64_t(rmsnorm_backward_scratch_bytes<Gpu<bf16>>(N, C)));

  Case c;
  c.shape = s.name;
  c.forward = moves(N, C, 2), c.backward = moves(N, C, 3);
  c.outputs = {output("out", out, N * C), output("rstd", rstd, N), output("dx", dx, N * C, 1),
               output("dweight", dweight, C, 1, Before::gradient)};
  c.variants.push_back({"production", "ours", [=, &dev] { rmsnorm_forward(dev, out, rstd, x, weight, N, C, eps); },
                        [=, &dev] {
                          Grad<Gpu<bf16>> gradient{dweight, true};
                          rmsnorm_backward(dev, dx, gradient, scratch, dout, none, x, weight, rstd, N, C);
                        }});
  auto add = [&](const char* name, std::function<void()> forward, std::function<void()> backward, Work forward_work,
                 Work backward_work) {
    Variant v{name, std::string("ours-") + name, std::move(forward), std::move(backward)};
    v.forward_work = forward_work, v.backward_work = backward_work;
    c.variants.push_back(std::move(v));
  };
  add(
      "01_thread_a_row", [=, &dev] { thread_a_row::forward(dev, out, rstd, x, weight, N, C, eps); },
      [=, &dev] { thread_a_row::backward(dev, dx, dweight, dout, x, weight, rstd, N, C); }, moves(N, C, 3),
      moves(N, C, 5));
  add(
      "02_block_a_row", [=, &dev] { block_a_row::forward(dev, out, rstd, x, weight, N, C, eps); },
      [=, &dev] { block_a_row::backward(dev, dx, dweight, dout, x, weight, rstd, N, C); }, moves(N, C, 2),
      moves(N, C, 3));
  add(
      "03_warp_a_row", [=, &dev] { warp_a_row::forward(dev, out, rstd, x, weight, N, C, eps); },
      [=, &dev] { warp_a_row::backward(dev, dx, dweight, partial, dout, x, weight, rstd, N, C); }, moves(N, C, 2),
      moves(N, C, 5));
  c.variants.push_back(copy_floor(lab, c.forward, c.backward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto x_host = lab.host(x, N * C), w = lab.host(weight, C), d = lab.host(dout, N * C);
    std::vector<double> y(N * C), r(N), gradient_x(N * C), gradient_w(C);
    std::vector<char> work(rmsnorm_backward_scratch_bytes<Cpu<double>>(N, C));
    rmsnorm_forward(cpu, y.data(), r.data(), x_host.data(), w.data(), N, C, eps);
    rmsnorm_backward(cpu, gradient_x.data(), Grad<Cpu<double>>{gradient_w.data(), true}, work.data(), d.data(), nullptr,
                     x_host.data(), w.data(), r.data(), N, C);
    return Values{y, r, gradient_x, gradient_w};
  };
  return c;
}

Case make_residual(Lab& lab, const Shape& s) {
  int64_t N = s.N, C = s.C;
  auto& dev = lab.dev;
  bf16 *residual = lab.normal<bf16>(N * C), *branch = lab.normal<bf16>(N * C), *weight = lab.normal<bf16>(C, 0.2, 1);
  bf16 *dout = lab.normal<bf16>(N * C), *dresidual = lab.normal<bf16>(N * C), *none = nullptr;
  bf16 *sum = lab.memory<bf16>(N * C), *out = lab.memory<bf16>(N * C), *dx = lab.memory<bf16>(N * C);
  float *rstd = lab.memory<float>(N), *dweight = lab.memory<float>(C);
  char* scratch = lab.memory<char>(int64_t(rmsnorm_backward_scratch_bytes<Gpu<bf16>>(N, C)));

  Case c;
  c.shape = s.name;
  c.forward = c.backward = moves(N, C, 4);
  c.outputs = {output("sum", sum, N * C), output("out", out, N * C), output("rstd", rstd, N),
               output("dx", dx, N * C, 1), output("dweight", dweight, C, 1, Before::gradient)};
  c.variants.push_back(
      {"production", "ours",
       [=, &dev] { residual_rmsnorm_forward(dev, sum, out, rstd, residual, branch, weight, N, C, eps); },
       [=, &dev] {
         Grad<Gpu<bf16>> gradient{dweight, true};
         rmsnorm_backward(dev, dx, gradient, scratch, dout, dresidual, sum, weight, rstd, N, C);
       }});
  Variant two{"two_launches", "ours-two-launches",
              [=, &dev] {
                residual_add(dev, sum, residual, branch, N * C);
                rmsnorm_forward(dev, out, rstd, sum, weight, N, C, eps);
              },
              [=, &dev] {
                Grad<Gpu<bf16>> gradient{dweight, true};
                rmsnorm_backward(dev, dx, gradient, scratch, dout, none, sum, weight, rstd, N, C);
                residual_add(dev, dx, dx, dresidual, N * C);
              }};
  two.forward_work = moves(N, C, 5), two.backward_work = moves(N, C, 6);
  c.variants.push_back(std::move(two));
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

Case make(Lab& lab, const Shape& s) { return s.residual ? make_residual(lab, s) : make_norm(lab, s); }
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "rmsnorm", shapes, make, reduced); }
