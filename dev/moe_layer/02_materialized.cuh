// Rung 2: sort, then multiply all experts at once. The routing plan puts rows in the experts' order; one kernel gathers
// the rows of x into a matrix (R,C), and one grouped product works on all experts' rows, whose numbers stay on the device.
// Nothing is fused: the activation, its backward, the gates and the gate gradient <dout, y> are passes of their own, and
// every intermediate is kept (the way of Tutel and MegaBlocks).
//
// The products are production's two plain ones, each under another name (see rows_times). Weight gradients and dX are
// production's as they stand, with rows read one to one.
//
// Kept: x, gathered x, H, A, Y: 2NC + 4RC + 6RF bytes.
// Predicted: forward 6NC + 10RC + 12RF + 6ECF bytes and 6RCF operations, backward 10NC + 22RC + 22RF + 12ECF and 12RCF.
// Of these bytes the passes between products are 6RC + 6RF (and 4NC) forward and 14RC + 10RF backward: nothing is
// multiplied meanwhile, so their time adds to that of the products.
#pragma once
#include "dev/moe_layer/rungs.cuh"
#include "llmc/swiglu.h"

namespace materialized {

using namespace ladder;

// out (R,OC) = in (R,IC) W[e]^T, W (E,OC,IC): what experts_down() does, with its C and F called OC and IC. (Of either
// function's scratch memory this device uses none.)
inline void rows_times(Device& dev, bf16* out, const bf16* in, const bf16* w, const int32_t* offsets, ExpertShape s,
                       int64_t IC, int64_t OC) {
  experts_down(dev, out, nullptr, in, w, offsets, {s.R, s.K, s.E, OC, IC});
}
// out (R,IC) = in (R,OC) W[e]: experts_up_backward_input(), with its 2F and C called OC and IC. OC is even.
inline void rows_times_transposed(Device& dev, bf16* out, const bf16* in, const bf16* w, const int32_t* offsets,
                                  ExpertShape s, int64_t IC, int64_t OC) {
  experts_up_backward_input(dev, out, nullptr, in, w, offsets, {s.R, s.K, s.E, IC, OC / 2});
}

inline Rows forward(Layer& l, Saved& s, Rows input, Rows residual, bool keep) {
  auto& x = l.x;
  const ExpertShape& e = l.experts.shape;
  const int64_t N = l.router.N;
  const Category saved = keep ? Category::saved : Category::workspace;
  route(l, s, input, keep);
  s.experts.rows = x.tensor<bf16>("x_rows", {e.R, e.C}, saved);
  s.experts.mlp.h = x.tensor<bf16>("h", {e.R, 2 * e.F}, saved);
  s.experts.mlp.a = x.tensor<bf16>("a", {e.R, e.F}, saved);
  s.y = x.tensor<bf16>("y", {e.R, e.C}, saved);
  x.op("gather x", dispatch_gather<Device>, s.experts.rows, input, s.experts.plan.offsets, s.experts.plan.row_slot, N,
       e.K, e.E, e.C);
  x.op("experts up", rows_times, s.experts.mlp.h, s.experts.rows, l.experts.weights.w13, s.experts.plan.offsets, e, e.C,
       2 * e.F);
  x.op("swiglu", swiglu_forward<Device>, s.experts.mlp.a, s.experts.mlp.h, e.R, e.F);
  x.op("experts down", rows_times, s.y, s.experts.mlp.a, l.experts.weights.w2, s.experts.plan.offsets, e, e.F, e.C);
  return combine_rows(l, s, s.y, residual);
}

inline Rows backward(Layer& l, Saved& s, Rows input, Rows dout) {
  auto& x = l.x;
  const ExpertShape& e = l.experts.shape;
  const int64_t N = l.router.N;
  const Tensor<int32_t> one_to_one;
  auto dy = x.tensor<bf16>("dy_rows", {e.R, e.C});
  auto dgates = x.tensor<float>("dgates", {N, e.K});
  auto da = x.tensor<bf16>("da", {e.R, e.F});
  auto dh = x.tensor<bf16>("dh", {e.R, 2 * e.F});
  x.op("gather dout", dispatch_gather<Device>, dy, dout, s.experts.plan.offsets, s.experts.plan.row_slot, N, e.K, e.E,
       e.C);
  x.op("gate gradient", dot_rows, dgates, dy, s.y, s.experts.plan.offsets, s.experts.plan.row_slot, e.R, 0, e.E, e.C);
  x.op("times gate", scale_rows, dy, s.gates, s.experts.plan.offsets, s.experts.plan.row_slot, e.R, e.E, e.C);
  x.op("experts dA", rows_times_transposed, da, dy, l.experts.weights.w2, s.experts.plan.offsets, e, e.F, e.C);
  x.op("experts dW2", experts_down_backward_weight<Device>, l.experts.weights.dw2, l.experts.scratch(), dy,
       s.experts.mlp.a, s.experts.plan.offsets, one_to_one, e);
  x.op("swiglu backward", swiglu_backward<Device>, dh, da, s.experts.mlp.h, e.R, e.F);
  x.op("experts dW13", experts_up_backward_weight<Device>, l.experts.weights.dw13, l.experts.scratch(), dh,
       s.experts.rows, s.experts.plan.offsets, one_to_one, e);
  return gradient_of_tokens(l, s, input, dh, dgates);
}

inline constexpr Rung<Device> rung{forward, backward};

inline Steps forward_steps(const Letters& l) {
  return {router_pass(l),
          pass(4 * l.RC),                                       // gather x
          product(4 * l.RCF, 2 * l.RC + 4 * l.ECF + 4 * l.RF),  // up
          pass(6 * l.RF),                                       // SwiGLU
          product(2 * l.RCF, 2 * l.RF + 2 * l.ECF + 2 * l.RC),  // down
          combine_pass(l)};
}
inline Steps backward_steps(const Letters& l) {
  return {pass(4 * l.RC),                                       // gather dout
          pass(4 * l.RC),                                       // <dout, Y>
          pass(4 * l.RC),                                       // times gate
          product(2 * l.RCF, 2 * l.RC + 2 * l.ECF + 2 * l.RF),  // dA
          product(2 * l.RCF, 2 * l.RC + 2 * l.RF + 2 * l.ECF),  // dW2
          pass(10 * l.RF),                                      // SwiGLU backward
          product(4 * l.RCF, 4 * l.RF + 2 * l.RC + 4 * l.ECF),  // dW13
          product(4 * l.RCF, 4 * l.RF + 4 * l.ECF + 2 * l.RC),  // dX
          router_backward_pass(l),
          combine_pass(l)};
}

}  // namespace materialized
