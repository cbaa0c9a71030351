// Rung 1: a loop over the experts, as most model files have it. For each: gather its rows, a library product (gate and up
// projection at once), SwiGLU, a second product, and add the gated rows to their tokens. Backward the same way round.
// How many rows an expert has is known on the device alone, so the host copies the counts and waits for them.
//
// Kept: x, and each expert's rows of x, H, A and Y: 2NC + 4RC + 6RF bytes. Transient: what one expert works on; planned
// for N rows, the most that one can have.
// Predicted: forward 6NC + 14RC + 12RF + 6ECF bytes and 6RCF operations, backward 14NC + 26RC + 22RF + 12ECF and 12RCF.
// That is rung 2's and 4RC more each way, and is not what will be measured. 5 launches an expert forward and 9 backward,
// none of which begins before the counts have come, take a few microseconds each (with 128 experts milliseconds), and a
// product of an expert's few rows leaves most of the chip idle. (Some traffic is cheaper than counted: what an expert of
// few rows leaves in the L2 cache the next kernel finds there.)
//
// Tokens are added to in bf16, expert after expert: K roundings instead of one. No atomics: an expert has a token at most
// once.
#pragma once
#include "dev/moe_layer/rungs.cuh"
#include "llmc/matmul.h"
#include "llmc/swiglu.h"

