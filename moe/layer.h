// One MoE layer: its ops in order, forward and backward, and what is kept between the two.
//
// Kept by default (policy `act`): x (N,C) and H (R,2F), 2NC + 4NKF bytes in bf16, and the routing metadata. Y, the
// gradient of each expert row, A, gate*A and dH live in the workspace that all layers share; so do the tokens of other ranks
// where experts are spread over ranks, which are sent again in the backward pass. A forward pass whose H no backward pass
// will read (evaluation, decoding, the first of two under policies `up` and `block`) does not make it.
#pragma once
#include "llmc/rmsnorm.h"
#include "moe/config.h"
#include "moe/expert_mlp.h"
#include "moe/expert_parallel.h"
#include "moe/expert_pull.h"
#include "moe/router.h"
#include "moe/tensor_parallel.h"

// A dense SwiGLU MLP: the shared expert, and the layers that have no experts. Each rank has the part F of its width.
template <class Device>
struct DenseMlp {
  using Real = typename Device::Real;
  Executor<Device>& x;
  MlpWeights<Device> weights;
  TensorRanks<Device> ranks;
  int64_t F;
  Recompute policy;
  const int64_t N = ranks.N(), C = ranks.C;

  Tensor<char> scratch() {
    return x.template tensor<char>("mlp.scratch", {int64_t(matmul_scratch_bytes<Device>(N, C, 2 * F))});
  }

  // input: of all ranks.
  void up(MlpSaved<Device>& s, Tensor<Real> input, Category keep) {
    s.h = x.template tensor<Real>("mlp.h", {N, 2 * F}, policy <= Recompute::act ? keep : Category::workspace);
    s.a = x.template tensor<Real>("mlp.a", {N, F}, policy == Recompute::none ? keep : Category::workspace);
    x.op("mlp up", matmul_forward<Device>, s.h, scratch(), input, weights.w13, N, C, 2 * F);
    x.op("mlp swiglu", swiglu_forward<Device>, s.a, s.h, N, F);
  }

  // Returns the output, as the input of this rank's tokens; skip_down: only what backward needs.
  Tensor<Real> forward(MlpSaved<Device>& s, Tensor<Real> input, Category keep, bool skip_down) {
    up(s, ranks.gather("all mlp.x", input), keep);
    if (skip_down) return {};
    auto y = x.template tensor<Real>("mlp.y", {N, C});
    x.op("mlp down", matmul_forward<Device>, y, scratch(), s.a, weights.w2, N, F, C);
    return ranks.sum("own mlp.y", y);
  }

  // Returns dinput, likewise.
  Tensor<Real> backward(MlpSaved<Device> s, Tensor<Real> input, Tensor<Real> dout) {
    input = ranks.gather("all mlp.x", input), dout = ranks.gather("all mlp.dy", dout);
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
    return ranks.sum("own mlp.dx", dinput);
  }
};

// With whom this rank shares balance statistics where the router's do (RouterShape::ranks): all of a communicator, or where
// its ranks are `groups`, one after another, those of its group.
struct StatisticsRanks {
  Comm comm;
  int64_t groups = 1, group = 0;
  bool counts = true;  // the selections of its group into the load of the experts: one rank of a group does
};

// The tokens that this rank's experts compute with, where experts are spread over ranks (expert_parallel.h; fetched:
// expert_pull.h).
template <class Device>
struct ArrivedTokens {
  Tensor<typename Device::Real> x;     // (M,C)
  Tensor<typename Device::Acc> gates;  // (M,K)
  Tensor<int32_t> position, counts;    // (N,ranks), (ranks,ranks)
  Tensor<int32_t> source;              // (M+1), in place of counts where they are fetched
};

template <class Device>
struct MoeSaved {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  Tensor<Acc> gates, lse;  // (N,K), (N)
  Tensor<int32_t> top_k_index, group_count;
  ArrivedTokens<Device> arrived;
  ExpertsSaved<Device> experts;
  MlpSaved<Device> shared;
};

template <class Device>
struct MoeLayer {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  Executor<Device>& x;
  RouterShape router;
  ExpertMlp<Device> experts;  // of the tokens that arrive here
  Tensor<Real> wg;
  GradTensor<Device> dwg;
  Tensor<Acc> bias;                   // (E), sigmoid gate only
  MlpWeights<Device> shared_weights;  // null tensors: no shared expert
  TensorRanks<Device> tensor_ranks;   // that share it
  int64_t d_shared;                   // this rank's part of its width
  Tensor<int32_t> load;               // (E) selections of the step
  Tensor<int32_t> replay, record;     // (N,K) or null
  Tensor<StepStats> stats;
  Tensor<StepParams> params;
  ExpertRanks ranks;       // that share the experts
  Tensor<int32_t> places;  // (E, ranks) of the experts, where there are several ranks
  Comm expert_ranks;
  StatisticsRanks statistics;
  PeerMemory* peers;  // of expert_ranks, who fetch rows from each other; null: they send them

