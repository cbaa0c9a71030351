// Where optimizer state lives, how gradients get there and weights come back (ZeRO stage 1, Rajbhandari et al. 2020, with
// homes that do not depend on who computes).
//
// The ranks of a group share a matrix, its space: each computes with some of its rows (a host: all rows, or those of its
// experts, in any order), and each is home to some of its rows: master weights and moments of a row are on one rank of
// the group alone.
// An update is: every host sends its gradient of a row to the row's home; the home adds them up in the order of the ranks,
// steps, and sends the new weights to every host. Rows are dealt out in units of 64 logical rows, so that the norm of the
// gradient is summed in the same blocks whoever is home to them.
//
// A space may be cut into slabs of columns of equal width, of which a host has one (experts cut by their width).
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "llmc/gradient.h"

// Some rows that this rank shares with another: `row` counts in this rank's memory.
struct Share {
  int rank;
  int64_t row, rows;
};

struct Homes {
  // Rows of the space that a host has one after another in its buffer, from row `at`. Two hosts have the same run, or no
  // row of it in common.
  struct Run {
    int64_t row, rows, at;
  };
  struct Host {
    int64_t rows = 0;  // of its buffer; those of no run belong to nobody
    int slab = 0;
    std::vector<Run> runs;  // ascending in the space
  };
  int group = 0;  // the caller's number of the communicator
  int rank = 0;   // in it
  int slabs = 1;
  // Not 0: only the first so many hosts have a part of the gradient, and only the others one of the second gradient
  // (tied embeddings at the two ends of a pipeline).
  int first_hosts = 0;
  std::vector<Host> hosts;      // by rank
  std::vector<int64_t> bounds;  // rank r is home to the rows [bounds[r], bounds[r+1])

  const Host& mine() const { return hosts[rank]; }
  bool has_gradient(int r) const { return first_hosts == 0 || r < first_hosts; }
  bool has_second_gradient(int r) const { return first_hosts == 0 || r >= first_hosts; }
  int64_t home_begin() const { return bounds[rank]; }
  int64_t home_end() const { return bounds[rank + 1]; }
  // Whether this rank computes with all rows that are at home on it and has them together, so that they are updated where
  // they stand; and where they do in its buffer.
  bool home_is_mine() const { return home_begin() == home_end() || (slabs == 1 && run_of(home_begin(), home_end())); }
  int64_t home_at() const { return row_at(home_begin(), home_end()); }
  // Whether it alone computes with them, so that its gradient is the sum.
  bool gradient_is_mine() const {
    for (const Share& s : from_hosts())
      if (s.rank != rank) return false;
    return home_is_mine();
  }
  // Rows that this rank computes with, by their homes, in the order of the ranks: rows of its buffer.
  std::vector<Share> to_homes() const {
    std::vector<Share> shares;
    for (int r = 0; r < int(hosts.size()); ++r)
      for (const Run& run : mine().runs) add(shares, r, run, bounds[r], bounds[r + 1], run.at - run.row);
    return shares;
  }
  // Rows at home here, by who computes with them, in the same order: rows of its home memory, (slabs, home rows).
  std::vector<Share> from_hosts() const {
    std::vector<Share> shares;
    for (int r = 0; r < int(hosts.size()); ++r)
      for (const Run& run : hosts[r].runs) add(shares, r, run, home_begin(), home_end(), home_memory(hosts[r].slab));
    return shares;
  }
  // Where this rank has a share of from_hosts() that is its own.
  int64_t row_of(const Share& own) const {
    const int64_t row = own.row - home_memory(mine().slab);
    return row_at(row, row + own.rows);
  }

 private:
  // From rows of the space to those of the home memory.
  int64_t home_memory(int slab) const { return (home_end() - home_begin()) * slab - home_begin(); }
  const Run* run_of(int64_t begin, int64_t end) const {
    for (const Run& run : mine().runs)
      if (run.row <= begin && end <= run.row + run.rows) return &run;
    return nullptr;
  }
  int64_t row_at(int64_t begin, int64_t end) const {
    const Run* run = run_of(begin, end);
    return run ? run->at + begin - run->row : 0;
  }
  static void add(std::vector<Share>& shares, int rank, const Run& run, int64_t begin, int64_t end, int64_t shift) {
    begin = std::max(begin, run.row), end = std::min(end, run.row + run.rows);
    if (begin < end) shares.push_back({rank, begin + shift, end - begin});
  }
};

// A host of all rows of a space, in order.
inline Homes::Host host_of_all(int64_t rows) { return {rows, 0, {{0, rows, 0}}}; }

// A process alone: all rows.
inline Homes home_alone(int64_t rows) { return {0, 0, 1, 0, {host_of_all(rows)}, {0, rows}}; }

// Bounds of the homes of `ranks` ranks over pieces of these numbers of rows, one after another, each dealt out in units of
// `unit` rows (its last may be shorter), as evenly as whole units allow: no rank has more than
// the first.
inline std::vector<int64_t> home_bounds(const std::vector<int64_t>& pieces, int64_t unit, int ranks) {
  auto units_of = [&](int64_t rows) { return (rows + unit - 1) / unit; };
  int64_t units = 0, row = 0, before = 0;  // row, before: rows and units in front of a piece
  for (int64_t rows : pieces) units += units_of(rows);
  std::vector<int64_t> bounds;
  size_t piece = 0;
  for (int r = 0; r <= ranks; ++r) {
    const int64_t first = (units * r + ranks - 1) / ranks;
    for (; piece < pieces.size() && first >= before + units_of(pieces[piece]); ++piece)
      before += units_of(pieces[piece]), row += pieces[piece];
    bounds.push_back(row + (first - before) * unit);
  }
  return bounds;
}

// Contributions to a sum, in its order.
struct SumParts {
  static constexpr int most = 16;
  const void* part[most] = {};
  int n = 0;
};
// out (n) = (add: out +) part[0] + part[1] + ..., added one after the other in Acc; parts are Acc (wide) or Real.
template <class Device>
void sum_parts(Device& dev, typename Device::Acc* out, SumParts parts, bool wide, bool add, int64_t n);
