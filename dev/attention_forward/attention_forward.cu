// The forward pass of causal attention in bf16, from three kernels with a matrix in memory to what the trainer runs:
// README.md of this folder walks through the rungs. 0: production. 01 to 05: a rung a file; those that would be slow at
// a shape run there only if asked for by name.
//
// Operations counted: two products of (T,HD) by (HD,T), half of each above the diagonal: 2 * B*NH * T*T*HD in all.
//
//   dev/attention_forward/attention_forward [variant] [shape]
#include "dev/attention_forward/01_scores_matrix.cuh"
#include "dev/attention_forward/02_online_softmax.cuh"
#include "dev/attention_forward/03_shared_tiles.cuh"
#include "dev/attention_forward/04_tensor_cores.cuh"
#include "dev/attention_forward/05_pipelined.cuh"
#include "dev/attention_shapes.h"

namespace {
using namespace bench;

struct Rung {
  const char* name;
  void (*forward)(Gpu<bf16>& dev, bf16* o, float* lse, void* scratch, const bf16* qk, const bf16* qkv, int64_t B,
                  int64_t T, HeadShape heads);
  bool tensor_cores;
  double most_flops;  // by default it runs up to this size
};
constexpr double any_size = 1e30;
const Rung rungs[] = {{"01_scores_matrix", scores_matrix::attention_forward, false, 1e10},
                      {"02_online_softmax", online_softmax::attention_forward, false, 1e11},
                      {"03_shared_tiles", shared_tiles::attention_forward, false, 5e11},
                      {"04_tensor_cores", tensor_cores::attention_forward, true, any_size},
                      {"05_pipelined", pipelined::attention_forward, true, any_size}};

Case make(Lab& lab, const AttentionShape& s) {
  auto& dev = lab.dev;
  const HeadShape heads{s.NH, s.NKV, s.HD};
  const int64_t B = s.B, T = s.T, N = B * T;
  bf16 *qk = lab.normal<bf16>(N * heads.qk_width()), *qkv = lab.normal<bf16>(N * heads.qkv_width());
  bf16* o = lab.memory<bf16>(N * heads.q_width());
  float* lse = lab.memory<float>(N * s.NH);
  char* scratch = lab.memory<char>(int64_t(attention_scratch_bytes<Gpu<bf16>>(B, T, heads)));

  Case c;
  c.shape = s.name;
  const double matrix = double(B * s.NH) * double(T) * double(T);  // elements, of which half are needed
  c.forward.flops = 2 * matrix * double(s.HD);
  c.forward.bytes = double(2 * N * (heads.qk_width() + s.NKV * s.HD + heads.q_width()) + 4 * N * s.NH);
  c.outputs = {output("o", o, N * heads.q_width()), output("lse", lse, N * s.NH)};
  c.variants.push_back(
      {"production", "ours", [=, &dev] { attention_forward(dev, o, lse, scratch, qk, qkv, B, T, heads); }});
  for (const Rung& rung : rungs) {
    if (c.forward.flops > rung.most_flops && !is_asked_for(lab, rung.name)) continue;
    const bool first = rung.forward == scores_matrix::attention_forward;
    void* memory = first ? lab.memory<char>(int64_t(scores_matrix::scratch_bytes(B, T, heads))) : scratch;
    Variant v{rung.name, std::string("ours-") + rung.name,
              [=, &dev, &rung] { rung.forward(dev, o, lse, memory, qk, qkv, B, T, heads); }};
    if (!rung.tensor_cores) v.forward_work = {0, c.forward.bytes, c.forward.flops};
    if (first) v.forward_work.bytes += 4 * 4 * matrix / 2;
    c.variants.push_back(std::move(v));
  }
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto qk_host = lab.host(qk, N * heads.qk_width()), qkv_host = lab.host(qkv, N * heads.qkv_width());
    std::vector<double> o_host(N * heads.q_width()), lse_host(N * heads.n_head);
    std::vector<char> work(attention_scratch_bytes<Cpu<double>>(B, T, heads));
    attention_forward(cpu, o_host.data(), lse_host.data(), work.data(), qk_host.data(), qkv_host.data(), B, T, heads);
    return Values{o_host, lse_host};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) {
  return run_family(argc, argv, "attention_forward", attention_shapes, make, reduced_attention);
}
