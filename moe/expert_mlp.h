// The experts of this rank on a batch of M tokens, each with its choice of K experts: routing plan, products, sums; forward
// and backward, and what is kept between the two.
//
// Kept by default (policy `act`): H (rows,2F) and the plan; the tokens themselves are the caller's. Y, the gradient of each
// expert row, A, gate*A and dH live in the workspace that all layers share.
//
// Rows come in passes of R: one pass where R = M*K, as on a rank that has all experts. Where tokens come from other ranks
// a rank may be sent many times its share, and R is some of that (a headroom over the mean): what does not fit the first
// pass is done in further ones, which keep nothing but are computed again in backward. So skew costs time, never memory.
#pragma once
#include "llmc/matmul.h"
#include "llmc/swiglu.h"
#include "moe/combine.h"
#include "moe/dispatch.h"
#include "moe/experts.h"

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

template <class Device>
struct ExpertsSaved {
  RoutingTensors plan, first;          // of all rows, and of the first pass
  Tensor<typename Device::Real> rows;  // (R,C) gathered tokens of the first pass, --dispatch materialized only
  MlpSaved<Device> mlp;                // of the first pass
};

template <class Device>
struct ExpertMlp {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  Executor<Device>& x;
  ExpertShape shape;  // R: rows of a pass
  int64_t M;
  int64_t most_rows;  // that M tokens can have
  int64_t capacity;
  Recompute policy;
  Dispatch dispatch;
  MlpWeights<Device> weights;
  int64_t* rows;  // host memory, where there are several passes: how many rows the tokens of the moment have; null: all
                  // passes are put on the device, which leaves the empty ones at once

  int64_t passes() const { return (most_rows + shape.R - 1) / shape.R; }

  Tensor<char> scratch() {
    return x.template tensor<char>("experts.scratch", {int64_t(experts_scratch_bytes<Device>(shape))});
  }

  // The plan of all rows, from the choices (M,K).
  void route(ExpertsSaved<Device>& s, Tensor<int32_t> choices, Category metadata) {
    const int64_t K = shape.K, E = shape.E;
    s.plan = plan_tensors(M * K, metadata);
    auto scratch = x.template tensor<char>("plan.scratch", {int64_t(dispatch_scratch_bytes<Device>(M, K, E))});
    x.op("routing plan", dispatch_plan<Device>, s.plan, scratch, choices, M, K, E, capacity);
    s.first = s.plan;
    if (passes() == 1) return;
    if (rows) x.op("count rows", count_rows, rows, s.plan.offsets, E);
    s.first = plan_of_pass(s, 0, metadata);
  }

  // out (M,C) = addend (null: 0) + the sum of each token's rows, gates (M,K) included. wants_h: a backward
  // pass will read H of the first pass before it is made again. skip_down: only what backward needs.
  void forward(ExpertsSaved<Device>& s, Tensor<Real> tokens, Tensor<Acc> gates, Category keep, bool wants_h,
               bool skip_down, auto out_and_addend) {
    Tensor<Real> out, addend;
    for (int64_t pass = 0; pass < (skip_down ? 1 : passes()); ++pass) {
      Further further(x, pass > 0, rows && pass > 0 && pass * shape.R >= *rows);
      RoutingTensors plan = pass ? plan_of_pass(s, pass, Category::workspace) : s.first;
      auto gathered = gather("x_rows", tokens, plan, pass ? Category::workspace : keep);
      MlpSaved<Device> mlp =
          up(gathered ? gathered : tokens, plan, pass ? Category::workspace : keep, wants_h && pass == 0);
      if (pass == 0) s.rows = gathered, s.mlp = mlp;
      if (skip_down) return;
      auto y = x.template tensor<Real>("y", {shape.R, shape.C});
      x.op("experts down", experts_down<Device>, y, scratch(), mlp.a, weights.w2, plan.offsets, shape);
      if (pass == 0) std::tie(out, addend) = out_and_addend();
      bring_back("combine", pass, plan, out, y, addend, gates);
    }
  }

