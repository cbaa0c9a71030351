// One MoE layer: its ops in order, forward and backward, and what is kept between the two.
//
// Kept by default (policy `act`): x (N,C) and H (R,2F), 2NC + 4NKF bytes in bf16, and the routing metadata. Y, the
// gradient of each expert row, A, gate*A and dH live in the workspace that all layers share.
#pragma once
#include "llmc/matmul.h"
#include "llmc/rmsnorm.h"
#include "llmc/swiglu.h"
#include "moe/combine.h"
#include "moe/config.h"
#include "moe/dispatch.h"
#include "moe/expert_parallel.h"
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

// The tokens that this rank's experts compute with, where experts are spread over ranks (expert_parallel.h).
template <class Device>
struct ArrivedTokens {
  Tensor<typename Device::Real> x;    // (M,C)
  Tensor<typename Device::Acc> gates;  // (M,K)
  Tensor<int32_t> position, counts;    // (N,ranks), (ranks,ranks)
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
  ArrivedTokens<Device> arrived;
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
  ExpertRanks ranks;  // one: all experts are here, and `experts` is of the tokens that arrive
  Comm expert_ranks;
  Comm statistics_ranks;  // that share balance statistics; none: only this

  Tensor<char> router_scratch() {
    return x.template tensor<char>("router.scratch", {int64_t(router_scratch_bytes<Device>(router))});
  }
  Tensor<char> scratch() {
    return x.template tensor<char>("experts.scratch", {int64_t(experts_scratch_bytes<Device>(experts))});
  }
  DenseMlp<Device> shared() { return {x, shared_weights, router.N, router.C, d_shared, policy}; }

  // What the expert products read, and through which index: x through row_slot, or the gathered rows one to one.
  Tensor<Real> source(const MoeSaved<Device>& s, Tensor<Real> tokens) const {
    return s.rows ? s.rows : s.arrived.x ? s.arrived.x : tokens;
  }
  Tensor<int32_t> index(const MoeSaved<Device>& s) const {
    return dispatch == Dispatch::materialized ? Tensor<int32_t>{} : s.plan.row_slot;
  }

  // Sends rows of x (N,C) to the ranks of their experts; returns what arrives, (M,C).
  Tensor<Real> send(const MoeSaved<Device>& s, const char* name, Tensor<Real> rows, Category category) {
    auto packed = x.template tensor<Real>("packed", {ranks.ranks * ranks.N, router.C});
    auto arrived = x.template tensor<Real>(name, {ranks.M(), router.C}, category);
    x.op("pack", expert_pack<Device>, packed, rows, s.arrived.position, router.C, ranks);
    x.op("to experts", exchange_rows<Device, Real>, expert_ranks, arrived, packed, s.arrived.counts, router.C, false,
         "tokens to experts");
    return arrived;
  }
  // out (N,C) = addend + the sum of each token's rows of y, gates (null: 1) included.
  void bring_back(const MoeSaved<Device>& s, const char* name, Tensor<Real> out, Tensor<Real> y, Tensor<Real> addend,
                  Tensor<Acc> gates) {
    if (ranks.ranks == 1) {
      x.op(name, combine<Device>, out, y, addend, gates, s.plan.slot_row, router.N, router.K, router.C);
      return;
    }
    auto partial = x.template tensor<Real>("partial", {ranks.M(), router.C});
    auto returned = x.template tensor<Real>("returned", {ranks.ranks * ranks.N, router.C});
    x.op(name, combine<Device>, partial, y, Tensor<Real>{}, gates, s.plan.slot_row, ranks.M(), router.K, router.C);
    x.op("from experts", exchange_rows<Device, Real>, expert_ranks, returned, partial, s.arrived.counts, router.C, true,
         "tokens from experts");
    x.op("add up", combine<Device>, out, returned, addend, Tensor<Acc>{}, s.arrived.position, router.N, ranks.ranks,
         router.C);
  }
  // Exchanges choices and tokens; returns the choices of those that arrived, (M,K).
  Tensor<int32_t> arrive(MoeSaved<Device>& s, Tensor<Real> input, Category saved, Category metadata) {
    const int64_t M = ranks.M(), N = router.N, K = router.K, n = ranks.ranks;
    auto all_choices = x.template tensor<int32_t>("all choices", {M, K});
    auto all_gates = x.template tensor<Acc>("all gates", {M, K});
    x.op("gather choices", gather_choices, expert_ranks, all_choices, all_gates, s.top_k_index, s.gates, N * K);
    auto destination = x.template tensor<int32_t>("destination", {M, n});
    x.op("destinations", expert_destinations<Device>, destination, all_choices, ranks);
    RoutingTensors plan;
    plan.counts = x.template tensor<int32_t>("sent counts", {n});
    plan.offsets = x.template tensor<int32_t>("sent offsets", {n + 1});
    plan.row_slot = x.template tensor<int32_t>("sent row_slot", {M * n});
    plan.slot_row = x.template tensor<int32_t>("sent slot_row", {M, n});
    auto scratch = x.template tensor<char>("plan.scratch", {int64_t(dispatch_scratch_bytes<Device>(M, n, n))});
    x.op("exchange plan", dispatch_plan<Device>, plan, scratch, destination, M, n, n, 0);
    auto choices = x.template tensor<int32_t>("arrived choices", {M, K});
    s.arrived.gates = x.template tensor<Acc>("arrived gates", {M, K}, metadata);
    x.op("arrivals", expert_arrivals<Device>, choices, s.arrived.gates, plan.offsets, plan.row_slot, all_choices,
         all_gates, ranks);
    s.arrived.position = x.template tensor<int32_t>("position", {N, n}, metadata);
    s.arrived.counts = x.template tensor<int32_t>("exchange counts", {n, n}, metadata);
    x.op("positions", expert_positions<Device>, s.arrived.position, s.arrived.counts, plan.offsets, plan.row_slot,
         plan.slot_row, ranks);
    s.arrived.x = send(s, "arrived x", input, saved);
    return choices;
  }

