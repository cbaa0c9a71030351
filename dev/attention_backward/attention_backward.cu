// The backward pass of causal attention in bf16, from matrices in memory to what the trainer runs: README.md of this
// folder walks through the rungs. 0: production. 01 to 04: a rung a file; those that would be slow at a shape run there
// only if asked for by name. o and lse are made once, by production.
//
// Operations counted: five products of (T,HD) by (HD,T), half of each above the diagonal: 5 * B*NH * T*T*HD in all.
//
//   dev/attention_backward/attention_backward [variant] [shape]
#include "dev/attention_backward/01_scores_matrix.cuh"
#include "dev/attention_backward/02_recomputed.cuh"
#include "dev/attention_backward/03_tensor_cores.cuh"
#include "dev/attention_backward/04_pipelined.cuh"
#include "dev/attention_shapes.h"

namespace {
using namespace bench;

struct Rung {
  const char* name;
  void (*backward)(Gpu<bf16>& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o, const float* lse,
                   const bf16* qk, const bf16* qkv, int64_t B, int64_t T, HeadShape heads);
  size_t (*scratch_bytes)(int64_t B, int64_t T, HeadShape heads);
  double most_flops;     // by default it runs up to this size
  double products;       // by tensor cores, of the five that are counted; 0: five by CUDA cores
  double element_bytes;  // moved besides, for each element of a matrix (T,T) that is needed
  double query_bytes;    // moved besides, for each value of a query
};
constexpr double any_size = 1e30;
const Rung rungs[] = {
    {"01_scores_matrix", scores_matrix::attention_backward, scores_matrix::scratch_bytes, 2e10, 0, 5 * 4, 0},
    {"02_recomputed", recomputed::attention_backward, recomputed::scratch_bytes, 2e11, 0, 0, 2 * 4},
    {"03_tensor_cores", tensor_cores::attention_backward, tensor_cores::scratch_bytes, any_size, 7, 0, 0},
    {"04_pipelined", pipelined::attention_backward, attention_scratch_bytes<Gpu<bf16>>, any_size, 5, 0, 0}};

Case make(Lab& lab, const AttentionShape& s) {
  auto& dev = lab.dev;
  const HeadShape heads{s.NH, s.NKV, s.HD};
  const int64_t B = s.B, T = s.T, N = B * T;
  bf16 *qk = lab.normal<bf16>(N * heads.qk_width()), *qkv = lab.normal<bf16>(N * heads.qkv_width());
  bf16 *dout = lab.normal<bf16>(N * heads.q_width()), *o = lab.memory<bf16>(N * heads.q_width());
  bf16* dqkv = lab.memory<bf16>(N * heads.qkv_width());
  float* lse = lab.memory<float>(N * s.NH);
  char* scratch = lab.memory<char>(int64_t(attention_scratch_bytes<Gpu<bf16>>(B, T, heads)));
  attention_forward(dev, o, lse, scratch, qk, qkv, B, T, heads);

  Case c;
  c.shape = s.name;
  const double matrix = double(B * s.NH) * double(T) * double(T);  // elements, of which half are needed
  const double values = double(N * heads.q_width());
  c.forward.flops = 5 * matrix * double(s.HD);
  c.forward.bytes =
      double(2 * N * (heads.qk_width() + s.NKV * s.HD + 2 * heads.q_width() + heads.qkv_width()) + 4 * N * s.NH);
  c.outputs = {output("dqkv", dqkv, N * heads.qkv_width())};
  // Some round dS times its scale, some dS alone (the same where the scale is a power of two, at head size 64). Either is
  // as near to the truth; of the 10^8 elements of a large shape the one that they round most differently is 0.13 apart.
  c.outputs[0].worst_limit = 0.2;
  c.variants.push_back({"production", "ours",
                        [=, &dev] { attention_backward(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads); }});
  for (const Rung& rung : rungs) {
    if (c.forward.flops > rung.most_flops && !is_asked_for(lab, rung.name)) continue;
    if (rung.backward == recomputed::attention_backward &&
        dev.shared_bytes_per_block < recomputed::shared_bytes(s.HD)) {
      std::printf("%s is left out at %s: a block needs more shared memory than this GPU has\n", rung.name,
                  s.name.c_str());
      continue;
    }
    char* memory = lab.memory<char>(int64_t(rung.scratch_bytes(B, T, heads)));
    Variant v{rung.name, std::string("ours-") + rung.name,
              [=, &dev, &rung] { rung.backward(dev, dqkv, memory, dout, o, lse, qk, qkv, B, T, heads); }};
    v.forward_work.flops = rung.products / 5 * c.forward.flops;
    v.forward_work.fp32_flops = rung.products > 0 ? 0 : c.forward.flops;
    v.forward_work.bytes = c.forward.bytes + rung.element_bytes * matrix / 2 + rung.query_bytes * values;
    c.variants.push_back(std::move(v));
  }
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto qk_host = lab.host(qk, N * heads.qk_width()), qkv_host = lab.host(qkv, N * heads.qkv_width());
    auto dout_host = lab.host(dout, N * heads.q_width());
    std::vector<double> o_host(dout_host.size()), lse_host(N * heads.n_head), dqkv_host(qkv_host.size());
    std::vector<char> work(attention_scratch_bytes<Cpu<double>>(B, T, heads));
    attention_forward(cpu, o_host.data(), lse_host.data(), work.data(), qk_host.data(), qkv_host.data(), B, T, heads);
    attention_backward(cpu, dqkv_host.data(), work.data(), dout_host.data(), o_host.data(), lse_host.data(),
                       qk_host.data(), qkv_host.data(), B, T, heads);
    return Values{dqkv_host};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) {
  return run_family(argc, argv, "attention_backward", attention_shapes, make, reduced_attention);
}
