// The parameter table: one row a logical tensor (the names of Hugging Face). It alone drives allocation,
// initialisation, weight decay, gradient norm, checkpoint names and the names in tests.
//
// Logical tensors live in buffers that ops like: q, k and v are rows of one matrix, the experts of a layer are one
// array with gate and up rows interleaved. A RowMap says where row i of a logical tensor is in its buffer.
#pragma once
#include <string>
#include <vector>

#include "llmc/gradient.h"
#include "llmc/homes.h"

enum class Init { zeros, ones, normal, residual };  // normal: N(0, 0.02); residual: N(0, 0.02/sqrt(2L))

// Row i is physical row first + (i / block) * stride + i % block.
struct RowMap {
  int64_t first = 0, block = 1, stride = 1;
  constexpr int64_t operator()(int64_t i) const { return first + i / block * stride + i % block; }
  // How many of `rows` rows lie before physical row `end`.
  constexpr int64_t before(int64_t end, int64_t rows) const {
    if (end <= first) return 0;
    int64_t whole = (end - first) / stride, rest = (end - first) % stride;
    int64_t n = whole * block + (rest < block ? rest : block);
    return n < rows ? n : rows;
  }
};

struct Parameter {
  std::string name;
  int64_t rows = 1, cols = 1;  // of the whole tensor; a vector has rows 1
  bool vector = false;         // written to files as shape (cols)
  Init init = Init::normal;
  bool decay = false;  // matrices only
  int layer = -1;
  int buffer = -1;  // that holds the part below; -1: this rank has no part of it
  RowMap map;       // from a part's rows to those of the buffer's space (homes.h)
  // Ranks cut it into `cuts` parts of part_rows x part_cols, by rows or by columns; slab 0 of the buffer's space is part
  // `cut`. Each part has norm partials of its own.
  int cuts = 1, cut = 0;
  bool cut_rows = false;
  int64_t first_partial = 0;  // the first 64-row block of its first part in the table of norm partials

  int64_t part_rows() const { return cut_rows ? (rows + cuts - 1) / cuts : rows; }
  int64_t part_cols() const { return cut_rows ? cols : cols / cuts; }
  // Of part c: its first row and column in the whole, and its rows (the last part may have fewer).
  int64_t row_of(int c) const { return cut_rows ? c * part_rows() : 0; }
  int64_t col_of(int c) const { return cut_rows ? 0 : c * part_cols(); }
  int64_t rows_of(int c) const { return std::clamp<int64_t>(rows - row_of(c), 0, part_rows()); }
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
  int64_t first_block = first_partial;  // blocks of 64 rows in the views before it: views() leave out other ranks' rows
};

inline constexpr int64_t norm_block_rows = 64;
constexpr int64_t norm_blocks(int64_t rows) { return (rows + norm_block_rows - 1) / norm_block_rows; }

template <class Device>
class ParameterTable {
 public:
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  static constexpr bool has_master = !std::is_same_v<Real, Acc>;

  struct Buffer {
    std::string name;
    int64_t rows, cols;  // what this rank computes with
    Tensor<Real> weight;
    bool wide_grad;  // of all its hosts; the second one is Acc
    bool two_grads;
    GradTensor<Device> grad, second_grad;  // null where this host has no part of it
    // Of the rows of its optimizer state that are at home on this rank (homes.h), as (slabs, home rows, cols):
    Homes homes;
    Tensor<Acc> master, m, v;
    Tensor<Acc> sum, second_sum;  // the gradient summed over the ranks; null where this rank's is the whole of it
    Tensor<Real> updated;         // new weights that are not this rank's to compute with; null where all are

    int64_t home_rows() const { return homes.home_end() - homes.home_begin(); }
    int64_t home_size() const { return homes.slabs * home_rows() * cols; }
  };

  // Declares a buffer and its state on the plan. `train` false: weights only. wide_grad: the gradient is Acc.
  // second_grad: one more Acc gradient of the same shape (tied embeddings). written_grad: a step's only writer of the
  // gradient writes it (gradient.h).
  int add_buffer(Plan& plan, const std::string& name, const Homes& homes, int64_t cols, bool train, bool wide_grad,
                 bool second_grad = false, bool written_grad = false) {
    int64_t rows = homes.mine().rows;
    Buffer b;
    b.name = name, b.rows = rows, b.cols = cols, b.homes = homes, b.wide_grad = wide_grad, b.two_grads = second_grad;
    b.weight = plan.persistent<Real>(name, {rows, cols}, Category::weights);
    if (train) {
      auto gradient = [&](bool wide, const char* suffix) {
        GradTensor<Device> g;
        if (wide)
          g.wide = plan.persistent<Acc>(name + suffix, {rows, cols}, Category::gradients);
        else
          g.narrow = plan.persistent<Real>(name + suffix, {rows, cols}, Category::gradients);
        return g;
      };
      if (homes.has_gradient(homes.rank)) b.grad = gradient(wide_grad, ".grad");
      b.grad.add = !written_grad;
      if (second_grad && homes.has_second_gradient(homes.rank)) b.second_grad = gradient(true, ".grad2");
      std::vector<int64_t> home{homes.slabs * b.home_rows(), cols};
      auto state = [&]<class T>(Tensor<T>& t, const char* suffix, Category category) {
        if (b.home_size()) t = plan.persistent<T>(name + suffix, home, category);
      };
      if (has_master || !homes.home_is_mine()) state(b.master, ".master", Category::optimizer);
      state(b.m, ".m", Category::optimizer), state(b.v, ".v", Category::optimizer);
      if (!homes.gradient_is_mine()) {
        state(b.sum, ".sum", Category::gradients);
        if (second_grad) state(b.second_sum, ".sum2", Category::gradients);
      }
      if (has_master && !homes.home_is_mine()) state(b.updated, ".updated", Category::weights);
    }
    buffers_.push_back(b);
    return int(buffers_.size()) - 1;
  }

