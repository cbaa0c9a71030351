// Runs the MoE layer of library/gpt_moe.h on the memory of a device, with edges around what it may write.
#pragma once
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "library/gpt_moe.h"
#include "llmc/gpu.h"
#include "llmc/random.h"

template <class Real>
constexpr moe::Dtype library_dtype() {
  return std::is_same_v<Real, bf16>    ? moe::Dtype::bf16
         : std::is_same_v<Real, float> ? moe::Dtype::f32
                                       : moe::Dtype::f64;
}

// Inputs and results of a layer; inputs are exact in bf16, so that all types are given the same ones.
struct LayerValues {
  using Values = std::vector<double>;
  Values x, dout, residual, router, w13, w2;
  Values out, dx, d_router, d_w13, d_w2, losses;
  std::vector<int32_t> load;

  explicit LayerValues(const moe::LayerConfig& c) {
    uint64_t stream = 0;
    auto fill = [&](Values& v, int64_t n, double scale) {
      ++stream;
      for (int64_t i = 0; i < n; ++i) v.push_back(double(float(bf16(float(scale * random_normal(7, stream, i))))));
    };
    const int64_t NC = c.tokens * c.d_model, EC = c.n_expert * c.d_model;
    fill(x, NC, 1), fill(dout, NC, 1), fill(residual, NC, 1), fill(router, EC, 0.3);
    fill(w13, EC * 2 * c.d_expert, 0.2), fill(w2, EC * c.d_expert, 0.2);
  }
};

// Forward, and backward (which `times` does that often) where times > 0. Whatever the layer writes begins as NaN, where it
// does not add, and behind every block stand bytes that must stay.
template <class Device>
void run_layer(Device& dev, moe::LayerConfig c, LayerValues& v, int times = 1) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  constexpr size_t edge = 64;
  struct Block {
    char* data;
    size_t bytes;
  };
  std::vector<Block> blocks;
  auto block = [&](size_t bytes) -> void* {
    auto* data = static_cast<char*>(dev.allocate(bytes + edge));
    dev.fill_byte(data, 0xFF, bytes), dev.fill_byte(data + bytes, 0x5A, edge);
    blocks.push_back({data, bytes});
    return data;
  };
  auto input = [&](const LayerValues::Values& values) {
    std::vector<Real> typed;
    for (double value : values) typed.push_back(Real(typename Device::Acc(value)));
    void* p = block(typed.size() * sizeof(Real));
    dev.to_device(p, typed.data(), typed.size() * sizeof(Real));
    return p;
  };
  auto output = [&]<class T>(T*, LayerValues::Values& values, const void* p, size_t n) {
    std::vector<T> typed(n);
    dev.to_host(typed.data(), p, n * sizeof(T));
    values.clear();
    for (T value : typed) values.push_back(double(Acc(value)));
  };
  c.dtype = library_dtype<Real>();
  moe::Layer layer(c);
  moe::Weights weights{input(v.router), input(v.w13), input(v.w2)};
  void *x = input(v.x), *dout = input(v.dout), *residual = input(v.residual);
  void *out = block(v.x.size() * sizeof(Real)), *dx = block(v.x.size() * sizeof(Real));
  void *saved = block(layer.saved_bytes()), *workspace = block(layer.workspace_bytes());
  void *losses = block(16), *load = block(size_t(c.n_expert) * 4);
  dev.zero(load, size_t(c.n_expert) * 4);
  if constexpr (Device::has_graphs) dev.synchronize();
  const moe::Routing routing{static_cast<double*>(losses), static_cast<int32_t*>(load)};
  CUstream_st* stream = nullptr;
  if constexpr (Device::has_graphs) stream = dev.stream;
  layer.forward(out, times > 0 ? saved : nullptr, workspace, x, residual, weights, routing, stream);
  output((Real*)nullptr, v.out, out, v.x.size());
  v.losses.resize(2), dev.to_host(v.losses.data(), losses, 16);
  v.load.resize(size_t(c.n_expert)), dev.to_host(v.load.data(), load, v.load.size() * 4);
  if (times > 0) {
    auto gradient = [&](const LayerValues::Values& weight) {
      const size_t bytes = weight.size() * (c.wide_gradients ? sizeof(Acc) : sizeof(Real));
      void* p = block(bytes);
      if (c.add_gradients) dev.zero(p, bytes);
      return p;
    };
    moe::WeightGradients g{gradient(v.router), gradient(v.w13), gradient(v.w2)};
    for (int i = 0; i < times; ++i) {
      dev.fill_byte(workspace, 0xFF, layer.workspace_bytes());  // nothing but `saved` comes from the forward pass
      layer.backward(dx, g, saved, workspace, x, dout, weights, stream);
    }
    output((Real*)nullptr, v.dx, dx, v.x.size());
    auto read = [&](LayerValues::Values& to, const void* p, size_t n) {
      c.wide_gradients ? output((Acc*)nullptr, to, p, n) : output((Real*)nullptr, to, p, n);
    };
    read(v.d_router, g.router, v.router.size()), read(v.d_w13, g.w13, v.w13.size()), read(v.d_w2, g.w2, v.w2.size());
  }
  for (Block b : blocks) {
    std::array<unsigned char, edge> after;
    dev.to_host(after.data(), b.data + b.bytes, edge);
    for (unsigned char byte : after) EXPECT_EQ(byte, 0x5A) << "written past the end of a block of " << b.bytes;
    dev.release(b.data);
  }
}
