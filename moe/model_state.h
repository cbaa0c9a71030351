// What a model keeps from one program to the next: the micro-batches under way.
#pragma once
#include "moe/layer.h"

// What the forward pass of a layer leaves for backward.
template <class Device>
struct LayerSaved {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  Tensor<Real> input;                 // (n,C) residual stream entering the layer, of this rank's n tokens
  Tensor<Acc> rstd1, rstd2, qk_rstd;  // (n), (n), (N, NH+NKV)
  Tensor<Real> qkv, o, middle, x;     // middle: residual after attention; x: normalised input of the MoE layer
  Tensor<Acc> lse;                    // (N, NH)
  MoeSaved<Device> moe;
  MlpSaved<Device> mlp;
};

// A micro-batch under way: what it is given, and what it keeps from forward to backward.
template <class Device>
struct Slot {
  Tensor<int32_t> tokens, targets;
  std::vector<Tensor<int32_t>> replay;  // by layer, as the rest
  Tensor<typename Device::Real> input;  // (n,C) from the stage before
  std::vector<LayerSaved<Device>> saved;
  Tensor<typename Device::Real> residual;  // after the last layer
  std::vector<int64_t> arrived_rows;       // of the experts, where they come in passes
};

// One way through the network.
template <class Device>
struct Pass {
  int64_t B, T;
  bool training, decoding;
  Slot<Device>& slot;
  Tensor<int32_t> tokens, positions;
  int64_t N() const { return B * T; }
};