  Tensor<char> router_scratch() {
    return x.template tensor<char>("router.scratch", {int64_t(router_scratch_bytes<Device>(router))});
  }
  DenseMlp<Device> shared() { return {x, shared_weights, tensor_ranks, d_shared, experts.policy}; }
  bool spread() const { return ranks.ranks > 1; }

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
    if (router.ranks > 1) share_statistics(group_prob, s.group_count);
    if (!recomputing) {
      auto counted = statistics.counts ? load : Tensor<int32_t>{};
      x.op("balance loss", balance_loss<Device>, stats, counted, group_prob, s.group_count, s.lse, params, router);
      if (record) x.op("record routing", copy_routing, record, s.top_k_index, N * K);
    }
    auto choices = spread() ? arrive(s, metadata) : s.top_k_index;
    meet();
    if (spread())
      s.arrived.x = send(s, "arrived x", input, experts.policy == Recompute::none ? saved : Category::workspace);
    experts.route(s.experts, choices, metadata);
    Tensor<Real> out, partial;
    experts.forward(s.experts, spread() ? s.arrived.x : input, spread() ? s.arrived.gates : s.gates, saved,
                    recomputing || (keep && experts.policy <= Recompute::act), recomputing, [&] {
                      x.plan.set_place(x.plan.layer(), "attention");  // the residual stream is the next layer's input
                      out = x.template tensor<Real>("residual", {N, C}, out_category);
                      x.plan.set_place(x.plan.layer(), "moe");
                      if (spread()) partial = x.template tensor<Real>("partial", {ranks.M(), C});
                      return spread() ? std::pair(partial, Tensor<Real>{}) : std::pair(out, residual);
                    });
    if (!recomputing) {
      if (spread()) {
        meet(input);  // partial sums are there, and the tokens have been fetched
        bring_back(s, out, partial, residual);
        meet(partial);
      }
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
    int64_t N = router.N, C = router.C, K = router.K;
    meet(input);  // which policy `block` may have had fetched just now
    if (spread() && (experts.policy == Recompute::act || experts.policy == Recompute::up)) {
      Recomputing again(x);  // ep * N rows are not kept: they come once more
      s.arrived.x = send(s, "arrived x", input, Category::workspace);
    }
    auto arrived_dout = spread() ? send(s, "arrived dout", dout, Category::workspace) : dout;
    auto dgates = x.template tensor<Acc>("dgates", {experts.M, K});
    Tensor<Real> dinput, partial;
    auto router_gradients = [&](Tensor<Acc> own_dgates) {
      dinput = x.template tensor<Real>("dx", {N, C});
      x.op("router backward", router_backward<Device>, dinput, dwg, router_scratch(), own_dgates, s.gates,
           s.top_k_index, s.lse, s.group_count, input, wg, params, router);
    };
    experts.backward(s.experts, spread() ? s.arrived.x : input, spread() ? s.arrived.gates : s.gates, arrived_dout,
                     dgates, [&] {
                       if (spread()) {
                         partial = x.template tensor<Real>("partial", {ranks.M(), C});
                         return std::pair(partial, Tensor<Real>{});
                       }
                       router_gradients(dgates);
                       return std::pair(dinput, dinput);
                     });
    if (spread()) {
      meet(input, dout);
      router_gradients(bring_back_gate_gradients(s, dgates));
      bring_back(s, dinput, partial, dinput);
      meet(partial, {}, dgates);
    }
    if (d_shared) {
      auto dshared = shared().backward(s.shared, input, dout);
      x.op("shared expert dX add", residual_add<Device>, dinput, dinput, dshared, N * C);
    }
    return dinput;
  }

 private:
  // ---- experts spread over ranks (expert_parallel.h) ----

