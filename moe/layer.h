// One MoE layer: its ops in order, forward and backward, and what is kept between the two.
//
// Kept by default (policy `act`): x (N,C) and H (R,2F), 2NC + 4NKF bytes in bf16, and the routing metadata. Y, the
// gradient of each expert row, A, gate*A and dH live in the workspace that all layers share. A forward pass whose H no
// backward pass will read (evaluation, decoding, the first of two under policies `up` and `block`) does not make it.
#pragma once
#include "llmc/matmul.h"
#include "llmc/rmsnorm.h"
#include "llmc/swiglu.h"
#include "moe/combine.h"
#include "moe/config.h"
#include "moe/dispatch.h"
#include "moe/experts.h"
#include "moe/router.h"

// What is computed again in the backward pass, in ascending order of saving:
//   none  nothing: A is kept too    act  A    up  H and A (only x is kept)    block  the whole layer (only its input)
enum class Recompute { none, act, up, block };
enum class Dispatch { zero_buffer, materialized };
const char* name_of(Recompute r);
const char* name_of(Dispatch d);
constexpr Dispatch other_dispatch(Dispatch d) {
  return d == Dispatch::zero_buffer ? Dispatch::materialized : Dispatch::zero_buffer;
}

// Weights and gradients of an MLP, and its activations between forward and backward.
template <class Device>
struct MlpWeights {
  Tensor<typename Device::Real> w13, w2;
  GradTensor<Device> dw13, dw2;
};
template <class Device>
struct MlpSaved {
  Tensor<typename Device::Real> h, a;
};

// A dense SwiGLU MLP of width F: the shared expert, and the layers that have no experts.
template <class Device>
struct DenseMlp {
  using Real = typename Device::Real;
  Executor<Device>& x;
  MlpWeights<Device> weights;
  int64_t N, C, F;
  Recompute policy;

  Tensor<char> scratch() {
    return x.template tensor<char>("mlp.scratch", {int64_t(matmul_scratch_bytes<Device>(N, C, 2 * F))});
  }

  void up(MlpSaved<Device>& s, Tensor<Real> input, Category keep) {
    s.h = x.template tensor<Real>("mlp.h", {N, 2 * F}, policy <= Recompute::act ? keep : Category::workspace);
    s.a = x.template tensor<Real>("mlp.a", {N, F}, policy == Recompute::none ? keep : Category::workspace);
    x.op("mlp up", matmul_forward<Device>, s.h, scratch(), input, weights.w13, N, C, 2 * F);
    x.op("mlp swiglu", swiglu_forward<Device>, s.a, s.h, N, F);
  }

  // Returns the output (N,C); skip_down: only what backward needs.
  Tensor<Real> forward(MlpSaved<Device>& s, Tensor<Real> input, Category keep, bool skip_down) {
    up(s, input, keep);
    if (skip_down) return {};
    auto y = x.template tensor<Real>("mlp.y", {N, C});
    x.op("mlp down", matmul_forward<Device>, y, scratch(), s.a, weights.w2, N, F, C);
    return y;
  }

  // Returns dinput (N,C).
  Tensor<Real> backward(MlpSaved<Device> s, Tensor<Real> input, Tensor<Real> dout) {
    if (policy == Recompute::up) {
      Recomputing again(x);
      up(s, input, Category::workspace);
    } else if (policy == Recompute::act) {
      Recomputing again(x);
      s.a = x.template tensor<Real>("mlp.a", {N, F});
      x.op("mlp swiglu", swiglu_forward<Device>, s.a, s.h, N, F);
    }
    auto da = x.template tensor<Real>("mlp.da", {N, F});
    auto dh = x.template tensor<Real>("mlp.dh", {N, 2 * F});
    auto dinput = x.template tensor<Real>("mlp.dx", {N, C});
    x.op("mlp down dW", matmul_backward_weight<Device>, weights.dw2, scratch(), dout, s.a, N, F, C);
    x.op("mlp down dX", matmul_backward_input<Device>, da, scratch(), dout, weights.w2, N, F, C);
    x.op("mlp swiglu backward", swiglu_backward<Device>, dh, da, s.h, N, F);
    x.op("mlp up dW", matmul_backward_weight<Device>, weights.dw13, scratch(), dh, input, N, C, 2 * F);
    x.op("mlp up dX", matmul_backward_input<Device>, dinput, scratch(), dh, weights.w13, N, C, 2 * F);
    return dinput;
  }
};

