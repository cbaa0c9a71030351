// QK-norm and rotary embedding over queries and keys; the backward pass works in place. Bound by memory: forward reads
// and writes (N,(NH+NKV)*HD), backward reads and writes its gradient, and with QK-norm reads the input once more.
// 0: production. 01 to 04: a rung a file (README.md); where there is QK-norm, 01 to 03 do not repeat the bits of its
// weights' gradients. copy: the floor.
//
//   dev/rope_qknorm/rope_qknorm [variant] [shape]
#include "llmc/rope.h"

#include "dev/bench.h"
#include "dev/rope_qknorm/01_two_passes.cuh"
#include "dev/rope_qknorm/02_table.cuh"
#include "dev/rope_qknorm/03_fused.cuh"
#include "dev/rope_qknorm/04_group_a_head.cuh"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, T;
  HeadShape heads;
  bool norm;
};
const std::vector<Shape> shapes = {{"gpt124", 32768, 1024, {12, 12, 64}, false},
                                   {"gpt124-large", 131072, 1024, {12, 12, 64}, false},
                                   {"olmoe", 32768, 4096, {16, 16, 128}, true},
                                   {"qwen3", 65536, 4096, {32, 4, 128}, true}};
// 69 tokens: no whole number of blocks, nor of rounds of one. Three heads of queries and one of keys fewer than there
// are, so that batches of heads have an end too.
Shape reduced(Shape s) {
  return {s.name, 69, 50, {s.heads.n_head - 3, s.heads.n_kv_head - 1, s.heads.head_dim}, s.norm};
}
constexpr double eps = 1e-6, theta = 10000;

