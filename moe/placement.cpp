#include "moe/placement.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "llmc/error.h"

namespace placement {

namespace {

void check_room(int64_t experts, int64_t ranks, int64_t slots) {
  if (experts > ranks * slots)
    fail("placement: ", experts, " experts do not fit into ", slots, " slots on each of ", ranks, " ranks");
}

// 0, 1, ... with the larger key first; the lower index where they are equal.
std::vector<int64_t> by_weight(std::span<const double> key) {
  std::vector<int64_t> order(key.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](int64_t a, int64_t b) { return key[size_t(a)] > key[size_t(b)]; });
  return order;
}

int64_t busiest(std::span<const double> load) { return std::ranges::max_element(load) - load.begin(); }

// A table being packed: weight (E) is the load of a copy.
struct Packing {
  Table table;
  std::span<const double> weight;
  std::vector<double> load;  // (P)

  Packing(int64_t ranks, int64_t slots, std::span<const double> w) : weight(w), load(size_t(ranks)) {
    table = {ranks, slots, std::vector<int32_t>(size_t(ranks * slots), -1)};
  }
  double of(int32_t expert) const { return expert < 0 ? 0 : weight[size_t(expert)]; }
  bool has(int64_t rank, int32_t expert) const {
    for (int64_t s = 0; s < table.slots; ++s)
      if (table.at(rank, s) == expert) return true;
    return false;
  }
  int64_t free_slot(int64_t rank) const {
    for (int64_t s = 0; s < table.slots; ++s)
      if (table.at(rank, s) < 0) return s;
    return -1;
  }
  void sum(int64_t rank) {
    double total = 0;
    for (int64_t s = 0; s < table.slots; ++s) total += of(table.at(rank, s));
    load[size_t(rank)] = total;
  }
  // To the rank with the least load that has room and not this expert.
  void add(int32_t expert) {
    int64_t best = -1;
    for (int64_t r = 0; r < table.ranks; ++r)
      if (free_slot(r) >= 0 && !has(r, expert) && (best < 0 || load[size_t(r)] < load[size_t(best)])) best = r;
    if (best < 0) return;
    table.at(best, free_slot(best)) = expert;
    sum(best);
  }
  // One exchange of the busiest rank; false: none helps.
  bool improve() {
    const int64_t b = busiest(load);
    double best = load[size_t(b)] * (1 - 1e-9);
    int64_t mine = -1, rank = -1, theirs = -1;
    for (int64_t r = 0; r < table.ranks; ++r) {
      if (r == b) continue;
      for (int64_t i = 0; i < table.slots; ++i)
        for (int64_t j = 0; j < table.slots; ++j) {
          const int32_t x = table.at(b, i), y = table.at(r, j);
          const double d = of(x) - of(y);
          if (d <= 0 || has(r, x) || (y >= 0 && has(b, y))) continue;
          const double larger = std::max(load[size_t(b)] - d, load[size_t(r)] + d);
          if (larger < best) best = larger, mine = i, rank = r, theirs = j;
        }
    }
    if (rank < 0) return false;
    std::swap(table.at(b, mine), table.at(rank, theirs));
    sum(b), sum(rank);
    return true;
  }
};

using Costs = std::vector<std::vector<int64_t>>;

Costs square(int64_t n) { return Costs(size_t(n), std::vector<int64_t>(size_t(n))); }

// cost (n,n) -> for each row its column, of least total cost. Rows are added one by one; prices of rows and columns keep
// every reduced cost at zero or above, and the pairs chosen at zero.
std::vector<int64_t> assignment(const Costs& cost) {
  const size_t n = cost.size();
  constexpr int64_t far = std::numeric_limits<int64_t>::max() / 2;
  std::vector<int64_t> row_price(n + 1), column_price(n + 1);
  std::vector<size_t> row_of(n + 1, n), from(n + 1);  // column n is where the search begins
  for (size_t row = 0; row < n; ++row) {
    std::vector<int64_t> distance(n + 1, far);
    std::vector<bool> done(n + 1);
    size_t column = n;
    row_of[n] = row;
    while (row_of[column] != n) {
      done[column] = true;
      int64_t step = far;
      size_t next = n;
      for (size_t j = 0; j < n; ++j) {
        if (done[j]) continue;
        const size_t i = row_of[column];
        const int64_t reduced = cost[i][j] - row_price[i] - column_price[j];
        if (reduced < distance[j]) distance[j] = reduced, from[j] = column;
        if (distance[j] < step) step = distance[j], next = j;
      }
      for (size_t j = 0; j <= n; ++j) {
        if (done[j])
          row_price[row_of[j]] += step, column_price[j] -= step;
        else
          distance[j] -= step;
      }
      column = next;
    }
    for (; column != n; column = from[column]) row_of[column] = row_of[from[column]];
    row_of[n] = n;
  }
  std::vector<int64_t> result(n);
  for (size_t j = 0; j < n; ++j) result[row_of[j]] = int64_t(j);
  return result;
}

// Experts of `next` on rank a that `now` does not have on rank b.
int64_t missing(const Table& next, int64_t a, const Table& now, int64_t b) {
  int64_t n = 0;
  for (int64_t i = 0; i < next.slots; ++i) {
    const int32_t e = next.at(a, i);
    bool found = e < 0;
    for (int64_t j = 0; j < now.slots && !found; ++j) found = now.at(b, j) == e;
    n += !found;
  }
  return n;
}

}  // namespace

