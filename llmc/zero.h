// The traffic of an update between ranks: gradients to the homes of their rows and their sums there, new weights back to
// whoever computes with them (homes.h). Communicators are the caller's, by Homes::group.
#pragma once
#include <deque>
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

  // All buffers of a table, cut into consecutive ones whose gradients are exchanged together: what has arrived waits in
  // memory until it is summed.
  static std::deque<UpdateTraffic> buckets(const Table& table, const Comm* comms) {
    constexpr int64_t bucket_elements = int64_t(32) << 20;
    const auto& buffers = table.buffers();
    std::deque<UpdateTraffic> all;
    for (int first = 0, last = 0; first < int(buffers.size()); first = last) {
      for (int64_t elements = 0; last < int(buffers.size()) && (last == first || elements < bucket_elements); ++last) {
        const Homes& h = buffers[last].homes;
        // (The same on all ranks of a stage. The ends of a pipeline share one buffer alone.)
        elements += std::max(h.bounds.back(), buffers[last].rows) * h.slabs * buffers[last].cols;
      }
      all.emplace_back(table, first, last, comms);
    }
    return all;
  }

  // What the gradients of other ranks need until they are summed.
  int64_t staging_bytes() const {
    int64_t bytes = 0;
    each_gradient([&](const Buffer& b, const Part& g) {
      for (const Share& s : b.homes.from_hosts())
        if (s.rank != b.homes.rank && g.of(s.rank)) bytes += s.rows * b.cols * g.width();
    });
    return bytes;
  }

  // Every host sends its gradients to the homes of their rows.
  static void exchange_gradients(Device&, const UpdateTraffic* t, char* staging) {
    t->each_group([&](int group, const Comm& comm) {
      std::vector<Piece> sends, receives;
      char* next = staging;
      t->each_gradient([&](const Buffer& b, const Part& g) {
        const int64_t row_bytes = b.cols * g.width();
        const bool ours = b.homes.group == group;
        for (const Share& s : b.homes.to_homes())
          if (ours && s.rank != b.homes.rank && g.of(b.homes.rank))
            sends.emplace_back(s.rank, g.data() + s.row * row_bytes, s.rows * row_bytes);
        for (const Share& s : b.homes.from_hosts()) {
          if (s.rank == b.homes.rank || !g.of(s.rank)) continue;
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
    t->each_gradient([&](const Buffer& b, const Part& g) {
      const int64_t row_bytes = b.cols * g.width();
      std::map<int64_t, std::pair<int64_t, std::vector<const void*>>> rows;  // first of home memory -> how many, parts
      for (const Share& s : b.homes.from_hosts()) {
        if (!g.of(s.rank)) continue;
        auto& [n, parts] = rows[s.row];
        n = s.rows;
        if (s.rank != b.homes.rank) {
          parts.push_back(next), next += s.rows * row_bytes;
        } else {
          parts.push_back(g.data() + b.homes.row_of(s) * row_bytes);
        }
      }
      if (!g.sum) return;
      for (const auto& [row, part] : rows)
        for (size_t begin = 0; begin < part.second.size(); begin += SumParts::most) {
          SumParts parts;
          while (parts.n < SumParts::most && begin + parts.n < part.second.size())
            parts.part[parts.n] = part.second[begin + parts.n], ++parts.n;
          sum_parts(dev, g.sum.data() + row * b.cols, parts, g.wide, begin > 0, part.first * b.cols);
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
  // One of the gradients of a buffer.
  struct Part {
    const Homes& homes;
    bool second, wide;
    const GradTensor<Device>& mine;  // null where this rank has no part of it
    Tensor<Acc> sum;

    bool of(int rank) const { return second ? homes.has_second_gradient(rank) : homes.has_gradient(rank); }
    int64_t width() const { return int64_t(wide ? sizeof(Acc) : sizeof(Real)); }
    char* data() const { return static_cast<char*>(Grad<Device>(mine).data); }
  };
  template <class F>
  void each_gradient(F f) const {
    for (int i = first_; i < last_; ++i) {
      const Buffer& b = table_->buffer(i);
      f(b, Part{b.homes, false, b.wide_grad, b.grad, b.sum});
      if (b.two_grads) f(b, Part{b.homes, true, true, b.second_grad, b.second_sum});
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
