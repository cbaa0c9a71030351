#include "moe/placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <set>

#include "dev/test/error_line.h"
#include "llmc/random.h"

namespace {

using namespace placement;

struct Numbers {
  uint64_t drawn = 0;
  double uniform() { return random_uniform(1, 0, drawn++); }
  int64_t below(int64_t n) { return std::min(n - 1, int64_t(uniform() * double(n))); }
  // As experts' loads are: one in three is several times as heavy.
  std::vector<double> loads(int64_t n) {
    std::vector<double> v;
    for (int64_t i = 0; i < n; ++i) v.push_back(std::floor(1 + 100 * uniform() * (below(3) ? 1 : 5)));
    return v;
  }
};

double sum(std::span<const double> v) { return std::accumulate(v.begin(), v.end(), 0.0); }

// Loads of the ranks, copies taking equal shares.
std::vector<double> shares(const Table& t, const std::vector<double>& load) {
  std::vector<double> n(load.size()), result(size_t(t.ranks));
  for (int32_t e : t.expert)
    if (e >= 0) ++n[size_t(e)];
  for (int64_t r = 0; r < t.ranks; ++r)
    for (int64_t s = 0; s < t.slots; ++s)
      if (int32_t e = t.at(r, s); e >= 0) result[size_t(r)] += load[size_t(e)] / n[size_t(e)];
  return result;
}

// Each expert somewhere, and on no rank twice.
void expect_valid(const Table& t, int64_t experts, bool one_copy = false) {
  ASSERT_EQ(int64_t(t.expert.size()), t.ranks * t.slots);
  std::vector<int64_t> n(static_cast<size_t>(experts));
  for (int64_t r = 0; r < t.ranks; ++r) {
    std::set<int32_t> here;
    for (int64_t s = 0; s < t.slots; ++s) {
      const int32_t e = t.at(r, s);
      ASSERT_GE(e, -1);
      ASSERT_LT(e, experts);
      if (e < 0) continue;
      EXPECT_TRUE(here.insert(e).second) << "rank " << r << " has expert " << e << " twice";
      ++n[size_t(e)];
    }
  }
  for (int64_t e = 0; e < experts; ++e) {
    EXPECT_GE(n[size_t(e)], 1) << e;
    EXPECT_LE(n[size_t(e)], one_copy ? 1 : t.ranks) << e;
  }
}

// The least load of the busiest rank, of all placements with one copy each.
double best_maximum(const std::vector<double>& load, int64_t ranks, int64_t slots) {
  double best = 1e300;
  std::vector<double> l(static_cast<size_t>(ranks));
  std::vector<int64_t> n(static_cast<size_t>(ranks));
  std::function<void(size_t)> place = [&](size_t e) {
    if (e == load.size()) {
      best = std::min(best, *std::ranges::max_element(l));
      return;
    }
    for (size_t r = 0; r < l.size(); ++r) {
      if (n[r] == slots || l[r] + load[e] >= best) continue;
      l[r] += load[e], ++n[r];
      place(e + 1);
      l[r] -= load[e], --n[r];
      if (n[r] == 0) break;  // empty ranks are alike
    }
  };
  place(0);
  return best;
}

TEST(Placement, InOrder) {
  EXPECT_EQ(in_order(6, 3, 2), (Table{3, 2, {0, 1, 2, 3, 4, 5}}));
  EXPECT_EQ(in_order(5, 2, 4), (Table{2, 4, {0, 1, 2, -1, 3, 4, -1, -1}}));
  EXPECT_EQ(in_order(2, 4, 1), (Table{4, 1, {0, 1, -1, -1}}));
}

TEST(Placement, PackedAlmostAsWellAsCanBe) {
  Numbers numbers;
  double total = 0, worst = 0;
  constexpr int cases = 400;
  for (int i = 0; i < cases; ++i) {
    const int64_t ranks = 2 + numbers.below(3), slots = 2 + numbers.below(2),
                  experts = ranks * slots - numbers.below(2);
    const auto load = numbers.loads(experts);
    const Table t = pack(load, ranks, slots);
    expect_valid(t, experts, true);
    const auto l = shares(t, load);
    const double ratio = *std::ranges::max_element(l) / best_maximum(load, ranks, slots);
    EXPECT_GE(ratio, 1 - 1e-12);
    EXPECT_EQ(t, pack(load, ranks, slots));
    total += ratio, worst = std::max(worst, ratio);
  }
  std::printf("busiest rank over the best placement's: mean %.4f, worst %.4f of %d\n", total / cases, worst, cases);
  EXPECT_LE(total / cases, 1.05);
}

TEST(Placement, CopiesGoWhereTheLoadIs) {
  EXPECT_EQ(copies(std::vector<double>{90, 10, 10, 10}, 4, 2), (std::vector<int32_t>{4, 2, 1, 1}));
  EXPECT_EQ(copies(std::vector<double>{1, 1}, 2, 3), (std::vector<int32_t>{2, 2})) << "no more copies than ranks";
  Numbers numbers;
  double with = 0, without = 0;
  for (int i = 0; i < 200; ++i) {
    const int64_t ranks = 2 + numbers.below(7), slots = 2 + numbers.below(4),
                  experts = 1 + numbers.below(ranks * (slots - 1));
    const auto load = numbers.loads(experts);
    const Table t = replicate(load, ranks, slots);
    expect_valid(t, experts);
    with += imbalance(shares(t, load)), without += imbalance(shares(pack(load, ranks, slots), load));
  }
  std::printf("largest over mean load: %.3f with replicas, %.3f without\n", with / 200, without / 200);
  EXPECT_LT(with, without);
}

TEST(Placement, CopiesStayOnANode) {
  Numbers numbers;
  for (int i = 0; i < 100; ++i) {
    const int64_t nodes = 1 + numbers.below(3), ranks = nodes * (1 + numbers.below(4)), slots = 2 + numbers.below(3);
    const int64_t experts = std::max<int64_t>(1, ranks * slots - nodes * numbers.below(ranks * slots / nodes));
    const auto load = numbers.loads(experts);
    const Table t = hierarchical(load, nodes, ranks, slots);
    expect_valid(t, experts);
    std::map<int32_t, int64_t> node_of;
    for (int64_t r = 0; r < ranks; ++r)
      for (int64_t s = 0; s < slots; ++s)
        if (int32_t e = t.at(r, s); e >= 0) {
          const int64_t node = r / (ranks / nodes);
          EXPECT_EQ(node_of.emplace(e, node).first->second, node) << "expert " << e;
        }
  }
}

Table shuffled(const Table& t, Numbers& numbers) {
  std::vector<int64_t> order(size_t(t.ranks));
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = t.ranks - 1; i > 0; --i) std::swap(order[size_t(i)], order[size_t(numbers.below(i + 1))]);
  Table result = t;
  for (int64_t r = 0; r < t.ranks; ++r)
    for (int64_t s = 0; s < t.slots; ++s) result.at(order[size_t(r)], t.slots - 1 - s) = t.at(r, s);
  return result;
}

