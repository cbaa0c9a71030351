// Parameters and their optimizer state between the device and logical tensors in host memory (Acc, row-major (rows, cols)):
// what initialisation, checkpoints and tests go through. With several processes every rank writes what it has of a tensor,
// and reads are collective.
#pragma once
#include "llmc/comm.h"
#include "llmc/parameters.h"

enum class ParameterState { weight, master, m, v, grad };

template <class Device>
class ParameterIo {
 public:
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  using Table = ParameterTable<Device>;
  using State = ParameterState;

  // host: of all ranks, in host memory; null: this process is alone. most_slabs: of any buffer's space (homes.h).
  ParameterIo(Device& device, const Table& table, const Comm* host, int most_slabs)
      : device_(device), table_(table), host_(host), most_slabs_(most_slabs) {}

  // Sets the weight, rounded to Real, and the master copy.
  void write(const Parameter& p, const Acc* values) {
    if (p.buffer < 0) return;
    const auto& b = table_.buffer(p.buffer);
    const auto& mine = b.homes.mine();
    for (const Homes::Run& run : mine.runs)
      write_rows(p, p.cut + mine.slab, b.weight.data() + run.at * b.cols, run.row, run.rows, values);
    if (b.updated) write_home(p, b.updated.data(), values);
    if (b.master) write_home(p, b.master.data(), values);
  }
  // Sets a part of the optimizer state.
  void write(const Parameter& p, State which, const Acc* values) {
    if (p.buffer >= 0) write_home(p, state_pointer(p, which), values);
  }

  // From the homes of its rows, to rank 0; elsewhere the result is empty. All ranks call it, in the same order. A gradient
  // of several ranks is there after an update.
  std::vector<Acc> read(const Parameter& p, State which) {
    std::vector<Slab> slabs(most_slabs_);
    std::vector<Acc> part = read_slabs(p, which, slabs);
    if (host_ && host_->rank() > 0) {
      gather(slabs);
      if (!part.empty()) host_->send(part.data(), int64_t(part.size()), 0, "a parameter");
      return {};
    }
    std::vector<Acc> values(p.rows * p.cols);
    place_in(values, p, slabs.data(), part);
    if (!host_) return values;
    const std::vector<Slab> all = gather(slabs);
    for (int r = 1; r < host_->size(); ++r) {
      const Slab* theirs = &all[size_t(r) * slabs.size()];
      int64_t rows = 0;
      for (size_t s = 0; s < slabs.size(); ++s) rows += theirs[s].rows;
      if (rows == 0) continue;
      part.resize(rows * p.part_cols());
      host_->receive(part.data(), int64_t(part.size()), r, "a parameter");
      place_in(values, p, theirs, part);
    }
    return values;
  }

 private:
  // Rows [row, row + rows) of part `cut` of a parameter: what is at home on a rank of one slab.
  struct Slab {
    int64_t cut, row, rows;
  };
  std::vector<Slab> gather(const std::vector<Slab>& slabs) const {
    std::vector<Slab> all(slabs.size() * size_t(host_->size()));
    host_->gather_host(all.data(), slabs.data(), int64_t(slabs.size() * sizeof(Slab)), "gather",
                       "homes of a parameter");
    return all;
  }
  void place_in(std::vector<Acc>& values, const Parameter& p, const Slab* slabs, const std::vector<Acc>& part) const {
    const Acc* data = part.data();
    for (int n = 0; n < most_slabs_; ++n)
      for (int64_t i = 0; i < slabs[n].rows; ++i, data += p.part_cols()) {
        const int cut = int(slabs[n].cut);
        std::copy_n(data, p.part_cols(), &values[(p.row_of(cut) + slabs[n].row + i) * p.cols + p.col_of(cut)]);
      }
  }

  Acc* state_pointer(const Parameter& p, State which) const {
    const auto& b = table_.buffer(p.buffer);
    return which == State::master ? b.master : which == State::m ? b.m : b.v;
  }

