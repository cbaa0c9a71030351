// The product C (M,N) = A (M,K) B (N,K)^T in fp32 on the host's processors, from the formula to the library in four
// steps: README.md of this folder walks through them. 0: production, matmul_forward() of Cpu<float>. library: one call
// of what it leaves its tiles to, on one thread.
//
//   dev/matmul_cpu/matmul_cpu [variant] [64x1024x256] [--quick] ...     (dev/bench_cpu.h)
#include <omp.h>

#include <memory>

#include "dev/bench_cpu.h"
#include "dev/matmul_cpu/01_naive.h"
#include "dev/matmul_cpu/02_tiled.h"
#include "dev/matmul_cpu/03_vectorised.h"
#include "dev/matmul_cpu/04_threaded.h"
#include "llmc/cpu_math.h"
#include "llmc/matmul.h"

namespace {
using namespace bench_cpu;

struct Shape {
  std::string name;
  int64_t M, N, K;
};
const std::vector<Shape> shapes = {{"8x256x128", 8, 256, 128},
                                   {"64x1024x256", 64, 1024, 256},
                                   {"256x768x768", 256, 768, 768},
                                   {"1024x3072x768", 1024, 3072, 768}};
// No whole number of any tile.
Shape reduced(Shape s) { return {s.name, 45, 139, 67}; }

struct Tensors {
  Array<float> a, b, c;
  Array<char> scratch;
  Cpu<float> dev;
};

Case make(const Shape& s) {
  const int64_t M = s.M, N = s.N, K = s.K;
  auto t = std::make_shared<Tensors>();
  t->a = normal_values(M * K, 1), t->b = normal_values(N * K, 2), t->c.resize(M * N);
  t->scratch.resize(matmul_scratch_bytes<Cpu<float>>(M, K, N));
  const double multiply_adds = double(M) * double(N) * double(K);
  const double bytes = 4 * double(M * K + N * K + M * N);

  Case c;
  c.shape = s.name;
  c.flops = 2 * multiply_adds;
  c.outputs = {{"c", std::span(t->c)}};
  auto rung = [&](const char* name, auto product, Work work) {
    c.variants.push_back(
        {name, std::string("ours-") + name, [=] { product(t->c.data(), t->a.data(), t->b.data(), M, N, K); }, work});
  };
  c.variants.push_back(
      {"production",
       "ours",
       [=] { matmul_forward(t->dev, t->c.data(), t->scratch.data(), t->a.data(), t->b.data(), M, K, N); },
       {.flops = c.flops, .bytes = bytes}});
  rung("01_naive", naive::product, {.bytes = bytes, .chained = multiply_adds, .threads = 1});
  rung("02_tiled", tiled::product, {.bytes = bytes, .clocks = multiply_adds / double(lanes), .threads = 1});
  rung("03_vectorised", vectorised::product, {.flops = c.flops, .bytes = bytes, .threads = 1});
  rung("04_threaded", threaded::product, {.flops = c.flops, .bytes = bytes});
#if defined(GPT_MOE_DNNL) || defined(GPT_MOE_OPENBLAS)
#ifdef GPT_MOE_DNNL
  const char* library = "onednn";
#else
  const char* library = "openblas";
#endif
  c.variants.push_back({"library",
                        library,
                        [=] {
                          const int threads = omp_get_max_threads();
                          omp_set_num_threads(1);
                          gemm<float>(false, false, true, M, N, K, 1, t->a.data(), K, t->b.data(), K, 0, t->c.data(),
                                      N);
                          omp_set_num_threads(threads);
                        },
                        {.flops = c.flops, .bytes = bytes, .threads = 1}});
#endif
  c.reference = [=] {
    Cpu<double> cpu;
    std::vector<double> a(t->a.begin(), t->a.end()), b(t->b.begin(), t->b.end()), out(M * N);
    std::vector<char> scratch(matmul_scratch_bytes<Cpu<double>>(M, K, N));
    matmul_forward(cpu, out.data(), scratch.data(), a.data(), b.data(), M, K, N);
    return Values{out};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_ladder(argc, argv, "matmul_cpu", shapes, make, reduced); }