namespace loop_over_experts {

using namespace ladder;

// out[token of row r] += gate * rows[r], n rows of one expert; without gates, 1.
__global__ void __launch_bounds__(row_warps * 32)
    add_rows_kernel(bf16* out, const bf16* rows, const float* gates, const int32_t* row_slot, int n, int K, int64_t C) {
  const int r = blockIdx.x * row_warps + threadIdx.x / 32;
  if (r >= n) return;
  const int slot = row_slot[r];
  const float gate = gates ? gates[slot] : 1;
  const bf16* from = rows + r * C;
  bf16* to = out + slot / K * C;
  for (int64_t c = threadIdx.x % 32 * Pack<bf16>::n; c < C; c += 32 * Pack<bf16>::n) {
    const Pack<bf16> v = *reinterpret_cast<const Pack<bf16>*>(from + c);
    Pack<bf16> sum = *reinterpret_cast<const Pack<bf16>*>(to + c);
#pragma unroll
    for (int i = 0; i < Pack<bf16>::n; ++i) sum.set(i, sum[i] + gate * v[i]);
    *reinterpret_cast<Pack<bf16>*>(to + c) = sum;
  }
}
inline void add_rows(Device& dev, bf16* out, const bf16* rows, const float* gates, const int32_t* row_slot, int64_t n,
                     int64_t K, int64_t C) {
  launch(dev, add_rows_kernel, dim3(unsigned(ceil_div(n, row_warps))), row_warps * 32, 0, out, rows, gates, row_slot,
         int(n), int(K), C);
}
// rows (n,C) of one expert = x[row_slot/K]. counts: this expert's, on the device.
inline void gather_rows(Device& dev, bf16* rows, const bf16* x, const int32_t* counts, const int32_t* row_slot,
                        int64_t n, int64_t K, int64_t C) {
  dispatch_gather(dev, rows, x, counts, row_slot, ceil_div(n, K), K, 0, C);
}

// x_rows (R,C), h (R,2F), a (R,F), y (R,C): of all experts, one after another. out (N,C) starts as the residual stream.
inline void forward_experts(Device& dev, std::vector<int32_t>* offsets_on_host, bf16* out, bf16* x_rows, bf16* h,
                            bf16* a, bf16* y, void* scratch, const bf16* x, const bf16* residual, const bf16* w13,
                            const bf16* w2, const float* gates, const int32_t* counts, const int32_t* offsets,
                            const int32_t* row_slot, ExpertShape s) {
  const int64_t C = s.C, F = s.F;
  std::vector<int32_t>& first = *offsets_on_host;
  first.resize(size_t(s.E + 1));
  dev.to_host(first.data(), offsets, first.size() * sizeof(int32_t));  // waits for the router
  dev.copy(out, residual, size_t(s.R / s.K * C) * sizeof(bf16));
  for (int64_t e = 0; e < s.E; ++e) {
    const int64_t r = first[e], n = first[e + 1] - r;
    if (n == 0) continue;
    bf16 *x_e = x_rows + r * C, *h_e = h + r * 2 * F, *a_e = a + r * F, *y_e = y + r * C;
    gather_rows(dev, x_e, x, counts + e, row_slot + r, n, s.K, C);
    matmul_forward(dev, h_e, scratch, x_e, w13 + e * 2 * F * C, n, C, 2 * F);
    swiglu_forward(dev, a_e, h_e, n, F);
    matmul_forward(dev, y_e, scratch, a_e, w2 + e * C * F, n, F, C);
    add_rows(dev, out, y_e, gates, row_slot + r, n, s.K, C);
  }
}

// dinput (N,C) = the experts' part of the gradient of x; dgates (N,K). dy, dx (N,C), da (N,F), dh (N,2F): of one expert.
inline void backward_experts(Device& dev, const std::vector<int32_t>* offsets_on_host, bf16* dinput, float* dgates,
                             Grad<Device> dw13, Grad<Device> dw2, bf16* dy, bf16* da, bf16* dh, bf16* dx, void* scratch,
                             const bf16* dout, const bf16* w13, const bf16* w2, const bf16* x_rows, const bf16* h,
                             const bf16* a, const bf16* y, const float* gates, const int32_t* counts,
                             const int32_t* row_slot, ExpertShape s) {
  const int64_t C = s.C, F = s.F;
  const std::vector<int32_t>& first = *offsets_on_host;
  // The gradient of expert e's weight, `size` elements each.
  auto of_expert = [](const Grad<Device>& g, int64_t e, int64_t size) {
    return Grad<Device>{static_cast<char*>(g.data) + e * size * int64_t(g.wide ? sizeof(float) : sizeof(bf16)), g.wide,
                        g.add};
  };
  auto no_rows = [&](const Grad<Device>& g, int64_t e, int64_t size) {
    if (!g.add) dev.zero(of_expert(g, e, size).data, size_t(size) * (g.wide ? sizeof(float) : sizeof(bf16)));
  };
  dev.zero(dinput, size_t(s.R / s.K * C) * sizeof(bf16));
  for (int64_t e = 0; e < s.E; ++e) {
    const int64_t r = first[e], n = first[e + 1] - r;
    if (n == 0) {
      no_rows(dw13, e, 2 * F * C), no_rows(dw2, e, C * F);
      continue;
    }
    const bf16 *w13_e = w13 + e * 2 * F * C, *w2_e = w2 + e * C * F;
    gather_rows(dev, dy, dout, counts + e, row_slot + r, n, s.K, C);
    dot_rows(dev, dgates, dy, y + r * C, counts + e, row_slot + r, n, 0, 0, C);
    scale_rows(dev, dy, gates, counts + e, row_slot + r, n, 0, C);
    matmul_backward_input(dev, da, scratch, dy, w2_e, n, F, C);
    matmul_backward_weight(dev, of_expert(dw2, e, C * F), scratch, dy, a + r * F, n, F, C);
    swiglu_backward(dev, dh, da, h + r * 2 * F, n, F);
    matmul_backward_weight(dev, of_expert(dw13, e, 2 * F * C), scratch, dh, x_rows + r * C, n, C, 2 * F);
    matmul_backward_input(dev, dx, scratch, dh, w13_e, n, C, 2 * F);
    add_rows(dev, dinput, dx, nullptr, row_slot + r, n, s.K, C);
  }
}

inline Tensor<char> library_scratch(Layer& l) {
  return l.x.tensor<char>(
      "matmul.scratch",
      {int64_t(matmul_scratch_bytes<Device>(l.experts.shape.R, l.experts.shape.C, 2 * l.experts.shape.F))});
}

inline Rows forward(Layer& l, Saved& s, Rows input, Rows residual, bool keep) {
  auto& x = l.x;
  const int64_t N = l.router.N, R = l.experts.shape.R, C = l.experts.shape.C, F = l.experts.shape.F;
  const Category saved = keep ? Category::saved : Category::workspace;
  route(l, s, input, keep);
  s.experts.rows = x.tensor<bf16>("x_rows", {R, C}, saved);
  s.experts.mlp.h = x.tensor<bf16>("h", {R, 2 * F}, saved);
  s.experts.mlp.a = x.tensor<bf16>("a", {R, F}, saved);
  s.y = x.tensor<bf16>("y", {R, C}, saved);
  auto out = x.tensor<bf16>("residual", {N, C});
  x.op("experts", forward_experts, &s.offsets_on_host, out, s.experts.rows, s.experts.mlp.h, s.experts.mlp.a, s.y,
       library_scratch(l), input, residual, l.experts.weights.w13, l.experts.weights.w2, s.gates, s.experts.plan.counts,
       s.experts.plan.offsets, s.experts.plan.row_slot, l.experts.shape);
  return out;
}

inline Rows backward(Layer& l, Saved& s, Rows input, Rows dout) {
  auto& x = l.x;
  const int64_t N = l.router.N, K = l.router.K, C = l.experts.shape.C, F = l.experts.shape.F;
  auto dinput = x.tensor<bf16>("dinput", {N, C});
  auto dgates = x.tensor<float>("dgates", {N, K});
  auto dy = x.tensor<bf16>("dy", {N, C}), da = x.tensor<bf16>("da", {N, F}), dh = x.tensor<bf16>("dh", {N, 2 * F}),
       dx = x.tensor<bf16>("dx_expert", {N, C});
  x.op("experts backward", backward_experts, &s.offsets_on_host, dinput, dgates, l.experts.weights.dw13,
       l.experts.weights.dw2, dy, da, dh, dx, library_scratch(l), dout, l.experts.weights.w13, l.experts.weights.w2,
       s.experts.rows, s.experts.mlp.h, s.experts.mlp.a, s.y, s.gates, s.experts.plan.counts, s.experts.plan.row_slot,
       l.experts.shape);
  Rows of_router = router_gradient(l, s, input, dgates);
  x.op("router dX add", residual_add<Device>, dinput, dinput, of_router, N * C);
  return dinput;
}

inline constexpr Rung<Device> rung{forward, backward};

inline Steps forward_steps(const Letters& l) {
  return {router_pass(l),
          pass(4 * l.NC),                                       // out = residual stream
          pass(4 * l.RC),                                       // gather x
          product(4 * l.RCF, 2 * l.RC + 4 * l.ECF + 4 * l.RF),  // up
          pass(6 * l.RF),                                       // SwiGLU
          product(2 * l.RCF, 2 * l.RF + 2 * l.ECF + 2 * l.RC),  // down
          pass(6 * l.RC)};                                      // add to tokens
}
inline Steps backward_steps(const Letters& l) {
  return {pass(2 * l.NC),                                       // dinput = 0
          pass(4 * l.RC),                                       // gather dout
          pass(4 * l.RC),                                       // <dout, Y>
          pass(4 * l.RC),                                       // times gate
          product(2 * l.RCF, 2 * l.RC + 2 * l.ECF + 2 * l.RF),  // dA
          product(2 * l.RCF, 2 * l.RC + 2 * l.RF + 2 * l.ECF),  // dW2
          pass(10 * l.RF),                                      // SwiGLU backward
          product(4 * l.RCF, 4 * l.RF + 2 * l.RC + 4 * l.ECF),  // dW13
          product(4 * l.RCF, 4 * l.RF + 4 * l.ECF + 2 * l.RC),  // dX
          pass(6 * l.RC),                                       // add to tokens
          router_backward_pass(l),
          pass(6 * l.NC)};  // and its part added
}

}  // namespace loop_over_experts