  // Rows of part `cut`, given by the values of the whole, into memory that holds rows [first, first + n) of the buffer's space.
  template <class T>
  void write_rows(const Parameter& p, int cut, T* base, int64_t first, int64_t n, const Acc* values) {
    const int64_t begin = p.map.before(first, p.rows_of(cut)), end = p.map.before(first + n, p.rows_of(cut)),
                  cols = p.part_cols();
    std::vector<T> rows((end - begin) * cols);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < cols; ++c)
        rows[(i - begin) * cols + c] = T(values[(p.row_of(cut) + i) * p.cols + p.col_of(cut) + c]);
    each_run(p.map, begin, end, cols, [&](int64_t row, int64_t pieces, int64_t width, int64_t pitch) {
      device_.rows_to_device(base + (p.map(row) - first) * cols, size_t(pitch) * sizeof(T),
                             rows.data() + (row - begin) * cols, size_t(width) * sizeof(T), size_t(pieces));
    });
  }
  template <class T>
  void write_home(const Parameter& p, T* base, const Acc* values) {
    const auto& b = table_.buffer(p.buffer);
    for (int s = 0; s < b.homes.slabs; ++s)
      write_rows(p, p.cut + s, base + s * b.home_rows() * b.cols, b.homes.home_begin(), b.home_rows(), values);
  }

  // What is at home here, slab after slab.
  std::vector<Acc> read_slabs(const Parameter& p, State which, std::vector<Slab>& slabs) {
    std::vector<Acc> part;
    if (p.buffer < 0) return part;
    const auto& b = table_.buffer(p.buffer);
    for (int s = 0; s < b.homes.slabs; ++s) {
      const int cut = p.cut + s;
      const int64_t begin = p.map.before(b.homes.home_begin(), p.rows_of(cut)),
                    end = p.map.before(b.homes.home_end(), p.rows_of(cut));
      slabs[s] = {cut, begin, end - begin};
      if (begin < end) append(part, p, s, begin, end, which);
    }
    return part;
  }
  void append(std::vector<Acc>& to, const Parameter& p, int slab, int64_t begin, int64_t end, State which) {
    const auto& b = table_.buffer(p.buffer);
    const int64_t at = slab * b.home_rows() * b.cols, mine = b.homes.home_at() * b.cols;
    auto read = [&]<class T>(const T* base) {
      std::vector<T> rows((end - begin) * b.cols);
      each_run(p.map, begin, end, b.cols, [&](int64_t row, int64_t pieces, int64_t width, int64_t pitch) {
        device_.rows_to_host(rows.data() + (row - begin) * b.cols, base + (p.map(row) - b.homes.home_begin()) * b.cols,
                             size_t(pitch) * sizeof(T), size_t(width) * sizeof(T), size_t(pieces));
      });
      return rows;
    };
    std::vector<Acc> values;
    auto keep = [&](const auto& rows) {
      for (auto value : rows) values.push_back(Acc(value));
    };
    if (which == State::weight || (which == State::master && !b.master))
      keep(read(table_.home_weight(b) + at));
    else if (which != State::grad)
      keep(read(state_pointer(p, which) + at));
    else if (b.sum)
      keep(read(b.sum + at));
    else
      Grad<Device>(b.grad).visit([&](auto* g) { keep(read(g + mine)); });
    if (which == State::grad && b.two_grads) {
      const auto second = read(b.second_sum ? b.second_sum + at : b.second_grad.wide + mine);
      for (size_t i = 0; i < values.size(); ++i) values[i] += second[i];
    }
    to.insert(to.end(), values.begin(), values.end());
  }

  // Calls f(first row, pieces, elements of a piece, elements from piece to piece) for rows [begin, end) of a map, begin
  // at the start of a block.
  template <class F>
  static void each_run(const RowMap& map, int64_t begin, int64_t end, int64_t cols, F f) {
    const int64_t rows = end - begin;
    if (rows == 0) return;
    if (map.block == map.stride) return f(begin, 1, rows * cols, rows * cols);
    const int64_t whole = rows / map.block, rest = rows % map.block;
    if (whole) f(begin, whole, map.block * cols, map.stride * cols);
    if (rest) f(begin + whole * map.block, 1, rest * cols, rest * cols);
  }

  Device& device_;
  const Table& table_;
  const Comm* host_;
  int most_slabs_;
};
