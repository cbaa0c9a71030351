// One MoE layer as a program of its own, planned and run as model.h does it: router, routing plan, experts, combine, and
// backward; softmax gates renormalised over the chosen, balance loss on. Expert gradients are as narrow as the weights, and
// written, not added to (llmc/gradient.h), as where a step has one micro-batch. forward_only is a pass without gradients:
// production makes no H there. All is over the device, so that the CPU can be asked for the same layer. A rung of the
// ladder (rungs.cuh) takes the place of MoeLayer's two passes and shares all the rest.
#pragma once
#include <memory>
#include <vector>

#include "dev/moe_shapes.h"
#include "moe/layer.h"

struct LayerSettings {
  Dispatch dispatch = Dispatch::zero_buffer;
  Recompute policy = Recompute::act;  // H kept, A computed again
  bool replays = false;               // tokens go where LayerProgram::replay says
};

// What is handed from forward to backward: production's, and what some rungs keep besides.
template <class Device>
struct Kept : MoeSaved<Device> {
  Tensor<typename Device::Real> y;       // (R,C) rows as the down projection left them, for the gate gradient
  std::vector<int32_t> offsets_on_host;  // (E+1), for the rung whose host counts rows
};

// The two passes of a layer, as MoeLayer's: forward returns out (N,C), residual added; backward returns dinput (N,C).
template <class Device>
struct Rung {
  using Rows = Tensor<typename Device::Real>;
  Rows (*forward)(MoeLayer<Device>& layer, Kept<Device>& kept, Rows input, Rows residual, bool keep);
  Rows (*backward)(MoeLayer<Device>& layer, Kept<Device>& kept, Rows input, Rows dout);
};

template <class Device>
struct LayerProgram {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  enum Id { forward_only, forward_backward };

  Device& dev;
  MoeShape shape;
  Plan plan;
  Executor<Device> x;
  std::unique_ptr<Arena<Device>> arena;
  Tensor<Real> input, residual, dout, wg, w13, w2;
  GradTensor<Device> dwg, dw13, dw2;
  Tensor<int32_t> load;
  Tensor<StepStats> stats;
  Tensor<StepParams> params;
  LayerSettings settings;
  const Rung<Device>* rung;  // null: production
  Tensor<int32_t> replay;    // (T,K), null unless settings.replays
  // Of the program that ran last. Production's gates and choices are intact after forward_backward: router backward reads
  // them, and nothing is laid over them afterwards.
  Tensor<Real> out, dinput;
  Kept<Device> saved;

  LayerProgram(Device& dev, const MoeShape& shape, LayerSettings settings, const Rung<Device>* rung = nullptr)
      : dev(dev), shape(shape), x(dev, plan), settings(settings), rung(rung) {
    int64_t T = shape.T, C = shape.d, F = shape.n, E = shape.E;
    plan.set_place(0, "moe");
    input = plan.persistent<Real>("x", {T, C}, Category::saved);  // the layer keeps it for backward
    wg = plan.persistent<Real>("wg", {E, C}, Category::weights);
    w13 = plan.persistent<Real>("w13", {E * 2 * F, C}, Category::weights);
    w2 = plan.persistent<Real>("w2", {E * C, F}, Category::weights);
    dwg.wide = plan.persistent<Acc>("dwg", {E, C}, Category::gradients);
    dw13.narrow = plan.persistent<Real>("dw13", {E * 2 * F, C}, Category::gradients);
    dw2.narrow = plan.persistent<Real>("dw2", {E * C, F}, Category::gradients);
    dw13.add = dw2.add = false;
    plan.set_place(0, "around");  // what the network around the layer hands in
    residual = plan.persistent<Real>("residual stream", {T, C}, Category::workspace);
    dout = plan.persistent<Real>("dout", {T, C}, Category::workspace);
    load = plan.persistent<int32_t>("load", {E}, Category::workspace);
    stats = plan.persistent<StepStats>("stats", {int64_t(sizeof(StepStats))}, Category::workspace);
    params = plan.persistent<StepParams>("params", {int64_t(sizeof(StepParams))}, Category::workspace);
    if (settings.replays) replay = plan.persistent<int32_t>("replay", {T, shape.K}, Category::workspace);
    run(forward_only), run(forward_backward);  // no arena yet: this plans
    plan.place();
    arena = std::make_unique<Arena<Device>>(dev, plan, false);
    x.run_with(arena.get());
    StepStats no_stats;
    StepParams step;
    dev.to_device(stats, &no_stats, sizeof no_stats);
    dev.to_device(params, &step, sizeof step);
    dev.zero(load, size_t(E) * sizeof(int32_t));
  }

  void run(Id id) {
    plan.set_place(0, "moe");
    const RouterShape router = shape.router();
    const ExpertShape experts = shape.experts();
    MoeLayer<Device> layer{
        x,
        router,
        {x, experts, router.N, experts.R, 0, settings.policy, settings.dispatch, {w13, w2, dw13, dw2}, {}},
        wg,
        dwg,
        {},
        {},
        {x, router.N, router.C},
        0,
        load,
        replay,
        {},
        stats,
        params,
        {1, 0, router.N, router.K, router.E},
        {},
        {},
        {},
        {}};
    saved = {};
    bool keep = id == forward_backward;
    x.begin(id);
    if (rung) {
      out = rung->forward(layer, saved, input, residual, keep);
      if (keep) dinput = rung->backward(layer, saved, input, dout);
    } else {
      out = layer.forward(saved, input, residual, keep, Category::workspace, false);
      if (keep) dinput = layer.backward(saved, input, dout);
    }
  }

  // Everything that lives for a part of a program only, filled with NaN bytes.
  void poison() {
    for (TensorInfo& t : plan.tensors())
      if (!t.persistent && t.first >= 0) dev.fill_byte(t.data, 0xFF, t.bytes);
  }

  // What is kept between forward and backward.
  size_t saved_bytes() const {
    return plan.layer_bytes(0, "moe", Category::saved) + plan.layer_bytes(0, "moe", Category::metadata);
  }
  size_t metadata_bytes() const { return plan.layer_bytes(0, "moe", Category::metadata); }
  // The workspace that the layer's ops share, without the tensors that are handed in.
  size_t transient_bytes() const {
    size_t bytes = plan.category_bytes(Category::workspace);
    for (const TensorInfo& t : plan.tensors())
      if (t.persistent && t.category == Category::workspace) bytes -= t.bytes;
    return bytes;
  }
};