TEST(Placement, AsFewMovesAsPossible) {
  Numbers numbers;
  for (int i = 0; i < 200; ++i) {
    const int64_t ranks = 1 + numbers.below(5), slots = 1 + numbers.below(4),
                  experts = 1 + numbers.below(ranks * slots);
    const Table now = replicate(numbers.loads(experts), ranks, slots);
    EXPECT_EQ(least_moves(shuffled(now, numbers), now), now);
    const Table next = replicate(numbers.loads(experts), ranks, slots), found = least_moves(next, now);
    expect_valid(found, experts);
    // The same experts together as in `next`.
    std::multiset<std::multiset<int32_t>> expected, together;
    auto rank_of = [&](const Table& t, int64_t r) {
      return std::multiset<int32_t>(t.expert.begin() + r * slots, t.expert.begin() + (r + 1) * slots);
    };
    for (int64_t r = 0; r < ranks; ++r) expected.insert(rank_of(next, r)), together.insert(rank_of(found, r));
    EXPECT_EQ(together, expected);
    // No renaming of ranks does better.
    std::vector<int64_t> order(static_cast<size_t>(ranks));
    std::iota(order.begin(), order.end(), 0);
    int64_t best = ranks * slots;
    do {
      Table t = next;
      for (int64_t r = 0; r < ranks; ++r)
        for (int64_t s = 0; s < slots; ++s) t.at(order[size_t(r)], s) = next.at(r, s);
      best = std::min(best, moves(t, now));
    } while (std::ranges::next_permutation(order).found);
    EXPECT_EQ(moves(found, now), best);
    // What stays keeps its slot.
    for (int64_t r = 0; r < ranks; ++r)
      for (int64_t s = 0; s < slots; ++s) {
        const int32_t e = now.at(r, s);
        if (e < 0 || !rank_of(found, r).contains(e)) continue;
        EXPECT_EQ(found.at(r, s), e);
      }
  }
}