template <class Device>
struct MoeSaved {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  Tensor<Real> rows;         // (R,C) gathered x, --dispatch materialized only
  MlpSaved<Device> experts;  // h (R,2F), a (R,F)
  Tensor<Acc> gates, lse;    // (N,K), (N)
  Tensor<int32_t> top_k_index, group_count;
  RoutingTensors plan;
  MlpSaved<Device> shared;
};

template <class Device>
struct MoeLayer {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  Executor<Device>& x;
  RouterShape router;
  ExpertShape experts;
  int64_t capacity;
  Recompute policy;
  Dispatch dispatch;
  Tensor<Real> wg;
  GradTensor<Device> dwg;
  Tensor<Acc> bias;  // (E), sigmoid gate only
  MlpWeights<Device> weights;
  MlpWeights<Device> shared_weights;  // null tensors: no shared expert
  int64_t d_shared;
  Tensor<int32_t> load;            // (E) selections of the step
  Tensor<int32_t> replay, record;  // (N,K) or null
  Tensor<StepStats> stats;
  Tensor<StepParams> params;

  Tensor<char> router_scratch() {
    return x.template tensor<char>("router.scratch", {int64_t(router_scratch_bytes<Device>(router))});
  }
  Tensor<char> scratch() {
    return x.template tensor<char>("experts.scratch", {int64_t(experts_scratch_bytes<Device>(experts))});
  }
  DenseMlp<Device> shared() { return {x, shared_weights, router.N, router.C, d_shared, policy}; }

  // What the expert products read, and through which index: x through row_slot, or the gathered rows one to one.
  Tensor<Real> source(const MoeSaved<Device>& s, Tensor<Real> tokens) const { return s.rows ? s.rows : tokens; }
  Tensor<int32_t> index(const MoeSaved<Device>& s) const {
    return dispatch == Dispatch::materialized ? Tensor<int32_t>{} : s.plan.row_slot;
  }

  // wants_h: a backward pass will read H before it is made again.
  void up(MoeSaved<Device>& s, Tensor<Real> input, Category keep, bool wants_h) {
    s.experts.h = {};
    if (wants_h)
      s.experts.h = x.template tensor<Real>("h", {experts.R, 2 * experts.F},
                                            policy <= Recompute::act ? keep : Category::workspace);
    s.experts.a =
        x.template tensor<Real>("a", {experts.R, experts.F}, policy == Recompute::none ? keep : Category::workspace);
    x.op("experts up", experts_up<Device>, s.experts.h, s.experts.a, scratch(), source(s, input), weights.w13,
         s.plan.offsets, index(s), experts);
  }

