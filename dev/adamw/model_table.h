// The parameters of a model as update ops see them: hundreds of tensors from 768 values to 38 million, some of them
// rows of a larger buffer. Shared by the families adamw and global_norm.
#pragma once
#include <string>
#include <vector>

#include "llmc/parameters.h"
#include "moe/experts.h"

struct ModelShape {
  std::string name;
  int64_t layers, E, C, F, V;  // V 0: no embedding and no classifier

  int64_t embedding() const { return V * C; }
  // Attention of width C; two norms; a router; gate, up and down projections.
  int64_t layer() const { return 4 * C * C + 2 * C + E * C + E * 3 * F * C; }
  int64_t parameters() const { return 2 * embedding() + layers * layer(); }
  int64_t wide() const { return 2 * embedding(); }  // the first of all, whose gradients are fp32
};

inline const std::vector<ModelShape>& model_shapes() {
  static const std::vector<ModelShape> all = {{"fine-128x8-layer", 1, 128, 1536, 256, 0},
                                              {"gpt124", 12, 1, 768, 2048, 50304},
                                              {"gpt124-8x2", 12, 8, 768, 2048, 50304}};
  return all;
}
// All kinds of tensors, numbers of rows that are no multiple of 64.
inline ModelShape reduced_model(ModelShape s) { return {s.name, 2, 3, 136, 40, s.V ? 203 : 0}; }

// All parameters one after another; gradients of the first shape.wide() in wide_grad, of the others in grad.
template <class Device>
struct ModelState {
  typename Device::Real *weight, *grad;
  typename Device::Acc *wide_grad, *master, *m, *v;
};

// The table, and in n_partials how many blocks of 64 rows it has.
template <class Device>
std::vector<ParameterView<Device>> model_views(const ModelShape& s, const ModelState<Device>& p, int64_t& n_partials) {
  std::vector<ParameterView<Device>> views;
  n_partials = 0;
  int64_t base = 0;  // of the buffer in question
  auto add = [&](RowMap map, int64_t rows, int64_t cols) {
    const Grad<Device> grad =
        base < s.wide() ? Grad<Device>{p.wide_grad + base, true} : Grad<Device>{p.grad + base - s.wide(), false};
    const bool decay = rows > 1;
    views.push_back(
        {p.weight + base, p.master + base, p.m + base, p.v + base, grad, {}, map, rows, cols, n_partials, decay});
    n_partials += (rows + norm_block_rows - 1) / norm_block_rows;
  };
  auto whole = [&](int64_t rows, int64_t cols) { add({}, rows, cols), base += rows * cols; };
  for (int i = 0; s.V > 0 && i < 2; ++i) whole(s.V, s.C);
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    whole(1, s.C), whole(1, s.C);
    for (int64_t part = 0; part < 3; ++part) add({part * s.C, 1, 1}, s.C, s.C);  // q, k and v: rows of one matrix
    base += 3 * s.C * s.C;
    whole(s.C, s.C);
    whole(s.E, s.C);
    for (int64_t e = 0; e < s.E; ++e) {
      add({w13_row(0, false), 8, 16}, s.F, s.C), add({w13_row(0, true), 8, 16}, s.F, s.C);  // rows interleaved
      base += 2 * s.F * s.C;
      whole(s.C, s.F);
    }
  }
  return views;
}
