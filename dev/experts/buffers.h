// The tensors of the six products at one shape, and the CPU's answer to each.
#pragma once
#include "dev/moe_shapes.h"
#include "dev/routing.h"

enum class Product { up, down, down_backward, dW2, dX, dW13 };
inline constexpr Product products[] = {Product::up,  Product::down, Product::down_backward,
                                       Product::dW2, Product::dX,   Product::dW13};
inline const char* name_of(Product p) {
  static const char* names[] = {"up", "down", "down_backward", "dW2", "dX", "dW13"};
  return names[int(p)];
}

// Every product has inputs of its own, so that each can be run alone and again. A weight product reads what others
// write, but never in the same case.
struct ExpertBuffers {
  ExpertShape s;
  Routing routing;
  const int32_t *offsets, *row_slot;
  bf16 *x, *dout, *x_rows, *dout_rows;  // (N,C); and gathered (R,C), for the library
  bf16 *w13, *w2, *dw13, *dw2;
  bf16 *h, *a, *dh, *a_scaled, *y, *dx_rows;
  float *gates, *dgates, *da;  // da (R,F): for those that do not fuse
  char* scratch;
};

inline ExpertBuffers make_buffers(bench::Lab& lab, const MoeShape& shape) {
  ExpertBuffers b;
  ExpertShape s = b.s = shape.experts();
  int64_t N = shape.T, RC = s.R * s.C, RF = s.R * s.F, weights = s.E * s.C * s.F;
  b.routing = make_routing(lab, N, s.K, s.E);
  b.offsets = b.routing.plan.offsets, b.row_slot = b.routing.plan.row_slot;
  b.x = lab.normal<bf16>(N * s.C), b.dout = lab.normal<bf16>(N * s.C);
  b.x_rows = lab.memory<bf16>(RC), b.dout_rows = lab.memory<bf16>(RC);
  dispatch_gather(lab.dev, b.x_rows, b.x, b.offsets, b.row_slot, N, s.K, s.E, s.C);
  dispatch_gather(lab.dev, b.dout_rows, b.dout, b.offsets, b.row_slot, N, s.K, s.E, s.C);
  b.w13 = lab.normal<bf16>(2 * weights, 0.02), b.w2 = lab.normal<bf16>(weights, 0.02);
  b.dw13 = lab.memory<bf16>(2 * weights), b.dw2 = lab.memory<bf16>(weights);
  b.h = lab.normal<bf16>(2 * RF), b.dh = lab.normal<bf16>(2 * RF);
  b.a = lab.normal<bf16>(RF, 0.3), b.a_scaled = lab.normal<bf16>(RF, 0.2);
  b.y = lab.memory<bf16>(RC), b.dx_rows = lab.memory<bf16>(RC);
  b.gates = lab.normal<float>(s.R, 0.1, 0.5), b.dgates = lab.memory<float>(s.R), b.da = lab.memory<float>(RF);
  b.scratch = lab.memory<char>(int64_t(experts_scratch_bytes<Gpu<bf16>>(s)));
  return b;
}

// The production launcher of a product; without `a`, which the default recompute policy does not keep.
inline void production(Gpu<bf16>& dev, Product p, const ExpertBuffers& b) {
  const bf16* no_a = nullptr;
  Grad<Gpu<bf16>> dw13{b.dw13, false}, dw2{b.dw2, false};
  switch (p) {
    case Product::up:
      return experts_up(dev, b.h, b.a, b.scratch, b.x, b.w13, b.offsets, b.row_slot, b.s);
    case Product::down:
      return experts_down(dev, b.y, b.scratch, b.a, b.w2, b.offsets, b.s);
    case Product::down_backward:
      return experts_down_backward(dev, b.dh, b.a_scaled, b.dgates, b.scratch, b.dout, b.w2, b.h, no_a, b.gates,
                                   b.offsets, b.row_slot, b.row_slot, b.s);
    case Product::dW2:
      return experts_down_backward_weight(dev, dw2, b.scratch, b.dout, b.a_scaled, b.offsets, b.row_slot, b.s);
    case Product::dX:
      return experts_up_backward_input(dev, b.dx_rows, b.scratch, b.dh, b.w13, b.offsets, b.s);
    case Product::dW13:
      return experts_up_backward_weight(dev, dw13, b.scratch, b.dh, b.x, b.offsets, b.row_slot, b.s);
  }
}

inline bench::Values reference(bench::Lab& lab, Product p, const ExpertBuffers& b) {
  using Reals = std::vector<double>;
  ExpertShape s = b.s;
  int64_t NC = s.R / s.K * s.C, RC = s.R * s.C, RF = s.R * s.F, weights = s.E * s.C * s.F;
  Cpu<double> cpu;
  std::vector<char> work(experts_scratch_bytes<Cpu<double>>(s));
  const int32_t *offsets = b.routing.offsets.data(), *row_slot = b.routing.row_slot.data();
  switch (p) {
    case Product::up: {
      Reals x = lab.host(b.x, NC), w = lab.host(b.w13, 2 * weights), h(2 * RF), a(RF);
      experts_up(cpu, h.data(), a.data(), work.data(), x.data(), w.data(), offsets, row_slot, s);
      return {h, a};
    }
    case Product::down: {
      Reals a = lab.host(b.a, RF), w = lab.host(b.w2, weights), y(RC);
      experts_down(cpu, y.data(), work.data(), a.data(), w.data(), offsets, s);
      return {y};
    }
    case Product::down_backward: {
      Reals dout = lab.host(b.dout, NC), w = lab.host(b.w2, weights), h = lab.host(b.h, 2 * RF);
      Reals gates = lab.host(b.gates, s.R), dh(2 * RF), a_scaled(RF), dgates(s.R);
      experts_down_backward(cpu, dh.data(), a_scaled.data(), dgates.data(), work.data(), dout.data(), w.data(),
                            h.data(), nullptr, gates.data(), offsets, row_slot, row_slot, s);
      return {dh, a_scaled, dgates};
    }
    case Product::dW2: {
      Reals dout = lab.host(b.dout, NC), a_scaled = lab.host(b.a_scaled, RF), dw(weights);
      experts_down_backward_weight(cpu, Grad<Cpu<double>>{dw.data(), true}, work.data(), dout.data(), a_scaled.data(),
                                   offsets, row_slot, s);
      return {dw};
    }
    case Product::dX: {
      Reals dh = lab.host(b.dh, 2 * RF), w = lab.host(b.w13, 2 * weights), dx(RC);
      experts_up_backward_input(cpu, dx.data(), work.data(), dh.data(), w.data(), offsets, s);
      return {dx};
    }
    case Product::dW13: {
      Reals dh = lab.host(b.dh, 2 * RF), x = lab.host(b.x, NC), dw(2 * weights);
      experts_up_backward_weight(cpu, Grad<Cpu<double>>{dw.data(), true}, work.data(), dh.data(), x.data(), offsets,
                                 row_slot, s);
      return {dw};
    }
  }
  return {};
}
