// Where optimizer state lives: who is home to which rows, what passes between hosts and homes, sums of what arrives.
#include "llmc/homes.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "dev/test/op_test.h"
#include "dev/test/places.h"
#include "llmc/zero.h"
#include "moe/parallel.h"

namespace {

TEST(HomeBounds, AreSharedOutByUnits) {
  EXPECT_EQ(home_bounds({256}, 64, 2), (std::vector<int64_t>{0, 128, 256}));
  EXPECT_EQ(home_bounds({300}, 64, 2), (std::vector<int64_t>{0, 192, 300}));          // 5 units, the last of 44 rows
  EXPECT_EQ(home_bounds({100, 30}, 64, 3), (std::vector<int64_t>{0, 64, 100, 130}));  // no unit crosses a piece
  EXPECT_EQ(home_bounds({128}, 64, 4), (std::vector<int64_t>{0, 64, 64, 128, 128}));
  EXPECT_EQ(home_bounds({1}, 64, 3), (std::vector<int64_t>{0, 1, 1, 1}));
  EXPECT_EQ(home_bounds({}, 64, 2), (std::vector<int64_t>{0, 0, 0}));
}

TEST(HomeBounds, HoldForAnyPiecesAndRanks) {
  for (uint64_t i = 0; i < 300; ++i) {
    auto number = [&](uint64_t stream, uint64_t bound) { return int64_t(random_bits(5, stream, i) % bound); };
    std::vector<int64_t> pieces;
    for (int64_t p = 0; p <= number(0, 5); ++p) pieces.push_back(number(uint64_t(10 + p), 400));
    const int64_t unit = 1 + number(1, 100);
    const int ranks = 1 + int(number(2, 12));
    std::vector<int64_t> bounds = home_bounds(pieces, unit, ranks);
    std::set<int64_t> starts;
    int64_t rows = 0;
    for (int64_t piece : pieces) {
      for (int64_t r = 0; r < piece; r += unit) starts.insert(rows + r);
      rows += piece;
    }
    ASSERT_EQ(int(bounds.size()), ranks + 1);
    EXPECT_EQ(bounds[0], 0);
    EXPECT_EQ(bounds[ranks], rows);
    std::vector<int64_t> units;
    for (int r = 0; r < ranks; ++r) {
      ASSERT_LE(bounds[r], bounds[r + 1]);
      EXPECT_TRUE(bounds[r] == rows || starts.contains(bounds[r])) << bounds[r];
      units.push_back(std::distance(starts.lower_bound(bounds[r]), starts.lower_bound(bounds[r + 1])));
    }
    auto [least, most] = std::minmax_element(units.begin(), units.end());
    EXPECT_LE(*most - *least, 1);
    EXPECT_EQ(units[0], *most);
  }
}

// The same matrix as each rank of a stage sees it.
using EveryRank = std::vector<Homes>;
struct Pattern {
  std::string name;
  EveryRank homes;
  bool together = true;  // every host has its rows in order, with no others between them
};
std::vector<Pattern> patterns() {
  std::vector<Pattern> all;
  for (Layout layout : {Layout{1, 1, 1, 1, 1}, Layout{2, 1, 1, 1, 1}, Layout{4, 1, 1, 2, 1}, Layout{8, 1, 1, 8, 1},
                        Layout{8, 1, 1, 2, 1}, Layout{3, 1, 1, 3, 1}, Layout{4, 1, 1, 2, 2}, Layout{8, 1, 1, 2, 2},
                        Layout{2, 2, 1, 1, 4}, Layout{4, 2, 2, 4, 1}, Layout{6, 1, 1, 3, 2}, Layout{1, 1, 2, 1, 1},
                        Layout{3, 1, 4, 1, 1}}) {
    std::string name = "dp " + std::to_string(layout.dp) + " tp " + std::to_string(layout.tp) + " pp " +
                       std::to_string(layout.pp) + " ep " + std::to_string(layout.ep) + " etp " +
                       std::to_string(layout.etp);
    auto add = [&](const std::string& kind, auto make, bool together = true) {
      for (int pp = 0; pp < layout.pp; ++pp) {
        Pattern p{name + ", " + kind, {}, together};
        for (int r = 0; r < layout.stage_ranks(); ++r) {
          Parallel parallel;
          parallel.layout = layout, parallel.here = place(layout, pp * layout.stage_ranks() + r);
          p.homes.push_back(make(parallel));
        }
        all.push_back(p);
      }
    };
    for (int64_t rows : {1, 40, 200, 1000}) add("all", [&](const Parallel& p) { return p.replicated({rows, 70}, 64); });
    const int64_t E = layout.ep * 4;
    const int sources = layout.ep * layout.etp;
    for (int64_t rows : {16, 64, 150}) {
      const ExpertSlots in_order = experts_in_order(E, layout.ep, sources, 4);
      add("experts", [&](const Parallel& p) { return p.experts(in_order, rows, 64); });
      for (uint64_t seed = 0; seed < 6; ++seed) {
        const ExpertSlots anywhere = random_places(seed, E, layout.ep, sources, 4 + int64_t(seed) / 2);
        add(
            "experts anywhere", [&](const Parallel& p) { return p.experts(anywhere, rows, 64); }, false);
      }
    }
    for (int tp = 0; tp < layout.tp; ++tp) {
      Pattern p{name + ", ends", {}};
      for (int rank : members(layout, Group::ends, tp)) {
        Parallel parallel;
        parallel.layout = layout, parallel.here = place(layout, rank);
        p.homes.push_back(parallel.ends({257}, 64, 384));
      }
      all.push_back(p);
    }
    // Padding beyond the pieces is at home nowhere.
    if (layout.tp == 1) add("padded", [&](const Parallel& p) { return p.dense({257}, 64, 384); });
  }
  return all;
}

// The row of the space that each row of a host's buffer is; -1: none.
std::vector<int64_t> rows_of(const Homes::Host& host) {
  std::vector<int64_t> row(size_t(host.rows), -1);
  for (const Homes::Run& run : host.runs)
    for (int64_t i = 0; i < run.rows; ++i) {
      EXPECT_EQ(row.at(size_t(run.at + i)), -1);
      row[size_t(run.at + i)] = run.row + i;
    }
  return row;
}

TEST(Homes, EveryRowHasOneHomeAndEveryHostsRowsGoThere) {
  for (const Pattern& p : patterns()) {
    SCOPED_TRACE(p.name);
    const int ranks = int(p.homes.size());
    for (int r = 0; r < ranks; ++r) {
      const Homes& h = p.homes[r];
      ASSERT_EQ(h.rank, r);
      ASSERT_EQ(h.bounds, p.homes[0].bounds);
      ASSERT_EQ(h.hosts.size(), size_t(ranks));
      std::vector<int> home(size_t(h.mine().rows), -1);  // of each row of this rank's memory
      int last = -1;
      for (const Share& s : h.to_homes()) {
        EXPECT_GE(s.rank, last) << "not in the order of the ranks";
        last = s.rank;
        ASSERT_TRUE(s.row >= 0 && s.rows > 0 && s.row + s.rows <= h.mine().rows);
        for (int64_t row = s.row; row < s.row + s.rows; ++row) {
          EXPECT_EQ(home[row], -1) << "row " << row << " goes to two homes";
          home[row] = s.rank;
        }
      }
      const std::vector<int64_t> in_space = rows_of(h.mine());
      for (int64_t row = 0; row < h.mine().rows; ++row) {
        int expected = -1;
        for (int owner = 0; owner < ranks; ++owner)
          if (h.bounds[owner] <= in_space[row] && in_space[row] < h.bounds[owner + 1]) expected = owner;
        EXPECT_EQ(home[row], expected) << row;
      }
    }
  }
}

// What a rank sends to a home is what the home expects of it: the same rows of the space, in the same order.
TEST(Homes, ToHomesAndFromHostsAreInverse) {
  for (const Pattern& p : patterns()) {
    SCOPED_TRACE(p.name);
    const int ranks = int(p.homes.size());
    for (int home = 0; home < ranks; ++home) {
      const Homes& at = p.homes[home];
      const int64_t home_rows = at.home_end() - at.home_begin();
      std::vector<std::set<int>> computed_by(size_t(at.slabs * home_rows));
      std::map<int64_t, int64_t> summed;  // what is added up at once: its first row of home memory, and how many
      int last = -1;
      size_t nth = 0;  // share of its rank
      for (const Share& in : at.from_hosts()) {
        EXPECT_GE(in.rank, last);
        nth = in.rank == last ? nth + 1 : 0;
        last = in.rank;
        const Homes& from = p.homes[in.rank];
        std::vector<Share> shares;
        for (const Share& s : from.to_homes())
          if (s.rank == home) shares.push_back(s);
        ASSERT_LT(nth, shares.size());
        const Share& out = shares[nth];
        EXPECT_EQ(out.rows, in.rows);
        EXPECT_EQ(summed.try_emplace(in.row, in.rows).first->second, in.rows);
        if (in.rank == home) { EXPECT_EQ(at.row_of(in), out.row); }
        ASSERT_TRUE(in.row >= 0 && in.row + in.rows <= at.slabs * home_rows);
        const int64_t slab = from.mine().slab;
        EXPECT_EQ(in.row / home_rows, slab);
        const std::vector<int64_t> in_space = rows_of(from.mine());
        for (int64_t i = 0; i < in.rows; ++i)
          EXPECT_EQ(in_space[size_t(out.row + i)], at.home_begin() + in.row - slab * home_rows + i);
        for (int64_t row = in.row; row < in.row + in.rows; ++row) computed_by[size_t(row)].insert(in.rank);
      }
      for (int sender = 0; sender < ranks; ++sender) {
        auto of = [&](const std::vector<Share>& shares, int rank) {
          return std::ranges::count_if(shares, [&](const Share& s) { return s.rank == rank; });
        };
        EXPECT_EQ(of(p.homes[sender].to_homes(), home), of(at.from_hosts(), sender));
      }
      bool own = true, alone = true;
      for (const std::set<int>& who : computed_by) {
        EXPECT_FALSE(who.empty()) << "a row that nobody computes with";
        own = own && who.contains(home), alone = alone && who == std::set<int>{home};
      }
      int64_t end = 0;  // no row is in two of these sums
      for (auto [row, n] : summed) {
        EXPECT_GE(row, end);
        end = row + n;
      }
      bool together = at.slabs == 1;
      if (at.home_is_mine() && home_rows) {
        const std::vector<int64_t> in_space = rows_of(at.mine());
        for (int64_t i = 0; i < home_rows; ++i) EXPECT_EQ(in_space.at(size_t(at.home_at() + i)), at.home_begin() + i);
      } else if (!p.together) {
        together = false;
      }
      EXPECT_EQ(at.home_is_mine(), own && (together || home_rows == 0));
      EXPECT_EQ(at.gradient_is_mine(), alone && (together || home_rows == 0));
    }
  }
}

// Of tied embeddings the first stage has the gradient of the embedding, the last that of the head.
TEST(Homes, AtTheEndsOfAPipelineEachHasOneGradient) {
  Parallel p;
  p.layout = {2, 1, 3, 1, 1};
  for (int rank : {0, 1, 4, 5}) {
    p.here = place(p.layout, rank);
    const Homes h = p.ends({257}, 64, 384);
    EXPECT_EQ(h.group, int(Group::ends));
    EXPECT_EQ(h.rank, rank < 2 ? rank : rank - 2);
    for (int other = 0; other < 4; ++other) {
      EXPECT_EQ(h.has_gradient(other), other < 2);
      EXPECT_EQ(h.has_second_gradient(other), other >= 2);
    }
    EXPECT_FALSE(h.gradient_is_mine());
  }
  p.layout = {2, 1, 1, 1, 1}, p.here = place(p.layout, 1);
  const Homes both = p.ends({257}, 64, 384);
  EXPECT_EQ(both.group, int(Group::stage));  // the same ranks as dp, under one name
  EXPECT_TRUE(both.has_gradient(0) && both.has_gradient(1) && both.has_second_gradient(0) &&
              both.has_second_gradient(1));
}

TEST(Homes, OfAProcessAlone) {
  Homes h = home_alone(37);
  EXPECT_TRUE(h.home_is_mine() && h.gradient_is_mine());
  ASSERT_EQ(h.to_homes().size(), 1u);
  ASSERT_EQ(h.from_hosts().size(), 1u);
  EXPECT_EQ(h.from_hosts()[0].rows, 37);
}

// Tied embeddings, four layers and a norm, whose homes are all on this rank, one of two.
TEST(UpdateBuckets, AreWholePartsOfLayersInTheOrderOfBackward) {
  constexpr int64_t cols = int64_t(1) << 20;
  Parallel p;
  p.layout = {2, 1, 1, 1, 1}, p.here = place(p.layout, 0);
  Plan plan;
  ParameterTable<Cpu<float>> table;
  auto add = [&](int layer, const char* part, int64_t rows, bool tied = false) {
    plan.set_place(layer, part);
    Parameter q;
    q.rows = rows, q.cols = cols;
    q.buffer = table.add_buffer(plan, "matrix", p.dense({rows}, 64, 0), cols, true, true, tied);
    table.add(q);
  };
  add(-1, "", 60, true);
  add(0, "attention", 5), add(0, "mlp", 16), add(0, "mlp", 17);
  add(1, "attention", 8), add(1, "moe", 9);
  add(2, "attention", 16), add(2, "moe", 1);  // with that of layer 1 enough, alone not
  add(3, "moe", 40);
  add(-1, "", 1);
  struct Bucket {
    int first, last;
    int64_t gradients;  // rows
  };
  const std::vector<Bucket> expected = {{9, 10, 1 + 60}, {8, 9, 40}, {4, 8, 34}, {2, 4, 33}, {0, 2, 65}};
  const auto buckets = UpdateBucket<Cpu<float>>::all(table, nullptr, int64_t(32) << 20, true);
  ASSERT_EQ(buckets.size(), expected.size());
  for (size_t i = 0; i < buckets.size(); ++i) {
    EXPECT_EQ(buckets[i].first(), expected[i].first);
    EXPECT_EQ(buckets[i].staging_bytes(), expected[i].gradients * cols * 4);  // of one other rank
    const auto [before, n] = table.views_of(expected[i].first, expected[i].last);
    EXPECT_EQ(before, expected[i].first);
    EXPECT_EQ(n, expected[i].last - expected[i].first);
  }
}

template <class Real>
struct Sums : ::testing::Test {};
TYPED_TEST_SUITE(Sums, AllReals);

// More parts than a call takes: the second goes on from where the first ended.
TYPED_TEST(Sums, AreTakenOneAfterTheOther) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  for (int n_parts : {1, 2, 3, 16, 17, 37})
    for (int64_t n : {1, 7, 1000})
      for (bool wide : {true, false}) {
        std::vector<std::vector<Acc>> sums;
        std::vector<std::vector<Real>> reals;
        for (int i = 0; i < n_parts; ++i) {
          sums.push_back(third(random_tensor<Acc>("part " + std::to_string(i), n)));
          reals.push_back(converted<Real>(sums.back()));
        }
        std::vector<Acc> expected(size_t(n), Acc(0));
        for (int64_t i = 0; i < n; ++i)
          for (int p = 0; p < n_parts; ++p) {
            Acc value = wide ? sums[p][i] : Acc(reals[p][i]);
            expected[i] = p == 0 ? value : expected[i] + value;
          }
        expect_same_bits_on_any_threads([&] {
          Cpu<Real> dev;
          auto out = poisoned<Acc>(n);
          for (int begin = 0; begin < n_parts; begin += SumParts::most) {
            SumParts parts;
            for (int p = begin; p < std::min(n_parts, begin + SumParts::most); ++p)
              parts.part[parts.n++] = wide ? static_cast<const void*>(sums[p].data()) : reals[p].data();
            sum_parts(dev, out.data(), parts, wide, begin > 0, n);
          }
          EXPECT_TRUE(bits_of(out) == bits_of(expected)) << n_parts << " parts of " << n;
          return bits_of(out);
        });
      }
}

}  // namespace