Case make(Lab& lab, const Shape& s) {
  const HeadShape heads = s.heads;
  const int64_t N = s.N, H = heads.n_head + heads.n_kv_head, HD = heads.head_dim, width = heads.qkv_width();
  auto& dev = lab.dev;
  const std::vector<double> angles = rope_table(s.T, HD, theta);
  std::vector<int32_t> rows(N);
  for (int64_t n = 0; n < N; ++n) rows[n] = int32_t(n % s.T);
  const float* cosines_sines = lab.upload(Lab::to<float>(angles));
  const int32_t* positions = lab.upload(rows);
  bf16 *qkv = lab.normal<bf16>(N * width), *dqk = lab.normal<bf16>(N * width), *dqkv = lab.copy_of(dqk, N * width);
  bf16 *wq = s.norm ? lab.normal<bf16>(HD, 0.2, 1) : nullptr, *wk = s.norm ? lab.normal<bf16>(HD, 0.2, 1) : nullptr;
  bf16* qk = lab.memory<bf16>(N * heads.qk_width());
  float *rstd = lab.memory<float>(N * H), *dwq = lab.memory<float>(HD), *dwk = lab.memory<float>(HD);
  char* scratch = lab.memory<char>(int64_t(qknorm_rope_backward_scratch_bytes<Gpu<bf16>>(N, heads)));
  float* partial = lab.memory<float>(group_a_head::scratch_size(N, heads));

  Case c;
  c.shape = s.name;
  const double part = double(N * heads.qk_width()) * sizeof(bf16), pairs = double(N * H * HD / 2);
  // A rotation is six operations a pair; the norm adds four a value forward, eight backward.
  c.forward = {.bytes = 2 * part, .fp32_flops = (s.norm ? 14 : 6) * pairs};
  c.backward = {.bytes = (s.norm ? 3 : 2) * part, .fp32_flops = (s.norm ? 22 : 6) * pairs};
  c.prepare = [=, &dev] { dev.copy(dqkv, dqk, size_t(N * width) * sizeof(bf16)); };
  c.outputs = {output("qk", qk, N * heads.qk_width()), output("dqkv", dqkv, N * width, 1, Before::input)};
  if (s.norm)
    for (auto& [name, gradient] : {std::pair{"dq_weight", dwq}, std::pair{"dk_weight", dwk}})
      c.outputs.push_back(output(name, gradient, HD, 1, Before::gradient));
  c.variants.push_back(
      {"production", "ours",
       [=, &dev] { qknorm_rope_forward(dev, qk, rstd, qkv, wq, wk, cosines_sines, positions, N, heads, eps); },
       [=, &dev] {
         Grad<Gpu<bf16>> q{dwq, true}, k{dwk, true};
         qknorm_rope_backward(dev, dqkv, q, k, scratch, qkv, rstd, wq, wk, cosines_sines, positions, N, heads);
       }});
  Variant two_passes{
      "01_two_passes", "ours-01_two_passes",
      [=, &dev] { two_passes::forward(dev, qk, rstd, qkv, wq, wk, theta, positions, N, heads, eps); },
      [=, &dev] { two_passes::backward(dev, dqkv, dwq, dwk, qkv, rstd, wq, wk, theta, positions, N, heads); }};
  two_passes.forward_work = {0, (s.norm ? 4 : 2) * part, 200 * pairs};
  two_passes.backward_work = {0, (s.norm ? 5 : 2) * part, 200 * pairs};
  c.variants.push_back(two_passes);
  Variant from_table{
      "02_table", "ours-02_table",
      [=, &dev] { table::forward(dev, qk, rstd, qkv, wq, wk, cosines_sines, positions, N, heads, eps); },
      [=, &dev] { table::backward(dev, dqkv, dwq, dwk, qkv, rstd, wq, wk, cosines_sines, positions, N, heads); }};
  from_table.forward_work = {0, (s.norm ? 4 : 2) * part, c.forward.fp32_flops};
  from_table.backward_work = {0, (s.norm ? 5 : 2) * part, c.backward.fp32_flops};
  c.variants.push_back(from_table);
  c.variants.push_back(
      {"03_fused", "ours-03_fused",
       [=, &dev] { fused::forward(dev, qk, rstd, qkv, wq, wk, cosines_sines, positions, N, heads, eps); },
       [=, &dev] { fused::backward(dev, dqkv, dwq, dwk, qkv, rstd, wq, wk, cosines_sines, positions, N, heads); }});
  c.variants.push_back(
      {"04_group_a_head", "ours-04_group_a_head",
       [=, &dev] { group_a_head::forward(dev, qk, rstd, qkv, wq, wk, cosines_sines, positions, N, heads, eps); },
       [=, &dev] {
         Grad<Gpu<bf16>> q{dwq, true}, k{dwk, true};
         group_a_head::backward(dev, dqkv, q, k, partial, qkv, rstd, wq, wk, cosines_sines, positions, N, heads);
       }});
  c.variants.push_back(copy_floor(lab, c.forward, c.backward));
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto x = lab.host(qkv, N * width), d = lab.host(dqk, N * width);
    std::vector<double> y(N * heads.qk_width()), r(N * H), q, k, gradient_q(HD), gradient_k(HD);
    if (s.norm) q = lab.host(wq, HD), k = lab.host(wk, HD);
    const double *wq_host = s.norm ? q.data() : nullptr, *wk_host = s.norm ? k.data() : nullptr;
    std::vector<char> work(qknorm_rope_backward_scratch_bytes<Cpu<double>>(N, heads));
    qknorm_rope_forward(cpu, y.data(), r.data(), x.data(), wq_host, wk_host, angles.data(), rows.data(), N, heads, eps);
    qknorm_rope_backward(cpu, d.data(), Grad<Cpu<double>>{gradient_q.data(), true},
                         Grad<Cpu<double>>{gradient_k.data(), true}, work.data(), x.data(), r.data(), wq_host, wk_host,
                         angles.data(), rows.data(), N, heads);
    Values values{y, d};
    if (s.norm) values.push_back(gradient_q), values.push_back(gradient_k);
    return values;
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "rope_qknorm", shapes, make, reduced); }
