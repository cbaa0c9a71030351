// A MoE layer of gpt-moe.cu in another program, from raw pointers: forward and backward on the CPU in double precision, held
// against finite differences; and, built with CUDA, in bf16 on the GPU, held against bf16 on the CPU.
#include <cstdio>
#include <initializer_list>

#include "arrays.h"

const int64_t N = 96, C = 64, F = 48, E = 8, K = 2;  // tokens, model width, expert width, experts, experts a token

moe::LayerConfig config(moe::Place place, moe::Dtype dtype) {
  moe::LayerConfig c;
  c.tokens = N, c.d_model = C, c.d_expert = F, c.n_expert = E, c.top_k = K, c.place = place, c.dtype = dtype;
  c.wide_gradients = c.add_gradients = false;  // of the weights' type, and written
  return c;
}

template <class T>
struct Program {
  moe::Place at;
  moe::Layer layer;
  T *x = array<T>(at, N*C, 1), *dout = array<T>(at, N*C, 1), *out = array<T>(at, N*C), *dx = array<T>(at, N*C);
  T *router = array<T>(at, E*C, 0.3), *d_router = array<T>(at, E*C);
  T *w13 = array<T>(at, E * 2 * F * C, 0.2), *d_w13 = array<T>(at, E * 2 * F * C);
  T *w2 = array<T>(at, E*C*F, 0.2), *d_w2 = array<T>(at, E*C*F);
  void *saved = allocate(at, layer.saved_bytes()), *workspace = allocate(at, layer.workspace_bytes());

  Program(moe::Place place, moe::Dtype dtype) : at(place), layer(config(place, dtype)) {}
  void forward() { layer.forward(out, saved, workspace, x, nullptr, {router, w13, w2}); }
  void backward() { layer.backward(dx, {d_router, d_w13, d_w2}, saved, workspace, x, dout, {router, w13, w2}); }
};

bool report(const char* what, double ours, double other, double error, double most) {
  std::printf("%-12s %15.9f %15.9f  error %.1e\n", what, ours, other, error);
  return error < most;  // NaN is not
}

// How much <out, dout> changes along a direction in `values`, twice.
bool check(Program<double>& p, const char* what, double* values, const double* gradient, int64_t size) {
  double slope = 0, difference = 0;
  for (double step : {-1e-6, 1e-6}) {
    for (int64_t i = 0; i < size; ++i) values[i] += step * std::cos(double(i));
    p.forward();
    for (int64_t i = 0; i < N * C; ++i) difference += p.out[i] * p.dout[i] / (2 * step);
    for (int64_t i = 0; i < size; ++i) values[i] -= step * std::cos(double(i));
  }
  for (int64_t i = 0; i < size; ++i) slope += gradient[i] * std::cos(double(i));
  return report(what, slope, difference, std::fabs(slope - difference) / (1 + std::fabs(slope)), 1e-6);
}

bool check(const char* what, const Bf16* gpu, const Bf16* cpu, int64_t size) {
  double ours = 0, other = 0, apart = 0;
  for (int64_t i = 0; i < size; ++i)
    ours += gpu[i] * gpu[i], other += cpu[i] * cpu[i], apart += (gpu[i] - cpu[i]) * (gpu[i] - cpu[i]);
  return report(what, std::sqrt(ours), std::sqrt(other), std::sqrt(apart / other), 0.02);
}

int main() {
  Program<double> p(moe::Place::cpu, moe::Dtype::f64);
  std::printf("saved %zu bytes, workspace %zu bytes\n", p.layer.saved_bytes(), p.layer.workspace_bytes());
  p.forward(), p.backward();
  bool good = check(p, "d x", p.x, p.dx, N * C) & check(p, "d router", p.router, p.d_router, E * C) &
              check(p, "d w13", p.w13, p.d_w13, E * 2 * F * C) & check(p, "d w2", p.w2, p.d_w2, E * C * F);
#ifdef WITH_CUDA
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) == cudaSuccess && gpus > 0) {
    Program<Bf16> gpu(moe::Place::cuda, moe::Dtype::bf16), cpu(moe::Place::cpu, moe::Dtype::bf16);
    gpu.forward(), gpu.backward(), cpu.forward(), cpu.backward();
    cudaDeviceSynchronize();
    good &= check("GPU out", gpu.out, cpu.out, N * C) & check("GPU d x", gpu.dx, cpu.dx, N * C) &
            check("GPU d router", gpu.d_router, cpu.d_router, E * C) &
            check("GPU d w13", gpu.d_w13, cpu.d_w13, E * 2 * F * C) & check("GPU d w2", gpu.d_w2, cpu.d_w2, E * C * F);
  }
#endif
  std::puts(good ? "good" : "WRONG");
  return good ? 0 : 1;
}
