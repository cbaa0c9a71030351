// The traffic of an update between ranks: gradients to the homes of their rows and their sums there, new weights back to
// whoever computes with them (homes.h). Communicators are the caller's, by Homes::group.
#pragma once
#include <map>
#include <set>

#include "llmc/comm.h"
#include "llmc/parameters.h"

template <class Device>
class UpdateTraffic {
 public:
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  using Table = ParameterTable<Device>;
  using Buffer = typename Table::Buffer;

  // Buffers [first, last) of the table.
  UpdateTraffic(const Table& table, int first, int last, const Comm* comms)
      : table_(&table), first_(first), last_(last), comms_(comms) {}

  // What the gradients of other ranks need until they are summed.
  int64_t staging_bytes() const {
    int64_t bytes = 0;
    each_gradient([&](const Buffer& b, const GradTensor<Device>& g, Tensor<Acc>) {
      for (const Share& s : b.homes.from_hosts())
        if (s.rank != b.homes.rank) bytes += s.rows * b.cols * width(g);
    });
    return bytes;
  }

  // Every host sends its gradients to the homes of their rows.
  static void exchange_gradients(Device&, const UpdateTraffic* t, char* staging) {
    t->each_group([&](int group, const Comm& comm) {
      std::vector<Piece> sends, receives;
      char* next = staging;
      t->each_gradient([&](const Buffer& b, const GradTensor<Device>& g, Tensor<Acc>) {
        const int64_t row_bytes = b.cols * width(g);
        const bool ours = b.homes.group == group;
        for (const Share& s : b.homes.to_homes())
          if (ours && s.rank != b.homes.rank)
            sends.emplace_back(s.rank, data(g) + s.row * row_bytes, s.rows * row_bytes);
        for (const Share& s : b.homes.from_hosts()) {
          if (s.rank == b.homes.rank) continue;
          if (ours) receives.emplace_back(s.rank, next, s.rows * row_bytes);
          next += s.rows * row_bytes;
        }
      });
      comm.exchange(sends, receives, "gradients");
    });
  }

  // Every home adds up what it was sent and its own, in the order of the ranks.
  static void sum_gradients(Device& dev, const UpdateTraffic* t, const char* staging) {
    const char* next = staging;
    t->each_gradient([&](const Buffer& b, const GradTensor<Device>& g, Tensor<Acc> sum) {
      const int64_t row_bytes = b.cols * width(g);
      std::map<int64_t, std::pair<int64_t, std::vector<const void*>>> rows;  // first of home memory -> how many, parts
      for (const Share& s : b.homes.from_hosts()) {
        auto& [n, parts] = rows[s.row];
        n = s.rows;
        if (s.rank != b.homes.rank) {
          parts.push_back(next), next += s.rows * row_bytes;
        } else {
          for (const Share& mine : b.homes.to_homes())
            if (mine.rank == s.rank) parts.push_back(data(g) + mine.row * row_bytes);
        }
      }
      if (!sum) return;
      for (const auto& [row, part] : rows)
        for (size_t begin = 0; begin < part.second.size(); begin += SumParts::most) {
          SumParts parts;
          while (parts.n < SumParts::most && begin + parts.n < part.second.size())
            parts.part[parts.n] = part.second[begin + parts.n], ++parts.n;
          sum_parts(dev, sum.data() + row * b.cols, parts, bool(g.wide), begin > 0, part.first * b.cols);
        }
    });
  }

  // Every home sends the new weights of its rows to their hosts.
  static void return_weights(Device&, const UpdateTraffic* t) {
    t->each_group([&](int group, const Comm& comm) {
      std::vector<Piece> sends, receives;
      for (int i = t->first_; i < t->last_; ++i) {
        const Buffer& b = t->table_->buffer(i);
        if (b.homes.group != group) continue;
        auto skip = [&](const Share& s) { return s.rank == b.homes.rank && b.homes.home_is_mine(); };
        const Real* home = t->table_->home_weight(b);
        for (const Share& s : b.homes.from_hosts())
          if (!skip(s)) sends.emplace_back(s.rank, home + s.row * b.cols, s.rows * b.cols);
        for (const Share& s : b.homes.to_homes())
          if (!skip(s)) receives.emplace_back(s.rank, b.weight.data() + s.row * b.cols, s.rows * b.cols);
      }
      comm.exchange(sends, receives, "weights");
    });
  }

 private:
  static int64_t width(const GradTensor<Device>& g) { return int64_t(g.wide ? sizeof(Acc) : sizeof(Real)); }
  static char* data(const GradTensor<Device>& g) { return static_cast<char*>(Grad<Device>(g).data); }
  template <class F>
  void each_gradient(F f) const {
    for (int i = first_; i < last_; ++i) {
      const Buffer& b = table_->buffer(i);
      f(b, b.grad, b.sum);
      if (b.second_grad.tensor()) f(b, b.second_grad, b.second_sum);
    }
  }
  template <class F>
  void each_group(F f) const {
    std::set<int> seen;
    for (int i = first_; i < last_; ++i) {
      const Homes& h = table_->buffer(i).homes;
      if (h.hosts.size() > 1 && seen.insert(h.group).second) f(h.group, comms_[h.group]);
    }
  }

  const Table* table_;
  int first_, last_;
  const Comm* comms_;
};