  // Who sends what, from the choices of all ranks; returns those of the tokens that arrive here, (M,K).
  Tensor<int32_t> arrive(MoeSaved<Device>& s, Category metadata) {
    const int64_t M = ranks.M(), N = router.N, K = router.K, n = ranks.ranks;
    auto all_choices = x.template tensor<int32_t>("all choices", {M, K});
    auto all_gates = x.template tensor<Acc>("all gates", {M, K});
    x.op("gather choices", gather_choices, expert_ranks, all_choices, all_gates, s.top_k_index, s.gates, N * K);
    x.op("places", expert_places<Device>, all_choices, all_choices, places, 0, M, ranks);
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
    if (peers) {
      s.arrived.source = x.template tensor<int32_t>("source", {M + 1}, metadata);
      x.op("who fetches what", expert_pull_plan<Device>, s.arrived.source, s.arrived.position, plan.offsets,
           plan.row_slot, plan.slot_row, ranks);
      return choices;
    }
    s.arrived.counts = x.template tensor<int32_t>("exchange counts", {n, n}, metadata);
    x.op("positions", expert_positions<Device>, s.arrived.position, s.arrived.counts, plan.offsets, plan.row_slot,
         plan.slot_row, ranks);
    return choices;
  }
  // Sends rows (N,C) to the ranks of their experts; returns what arrives, (M,C).
  Tensor<Real> send(const MoeSaved<Device>& s, const char* name, Tensor<Real> rows, Category category) {
    if (peers) {
      auto arrived = x.template tensor<Real>(name, {ranks.M(), router.C}, category);
      x.op("fetch tokens", expert_pull<Device>, arrived, peers->of(rows), s.arrived.source, router.C, ranks);
      return arrived;
    }
    auto packed = x.template tensor<Real>("packed", {ranks.ranks * ranks.N, router.C});
    auto arrived = x.template tensor<Real>(name, {ranks.M(), router.C}, category);
    x.op("pack", expert_pack<Device>, packed, rows, s.arrived.position, router.C, ranks);
    x.op("to experts", exchange_rows<Device, Real>, expert_ranks, arrived, packed, s.arrived.counts, router.C, false,
         "tokens to experts");
    return arrived;
  }
  // out (N,C) = addend + what each rank's experts made of a token, partial (M,C) on theirs.
  void bring_back(const MoeSaved<Device>& s, Tensor<Real> out, Tensor<Real> partial, Tensor<Real> addend) {
    if (peers)
      return x.op("fetch sums", expert_pull_back<Device>, out, peers->of(partial), addend, s.arrived.position, router.C,
                  ranks);
    auto returned = x.template tensor<Real>("returned", {ranks.ranks * ranks.N, router.C});
    x.op("from experts", exchange_rows<Device, Real>, expert_ranks, returned, partial, s.arrived.counts, router.C, true,
         "tokens from experts");
    x.op("add up", combine<Device>, out, returned, addend, Tensor<Acc>{}, s.arrived.position, router.N, ranks.ranks,
         router.C);
  }
  // Those of this rank's choices (N,K), from dgates (M,K) where the experts are.
  Tensor<Acc> bring_back_gate_gradients(const MoeSaved<Device>& s, Tensor<Acc> dgates) {
    Tensor<Acc> returned;
    if (!peers) {
      returned = x.template tensor<Acc>("returned dgates", {ranks.ranks * ranks.N, ranks.K});
      x.op("gate gradients", exchange_rows<Device, Acc>, expert_ranks, returned, dgates, s.arrived.counts, ranks.K,
           true, "gate gradients");
    }
    auto place = x.template tensor<int32_t>("own places", {ranks.N, ranks.K});
    x.op("own places", expert_places<Device>, place, s.top_k_index, places, ranks.rank * ranks.N, ranks.N, ranks);
    auto own = x.template tensor<Acc>("own dgates", {ranks.N, ranks.K});
    if (peers)
      x.op("fetch gate gradients", expert_pull_gate_gradients<Device>, own, peers->of(dgates), s.arrived.position,
           place, ranks);
    else
      x.op("own gate gradients", expert_gate_gradients<Device>, own, returned, s.arrived.position, place, ranks);
    return own;
  }
  // Where rows are fetched: the ranks meet (peer_memory.h). What was fetched since the last meeting stays until this one.
  void meet(Tensor<Real> fetched = {}, Tensor<Real> fetched_too = {}, Tensor<Acc> gates = {}) {
    if constexpr (Device::has_graphs)
      if (peers) x.op("meet", meet_peers, *peers, fetched, fetched_too, gates);
  }
  static void meet_peers(Device& dev, const PeerMemory& peers, const Real*, const Real*, const Acc*) {
    peers.meet(dev);
  }

  // Statistics of one group of tokens go through a table of all groups.
  void share_statistics(Tensor<Acc> prob, Tensor<int32_t> count) {
    const int64_t n = router.G * router.E, groups = statistics.groups;
    auto all_prob = groups > 1 ? x.template tensor<Acc>("all group_prob", {groups, n}) : prob;
    auto all_count = groups > 1 ? x.template tensor<int32_t>("all group_count", {groups, n}) : count;
    x.op("sum statistics", sum_statistics, statistics, all_prob, all_count, prob, count, n);
  }
  static void sum_statistics(Device& dev, const StatisticsRanks& s, Acc* all_prob, int32_t* all_count, Acc* prob,
                             int32_t* count, int64_t n) {
    auto each = [&](auto f) { f(all_prob, prob), f(all_count, count); };
    if (s.groups > 1)
      each([&](auto* all, auto* own) {
        dev.zero(all, size_t(s.groups * n) * sizeof *own);
        dev.copy(all + s.group * n, own, size_t(n) * sizeof *own);
      });
    s.comm.together(
        [&] { each([&](auto* all, auto*) { s.comm.all_reduce(all, s.groups * n, "balance statistics"); }); });
    if (s.groups > 1) each([&](auto* all, auto* own) { dev.copy(own, all + s.group * n, size_t(n) * sizeof *own); });
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
