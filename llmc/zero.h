// The traffic of an update between ranks: gradients to the homes of their rows and their sums there, new weights back to
// whoever computes with them (homes.h). Communicators are the caller's, by Homes::group.
#pragma once
#include <deque>
#include <map>
#include <set>

#include "llmc/adamw.h"
#include "llmc/comm.h"
#include "llmc/parameters.h"

// Buffers of a table whose gradients are exchanged together, and whose weights are.
template <class Device>
class UpdateBucket {
 public:
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  using Table = ParameterTable<Device>;
  using Buffer = typename Table::Buffer;

  // All buffers of a table, cut in the order in which backward completes their gradients: second ones, then from the
  // last buffer to the first. What has arrived waits in memory until it is summed, so buckets are small: whole parts of
  // layers, until there are `enough` elements. aside: exchanges go on beside what the device does next.
  static std::deque<UpdateBucket> all(const Table& table, const Comm* comms, int64_t enough, bool aside) {
    const auto& buffers = table.buffers();
    std::deque<UpdateBucket> buckets;
    int64_t elements = 0;
    const TensorInfo* above = nullptr;
    for (int i = int(buffers.size()) - 1; i >= 0; --i) {
      const TensorInfo* w = buffers[i].weight.info;
      const bool edge = above && (w->layer != above->layer || w->part != above->part);
      if (!above || (edge && (elements >= enough || above->layer < 0)))  // what follows the layers is complete early
        buckets.push_back(UpdateBucket(table, i + 1, comms, aside)), elements = 0;
      buckets.back().first_ = i, above = w;
      const Homes& h = buffers[i].homes;
      // (The same on all ranks of a stage. The ends of a pipeline share one buffer alone.)
      elements += std::max(h.bounds.back(), buffers[i].rows) * h.slabs * buffers[i].cols;
    }
    for (UpdateBucket& b : buckets) {
      b.views_ = table.views_of(b.first_, b.last_);
      for (int i = b.first_; i < b.last_; ++i) {
        b.add(buffers[i], false);
        if (buffers[i].two_grads) buckets.front().add(buffers[i], true);
      }
    }
    return buckets;
  }

  int first() const { return first_; }  // of its buffers
  // What the gradients of other ranks need until they are summed.
  int64_t staging_bytes() const { return staging_bytes_; }

  // Every host sends its gradients to the homes of their rows.
  static void send_gradients(Device&, UpdateBucket* t, char* staging) {
    t->each_group([&](int group, const Comm& comm) {
      std::vector<Piece> sends, receives;
      for (const Gradient& g : t->gradients_) {
        const Homes& h = g.buffer->homes;
        if (h.group != group) continue;
        for (const Share& s : h.to_homes())
          if (s.rank != h.rank && g.of(h.rank))
            sends.emplace_back(s.rank, g.data() + s.row * g.row_bytes, s.rows * g.row_bytes);
        for (const auto& [s, at] : g.parts)
          if (s.rank != h.rank) receives.emplace_back(s.rank, staging + at, s.rows * g.row_bytes);
      }
      t->exchange(comm, sends, receives, "gradients");
    });
  }

  // Every home waits for what it is sent, and adds it and its own up, in the order of the ranks.
  static void sum_gradients(Device& dev, UpdateBucket* t, const char* staging) {
    wait(dev, t);
    for (const Gradient& g : t->gradients_) {
      const Tensor<Acc> sum = g.second ? g.buffer->second_sum : g.buffer->sum;
      if (!sum) continue;
      std::map<int64_t, std::pair<int64_t, std::vector<const void*>>> rows;  // first of home memory -> how many, parts
      for (const auto& [s, at] : g.parts) {
        auto& [n, parts] = rows[s.row];
        n = s.rows, parts.push_back((s.rank == g.buffer->homes.rank ? g.data() : staging) + at);
      }
      for (const auto& [row, part] : rows)
        for (size_t begin = 0; begin < part.second.size(); begin += SumParts::most) {
          SumParts parts;
          while (parts.n < SumParts::most && begin + parts.n < part.second.size())
            parts.part[parts.n] = part.second[begin + parts.n], ++parts.n;
          const int64_t cols = g.buffer->cols;
          sum_parts(dev, sum.data() + row * cols, parts, g.wide(), begin > 0, part.first * cols);
        }
    }
  }

  static void step(Device& dev, const UpdateBucket* t, const ParameterView<Device>* views, const StepParams* params,
                   const StepStats* stats, AdamWConfig config) {
    adamw(dev, views + t->views_.first, params, stats, t->views_.second, config);
  }