  // out (N,C) = residual + experts(input) + shared expert(input). recomputing: the second run of policy `block`, which
  // leaves statistics alone and stops where backward has all it needs.
  Tensor<Real> forward(MoeSaved<Device>& s, Tensor<Real> input, Tensor<Real> residual, bool keep, Category out_category,
                       bool recomputing) {
    int64_t N = router.N, C = router.C, E = router.E, K = router.K;
    Category saved = keep ? Category::saved : Category::workspace,
             metadata = keep ? Category::metadata : Category::workspace;
    s.gates = x.template tensor<Acc>("gates", {N, K}, metadata);
    s.lse = x.template tensor<Acc>("lse", {N}, metadata);
    s.top_k_index = x.template tensor<int32_t>("top_k_index", {N, K}, metadata);
    s.group_count = x.template tensor<int32_t>("group_count", {router.G, E}, metadata);
    auto group_prob = x.template tensor<Acc>("group_prob", {router.G, E});
    x.op("router", router_forward<Device>, s.gates, s.top_k_index, s.lse, group_prob, s.group_count, router_scratch(),
         input, wg, bias, replay, router);
    if (!recomputing) {
      x.op("balance loss", balance_loss<Device>, stats, load, group_prob, s.group_count, s.lse, params, router);
      if (record) x.op("record routing", copy_routing, record, s.top_k_index, N * K);
    }
    s.plan.counts = x.template tensor<int32_t>("counts", {E});
    s.plan.offsets = x.template tensor<int32_t>("offsets", {E + 1}, metadata);
    s.plan.row_slot = x.template tensor<int32_t>("row_slot", {experts.R}, metadata);
    s.plan.slot_row = x.template tensor<int32_t>("slot_row", {N, K}, metadata);
    auto plan_scratch = x.template tensor<char>("plan.scratch", {int64_t(dispatch_scratch_bytes<Device>(N, K, E))});
    x.op("routing plan", dispatch_plan<Device>, s.plan, plan_scratch, s.top_k_index, N, K, E, capacity);
    if (dispatch == Dispatch::materialized) {
      s.rows = x.template tensor<Real>("x_rows", {experts.R, C}, saved);
      x.op("gather x", dispatch_gather<Device>, s.rows, input, s.plan.offsets, s.plan.row_slot, N, K, E, C);
    }
    up(s, input, saved, recomputing || (keep && policy <= Recompute::act));
    if (!recomputing) {
      auto y = x.template tensor<Real>("y", {experts.R, C});
      x.op("experts down", experts_down<Device>, y, scratch(), s.experts.a, weights.w2, s.plan.offsets, experts);
      x.plan.set_place(x.plan.layer(), "attention");  // the residual stream is the next layer's input, not ours
      auto out = x.template tensor<Real>("residual", {N, C}, out_category);
      x.plan.set_place(x.plan.layer(), "moe");
      x.op("combine", combine<Device>, out, y, residual, s.gates, s.plan.slot_row, N, K, C);
      residual = out;
    }
    if (d_shared) {
      auto y = shared().forward(s.shared, input, saved, recomputing);
      if (!recomputing) x.op("shared expert add", residual_add<Device>, residual, residual, y, N * C);
    }
    return residual;
  }

  // dinput (N,C): the gradient that reaches the layer's normalised input; dout is the gradient of the output.
  Tensor<Real> backward(MoeSaved<Device> s, Tensor<Real> input, Tensor<Real> dout) {
    int64_t N = router.N, C = router.C, K = router.K, E = router.E;
    if (policy == Recompute::up) {
      Recomputing again(x);
      up(s, input, Category::workspace, true);
    }
    auto dout_rows = dout;
    if (dispatch == Dispatch::materialized) {
      dout_rows = x.template tensor<Real>("dout_rows", {experts.R, C});
      x.op("gather dout", dispatch_gather<Device>, dout_rows, dout, s.plan.offsets, s.plan.row_slot, N, K, E, C);
    }
    auto dh = x.template tensor<Real>("dh", {experts.R, 2 * experts.F});
    auto a_scaled = x.template tensor<Real>("a_scaled", {experts.R, experts.F});
    auto dgates = x.template tensor<Acc>("dgates", {N, K});
    Tensor<Real> kept_a = policy == Recompute::none ? s.experts.a : Tensor<Real>{};
    x.op("experts down backward", experts_down_backward<Device>, dh, a_scaled, dgates, scratch(), dout_rows, weights.w2,
         s.experts.h, kept_a, s.gates, s.plan.offsets, index(s), s.plan.row_slot, experts);
    x.op("experts dW2", experts_down_backward_weight<Device>, weights.dw2, scratch(), dout_rows, a_scaled,
         s.plan.offsets, index(s), experts);
    x.op("experts dW13", experts_up_backward_weight<Device>, weights.dw13, scratch(), dh, source(s, input),
         s.plan.offsets, index(s), experts);
    auto dx_rows = x.template tensor<Real>("dx_rows", {experts.R, C});
    x.op("experts dX", experts_up_backward_input<Device>, dx_rows, scratch(), dh, weights.w13, s.plan.offsets, experts);
    auto dinput = x.template tensor<Real>("dx", {N, C});
    x.op("router backward", router_backward<Device>, dinput, dwg, router_scratch(), dgates, s.gates, s.top_k_index,
         s.lse, s.group_count, input, wg, params, router);
    x.op("combine backward", combine<Device>, dinput, dx_rows, dinput, nullptr, s.plan.slot_row, N, K, C);
    if (d_shared) {
      auto dshared = shared().backward(s.shared, input, dout);
      x.op("shared expert dX add", residual_add<Device>, dinput, dinput, dshared, N * C);
    }
    return dinput;
  }

  static void copy_routing(Device& dev, int32_t* to, const int32_t* from, int64_t n) {
    dev.copy(to, from, size_t(n) * sizeof(int32_t));
  }
};
