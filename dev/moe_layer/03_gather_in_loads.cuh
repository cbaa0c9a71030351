// Rung 3: no gathered copies. The products read x and dout through row_slot while they load their tiles, as production's
// do; everything after a product is still a pass of its own.
//
// A load cannot multiply. dout came gathered and times its gate before; now the gate has to go to the results: to dA' and
// to A, two passes over rows of width F instead of one over width C, before the activation's backward and before dW2.
//
// Kept: x, H, A, Y: 2NC + 2RC + 6RF bytes, a gathered x less than rung 2.
// Predicted: forward 6NC + 6RC + 12RF + 6ECF bytes, backward 10NC + 14RC + 30RF + 12ECF; operations as before. The passes
// between products are 2RC + 6RF forward and 6RC + 18RF backward: with backward 12RC less and 8RF more than rung 2. Faster
// where F < 3C/2; where experts are wider than that (gpt124-8x2: F = 8C/3), slower, until rung 4 puts the gate into the
// epilogue. The memory is saved at once.
#pragma once
#include "dev/moe_layer/rungs.cuh"
#include "llmc/swiglu.h"
#include "moe/experts_hopper.cuh"
#include "moe/experts_hopper_kernels.h"
#include "moe/experts_portable.cuh"

namespace gather_in_loads {

using namespace ladder;

// Production's plain product of rows (y = a W2^T, dX = dh W13) with the one difference that rows are read through
// row_slot. On Hopper, and on every GPU since Ampere.
template <class Shape, bool b_down>
struct HopperRows : hopper::StagedRows<Shape, b_down> {
  static constexpr grouped::Access a_access{.down = false, .gathered = true};
};
template <class Shape, bool b_down>
struct PortableRows : grouped::Rows<Shape, b_down> {
  static constexpr grouped::Access a_access{.down = false, .gathered = true};
};

// out (R,OC) = in[token(r)] W[e]^T, W (E,OC,IC); transposed: out (R,OC) = in[token(r)] W[e], W (E,IC,OC). Tiles are those
// that rung 2's products take.
template <bool transposed>
void tokens_times(Device& dev, bf16* out, const bf16* in, const bf16* w, const int32_t* offsets,
                  const int32_t* row_slot, ExpertShape s, int64_t IC, int64_t OC) {
  const grouped::Operands o{in, w, offsets, row_slot, grouped::Divisor(s.K), int(s.E), 0, int(OC), int(IC)};
  if (dev.portable || !hopper::usable(dev, s))
    return portable::run(dev, PortableRows<portable::TileShape<128, 256, 1>, transposed>{{o, out}});
  const ExpertShape as_down{s.R, s.K, s.E, OC, IC}, as_up_input{s.R, s.K, s.E, OC, IC / 2};
  if ((transposed ? hopper::up_input_tile(as_up_input) : hopper::down_tile(as_down)) == hopper::wide)
    return hopper::run(dev, HopperRows<hopper::Wide, transposed>{{{o, out}}}, s);
  hopper::run(dev, HopperRows<hopper::Medium, transposed>{{{o, out}}}, s);
}

inline Rows forward(Layer& l, Saved& s, Rows input, Rows residual, bool keep) {
  auto& x = l.x;
  const ExpertShape& e = l.experts.shape;
  const Category saved = keep ? Category::saved : Category::workspace;
  route(l, s, input, keep);
  s.experts.mlp.h = x.tensor<bf16>("h", {e.R, 2 * e.F}, saved);
  s.experts.mlp.a = x.tensor<bf16>("a", {e.R, e.F}, saved);
  s.y = x.tensor<bf16>("y", {e.R, e.C}, saved);
  x.op("experts up", tokens_times<false>, s.experts.mlp.h, input, l.experts.weights.w13, s.experts.plan.offsets,
       s.experts.plan.row_slot, e, e.C, 2 * e.F);
  x.op("swiglu", swiglu_forward<Device>, s.experts.mlp.a, s.experts.mlp.h, e.R, e.F);
  x.op("experts down", experts_down<Device>, s.y, l.experts.scratch(), s.experts.mlp.a, l.experts.weights.w2,
       s.experts.plan.offsets, e);
  return combine_rows(l, s, s.y, residual);
}

inline Rows backward(Layer& l, Saved& s, Rows input, Rows dout) {
  auto& x = l.x;
  const ExpertShape& e = l.experts.shape;
  auto dgates = x.tensor<float>("dgates", {l.router.N, e.K});
  auto da = x.tensor<bf16>("da", {e.R, e.F});
  auto dh = x.tensor<bf16>("dh", {e.R, 2 * e.F});
  x.op("gate gradient", dot_rows, dgates, dout, s.y, s.experts.plan.offsets, s.experts.plan.row_slot, e.R, e.K, e.E,
       e.C);
  x.op("experts dA'", tokens_times<true>, da, dout, l.experts.weights.w2, s.experts.plan.offsets,
       s.experts.plan.row_slot, e, e.C, e.F);
  x.op("dA' times gate", scale_rows, da, s.gates, s.experts.plan.offsets, s.experts.plan.row_slot, e.R, e.E, e.F);
  x.op("A times gate", scale_rows, s.experts.mlp.a, s.gates, s.experts.plan.offsets, s.experts.plan.row_slot, e.R, e.E,
       e.F);
  x.op("experts dW2", experts_down_backward_weight<Device>, l.experts.weights.dw2, l.experts.scratch(), dout,
       s.experts.mlp.a, s.experts.plan.offsets, s.experts.plan.row_slot, e);
  x.op("swiglu backward", swiglu_backward<Device>, dh, da, s.experts.mlp.h, e.R, e.F);
  x.op("experts dW13", experts_up_backward_weight<Device>, l.experts.weights.dw13, l.experts.scratch(), dh, input,
       s.experts.plan.offsets, s.experts.plan.row_slot, e);
  return gradient_of_tokens(l, s, input, dh, dgates);
}

inline constexpr Rung<Device> rung{forward, backward};

inline Steps forward_steps(const Letters& l) {
  return {router_pass(l), product(4 * l.RCF, 2 * l.RC + 4 * l.ECF + 4 * l.RF),  // up
          pass(6 * l.RF),                                                       // SwiGLU
          product(2 * l.RCF, 2 * l.RF + 2 * l.ECF + 2 * l.RC),                  // down
          combine_pass(l)};
}
inline Steps backward_steps(const Letters& l) {
  return {pass(4 * l.RC),                                       // <dout, Y>
          product(2 * l.RCF, 2 * l.RC + 2 * l.ECF + 2 * l.RF),  // dA'
          pass(4 * l.RF),                                       // times gate
          pass(4 * l.RF),                                       // A times gate
          product(2 * l.RCF, 2 * l.RC + 2 * l.RF + 2 * l.ECF),  // dW2
          pass(10 * l.RF),                                      // SwiGLU backward
          product(4 * l.RCF, 4 * l.RF + 2 * l.RC + 4 * l.ECF),  // dW13
          product(4 * l.RCF, 4 * l.RF + 4 * l.ECF + 2 * l.RC),  // dX
          router_backward_pass(l),
          combine_pass(l)};
}

}  // namespace gather_in_loads
