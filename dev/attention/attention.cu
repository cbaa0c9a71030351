// Causal attention, forward and backward. 0: production. 1: a warp a row (naive.cuh).
//
// Operations counted: the forward pass is two products of (T,HD) by (HD,T), half of each above the diagonal,
// 2 * B*NH * T*T*HD in all; the backward pass five such products, 2.5 times as many.
//
//   build/attention [--shapes b32t1024h64,...] [--quick]
#include "dev/attention/naive.cuh"
#include "dev/bench.h"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t B, NH, T, HD;
};
const std::vector<Shape> shapes = {{"b32t1024h64", 32, 12, 1024, 64},
                                   {"b8t4096h64", 8, 16, 4096, 64},
                                   {"b8t4096h128", 8, 16, 4096, 128},
                                   {"b4t8192h128", 4, 16, 8192, 128}};
Shape reduced(Shape s) { return {s.name, 2, 2, 384, s.HD}; }

Case make(Lab& lab, const Shape& s) {
  HeadShape heads{s.NH, s.NH, s.HD};
  int64_t B = s.B, T = s.T, N = B * T;
  auto& dev = lab.dev;
  bf16 *qk = lab.normal<bf16>(N * heads.qk_width()), *qkv = lab.normal<bf16>(N * heads.qkv_width());
  bf16 *dout = lab.normal<bf16>(N * heads.q_width()), *o = lab.memory<bf16>(N * heads.q_width());
  bf16* dqkv = lab.memory<bf16>(N * heads.qkv_width());
  float* lse = lab.memory<float>(N * s.NH);
  char* scratch = lab.memory<char>(int64_t(attention_scratch_bytes<Gpu<bf16>>(B, T, heads)));

  Case c;
  c.shape = s.name;
  c.forward.flops = 2.0 * double(B * s.NH) * double(T) * double(T) * double(s.HD);
  c.backward.flops = 2.5 * c.forward.flops;
  c.outputs = {output("o", o, N * heads.q_width()), output("lse", lse, N * s.NH),
               output("dqkv", dqkv, N * heads.qkv_width(), 1)};
  c.variants.push_back({"production", "ours",
                        [=, &dev] { attention_forward(dev, o, lse, scratch, qk, qkv, B, T, heads); },
                        [=, &dev] { attention_backward(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads); }});
  c.variants.push_back({"naive", "ours-naive",
                        [=, &dev] { naive::attention_forward(dev, o, lse, qk, qkv, B, T, heads); },
                        [=, &dev] { naive::attention_backward(dev, dqkv, dout, o, lse, qk, qkv, B, T, heads); }});
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto qk_host = lab.host(qk, N * heads.qk_width()), qkv_host = lab.host(qkv, N * heads.qkv_width());
    auto dout_host = lab.host(dout, N * heads.q_width());
    std::vector<double> o_host(dout_host.size()), lse_host(N * heads.n_head), dqkv_host(qkv_host.size());
    std::vector<char> work(attention_scratch_bytes<Cpu<double>>(B, T, heads));
    attention_forward(cpu, o_host.data(), lse_host.data(), work.data(), qk_host.data(), qkv_host.data(), B, T, heads);
    attention_backward(cpu, dqkv_host.data(), work.data(), dout_host.data(), o_host.data(), lse_host.data(),
                       qk_host.data(), qkv_host.data(), B, T, heads);
    return Values{o_host, lse_host, dqkv_host};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "attention", shapes, make, reduced); }