  // Every home sends the new weights of its rows to their hosts.
  static void return_weights(Device&, UpdateBucket* t) {
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
      t->exchange(comm, sends, receives, "weights");
    });
  }

  static void wait(Device&, UpdateBucket* t) {
    for (Begun& begun : t->begun_) begun.wait();
    t->begun_.clear();
  }

 private:
  // One of the gradients of a buffer.
  struct Gradient {
    // Rows to be summed here, of home memory, by who has a part of them; at: that part, in bytes into the staging memory,
    // or into this rank's own gradient.
    struct Part {
      Share rows;
      int64_t at;
    };
    const Buffer* buffer;
    bool second;
    int64_t row_bytes = buffer->cols * int64_t(wide() ? sizeof(Acc) : sizeof(Real));
    std::vector<Part> parts = {};  // in the order of the ranks

    bool wide() const { return second || buffer->wide_grad; }
    bool of(int rank) const {
      return second ? buffer->homes.has_second_gradient(rank) : buffer->homes.has_gradient(rank);
    }
    const char* data() const {
      return static_cast<const char*>(Grad<Device>(second ? buffer->second_grad : buffer->grad).data);
    }
  };

  UpdateBucket(const Table& table, int last, const Comm* comms, bool aside)
      : table_(&table), last_(last), comms_(comms), aside_(aside) {}

  void add(const Buffer& b, bool second) {
    Gradient g{&b, second};
    for (const Share& s : b.homes.from_hosts()) {
      if (!g.of(s.rank)) continue;
      if (s.rank != b.homes.rank) {
        g.parts.push_back({s, staging_bytes_});
        staging_bytes_ += (s.rows * g.row_bytes + 15) / 16 * 16;
      } else {
        g.parts.push_back({s, b.homes.row_of(s) * g.row_bytes});
      }
    }
    gradients_.push_back(std::move(g));
  }

  void exchange(const Comm& comm, const std::vector<Piece>& sends, const std::vector<Piece>& receives,
                const char* name) {
    if (aside_)
      begun_.push_back(comm.begin_exchange(sends, receives, name));
    else
      comm.exchange(sends, receives, name);
  }

  template <class F>
  void each_group(F f) const {
    std::set<int> seen;
    for (const Gradient& g : gradients_) {
      const Homes& h = g.buffer->homes;
      if (h.hosts.size() > 1 && seen.insert(h.group).second) f(h.group, comms_[h.group]);
    }
  }

  const Table* table_;
  int first_ = 0, last_;               // buffers
  std::pair<int64_t, int64_t> views_;  // how many come before theirs, how many theirs are
  std::vector<Gradient> gradients_;
  int64_t staging_bytes_ = 0;
  const Comm* comms_;
  bool aside_;
  std::vector<Begun> begun_;
};

// The ops of an update of many ranks, in order. Gradients may be exchanged while backward goes on: overlap is for ranks
// all of whose operations are of one communicator.
template <class Device>
class UpdateTraffic {
 public:
  using Bucket = UpdateBucket<Device>;

  UpdateTraffic() = default;
  UpdateTraffic(const ParameterTable<Device>& table, const Comm* comms, int64_t enough, bool overlap)
      : overlap(overlap), buckets_(Bucket::all(table, comms, enough, overlap)) {}

  bool overlap = false;  // exchange() is called in backward, as its gradients are completed
  bool idle = false;     // the ops of an exchange are not called: more micro-steps will add to the gradients

  // Sums the gradients whose exchange has begun, so that their memory is free, and begins the exchange of others, in
  // buckets of the buffers from `reached` on.
  void exchange(Executor<Device>& x, int reached) {
    x.skipping = idle;
    for (const auto& [bucket, staging] : std::exchange(begun_, {}))
      x.op("sum gradients", Bucket::sum_gradients, bucket, staging);
    for (; next_ < buckets_.size() && buckets_[next_].first() >= reached; ++next_) {
      Bucket& b = buckets_[next_];
      begun_.emplace_back(&b, x.template tensor<char>("gradients.staging", {std::max<int64_t>(1, b.staging_bytes())}));
      x.op("exchange gradients", Bucket::send_gradients, &b, begun_.back().second);
    }
    x.skipping = false;
  }
  // The rest, one bucket after another.
  void finish_exchange(Executor<Device>& x) {
    while (next_ < buckets_.size()) exchange(x, buckets_[next_].first());
    exchange(x, 0);
    next_ = 0;
  }

  // AdamW, and new weights to those who compute with them: where these go on aside, those of a bucket are on their way
  // while the next one's are made.
  void step(Executor<Device>& x, Tensor<ParameterView<Device>> views, int64_t n_views, Tensor<StepParams> params,
            Tensor<StepStats> stats, AdamWConfig config) {
    if (!overlap) x.op("adamw", adamw<Device>, views, params, stats, n_views, config);
    for (Bucket& b : buckets_) {
      if (overlap) x.op("adamw", Bucket::step, &b, views, params, stats, config);
      x.op("return weights", Bucket::return_weights, &b);
    }
    for (Bucket& b : buckets_) x.op("await weights", Bucket::wait, &b);
  }

 private:
  std::deque<Bucket> buckets_;
  size_t next_ = 0;  // bucket to begin
  std::vector<std::pair<Bucket*, Tensor<char>>> begun_;
};
