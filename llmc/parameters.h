// The parameter table: one row a logical tensor (the names of Hugging Face). It alone drives allocation,
// initialisation, weight decay, gradient norm, checkpoint names and the names in tests.
//
// Logical tensors live in buffers that ops like: q, k and v are rows of one matrix, the experts of a layer are one
// array with gate and up rows interleaved. A RowMap says where row i of a logical tensor is in its buffer.
#pragma once
#include <string>
#include <vector>

#include "llmc/gradient.h"

enum class Init { zeros, ones, normal, residual };       // normal: N(0, 0.02); residual: N(0, 0.02/sqrt(2L))
enum class Shard { replicated, rows, columns, expert };  // how tensor and expert parallelism cut it

// Row i is physical row first + (i / block) * stride + i % block.
struct RowMap {
  int64_t first = 0, block = 1, stride = 1;
  constexpr int64_t operator()(int64_t i) const { return first + i / block * stride + i % block; }
};

struct Parameter {
  std::string name;
  int64_t rows = 1, cols = 1;  // a vector has rows 1
  bool vector = false;         // written to files as shape (cols)
  Init init = Init::normal;
  bool decay = false;  // matrices only
  Shard shard = Shard::replicated;
  int layer = -1;
  int buffer = -1;
  RowMap map;
  int64_t first_partial = 0;  // its first 64-row block in the table of norm partials
};

// A parameter as the update ops see it, in device memory. Pointers are to the first element of the buffer.
template <class Device>
struct ParameterView {
  typename Device::Real* weight;
  typename Device::Acc* master;  // the weight itself where Real is Acc
  typename Device::Acc *m, *v;
  Grad<Device> grad;
  Grad<Device> second_grad;  // tied head: kept apart until the update; else null
  RowMap map;
  int64_t rows, cols, first_partial;
  bool decay;
};

inline constexpr int64_t norm_block_rows = 64;

template <class Device>
class ParameterTable {
 public:
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  static constexpr bool has_master = !std::is_same_v<Real, Acc>;

  struct Buffer {
    std::string name;
    int64_t rows, cols;
    Tensor<Real> weight;
    GradTensor<Device> grad, second_grad;
    Tensor<Acc> master, m, v;
  };

  // Declares a buffer (rows, cols) and its state on the plan. `train` false: weights only. wide_grad: the gradient is
  // Acc. second_grad: one more Acc gradient of the same shape (tied embeddings). written_grad: a step's only writer of the
  // gradient writes it (gradient.h).
  int add_buffer(Plan& plan, const std::string& name, int64_t rows, int64_t cols, bool train, bool wide_grad,
                 bool second_grad = false, bool written_grad = false) {
    Buffer b{name, rows, cols, plan.persistent<Real>(name, {rows, cols}, Category::weights), {}, {}, {}, {}, {}};
    if (train) {
      auto gradient = [&](bool wide, const char* suffix) {
        GradTensor<Device> g;
        if (wide)
          g.wide = plan.persistent<Acc>(name + suffix, {rows, cols}, Category::gradients);
        else
          g.narrow = plan.persistent<Real>(name + suffix, {rows, cols}, Category::gradients);
        return g;
      };
      b.grad = gradient(wide_grad, ".grad");
      b.grad.add = !written_grad;
      if (second_grad) b.second_grad = gradient(true, ".grad2");
      if (has_master) b.master = plan.persistent<Acc>(name + ".master", {rows, cols}, Category::optimizer);
      b.m = plan.persistent<Acc>(name + ".m", {rows, cols}, Category::optimizer);
      b.v = plan.persistent<Acc>(name + ".v", {rows, cols}, Category::optimizer);
    }
    buffers_.push_back(b);
    return int(buffers_.size()) - 1;
  }

  void add(Parameter p) {
    p.first_partial = n_partials_;
    n_partials_ += (p.rows + norm_block_rows - 1) / norm_block_rows;
    parameters_.push_back(std::move(p));
  }

  const std::vector<Parameter>& parameters() const { return parameters_; }
  const Buffer& buffer(int i) const { return buffers_[i]; }
  const std::vector<Buffer>& buffers() const { return buffers_; }
  int64_t partials() const { return n_partials_; }

  std::vector<ParameterView<Device>> views() const {
    std::vector<ParameterView<Device>> views;
    for (const Parameter& p : parameters_) {
      const Buffer& b = buffers_[p.buffer];
      Acc* master = b.master;
      if constexpr (!has_master) master = b.weight;
      views.push_back(
          {b.weight, master, b.m, b.v, b.grad, b.second_grad, p.map, p.rows, p.cols, p.first_partial, p.decay});
    }
    return views;
  }

 private:
  std::vector<Buffer> buffers_;
  std::vector<Parameter> parameters_;
  int64_t n_partials_ = 0;
};
