// The six expert products, each alone. 0: production. portable: the kernels for every GPU, where production has special
// ones. 128x128 ... : on Hopper, production with that tile, where the product comes in it. naive: a thread an element
// (naive.cuh), timed only where it does not take seconds. cublaslt: one product an expert through cuBLASLt, on rows that
// were gathered beforehand and without what ours fuse (SwiGLU, its backward, the gate gradient).
//
//   make -C dev experts && dev/experts/experts [variant] [shape]     a shape: olmoe-64x8.up, or olmoe-64x8 for all six
#include "dev/experts/buffers.h"
#include "dev/experts/naive.cuh"
#include "llmc/cuda_matmul.cuh"
#include "moe/experts_hopper_kernels.h"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  MoeShape moe;
  Product product;
};
std::vector<Shape> all_shapes() {
  std::vector<Shape> all;
  for (const MoeShape& s : moe_shapes()) {
    if (s.name.starts_with("blaze")) continue;  // moe_layer has them
    for (Product p : products) all.push_back({s.name + "." + name_of(p), s, p});
  }
  return all;
}
Shape reduced(Shape s) { return {s.name, reduced_moe(s.moe), s.product}; }

void simple(GpuBase& dev, Product p, const ExpertBuffers& b) {
  const ExpertShape& s = b.s;
  int64_t C = s.C, F = s.F;
  const int32_t* none = nullptr;
  naive::Weight w13{b.w13, 2 * F * C, C, 1}, w2{b.w2, C * F, F, 1};                        // (outputs, inputs)
  naive::Weight w13_transposed{b.w13, 2 * F * C, 1, C}, w2_transposed{b.w2, C * F, 1, F};  // backward
  switch (p) {
    case Product::up:
      naive::launch_rows_product(dev, b.h, b.x, w13, b.offsets, b.row_slot, s, 2 * F, C);
      launch(dev, naive::swiglu, unsigned(ceil_div(s.R * F, naive::block)), naive::block, 0, b.a, b.h, s.R * F, F);
      return;
    case Product::down:
      return naive::launch_rows_product(dev, b.y, b.a, w2, b.offsets, none, s, C, F);
    case Product::down_backward:
      naive::launch_rows_product(dev, b.da, b.dout, w2_transposed, b.offsets, b.row_slot, s, F, C);
      launch(dev, naive::down_epilogue, unsigned(s.R), naive::block, 0, b.dh, b.a_scaled, b.dgates, b.da, b.h, b.gates,
             b.row_slot, F);
      return;
    case Product::dW2:
      return naive::launch_weight_product(dev, b.dw2, b.dout, b.row_slot, b.a_scaled, none, b.offsets, s, C, F);
    case Product::dX:
      return naive::launch_rows_product(dev, b.dx_rows, b.dh, w13_transposed, b.offsets, none, s, C, 2 * F);
    case Product::dW13:
      return naive::launch_weight_product(dev, b.dw13, b.dh, none, b.x, b.row_slot, b.offsets, s, 2 * F, C);
  }
}

void library(GpuBase& dev, Product p, const ExpertBuffers& b, void* scratch) {
  int64_t C = b.s.C, F = b.s.F;
  for (int64_t e = 0; e < b.s.E; ++e) {
    int64_t r = b.routing.offsets[e], n = b.routing.offsets[e + 1] - r;
    if (n == 0) continue;
    MatrixView x = view(b.x_rows + r * C, C), dout = view(b.dout_rows + r * C, C), h = view(b.h + r * 2 * F, 2 * F);
    MatrixView a = view(b.a + r * F, F), a_scaled = view(b.a_scaled + r * F, F), dh = view(b.dh + r * 2 * F, 2 * F);
    MatrixView w13 = view(b.w13 + e * 2 * F * C, C), w2 = view(b.w2 + e * C * F, F);
    switch (p) {
      case Product::up:
        dense_product(dev, h, scratch, x, false, w13, true, n, 2 * F, C, false);
        break;
      case Product::down:
        dense_product(dev, view(b.y + r * C, C), scratch, a, false, w2, true, n, C, F, false);
        break;
      case Product::down_backward:  // dA' takes the place of a
        dense_product(dev, a, scratch, dout, false, w2, false, n, F, C, false);
        break;
      case Product::dW2:
        dense_product(dev, view(b.dw2 + e * C * F, F), scratch, dout, true, a_scaled, false, C, F, n, true);
        break;
      case Product::dX:
        dense_product(dev, view(b.dx_rows + r * C, C), scratch, dh, false, w13, false, n, C, 2 * F, false);
        break;
      case Product::dW13:
        dense_product(dev, view(b.dw13 + e * 2 * F * C, C), scratch, dh, true, x, false, 2 * F, C, n, true);
        break;
    }
  }
}

std::vector<Output> outputs_of(Product p, const ExpertBuffers& b) {
  int64_t RC = b.s.R * b.s.C, RF = b.s.R * b.s.F, weights = b.s.E * b.s.C * b.s.F;
  switch (p) {
    case Product::up:
      return {output("h", b.h, 2 * RF), output("a", b.a, RF)};
    case Product::down:
      return {output("y", b.y, RC)};
    case Product::down_backward:
      return {output("dh", b.dh, 2 * RF), output("a_scaled", b.a_scaled, RF), output("dgates", b.dgates, b.s.R)};
    case Product::dW2:
      return {output("dW2", b.dw2, weights, 0, Before::gradient)};
    case Product::dX:
      return {output("dx_rows", b.dx_rows, RC)};
    case Product::dW13:
      return {output("dW13", b.dw13, 2 * weights, 0, Before::gradient)};
  }
  return {};
}

Case make(Lab& lab, const Shape& shape) {
  auto& dev = lab.dev;
  Product p = shape.product;
  ExpertBuffers b = make_buffers(lab, shape.moe);
  void* library_scratch = lab.memory<char>(int64_t(dense_scratch_bytes()));

  Case c;
  c.shape = shape.name;
  bool both_halves = p == Product::up || p == Product::dX || p == Product::dW13;
  c.forward.flops = (both_halves ? 4.0 : 2.0) * double(b.s.R) * double(b.s.C) * double(b.s.F);
  c.outputs = outputs_of(p, b);
  c.variants.push_back({"production", "ours", [=, &dev] { production(dev, p, b); }});
  c.variants.push_back({"portable", "ours-portable", [=, &dev] {
                          dev.portable = true;
                          production(dev, p, b);
                          dev.portable = false;
                        }});
  const bool sums_rows = p == Product::dW2 || p == Product::dW13, has_slots = p == Product::down_backward;
  for (int tile = 0; tile < hopper::tile_choices; ++tile)
    if (hopper::usable(dev, b.s) && hopper::comes_in(tile, sums_rows, has_slots))
      c.variants.push_back({hopper::tile_names[tile], std::string("ours-") + hopper::tile_names[tile], [=, &dev] {
                              dev.expert_tile = tile;
                              production(dev, p, b);
                              dev.expert_tile = -1;
                            }});
  if (c.forward.flops < 4e11 || !lab.options.variants.empty())
    c.variants.push_back({"naive", "ours-naive", [=, &dev] { simple(dev, p, b); }});
  Variant products{"cublaslt", "cublaslt", [=, &dev] { library(dev, p, b, library_scratch); }};
  products.is_library = true, products.checked = p != Product::down_backward;
  if (p == Product::up) products.missing = {"a"};
  c.variants.push_back(products);
  c.reference = [=, &lab] { return reference(lab, p, b); };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "experts", all_shapes(), make, reduced); }