Table in_order(int64_t experts, int64_t ranks, int64_t slots) {
  check_room(experts, ranks, slots);
  const int64_t each = (experts + ranks - 1) / ranks;
  Table t{ranks, slots, std::vector<int32_t>(size_t(ranks * slots), -1)};
  for (int64_t e = 0; e < experts; ++e) t.at(e / each, e % each) = int32_t(e);
  return t;
}

std::vector<int32_t> copies(std::span<const double> load, int64_t ranks, int64_t slots) {
  const int64_t experts = int64_t(load.size());
  check_room(experts, ranks, slots);
  std::vector<int32_t> n(load.size(), 1);
  for (int64_t left = std::min(ranks * slots, experts * ranks) - experts; left > 0; --left) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e)
      if (n[size_t(e)] < ranks && (best < 0 || load[size_t(e)] / n[size_t(e)] > load[size_t(best)] / n[size_t(best)]))
        best = e;
    ++n[size_t(best)];
  }
  return n;
}

Table pack(std::span<const double> load, std::span<const int32_t> number_of_copies, int64_t ranks, int64_t slots) {
  check_room(std::accumulate(number_of_copies.begin(), number_of_copies.end(), int64_t(0)), ranks, slots);
  std::vector<double> weight(load.size());
  for (size_t e = 0; e < load.size(); ++e) weight[e] = load[e] / number_of_copies[e];
  Packing p(ranks, slots, weight);
  for (int64_t e : by_weight(weight))
    for (int32_t c = 0; c < number_of_copies[size_t(e)]; ++c) p.add(int32_t(e));
  while (p.improve()) {}
  return p.table;
}

Table pack(std::span<const double> load, int64_t ranks, int64_t slots) {
  return pack(load, std::vector<int32_t>(load.size(), 1), ranks, slots);
}

Table replicate(std::span<const double> load, int64_t ranks, int64_t slots) {
  return pack(load, copies(load, ranks, slots), ranks, slots);
}

Table hierarchical(std::span<const double> load, int64_t nodes, int64_t ranks, int64_t slots) {
  if (nodes < 1 || ranks % nodes)
    fail("placement: ", ranks, " ranks are not the same number on each of ", nodes, " nodes");
  const int64_t experts = int64_t(load.size()), ranks_here = ranks / nodes;
  check_room(experts, ranks, slots);
  const Table of_nodes = pack(load, nodes, (experts + nodes - 1) / nodes);
  Table t{ranks, slots, {}};
  for (int64_t node = 0; node < nodes; ++node) {
    std::vector<int32_t> names;
    std::vector<double> its;
    for (int64_t i = 0; i < of_nodes.slots; ++i)
      if (int32_t e = of_nodes.at(node, i); e >= 0) names.push_back(e), its.push_back(load[size_t(e)]);
    for (int32_t e : replicate(its, ranks_here, slots).expert) t.expert.push_back(e < 0 ? -1 : names[size_t(e)]);
  }
  return t;
}

