// The classifier, in two parts; README.md of this folder walks through them.
//   ce-*    cross_entropy() alone on logits (n,Vp), which it turns into their gradient in place. Bound by memory: every
//           logit is read and written once. 0: production. 01 to 03: a rung a file. copy: the floor.
//   loop-*  the whole op: three products and the cross-entropy of every chunk of tokens. 0: production, in chunks as
//           the model has them; the same in smaller and larger ones; products: the products alone, through cuBLASLt.
//
//   dev/classifier/classifier [variant] [shape]
#include "llmc/classifier.h"

#include "dev/bench.h"
#include "dev/classifier/01_naive.cuh"
#include "dev/classifier/02_online.cuh"
#include "dev/classifier/03_vectorised.cuh"
#include "llmc/random.h"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, C, V;  // C 0: cross-entropy alone
  int64_t Vp() const { return (V + 63) / 64 * 64; }
};
const std::vector<Shape> shapes = {{"ce-640", 640, 0, 50257},
                                   {"ce-8192", 8192, 0, 50257},
                                   {"loop-gpt124", 32768, 768, 50257},
                                   {"loop-olmoe", 16384, 2048, 50304}};
// V stays as it is where it decides whether a row fits in shared memory.
Shape reduced(Shape s) {
  return s.C ? Shape{s.name, 500, std::min<int64_t>(s.C, 256), 1003} : Shape{s.name, 24, 0, s.V};
}

// Every sixteenth position has no target.
std::vector<int32_t> random_targets(int64_t N, int64_t V) {
  std::vector<int32_t> ids(N);
  for (int64_t n = 0; n < N; ++n) ids[n] = n % 16 == 5 ? -1 : int32_t(random_bits(5, 1, n) % uint64_t(V));
  return ids;
}

