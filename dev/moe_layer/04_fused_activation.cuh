// Rung 4: the activation leaves the passes. SwiGLU is computed while a tile of H is still in registers (experts_up()), its
// backward while a tile of dA' is (experts_down_backward()): dA' is never stored, and the gate is a factor there that
// costs nothing.
//
// The kernel of the backward is production's and makes the gate gradient as well; here that result is thrown away, and the
// gate gradient taken from the kept Y as before, so that rung 5 changes that alone. (What it costs to make it in vain: RF/8
// bytes, half a percent of what the backward moves.)
//
// Kept: as rung 3, 2NC + 2RC + 6RF bytes. Transient: no dA.
// Predicted: forward 6NC + 6RC + 8RF + 6ECF bytes, backward 10NC + 14RC + 20RF + 12ECF; operations as before. The passes
// between products are 2RC forward and 6RC backward: 24RF less than in rung 3, both ways together.
#pragma once
#include "dev/moe_layer/rungs.cuh"

namespace fused_activation {

using namespace ladder;

inline Rows forward(Layer& l, Saved& s, Rows input, Rows residual, bool keep) {
  auto& x = l.x;
  const ExpertShape& e = l.experts.shape;
  const Category saved = keep ? Category::saved : Category::workspace;
  route(l, s, input, keep);
  s.experts.mlp.h = x.tensor<bf16>("h", {e.R, 2 * e.F}, saved);
  s.experts.mlp.a = x.tensor<bf16>("a", {e.R, e.F}, saved);
  s.y = x.tensor<bf16>("y", {e.R, e.C}, saved);
  x.op("experts up", experts_up<Device>, s.experts.mlp.h, s.experts.mlp.a, l.experts.scratch(), input,
       l.experts.weights.w13, s.experts.plan.offsets, s.experts.plan.row_slot, e);
  x.op("experts down", experts_down<Device>, s.y, l.experts.scratch(), s.experts.mlp.a, l.experts.weights.w2,
       s.experts.plan.offsets, e);
  return combine_rows(l, s, s.y, residual);
}

inline Rows backward(Layer& l, Saved& s, Rows input, Rows dout) {
  auto& x = l.x;
  const ExpertShape& e = l.experts.shape;
  auto dgates = x.tensor<float>("dgates", {l.router.N, e.K}), in_vain = x.tensor<float>("dgates2", {l.router.N, e.K});
  auto dh = x.tensor<bf16>("dh", {e.R, 2 * e.F});
  auto a_scaled = x.tensor<bf16>("a_scaled", {e.R, e.F});
  x.op("gate gradient", dot_rows, dgates, dout, s.y, s.experts.plan.offsets, s.experts.plan.row_slot, e.R, e.K, e.E,
       e.C);
  x.op("experts down backward", experts_down_backward<Device>, dh, a_scaled, in_vain, l.experts.scratch(), dout,
       l.experts.weights.w2, s.experts.mlp.h, s.experts.mlp.a, s.gates, s.experts.plan.offsets, s.experts.plan.row_slot,
       s.experts.plan.row_slot, e);
  x.op("experts dW2", experts_down_backward_weight<Device>, l.experts.weights.dw2, l.experts.scratch(), dout, a_scaled,
       s.experts.plan.offsets, s.experts.plan.row_slot, e);
  x.op("experts dW13", experts_up_backward_weight<Device>, l.experts.weights.dw13, l.experts.scratch(), dh, input,
       s.experts.plan.offsets, s.experts.plan.row_slot, e);
  return gradient_of_tokens(l, s, input, dh, dgates);
}

inline constexpr Rung<Device> rung{forward, backward};

inline Steps forward_steps(const Letters& l) {
  return {router_pass(l), product(4 * l.RCF, 2 * l.RC + 4 * l.ECF + 6 * l.RF),  // up, and SwiGLU
          product(2 * l.RCF, 2 * l.RF + 2 * l.ECF + 2 * l.RC),                  // down
          combine_pass(l)};
}
inline Steps backward_steps(const Letters& l) {
  return {pass(4 * l.RC),                                        // <dout, Y>
          product(2 * l.RCF, 2 * l.RC + 2 * l.ECF + 10 * l.RF),  // dA', and from it and H dH and gate * A
          product(2 * l.RCF, 2 * l.RC + 2 * l.RF + 2 * l.ECF),   // dW2
          product(4 * l.RCF, 4 * l.RF + 2 * l.RC + 4 * l.ECF),   // dW13
          product(4 * l.RCF, 4 * l.RF + 4 * l.ECF + 2 * l.RC),   // dX
          router_backward_pass(l),
          combine_pass(l)};
}

}  // namespace fused_activation