  void up(MoeSaved<Device>& s, Tensor<Real> input, Category keep) {
    s.experts.h =
        x.template tensor<Real>("h", {experts.R, 2 * experts.F}, policy <= Recompute::act ? keep : Category::workspace);
    s.experts.a =
        x.template tensor<Real>("a", {experts.R, experts.F}, policy == Recompute::none ? keep : Category::workspace);
    x.op("experts up", experts_up<Device>, s.experts.h, s.experts.a, scratch(), source(s, input), weights.w13,
         s.plan.offsets, index(s), experts);
  }

  // out (N,C) = residual + experts(input) + shared expert(input). recomputing: the second run of policy `block`, which
  // leaves statistics alone and stops where backward has all it needs.
  Tensor<Real> forward(MoeSaved<Device>& s, Tensor<Real> input, Tensor<Real> residual, bool keep, Category out_category,
                       bool recomputing) {
    int64_t N = router.N, C = router.C, E = router.E, K = router.K, M = ranks.M(), local = experts.E;
    Category saved = keep ? Category::saved : Category::workspace,
             metadata = keep ? Category::metadata : Category::workspace;
    s.gates = x.template tensor<Acc>("gates", {N, K}, metadata);
    s.lse = x.template tensor<Acc>("lse", {N}, metadata);
    s.top_k_index = x.template tensor<int32_t>("top_k_index", {N, K}, metadata);
    s.group_count = x.template tensor<int32_t>("group_count", {router.G, E}, metadata);
    auto group_prob = x.template tensor<Acc>("group_prob", {router.G, E});
    x.op("router", router_forward<Device>, s.gates, s.top_k_index, s.lse, group_prob, s.group_count, router_scratch(),
         input, wg, bias, replay, router);
    if (statistics_ranks)
      x.op("sum statistics", sum_statistics, statistics_ranks, group_prob, s.group_count, router.G * E);
    if (!recomputing) {
      x.op("balance loss", balance_loss<Device>, stats, load, group_prob, s.group_count, s.lse, params, router);
      if (record) x.op("record routing", copy_routing, record, s.top_k_index, N * K);
    }
    auto choices = ranks.ranks > 1 ? arrive(s, input, saved, metadata) : s.top_k_index;
    s.plan.counts = x.template tensor<int32_t>("counts", {local});
    s.plan.offsets = x.template tensor<int32_t>("offsets", {local + 1}, metadata);
    s.plan.row_slot = x.template tensor<int32_t>("row_slot", {experts.R}, metadata);
    s.plan.slot_row = x.template tensor<int32_t>("slot_row", {M, K}, metadata);
    auto plan_scratch = x.template tensor<char>("plan.scratch", {int64_t(dispatch_scratch_bytes<Device>(M, K, local))});
    x.op("routing plan", dispatch_plan<Device>, s.plan, plan_scratch, choices, M, K, local, capacity);
    if (dispatch == Dispatch::materialized) {
      auto rows = x.template tensor<Real>("x_rows", {experts.R, C}, saved);
      x.op("gather x", dispatch_gather<Device>, rows, source(s, input), s.plan.offsets, s.plan.row_slot, M, K, local, C);
      s.rows = rows;
    }
    up(s, input, saved);
    if (!recomputing) {
      auto y = x.template tensor<Real>("y", {experts.R, C});
      x.op("experts down", experts_down<Device>, y, scratch(), s.experts.a, weights.w2, s.plan.offsets, experts);
      x.plan.set_place(x.plan.layer(), "attention");  // the residual stream is the next layer's input, not ours
      auto out = x.template tensor<Real>("residual", {N, C}, out_category);
      x.plan.set_place(x.plan.layer(), "moe");
      bring_back(s, "combine", out, y, residual, ranks.ranks > 1 ? s.arrived.gates : s.gates);
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
    int64_t N = router.N, C = router.C, K = router.K, M = ranks.M();
    if (policy == Recompute::up) {
      Recomputing again(x);
      up(s, input, Category::workspace);
    }
    auto arrived_dout = ranks.ranks > 1 ? send(s, "arrived dout", dout, Category::workspace) : dout;
    auto dout_rows = arrived_dout;
    if (dispatch == Dispatch::materialized) {
      dout_rows = x.template tensor<Real>("dout_rows", {experts.R, C});
      x.op("gather dout", dispatch_gather<Device>, dout_rows, arrived_dout, s.plan.offsets, s.plan.row_slot, M, K,
           experts.E, C);
    }
    auto dh = x.template tensor<Real>("dh", {experts.R, 2 * experts.F});
    auto a_scaled = x.template tensor<Real>("a_scaled", {experts.R, experts.F});
    auto dgates = x.template tensor<Acc>("dgates", {M, K});
    Tensor<Real> kept_a = policy == Recompute::none ? s.experts.a : Tensor<Real>{};
    x.op("experts down backward", experts_down_backward<Device>, dh, a_scaled, dgates, scratch(), dout_rows, weights.w2,
         s.experts.h, kept_a, ranks.ranks > 1 ? s.arrived.gates : s.gates, s.plan.offsets, index(s), s.plan.row_slot,
         experts);
    x.op("experts dW2", experts_down_backward_weight<Device>, weights.dw2, scratch(), dout_rows, a_scaled,
         s.plan.offsets, index(s), experts);
    x.op("experts dW13", experts_up_backward_weight<Device>, weights.dw13, scratch(), dh, source(s, input),
         s.plan.offsets, index(s), experts);
    auto dx_rows = x.template tensor<Real>("dx_rows", {experts.R, C});
    x.op("experts dX", experts_up_backward_input<Device>, dx_rows, scratch(), dh, weights.w13, s.plan.offsets, experts);
    if (ranks.ranks > 1) {
      auto returned = x.template tensor<Acc>("returned dgates", {ranks.ranks * N, K});
      x.op("gate gradients", exchange_rows<Device, Acc>, expert_ranks, returned, dgates, s.arrived.counts, K, true,
           "gate gradients");
      dgates = x.template tensor<Acc>("own dgates", {N, K});
      x.op("own gate gradients", expert_gate_gradients<Device>, dgates, returned, s.arrived.position, s.top_k_index,
           ranks);
    }
    auto dinput = x.template tensor<Real>("dx", {N, C});
    x.op("router backward", router_backward<Device>, dinput, dwg, router_scratch(), dgates, s.gates, s.top_k_index,
         s.lse, s.group_count, input, wg, params, router);
    bring_back(s, "combine backward", dinput, dx_rows, dinput, {});
    if (d_shared) {
      auto dshared = shared().backward(s.shared, input, dout);
      x.op("shared expert dX add", residual_add<Device>, dinput, dinput, dshared, N * C);
    }
    return dinput;
  }

  static void sum_statistics(Device&, const Comm& comm, Acc* group_prob, int32_t* group_count, int64_t n) {
    comm.all_reduce(group_prob, n, "balance statistics");
    comm.all_reduce(group_count, n, "balance statistics");
  }
  static void gather_choices(Device&, const Comm& comm, int32_t* all_choices, Acc* all_gates, const int32_t* choices,
                             const Acc* gates, int64_t n) {
    comm.all_gather(all_choices, choices, n, "choices of experts");
    comm.all_gather(all_gates, gates, n, "gates");
  }
  static void copy_routing(Device& dev, int32_t* to, const int32_t* from, int64_t n) {
    dev.copy(to, from, size_t(n) * sizeof(int32_t));
  }
};
