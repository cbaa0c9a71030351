// Causal attention on the host's processors in three steps: README.md of this folder walks through them. 0: production,
// attention_forward() of Cpu<float>: the tiles of rung 3, with the library's products.
//
//   dev/attention_cpu/attention_cpu [variant] [b1t1024h64] [--quick] ...     (dev/bench_cpu.h)
#include <omp.h>

#include <memory>

#include "dev/attention_cpu/01_scores_matrix.h"
#include "dev/attention_cpu/02_online_softmax.h"
#include "dev/attention_cpu/03_tiles.h"
#include "dev/bench_cpu.h"
#include "llmc/attention.h"

namespace {
using namespace bench_cpu;

struct Shape {
  std::string name;
  int64_t B, T;
  HeadShape heads;
};
const std::vector<Shape> shapes = {
    {"b4t256h64", 4, 256, {4, 2, 64}}, {"b1t1024h64", 1, 1024, {8, 4, 64}}, {"b1t2048h128", 1, 2048, {4, 2, 128}}};
// Some tiles and a part of one.
Shape reduced(Shape s) { return {s.name, 2, 143, {2, 1, s.heads.head_dim}}; }

struct Tensors {
  Array<float> qk, qkv, o, lse, matrix;
  Array<char> scratch;
  Cpu<float> dev;
};

Case make(const Shape& s) {
  const int64_t B = s.B, T = s.T, N = B * T;
  const HeadShape heads = s.heads;
  auto t = std::make_shared<Tensors>();
  t->qk = normal_values(N * heads.qk_width(), 1), t->qkv = normal_values(N * heads.qkv_width(), 2);
  t->o.resize(N * heads.q_width()), t->lse.resize(N * heads.n_head);
  t->matrix.resize(omp_get_max_threads() * T * T);
  t->scratch.resize(attention_scratch_bytes<Cpu<float>>(B, T, heads));
  const double scores = double(B * heads.n_head) * double(T) * double(T + 1) / 2, HD = double(heads.head_dim);
  const double bytes = 4 * double(N) * double(heads.qkv_width() + heads.q_width());
  const double clocks = HD / 4 + 20, flops = 4 * HD + 40;  // of a score

  Case c;
  c.shape = s.name;
  c.flops = scores * 4 * HD;
  c.outputs = {{"o", std::span(t->o)}, {"lse", std::span(t->lse)}};
  auto rung = [&](const char* name, auto attention, Work work) {
    c.variants.push_back(
        {name, std::string("ours-") + name,
         [=] { attention(t->o.data(), t->lse.data(), t->matrix.data(), t->qk.data(), t->qkv.data(), B, T, heads); },
         work});
  };
  c.variants.push_back({"production",
                        "ours",
                        [=] {
                          attention_forward(t->dev, t->o.data(), t->lse.data(), t->scratch.data(), t->qk.data(),
                                            t->qkv.data(), B, T, heads);
                        },
                        {.flops = scores * flops, .bytes = bytes}});
  rung("01_scores_matrix", scores_matrix::attention, {.bytes = bytes + 16 * scores, .clocks = scores * clocks});
  rung("02_online_softmax", online_softmax::attention, {.bytes = bytes, .clocks = scores * (clocks + 6)});
  rung("03_tiles", tiles::attention, {.flops = scores * flops, .bytes = bytes});
  c.reference = [=] {
    Cpu<double> cpu;
    std::vector<double> qk(t->qk.begin(), t->qk.end()), qkv(t->qkv.begin(), t->qkv.end());
    std::vector<double> o(t->o.size()), lse(t->lse.size());
    std::vector<char> scratch(attention_scratch_bytes<Cpu<double>>(B, T, heads));
    attention_forward(cpu, o.data(), lse.data(), scratch.data(), qk.data(), qkv.data(), B, T, heads);
    return Values{o, lse};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_ladder(argc, argv, "attention_cpu", shapes, make, reduced); }