TEST(Placement, RanksKeepToTheirNode) {
  Numbers numbers;
  const auto load = numbers.loads(12);
  const Table now = hierarchical(load, 2, 4, 4), next = hierarchical(numbers.loads(12), 2, 4, 4);
  const Table found = least_moves(next, now, 2);
  std::multiset<std::set<int32_t>> expected, nodes;
  for (int64_t n = 0; n < 2; ++n) {
    expected.emplace(next.expert.begin() + n * 8, next.expert.begin() + n * 8 + 8);
    nodes.emplace(found.expert.begin() + n * 8, found.expert.begin() + n * 8 + 8);
  }
  EXPECT_EQ(nodes, expected);
  EXPECT_LE(moves(found, now), moves(next, now));
}

TEST(Placement, RowsGoToCopiesOfTheirExpert) {
  Numbers numbers;
  double routed = 0, equal = 0;
  for (int i = 0; i < 100; ++i) {
    const int64_t P = 2 + numbers.below(7), S = 2 + numbers.below(3), E = 1 + numbers.below(P * (S - 1));
    const auto popular = numbers.loads(E);
    std::vector<double> rows(size_t(E * P));
    for (int64_t s = 0; s < P; ++s) {  // every rank sends as many
      std::vector<double> its;
      for (double n : popular) its.push_back(n * (0.5 + numbers.uniform()));
      for (int64_t e = 0; e < E; ++e) rows[size_t(e * P + s)] = 1000 * its[size_t(e)] / sum(its);
    }
    std::vector<double> load;
    for (int64_t e = 0; e < E; ++e) load.push_back(sum(std::span(rows).subspan(size_t(e * P), size_t(P))));
    const Table t = replicate(load, P, S);
    const auto slots = route(t, rows);
    for (int64_t e = 0; e < E; ++e)
      for (int64_t s = 0; s < P; ++s) EXPECT_EQ(t.expert[size_t(slots[size_t(e * P + s)])], e);
    const auto l = rank_rows(slots, rows, P, S);
    EXPECT_NEAR(sum(l), sum(rows), 1e-9 * sum(rows));
    routed += imbalance(l), equal += imbalance(shares(t, load));
  }
  std::printf("largest over mean rows: %.3f, %.3f were copies to share equally\n", routed / 100, equal / 100);
  EXPECT_LT(routed, 1.2 * equal);
}

TEST(Placement, ARankKeepsItsOwnRowsWhereNothingElseSpeaks) {
  const Table t{2, 1, {0, 0}};
  EXPECT_EQ(route(t, std::vector<double>{5, 5}), (std::vector<int32_t>{0, 1}));
}

struct Shadowed {
  double before, after;  // seconds
  std::vector<Shadow> list;
};

Shadowed shadowed(const std::vector<double>& rows, const std::vector<int32_t>& slots_of, int64_t P, int64_t S,
                  int64_t slots, const ShadowCosts& costs) {
  std::vector<double> load = rank_rows(slots_of, rows, P, S), link(static_cast<size_t>(P));
  std::vector<int64_t> used(static_cast<size_t>(P));
  Shadowed r{*std::ranges::max_element(load) * costs.row, 0, shadows(slots_of, rows, P, S, slots, costs)};
  for (const Shadow& shadow : r.list)
    for (int32_t s : shadow.ranks) {
      const size_t i = size_t(shadow.expert * P + s), host = size_t(slots_of[i] / S);
      EXPECT_NE(int64_t(host), s);
      EXPECT_LE(++used[size_t(s)], slots);
      load[host] -= rows[i], load[size_t(s)] += rows[i], link[host] += costs.weights + costs.gradient;
    }
  r.after = *std::ranges::max_element(load) * costs.row + *std::ranges::max_element(link);
  return r;
}

