// Token embedding and its gradient (fp32), for tokens as frequent as words are: the probability of token v falls like
// 1/v, so that one row of the table collects a sixteenth of all positions. Bound by memory: forward reads a row of the
// table a token and writes one; backward reads a row a token, and reads and writes each row of the table that occurs.
// 0: production. 1: a thread an element, atomics (naive.cuh). copy: the floor.
//
//   build/embedding [--shapes 65536x768,...] [--quick]
#include "llmc/embedding.h"

#include <cmath>
#include <set>

#include "dev/bench.h"
#include "dev/embedding/naive.cuh"
#include "llmc/random.h"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, C, V;
};
const std::vector<Shape> shapes = {{"32768x768", 32768, 768, 50257}, {"131072x2048", 131072, 2048, 50257}};
Shape reduced(Shape s) { return {s.name, 4000, s.C, 5000}; }

std::vector<int32_t> frequent_tokens(int64_t N, int64_t V) {
  std::vector<int32_t> ids(N);
  for (int64_t n = 0; n < N; ++n)
    ids[n] = int32_t(std::min<double>(double(V), std::pow(double(V), random_uniform(3, 1, n))) - 1);
  return ids;
}

Case make(Lab& lab, const Shape& s) {
  int64_t N = s.N, C = s.C, V = s.V;
  auto& dev = lab.dev;
  std::vector<int32_t> ids = frequent_tokens(N, V);
  const int32_t* tokens = lab.upload(ids);
  bf16 *table = lab.normal<bf16>(V * C), *dout = lab.normal<bf16>(N * C), *out = lab.memory<bf16>(N * C);
  float* dtable = lab.memory<float>(V * C);
  char* scratch = lab.memory<char>(int64_t(embedding_backward_scratch_bytes<Gpu<bf16>>(N, C, V)));

  Case c;
  c.shape = s.name;
  auto distinct = double(std::set<int32_t>(ids.begin(), ids.end()).size());
  c.forward.bytes = 2.0 * double(N * C) * sizeof(bf16);
  c.backward.bytes = double(N * C) * sizeof(bf16) + 2 * distinct * double(C) * sizeof(float);
  c.outputs = {output("out", out, N * C), output("dtable", dtable, V * C, 1, Before::gradient)};
  c.variants.push_back({"production", "ours", [=, &dev] { embedding_forward(dev, out, tokens, table, N, C, V); },
                        [=, &dev] {
                          Grad<Gpu<bf16>> gradient{dtable, true};
                          embedding_backward(dev, gradient, scratch, tokens, dout, N, C, V);
                        }});
  unsigned blocks = unsigned(ceil_div(N * C, 256));
  c.variants.push_back({"naive", "ours-naive",
                        [=, &dev] { launch(dev, naive::forward, blocks, 256, 0, out, tokens, table, N, C); },
                        [=, &dev] { launch(dev, naive::backward, blocks, 256, 0, dtable, tokens, dout, N, C); }});
  c.variants.push_back(copy_floor(lab, c.forward, c.backward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto table_host = lab.host(table, V * C), dout_host = lab.host(dout, N * C);
    std::vector<double> out_host(N * C), gradient(V * C);
    std::vector<char> work(embedding_backward_scratch_bytes<Cpu<double>>(N, C, V));
    embedding_forward(cpu, out_host.data(), ids.data(), table_host.data(), N, C, V);
    embedding_backward(cpu, Grad<Cpu<double>>{gradient.data(), true}, work.data(), ids.data(), dout_host.data(), N, C,
                       V);
    return Values{out_host, gradient};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "embedding", shapes, make, reduced); }