Table least_moves(const Table& next, const Table& now, int64_t nodes) {
  if (nodes < 1 || next.ranks % nodes || next.ranks != now.ranks || next.slots != now.slots)
    fail("placement: tables of ", next.ranks, " x ", next.slots, " and ", now.ranks, " x ", now.slots, " on ", nodes,
         " nodes");
  const int64_t group = next.ranks / nodes;
  Costs of_nodes = square(nodes);
  std::vector<Costs> within(of_nodes.size(), of_nodes);
  for (int64_t a = 0; a < nodes; ++a)
    for (int64_t b = 0; b < nodes; ++b) {
      Costs cost = square(group);
      for (int64_t i = 0; i < group; ++i)
        for (int64_t j = 0; j < group; ++j)
          cost[size_t(i)][size_t(j)] = missing(next, a * group + i, now, b * group + j);
      auto& pairs = within[size_t(a)][size_t(b)] = assignment(cost);
      for (int64_t i = 0; i < group; ++i) of_nodes[size_t(a)][size_t(b)] += cost[size_t(i)][size_t(pairs[size_t(i)])];
    }
  const std::vector<int64_t> node_to = assignment(of_nodes);
  Table t{next.ranks, next.slots, std::vector<int32_t>(next.expert.size(), -1)};
  for (int64_t a = 0; a < nodes; ++a)
    for (int64_t i = 0; i < group; ++i) {
      const int64_t from = a * group + i, b = node_to[size_t(a)];
      const int64_t to = b * group + within[size_t(a)][size_t(b)][size_t(i)];
      std::vector<int32_t> come;  // what `to` does not have
      for (int64_t s = 0; s < next.slots; ++s) {
        const int32_t e = next.at(from, s);
        if (e < 0) continue;
        int64_t kept = -1;
        for (int64_t q = 0; q < now.slots && kept < 0; ++q)
          if (now.at(to, q) == e) kept = q;
        if (kept >= 0)
          t.at(to, kept) = e;
        else
          come.push_back(e);
      }
      for (int64_t s = 0, n = 0; n < int64_t(come.size()); ++s)
        if (t.at(to, s) < 0) t.at(to, s) = come[size_t(n++)];
    }
  return t;
}

int64_t moves(const Table& next, const Table& now) {
  int64_t n = 0;
  for (int64_t r = 0; r < next.ranks; ++r) n += missing(next, r, now, r);
  return n;
}

std::vector<int32_t> route(const Table& table, std::span<const double> rows) {
  const int64_t P = table.ranks, E = int64_t(rows.size()) / P;
  std::vector<std::vector<int32_t>> where(static_cast<size_t>(E));  // its slots, ascending
  for (size_t i = 0; i < table.expert.size(); ++i)
    if (table.expert[i] >= 0) where[size_t(table.expert[i])].push_back(int32_t(i));
  std::vector<int32_t> slots(rows.size());
  std::vector<double> load(static_cast<size_t>(P));
  for (int64_t e = 0; e < E; ++e) {
    const auto its = rows.subspan(size_t(e * P), size_t(P));
    if (where[size_t(e)].empty()) fail("placement: expert ", e, " has no slot");
    if (where[size_t(e)].size() > 1) continue;
    std::fill_n(slots.begin() + e * P, P, where[size_t(e)][0]);
    load[size_t(where[size_t(e)][0] / table.slots)] += std::accumulate(its.begin(), its.end(), 0.0);
  }
  // A piece is the rows of one source for an expert with several copies.
  std::vector<double> piece(rows.begin(), rows.end());
  for (int64_t e = 0; e < E; ++e)
    if (where[size_t(e)].size() == 1) std::fill_n(piece.begin() + e * P, P, -1.0);
  const std::vector<int64_t> order = by_weight(piece);
  for (int64_t i : order) {
    if (piece[size_t(i)] < 0) break;
    const int64_t source = i % P;
    int32_t best = -1;
    for (int32_t slot : where[size_t(i / P)]) {
      const int64_t r = slot / table.slots, q = best / table.slots;
      if (best < 0 || load[size_t(r)] < load[size_t(q)] || (load[size_t(r)] == load[size_t(q)] && r == source))
        best = slot;
    }
    slots[size_t(i)] = best;
    load[size_t(best / table.slots)] += rows[size_t(i)];
  }
  // As long as a piece of the busiest rank is better off elsewhere.
  for (bool better = true; better;) {
    better = false;
    const int64_t b = busiest(load);
    double least = load[size_t(b)] * (1 - 1e-9);
    int64_t moved = -1;
    int32_t to = -1;
    for (int64_t i : order) {
      const double n = piece[size_t(i)];
      if (n <= 0) break;
      if (slots[size_t(i)] / table.slots != b) continue;
      for (int32_t slot : where[size_t(i / P)]) {
        const double larger = std::max(load[size_t(b)] - n, load[size_t(slot / table.slots)] + n);
        if (slot / table.slots != b && larger < least) least = larger, moved = i, to = slot, better = true;
      }
    }
    if (!better) break;
    load[size_t(b)] -= piece[size_t(moved)], load[size_t(to / table.slots)] += piece[size_t(moved)];
    slots[size_t(moved)] = to;
  }
  return slots;
}

