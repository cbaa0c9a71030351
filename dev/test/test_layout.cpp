// Groups of processes: both views of a rank, who is with whom, what each has, and what is refused.
#include "moe/layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "dev/test/error_line.h"

namespace {

// Every layout whose product is at most 16.
std::vector<Layout> layouts() {
  std::vector<Layout> all;
  for (int dp : {1, 2, 3, 4, 8})
    for (int tp : {1, 2, 4})
      for (int pp : {1, 2, 3, 4})
        for (int ep : {1, 2, 4, 8})
          for (int etp : {1, 2, 4}) {
            Layout l{dp, tp, pp, ep, etp};
            if (l.world() <= 16 && l.stage_ranks() % (ep * etp) == 0) all.push_back(l);
          }
  return all;
}

int size_of(const Layout& l, Group g) {
  switch (g) {
    case Group::world:
      return l.world();
    case Group::stage:
      return l.dp * l.tp;
    case Group::dp:
      return l.dp;
    case Group::tp:
      return l.tp;
    case Group::pp:
      return l.pp;
    case Group::ep:
      return l.ep * l.etp;
    case Group::etp:
      return l.etp;
    case Group::edp:
      return l.edp();
    case Group::ends:
      return l.dp * std::min(l.pp, 2);
  }
  return 0;
}

TEST(Layout, BothViewsNumberTheSameRanks) {
  for (const Layout& l : layouts())
    for (int rank = 0; rank < l.world(); ++rank) {
      Place p = place(l, rank);
      EXPECT_EQ((p.pp * l.dp + p.dp) * l.tp + p.tp, rank);
      EXPECT_EQ((p.edp * l.ep + p.ep) * l.etp + p.etp, rank % l.stage_ranks());
      EXPECT_TRUE(p.dp < l.dp && p.tp < l.tp && p.pp < l.pp && p.edp < l.edp() && p.ep < l.ep && p.etp < l.etp);
    }
}

TEST(Layout, GroupsOfAKindPartTheRanks) {
  for (const Layout& l : layouts())
    for (Group g : groups) {
      SCOPED_TRACE(std::string(name_of(g)) + " of\n" + describe(l, ModelConfig{}));
      std::set<int> seen;
      for (const auto& ranks : all_groups(l, g)) {
        EXPECT_EQ(int(ranks.size()), size_of(l, g));
        EXPECT_TRUE(std::is_sorted(ranks.begin(), ranks.end()));
        for (int rank : ranks) {
          EXPECT_TRUE(seen.insert(rank).second) << rank << " is in two groups";
          EXPECT_EQ(members(l, g, rank), ranks);
        }
      }
      const int stages = g == Group::ends ? std::min(l.pp, 2) : l.pp;
      EXPECT_EQ(int(seen.size()), l.stage_ranks() * stages);
    }
}

TEST(Layout, KnownGroups) {
  const Layout l{4, 2, 2, 2, 2};  // stage: 8 ranks, edp 2
  EXPECT_EQ(members(l, Group::tp, 5), (std::vector<int>{4, 5}));
  EXPECT_EQ(members(l, Group::dp, 5), (std::vector<int>{1, 3, 5, 7}));
  EXPECT_EQ(members(l, Group::pp, 5), (std::vector<int>{5, 13}));
  EXPECT_EQ(members(l, Group::ends, 5), (std::vector<int>{1, 3, 5, 7, 9, 11, 13, 15}));
  EXPECT_EQ(members(l, Group::etp, 5), (std::vector<int>{4, 5}));
  EXPECT_EQ(members(l, Group::ep, 5), (std::vector<int>{4, 5, 6, 7}));
  EXPECT_EQ(members(l, Group::edp, 5), (std::vector<int>{1, 5}));
  EXPECT_EQ(members(l, Group::stage, 13), (std::vector<int>{8, 9, 10, 11, 12, 13, 14, 15}));
}

// A gradient of an expert is summed over edp and reaches, through ep, each expert and part once.
TEST(Layout, ExpertGroupsTogetherAreTheStage) {
  for (const Layout& l : layouts())
    for (int rank = 0; rank < l.world(); ++rank) {
      std::set<int> reached;
      for (int a : members(l, Group::edp, rank))
        for (int b : members(l, Group::ep, a)) EXPECT_TRUE(reached.insert(b).second);
      EXPECT_EQ(int(reached.size()), l.stage_ranks());
    }
}

TEST(Layout, SharesCoverEverythingOnceAndEvenly) {
  for (int64_t n : {0, 1, 7, 64, 1000})
    for (int parts : {1, 2, 3, 8}) {
      int64_t next = 0;
      for (int i = 0; i < parts; ++i) {
        auto [first, last] = share(n, parts, i);
        EXPECT_EQ(first, next);
        EXPECT_TRUE(last - first == n / parts || last - first == n / parts + 1);
        next = last;
      }
      EXPECT_EQ(next, n);
    }
}

TEST(Layout, StagesMayHaveUnequalNumbersOfLayers) {
  ModelConfig model;
  model.n_layer = 7;
  const Layout l{1, 1, 3, 1, 1};
  EXPECT_EQ(layers_of(l, model, 0), (std::pair<int64_t, int64_t>{0, 2}));
  EXPECT_EQ(layers_of(l, model, 1), (std::pair<int64_t, int64_t>{2, 4}));
  EXPECT_EQ(layers_of(l, model, 2), (std::pair<int64_t, int64_t>{4, 7}));
}

TEST(Layout, WhatCannotBeIsRefusedInOneLine) {
  const ModelConfig tiny;  // L 4, NH 4, NKV 2, E 8, F 128
  auto line = [&](Layout l, int world) { return error_line([&] { l.validate(world, tiny); }); };
  EXPECT_EQ(line({2, 1, 2, 2, 1}, 4), "");
  EXPECT_EQ(line({2, 1, 1, 1, 1}, 4),
            "--dp 2 --tp 1 --pp 1 are 2 processes, but 4 run; start as many as their product");
  EXPECT_EQ(line({2, 1, 1, 1, 1}, 1),
            "--dp 2 --tp 1 --pp 1 are 2 processes, but 1 runs; start as many as their product");
  EXPECT_EQ(line({4, 1, 1, 3, 1}, 4), "--ep 3 --etp 1: their product 3 does not divide --dp x --tp = 4");
  EXPECT_EQ(line({1, 4, 1, 1, 1}, 4), "--tp 4 does not divide --n-head 4 and --n-kv-head 2");
  EXPECT_EQ(line({1, 1, 5, 1, 1}, 5), "--pp 5 is more than the 4 layers of the model (--n-layer)");
  EXPECT_EQ(line({16, 1, 1, 16, 1}, 16), "--ep 16 does not divide --n-expert 8");
  EXPECT_EQ(line({32, 1, 1, 1, 32}, 32), "--etp 32 does not cut --d-expert 128 into multiples of 8");
  EXPECT_EQ(line({0, 1, 1, 1, 1}, 1), "--dp must be from 1 to 2^20, not 0");
}

TEST(Layout, ItsDescriptionNamesEveryGroup) {
  const std::string text = describe({2, 1, 2, 2, 1}, ModelConfig{});
  for (Group g : groups) EXPECT_NE(text.find(std::string("  ") + name_of(g) + ": "), std::string::npos) << text;
  EXPECT_NE(text.find("ep: 2 of 2 (0 1), tokens to experts and back\n"), std::string::npos) << text;
  EXPECT_NE(text.find("stage 1: layers 2 to 3, 4 of 8 experts a rank\n"), std::string::npos) << text;
}

}  // namespace