TEST(Placement, ShadowsWhereTheyPay) {
  Numbers numbers;
  for (int i = 0; i < 100; ++i) {
    const int64_t P = 2 + numbers.below(4), E = P * (1 + numbers.below(3)), S = E / P;
    const auto rows = numbers.loads(E * P);
    const auto slots_of = route(in_order(E, P, S), rows);
    const Shadowed some = shadowed(rows, slots_of, P, S, 2, {.row = 1, .weights = 20, .gradient = 20});
    EXPECT_EQ(some.list.empty(), some.after == some.before);
    EXPECT_LE(some.after, some.before);
    EXPECT_TRUE(shadows(slots_of, rows, P, S, 2, {.row = 1, .weights = 1e9, .gradient = 0}).empty());
    EXPECT_TRUE(shadows(slots_of, rows, P, S, 2, {.row = 1, .weights = 0, .gradient = 1e9}).empty());
    EXPECT_TRUE(shadows(slots_of, rows, P, S, 0, {.row = 1, .weights = 0, .gradient = 0}).empty());
    // No other single shadow would pay.
    auto rest = rows;
    std::vector<double> load = rank_rows(slots_of, rows, P, S), link(static_cast<size_t>(P));
    std::vector<int64_t> used(static_cast<size_t>(P));
    for (const Shadow& shadow : some.list)
      for (int32_t s : shadow.ranks) {
        const size_t j = size_t(shadow.expert * P + s), h = size_t(slots_of[j] / S);
        load[h] -= rows[j], load[size_t(s)] += rows[j], link[h] += 40, ++used[size_t(s)], rest[j] = 0;
      }
    for (size_t j = 0; j < rest.size(); ++j) {
      const size_t h = size_t(slots_of[j] / S), s = j % size_t(P);
      if (h == s || used[s] == 2) continue;
      auto l = load, k = link;
      l[h] -= rest[j], l[s] += rest[j], k[h] += 40;
      EXPECT_GE(*std::ranges::max_element(l) + *std::ranges::max_element(k), some.after * (1 - 1e-8));
    }
  }
}

// Expert 0 on rank 0 gets 100 rows of each of four ranks, the others next to nothing: three ranks take their own.
TEST(Placement, TheHotExpertIsShadowed) {
  std::vector<double> rows(4 * 4, 1);
  std::fill_n(rows.begin(), 4, 100.0);
  const auto slots_of = route(in_order(4, 4, 1), rows);
  const auto list = shadows(slots_of, rows, 4, 1, 1, {.row = 1, .weights = 10, .gradient = 10});
  ASSERT_EQ(list.size(), 1u);
  EXPECT_EQ(list[0].expert, 0);
  EXPECT_EQ(list[0].ranks, (std::vector<int32_t>{1, 2, 3}));
}

TEST(Placement, Refused) {
  const std::vector<double> load(9, 1.0);
  EXPECT_EQ(error_line([&] { in_order(9, 4, 2); }), "placement: 9 experts do not fit into 2 slots on each of 4 ranks");
  EXPECT_EQ(error_line([&] { pack(load, 4, 2); }), "placement: 9 experts do not fit into 2 slots on each of 4 ranks");
  EXPECT_EQ(error_line([&] { replicate(load, 4, 2); }),
            "placement: 9 experts do not fit into 2 slots on each of 4 ranks");
  EXPECT_EQ(error_line([&] { hierarchical(load, 3, 4, 4); }),
            "placement: 4 ranks are not the same number on each of 3 nodes");
  EXPECT_EQ(error_line([&] {
              route(Table{2, 1, {0, -1}}, std::vector<double>(4, 1.0));
            }),
            "placement: expert 1 has no slot");
  EXPECT_EQ(error_line([&] {
              least_moves(Table{2, 1, {0, 1}}, Table{1, 2, {0, 1}});
            }),
            "placement: tables of 2 x 1 and 1 x 2 on 1 nodes");
}

}  // namespace