  // dgates (M,K): zero where a slot has no row here. Then, dx (M,C) = addend + the sum of the gradients of each token's
  // rows: dx_and_addend() is called in between.
  void backward(const ExpertsSaved<Device>& s, Tensor<Real> tokens, Tensor<Acc> gates, Tensor<Real> dout,
                Tensor<Acc> dgates, auto dx_and_addend) {
    Tensor<Real> dx, addend;
    for (int64_t pass = 0; pass < passes(); ++pass) {
      Further further(x, pass > 0, rows && pass > 0 && pass * shape.R >= *rows);
      RoutingTensors plan = pass ? plan_of_pass(s, pass, Category::workspace) : s.first;
      Tensor<Real> gathered = s.rows;
      MlpSaved<Device> mlp = s.mlp;
      if (pass > 0 || policy == Recompute::up) {
        Recomputing again(x);
        if (pass > 0) gathered = gather("x_rows", tokens, plan, Category::workspace);
        mlp = up(gathered ? gathered : tokens, plan, Category::workspace, true);
      }
      auto source = gathered ? gathered : tokens;
      auto dout_rows = gather("dout_rows", dout, plan, Category::workspace);
      if (!dout_rows) dout_rows = dout;
      auto dh = x.template tensor<Real>("dh", {shape.R, 2 * shape.F});
      auto a_scaled = x.template tensor<Real>("a_scaled", {shape.R, shape.F});
      auto part = pass ? x.template tensor<Acc>("dgates of a pass", {M, shape.K}) : dgates;
      Tensor<Real> kept_a = policy == Recompute::none ? mlp.a : Tensor<Real>{};
      x.op("experts down backward", experts_down_backward<Device>, dh, a_scaled, part, scratch(), dout_rows, weights.w2,
           mlp.h, kept_a, gates, plan.offsets, index(plan), plan.row_slot, shape);
      if (pass > 0) x.op("add gate gradients", add_to<Device>, dgates, part, M * shape.K);
      auto dw2 = weights.dw2, dw13 = weights.dw13;
      if (pass > 0) dw2.add = dw13.add = true;  // to what the first wrote
      x.op("experts dW2", experts_down_backward_weight<Device>, dw2, scratch(), dout_rows, a_scaled, plan.offsets,
           index(plan), shape);
      x.op("experts dW13", experts_up_backward_weight<Device>, dw13, scratch(), dh, source, plan.offsets, index(plan),
           shape);
      auto dx_rows = x.template tensor<Real>("dx_rows", {shape.R, shape.C});
      x.op("experts dX", experts_up_backward_input<Device>, dx_rows, scratch(), dh, weights.w13, plan.offsets, shape);
      if (pass == 0) std::tie(dx, addend) = dx_and_addend();
      bring_back("combine backward", pass, plan, dx, dx_rows, addend, {});
    }
  }

 private:
  // While it lives, the ops are those of a further pass, or, `empty`, not executed: there is nothing for them to do.
  struct Further {
    Executor<Device>& x;
    Further(Executor<Device>& x, bool further, bool empty) : x(x) {
      x.extra = further, x.skipping = empty && !x.planning();
    }
    ~Further() { x.extra = x.skipping = false; }
  };

  // out (M,C) = addend + what the first pass makes of each token, and += what a further one does.
  void bring_back(const char* name, int64_t pass, const RoutingTensors& plan, Tensor<Real> out, Tensor<Real> y,
                  Tensor<Real> addend, Tensor<Acc> gates) {
    if (pass == 0) return x.op(name, combine<Device>, out, y, addend, gates, plan.slot_row, M, shape.K, shape.C);
    x.op(name, further_rows, out, y, gates, plan, M, shape.K, shape.E, shape.C);
  }
  static void further_rows(Device& dev, Real* out, const Real* y, const Acc* gates, RoutingPlan plan, int64_t M,
                           int64_t K, int64_t E, int64_t C) {
    combine_more<Device>(dev, out, y, gates, plan.slot_row, plan.offsets + E, M, K, C);
  }
  RoutingTensors plan_tensors(int64_t n_rows, Category category) {
    RoutingTensors plan;
    plan.counts = x.template tensor<int32_t>("counts", {shape.E});
    plan.offsets = x.template tensor<int32_t>("offsets", {shape.E + 1}, category);
    plan.row_slot = x.template tensor<int32_t>("row_slot", {n_rows}, category);
    plan.slot_row = x.template tensor<int32_t>("slot_row", {M, shape.K}, category);
    return plan;
  }
  RoutingTensors plan_of_pass(const ExpertsSaved<Device>& s, int64_t pass, Category category) {
    RoutingTensors plan = plan_tensors(shape.R, category);
    x.op("plan of a pass", dispatch_part<Device>, plan, s.plan, pass * shape.R, shape.R, M, shape.K, shape.E);
    return plan;
  }
  // What the products read, and through which index: tokens through row_slot, or the gathered rows one to one.
  Tensor<Real> gather(const char* name, Tensor<Real> tokens, const RoutingTensors& plan, Category category) {
    if (dispatch == Dispatch::zero_buffer) return {};
    auto gathered = x.template tensor<Real>(name, {shape.R, shape.C}, category);
    x.op("gather", dispatch_gather<Device>, gathered, tokens, plan.offsets, plan.row_slot, M, shape.K, shape.E,
         shape.C);
    return gathered;
  }
  Tensor<int32_t> index(const RoutingTensors& plan) const {
    return dispatch == Dispatch::materialized ? Tensor<int32_t>{} : plan.row_slot;
  }
  MlpSaved<Device> up(Tensor<Real> source, const RoutingTensors& plan, Category keep, bool wants_h) {
    MlpSaved<Device> mlp;
    if (wants_h)
      mlp.h =
          x.template tensor<Real>("h", {shape.R, 2 * shape.F}, policy <= Recompute::act ? keep : Category::workspace);
    mlp.a = x.template tensor<Real>("a", {shape.R, shape.F}, policy == Recompute::none ? keep : Category::workspace);
    x.op("experts up", experts_up<Device>, mlp.h, mlp.a, scratch(), source, weights.w13, plan.offsets, index(plan),
         shape);
    return mlp;
  }
  static void count_rows(Device& dev, int64_t* rows, const int32_t* offsets, int64_t E) {
    int32_t n = 0;
    dev.to_host(&n, offsets + E, sizeof n);
    *rows = n;
  }
};