std::vector<double> rank_rows(std::span<const int32_t> slots, std::span<const double> rows, int64_t ranks,
                              int64_t slots_per_rank) {
  std::vector<double> load(static_cast<size_t>(ranks));
  for (size_t i = 0; i < rows.size(); ++i) load[size_t(slots[i] / slots_per_rank)] += rows[i];
  return load;
}

double imbalance(std::span<const double> rank_rows) {
  const double total = std::accumulate(rank_rows.begin(), rank_rows.end(), 0.0);
  return total > 0 ? *std::ranges::max_element(rank_rows) * double(rank_rows.size()) / total : 1;
}

std::vector<Shadow> shadows(std::span<const int32_t> slots_of, std::span<const double> rows, int64_t ranks,
                            int64_t slots_per_rank, int64_t slots, const ShadowCosts& costs) {
  const int64_t P = ranks, E = int64_t(rows.size()) / P;
  std::vector<int64_t> host(rows.size()), used(static_cast<size_t>(P));  // host (E,P): who computes them now
  for (size_t i = 0; i < rows.size(); ++i) host[i] = slots_of[i] / slots_per_rank;
  std::vector<double> load = rank_rows(slots_of, rows, ranks, slots_per_rank), link(size_t(P), 0.0);
  auto time = [&](std::span<const double> l, std::span<const double> k) {
    return *std::ranges::max_element(l) * costs.row + *std::ranges::max_element(k);
  };
  std::vector<Shadow> chosen;
  for (;;) {
    const int64_t b = busiest(load);
    double best = time(load, link) * (1 - 1e-9);
    int64_t expert = -1;
    std::vector<int64_t> takers;
    const double one = costs.weights + costs.gradient;
    for (int64_t e = 0; e < E; ++e) {
      std::vector<double> l = load, k = link;
      std::vector<int64_t> senders;
      for (int64_t s : by_weight(rows.subspan(size_t(e * P), size_t(P)))) {
        const double n = rows[size_t(e * P + s)];
        if (host[size_t(e * P + s)] != b || s == b || n <= 0 || used[size_t(s)] == slots) continue;
        senders.push_back(s);
        l[size_t(b)] -= n, l[size_t(s)] += n, k[size_t(b)] += one;
        if (double t = time(l, k); t < best) best = t, expert = e, takers = senders;
        std::vector<double> alone = load, alone_link = link;
        alone[size_t(b)] -= n, alone[size_t(s)] += n, alone_link[size_t(b)] += one;
        if (double t = time(alone, alone_link); t < best) best = t, expert = e, takers = {s};
      }
    }
    if (expert < 0) break;
    auto it = std::ranges::find(chosen, int32_t(expert), &Shadow::expert);
    if (it == chosen.end()) it = chosen.insert(it, Shadow{int32_t(expert), {}});
    for (int64_t s : takers) {
      const size_t i = size_t(expert * P + s);
      load[size_t(b)] -= rows[i], load[size_t(s)] += rows[i], link[size_t(b)] += one;
      host[i] = s, ++used[size_t(s)];
      it->ranks.push_back(int32_t(s));
    }
    std::ranges::sort(it->ranks);
  }
  return chosen;
}

}  // namespace placement
