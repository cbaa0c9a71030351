// A parameter gradient as ops see it. Its type is chosen at run time (--grad-dtype): the storage type where a single
// call writes it, the type of sums wherever more than one call adds to it.
//
// Gradients are added to: they are zeroed before a step. Where a step has a single writer (one micro-step, one product),
// a product may write instead: its gradient is then neither zeroed nor read, whatever stands there. That is for
// matmul_backward_weight() and the two weight gradients of the experts; all other ops add.
#pragma once
#include "llmc/device.h"
#include "llmc/plan.h"

template <class Device>
struct Grad {
  void* data = nullptr;
  bool wide = true;  // elements are Device::Acc; else Device::Real
  bool add = true;   // to what stands there; else write, the bits of adding to zeros but for the sign of a zero

  explicit operator bool() const { return data != nullptr; }
  // Calls f with a typed pointer to the first element.
  template <class F>
  void visit(F f) const {
    if (wide)
      f(static_cast<typename Device::Acc*>(data));
    else
      f(static_cast<typename Device::Real*>(data));
  }
};

// Adds a finished contribution of n values to gradient elements [first, first + n), or writes it: one rounding.
template <class Device>
void add_to_gradient(const Grad<Device>& g, int64_t first, const typename Device::Acc* values, int64_t n) {
  using Acc = typename Device::Acc;
  g.visit([&](auto* p) {
    using T = std::remove_reference_t<decltype(*p)>;
    for (int64_t i = 0; i < n; ++i) p[first + i] = T(g.add ? Acc(p[first + i]) + values[i] : values[i]);
  });
}

// The planned tensor behind a Grad.
template <class Device>
struct GradTensor {
  Tensor<typename Device::Real> narrow;
  Tensor<typename Device::Acc> wide;
  bool add = true;
  operator Grad<Device>() const {
    if (wide) return {wide.data(), true, add};
    return {narrow.data(), false, add};
  }
  TensorInfo* tensor() const { return wide ? wide.info : narrow.info; }
};