  void add(Parameter p) {
    p.first_partial = n_partials_;
    n_partials_ += p.cuts * norm_blocks(p.part_rows());
    parameters_.push_back(std::move(p));
  }

  const std::vector<Parameter>& parameters() const { return parameters_; }
  const Buffer& buffer(int i) const { return buffers_[i]; }
  const std::vector<Buffer>& buffers() const { return buffers_; }
  int64_t partials() const { return n_partials_; }
  // Where each tensor's norm partials begin, and where the last one's end.
  std::vector<int64_t> first_partials() const {
    std::vector<int64_t> first;
    for (const Parameter& p : parameters_) first.push_back(p.first_partial);
    first.push_back(n_partials_);
    return first;
  }

  // Weights of the rows at home here: where they stand if this rank computes with them all, else new ones by themselves.
  static Real* home_weight(const Buffer& b) {
    if (b.homes.home_is_mine()) return b.weight + b.homes.home_at() * b.cols;
    if constexpr (!has_master) return b.master;
    return b.updated;
  }

  // What this rank updates: of every tensor the rows that are at home here, each slab of columns by itself. The arena is
  // allocated.
  std::vector<ParameterView<Device>> views() const {
    std::vector<ParameterView<Device>> views;
    int64_t blocks = 0;
    each_home([&](const Parameter& p, const Buffer& b, int slab, int64_t row0, int64_t row1) {
      const int64_t begin = b.homes.home_begin(), at = slab * b.home_rows() * b.cols, mine = b.homes.home_at() * b.cols;
      ParameterView<Device> v{};
      v.weight = home_weight(b) + at;
      v.m = b.m + at, v.v = b.v + at;
      if constexpr (has_master)
        v.master = b.master + at;
      else
        v.master = v.weight;
      v.grad = b.sum ? Grad<Device>{b.sum + at, true} : shifted(b.grad, mine);
      if (b.two_grads)
        v.second_grad = b.second_sum ? Grad<Device>{b.second_sum + at, true} : shifted(b.second_grad, mine);
      v.map = {p.map(row0) - begin, p.map.block, p.map.stride};
      v.rows = row1 - row0, v.cols = b.cols, v.decay = p.decay;
      v.first_partial = p.first_partial + (p.cut + slab) * norm_blocks(p.part_rows()) + row0 / norm_block_rows;
      v.first_block = blocks, blocks += norm_blocks(v.rows);
      views.push_back(v);
    });
    return views;
  }
  int64_t n_views() const { return views_of(0, int(buffers_.size())).second; }
  // Views of the buffers [first, last), which are neighbours: how many come before them, and how many they are.
  std::pair<int64_t, int64_t> views_of(int first, int last) const {
    int64_t view = 0, before = 0, n = 0;
    each_home([&](const Parameter& p, const Buffer& b, auto&&...) {
      if (first <= p.buffer && p.buffer < last) {
        if (n == 0) before = view;
        if (before + n++ != view) fail("views of ", b.name, " are among those of other buffers");
      }
      ++view;
    });
    return {before, n};
  }

 private:
  // Calls f(parameter, buffer, slab, row0, row1) for the rows of each part that are at home here.
  template <class F>
  void each_home(F f) const {
    for (const Parameter& p : parameters_) {
      if (p.buffer < 0) continue;
      const Buffer& b = buffers_[p.buffer];
      for (int slab = 0; slab < b.homes.slabs; ++slab) {
        const int64_t rows = p.rows_of(p.cut + slab), row0 = p.map.before(b.homes.home_begin(), rows),
                      row1 = p.map.before(b.homes.home_end(), rows);
        if (row0 < row1) f(p, b, slab, row0, row1);
      }
    }
  }
  static Grad<Device> shifted(Grad<Device> g, int64_t n) {
    g.visit([&](auto* p) { g.data = p + n; });
    return g;
  }

  std::vector<Buffer> buffers_;
  std::vector<Parameter> parameters_;
  int64_t n_partials_ = 0;
};