Case make_cross_entropy(Lab& lab, const Shape& s) {
  int64_t N = s.N, V = s.V, Vp = s.Vp();
  auto& dev = lab.dev;
  std::vector<int32_t> ids = random_targets(N, V);
  StepParams step;
  step.loss_scale = 1.0 / double(N);
  const int32_t* targets = lab.upload(ids);
  const StepParams* params = lab.upload(std::vector<StepParams>{step});
  bf16 *fresh = lab.normal<bf16>(N * Vp, 2), *logits = lab.copy_of(fresh, N * Vp);
  float *losses = lab.memory<float>(N), *p = lab.memory<float>(N * Vp);

  Case c;
  c.shape = s.name;
  const double operations = 8.0 * double(N * Vp);  // an exponential counted as one
  c.forward = {.bytes = 2.0 * double(N * Vp) * sizeof(bf16), .fp32_flops = operations};
  c.prepare = [=, &dev] { dev.copy(logits, fresh, size_t(N * Vp) * sizeof(bf16)); };
  c.outputs = {output("losses", losses, N), output("dlogits", logits, N * Vp, 0, Before::input)};
  c.variants.push_back(
      {"production", "ours", [=, &dev] { cross_entropy(dev, losses, logits, targets, params, 0, N, V, Vp, true); }});
  Variant naive{"01_naive", "ours-01_naive",
                [=, &dev] { naive::cross_entropy(dev, losses, logits, p, targets, params, N, V, Vp); }};
  naive.forward_work = {0, 12.0 * double(N * Vp), operations};
  c.variants.push_back(std::move(naive));
  c.variants.push_back({"02_online", "ours-02_online",
                        [=, &dev] { online::cross_entropy(dev, losses, logits, targets, params, N, V, Vp); }});
  c.variants.push_back({"03_vectorised", "ours-03_vectorised",
                        [=, &dev] { vectorised::cross_entropy(dev, losses, logits, targets, params, N, V, Vp); }});
  c.variants.push_back(copy_floor(lab, c.forward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto values = lab.host(fresh, N * Vp);
    std::vector<double> losses_host(N);
    cross_entropy(cpu, losses_host.data(), values.data(), ids.data(), &step, 0, N, V, Vp, true);
    return Values{losses_host, values};
  };
  return c;
}

// The products of the loop: what is left when the cross-entropy costs nothing.
void products_alone(Gpu<bf16>& dev, bf16* dx, float* dweight, bf16* logits, void* scratch, const bf16* x,
                    const bf16* weight, int64_t N, int64_t C, int64_t Vp, int64_t chunk) {
  Grad<Gpu<bf16>> gradient{dweight, true};
  for (int64_t n0 = 0; n0 < N; n0 += chunk) {
    int64_t n = std::min(chunk, N - n0);
    matmul_forward(dev, logits, scratch, x + n0 * C, weight, n, C, Vp);
    matmul_backward_input(dev, dx + n0 * C, scratch, logits, weight, n, C, Vp);
    matmul_backward_weight(dev, gradient, scratch, logits, x + n0 * C, n, C, Vp);
  }
}

Case make_loop(Lab& lab, const Shape& s) {
  int64_t N = s.N, C = s.C, V = s.V, Vp = s.Vp();
  auto& dev = lab.dev;
  int64_t chunk = std::min(N, Gpu<bf16>::classifier_bytes / (Vp * int64_t(sizeof(bf16))) / 64 * 64);
  if (N <= 1000) chunk = 384;  // the reduced size has several chunks too, the last one shorter
  int64_t largest_chunk = std::min<int64_t>(N, 8192);
  std::vector<int32_t> ids = random_targets(N, V);
  StepParams step;
  step.loss_scale = 1.0 / double(N);
  const int32_t* targets = lab.upload(ids);
  const StepParams* params = lab.upload(std::vector<StepParams>{step});
  bf16 *x = lab.normal<bf16>(N * C), *weight = lab.normal<bf16>(Vp * C, 0.02), *dx = lab.memory<bf16>(N * C);
  float *losses = lab.memory<float>(N), *dweight = lab.memory<float>(Vp * C);
  char* scratch = lab.memory<char>(int64_t(classifier_scratch_bytes<Gpu<bf16>>(C, Vp, largest_chunk)));
  bf16* logits = lab.normal<bf16>(chunk * Vp, 1e-4);
  char* product_scratch = lab.memory<char>(int64_t(matmul_scratch_bytes<Gpu<bf16>>(chunk, C, Vp)));

  Case c;
  c.shape = s.name;
  c.forward.flops = 6.0 * double(N) * double(C) * double(Vp);
  c.outputs = {output("losses", losses, N), output("dx", dx, N * C),
               output("dweight", dweight, Vp * C, 0, Before::gradient)};
  auto in_chunks = [=, &dev](int64_t n) {
    return [=, &dev] { classifier(dev, losses, dx, dweight, scratch, x, weight, targets, params, N, C, V, Vp, n); };
  };
  c.variants.push_back({"production", "ours", in_chunks(chunk)});
  for (int64_t n : {640, 2048, 8192})
    c.variants.push_back({"chunk" + std::to_string(n), "ours-chunk" + std::to_string(n), in_chunks(std::min(N, n))});
  Variant products{"products", "cublaslt", [=, &dev] {
                     products_alone(dev, dx, dweight, logits, product_scratch, x, weight, N, C, Vp, chunk);
                   }};
  products.is_library = true, products.checked = false;
  c.variants.push_back(products);
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto x_host = lab.host(x, N * C), w_host = lab.host(weight, Vp * C);
    std::vector<double> losses_host(N), dx_host(N * C), dw_host(Vp * C);
    std::vector<char> work(classifier_scratch_bytes<Cpu<double>>(C, Vp, chunk));
    classifier(cpu, losses_host.data(), dx_host.data(), dw_host.data(), work.data(), x_host.data(), w_host.data(),
               ids.data(), &step, N, C, V, Vp, chunk);
    return Values{losses_host, dx_host, dw_host};
  };
  return c;
}

Case make(Lab& lab, const Shape& s) { return s.C ? make_loop(lab, s) : make_cross_entropy(lab, s); }
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "classifier", shapes, make, reduced); }
