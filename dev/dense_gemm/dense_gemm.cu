// The dense product C (M,N) = A (M,K) B (N,K)^T in bf16, from the simplest kernel to the library's speed in small
// steps: README.md of this folder walks through them. 0: production, cuBLASLt, which is what the trainer calls. 01 to
// 10: a rung a file; those from 04 on need Hopper. 01 runs where it would take seconds only if asked for by name.
//
//   make -C dev dense_gemm && dev/dense_gemm/dense_gemm [variant] [shape]
#include "dev/bench.h"
#include "dev/dense_gemm/01_naive.cuh"
#include "dev/dense_gemm/02_shared_tiles.cuh"
#include "dev/dense_gemm/03_tensor_cores.cuh"
#include "dev/dense_gemm/04_wgmma.cuh"
#include "dev/dense_gemm/05_ring.cuh"
#include "dev/dense_gemm/06_two_consumers.cuh"
#include "dev/dense_gemm/07_persistent.cuh"
#include "dev/dense_gemm/08_cluster.cuh"
#include "dev/dense_gemm/09_async_store.cuh"
#include "dev/dense_gemm/10_hilbert.cuh"
#include "llmc/cuda_matmul.cuh"
#include "llmc/matmul.h"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int M, N, K;
};
const std::vector<Shape> shapes = {{"1024", 1024, 1024, 1024},
                                   {"2048", 2048, 2048, 2048},
                                   {"32768x768x3072", 32768, 768, 3072},
                                   {"4096", 4096, 4096, 4096},
                                   {"8192", 8192, 8192, 8192}};
// Nine steps of the reduction: more than a round of any ring, and no whole number of rounds.
Shape reduced(Shape s) { return {s.name, 512, 768, 576}; }

struct Rung {
  const char* name;
  void (*product)(GpuBase& dev, bf16* c, const bf16* a, const bf16* b, int M, int N, int K);
  bool hopper;
  double most_flops;  // by default it runs up to this size
  bool cuda_cores = false;
};
constexpr double any_size = 1e30;
const Rung rungs[] = {{"01_naive", naive::product, false, 2e11, true},
                      {"02_shared_tiles", shared_tiles::product, false, any_size, true},
                      {"03_tensor_cores", tensor_cores::product, false, any_size},
                      {"04_wgmma", one_stage::product, true, any_size},
                      {"05_ring", ring::product, true, any_size},
                      {"06_two_consumers", two_consumers::product, true, any_size},
                      {"07_persistent", persistent::product, true, any_size},
                      {"08_cluster", cluster::product, true, any_size},
                      {"09_async_store", async_store::product, true, any_size},
                      {"10_hilbert", hilbert::product, true, any_size}};

Case make(Lab& lab, const Shape& s) {
  auto& dev = lab.dev;
  const int64_t M = s.M, N = s.N, K = s.K;
  bf16 *a = lab.normal<bf16>(M * K), *b = lab.normal<bf16>(N * K), *c = lab.memory<bf16>(M * N);
  void* scratch = lab.memory<char>(int64_t(dense_scratch_bytes()));

  Case result;
  result.shape = s.name;
  const double flops = 2.0 * double(M) * double(N) * double(K),
               bytes = 2.0 * (double(M) * double(K) + double(N) * double(K) + double(M) * double(N));
  result.forward = {flops, bytes};
  result.outputs = {output("c", c, M * N)};
  result.variants.push_back(
      {"production", "ours",
       [=, &dev] { dense_product(dev, view(c, N), scratch, view(a, K), false, view(b, K), true, M, N, K, false); }});
  static const bool hopper = [&] {
    const bool runs = hopper::usable(dev);
    if (!runs) std::printf("rungs 04 to 10 are left out: they need a Hopper GPU and code for sm_90a\n");
    return runs;
  }();
  for (const Rung& rung : rungs)
    if ((hopper || !rung.hopper) && (flops < rung.most_flops || !lab.options.variants.empty())) {
      Variant v{rung.name, std::string("ours-") + rung.name,
                [=, &dev, &rung] { rung.product(dev, c, a, b, s.M, s.N, s.K); }};
      if (rung.cuda_cores) v.forward_work = {0, bytes, flops};
      result.variants.push_back(v);
    }
  result.reference = [=, &lab] {
    Cpu<double> cpu;
    std::vector<double> a_host = lab.host(a, M * K), b_host = lab.host(b, N * K), c_host(M * N);
    std::vector<char> work(matmul_scratch_bytes<Cpu<double>>(M, K, N));
    matmul_forward(cpu, c_host.data(), work.data(), a_host.data(), b_host.data(), M, K, N);
    return Values{c_host};
  };
  return result;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "dense_gemm", shapes, make, reduced); }
