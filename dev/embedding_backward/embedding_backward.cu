// The gradient (V,C) of a token embedding, fp32: row v gets the sum of dout (N,C) over the positions of token v. The
// sum has an order, and which rows of dout belong together is known only on the device. README.md of this folder walks
// through it. Bound by memory: a row of dout a token is read, each row of the table that occurs is read and written. 0:
// production. 01 to 03: a rung a file. copy: the floor.
//
// Tokens are as frequent as words are: the probability of token v falls like 1/v, so that one row of the table collects
// a sixteenth of all positions. "...-uniform": all tokens are equally frequent.
//
//   dev/embedding_backward/embedding_backward [variant] [shape]
#include <algorithm>
#include <cmath>
#include <set>

#include "dev/bench.h"
#include "dev/embedding_backward/01_atomic.cuh"
#include "dev/embedding_backward/02_block_a_vocab_row.cuh"
#include "dev/embedding_backward/03_sorted.cuh"
#include "llmc/embedding.h"
#include "llmc/random.h"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, C, V;
  bool uniform;
};
const std::vector<Shape> shapes = {{"32768x768", 32768, 768, 50257, false},
                                   {"131072x2048", 131072, 2048, 50257, false},
                                   {"131072x2048-uniform", 131072, 2048, 50257, true}};
// Several runs of the most frequent token, and a last run that is not full.
Shape reduced(Shape s) { return {s.name, 1501, s.C, 1000, s.uniform}; }

std::vector<int32_t> random_tokens(const Shape& s) {
  std::vector<int32_t> ids(s.N);
  for (int64_t n = 0; n < s.N; ++n) {
    double u = random_uniform(3, 1, n), V = double(s.V);
    ids[n] = int32_t(std::min(V, s.uniform ? 1 + u * V : std::pow(V, u)) - 1);
  }
  return ids;
}

Case make(Lab& lab, const Shape& s) {
  int64_t N = s.N, C = s.C, V = s.V;
  auto& dev = lab.dev;
  std::vector<int32_t> ids = random_tokens(s);
  const int32_t* tokens = lab.upload(ids);
  bf16* dout = lab.normal<bf16>(N * C);
  float* dtable = lab.memory<float>(V * C);
  char* scratch = lab.memory<char>(
      std::max(int64_t(embedding_backward_scratch_bytes<Gpu<bf16>>(N, C, V)), sorted::scratch_bytes(N)));

  Case c;
  c.shape = s.name;
  auto distinct = double(std::set<int32_t>(ids.begin(), ids.end()).size());
  c.forward = {.bytes = double(N * C) * sizeof(bf16) + 2 * distinct * double(C) * sizeof(float),
               .fp32_flops = double(N * C)};
  c.outputs = {output("dtable", dtable, V * C, 0, Before::gradient)};
  c.variants.push_back({"production", "ours", [=, &dev] {
                          Grad<Gpu<bf16>> gradient{dtable, true};
                          embedding_backward(dev, gradient, scratch, tokens, dout, N, C, V);
                        }});
  c.variants.push_back(
      {"01_atomic", "ours-01_atomic", [=, &dev] { atomic::backward(dev, dtable, tokens, dout, N, C); }});
  c.variants.push_back({"02_block_a_vocab_row", "ours-02_block_a_vocab_row",
                        [=, &dev] { block_a_vocab_row::backward(dev, dtable, tokens, dout, N, C, V); }});
  c.variants.push_back(
      {"03_sorted", "ours-03_sorted", [=, &dev] { sorted::backward(dev, dtable, scratch, tokens, dout, N, C, V); }});
  c.variants.push_back(copy_floor(lab, c.forward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto dout_host = lab.host(dout, N * C);
    std::vector<double> gradient(V * C);
    std::vector<char> work(embedding_backward_scratch_bytes<Cpu<double>>(N, C, V));
    embedding_backward(cpu, Grad<Cpu<double>>{gradient.data(), true}, work.data(), ids.data(), dout_host.data(), N, C,
                       V);
    return Values{gradient};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "embedding_backward", shapes, make, reduced); }
