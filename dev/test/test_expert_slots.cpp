// Tables of who computes which expert: what they hold in order, their runs, what is no such table.
#include "moe/expert_slots.h"

#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "dev/test/places.h"
#include "llmc/error.h"

namespace {

// The line of an error that this throws; empty: none.
template <class F>
std::string line_of(F f) {
  try {
    f();
  } catch (const Error& e) { return e.what(); }
  return {};
}
bool says(const std::string& line, std::initializer_list<const char*> words) {
  for (const char* word : words)
    if (line.find(word) == std::string::npos) return false;
  return line.find('\n') == std::string::npos;
}

TEST(ExpertSlots, InOrderEachHostHasItsShare) {
  EXPECT_EQ(experts_in_order(4, 2, 2, 2).place, (std::vector<int32_t>{0, 0, 1, 1, 2, 2, 3, 3}));
  EXPECT_EQ(experts_in_order(4, 2, 4, 3).place, (std::vector<int32_t>{0, 0, 0, 0, 1, 1, 1, 1, 3, 3, 3, 3, 4, 4, 4, 4}));
  for (auto [E, hosts, extra] : {std::tuple{1, 1, 0}, {8, 1, 0}, {8, 4, 0}, {8, 4, 3}, {12, 3, 1}}) {
    const ExpertSlots s = experts_in_order(E, hosts, hosts, E / hosts + extra);
    s.validate("here", E / hosts);
    const auto runs = s.runs();
    ASSERT_EQ(int(runs.size()), hosts);
    for (int h = 0; h < hosts; ++h) {
      ASSERT_EQ(runs[h].size(), 1u);  // a host's share stays in one piece
      EXPECT_EQ(runs[h][0].expert, h * (E / hosts));
      EXPECT_EQ(runs[h][0].n, E / hosts);
      EXPECT_EQ(runs[h][0].slot, 0);
    }
  }
}

TEST(ExpertSlots, RunsAreWhatTheTableSays) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const int hosts = 1 + int(seed % 5), sources = hosts * (1 + int(seed % 2));
    const int64_t slots = 1 + int64_t(seed % 7), E = 1 + int64_t(random_bits(3, seed, 0) % uint64_t(hosts * slots));
    SCOPED_TRACE("seed " + std::to_string(seed));
    const ExpertSlots s = random_places(seed, E, hosts, sources, slots);
    s.validate("here", slots);
    std::set<std::pair<int64_t, int64_t>> in_table, in_runs;  // (expert, place)
    for (int64_t i = 0; i < E * sources; ++i) in_table.emplace(i / sources, s.place[i]);
    const auto runs = s.runs();
    for (int h = 0; h < hosts; ++h) {
      int64_t end = 0;
      for (const auto& run : runs[h]) {
        EXPECT_GE(run.expert, end);
        end = run.expert + run.n;
        for (int64_t i = 0; i < run.n; ++i) in_runs.emplace(run.expert + i, h * slots + run.slot + i);
        for (const auto& others : runs)
          for (const auto& other : others)
            EXPECT_TRUE((other.expert == run.expert && other.n == run.n) || other.expert >= end ||
                        other.expert + other.n <= run.expert);
      }
    }
    EXPECT_EQ(in_runs, in_table);
  }
}

TEST(ExpertSlots, WhatIsNoTable) {
  const ExpertSlots good{3, 2, 2, 3, {0, 3, 4, 4, 1, 1}};  // expert 0 on both hosts
  good.validate("here", 2);
  auto changed = [&](size_t i, int32_t to, int64_t in_use) {
    ExpertSlots s = good;
    s.place[i] = to;
    return line_of([&] { s.validate("here", in_use); });
  };
  EXPECT_TRUE(says(changed(0, -1, 2), {"here: expert 0 for tokens of rank 0: -1 is not", "host < 2", "slot < 2"}));
  EXPECT_TRUE(says(changed(3, 6, 2), {"here: expert 1 for tokens of rank 1: 6 is not"}));
  EXPECT_TRUE(says(changed(3, 2, 2), {"expert 1", "2 is not"}));  // the third slot is not in use
  EXPECT_TRUE(says(changed(3, 2, 3), {})) << "and is another host's";
  EXPECT_TRUE(says(changed(4, 4, 2), {"here: experts 1 and 2 are both in slot 1 of host 1"}));
  EXPECT_TRUE(says(changed(4, 0, 2), {"here: experts 0 and 2 are both in slot 0 of host 0"}));
  EXPECT_TRUE(says(changed(3, 5, 3), {"here: expert 1 is in slots 1 and 2 of host 1"}));
}

TEST(ExpertSlots, AreReadFromText) {
  const std::string path =
      ::testing::TempDir() + "places-" + std::to_string(::testing::UnitTest::GetInstance()->random_seed());
  auto read = [&](const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
    return read_places(path, 2, 3);
  };
  EXPECT_EQ(read("0 1 2\n3\t4 5\r\n"), (std::vector<std::vector<int32_t>>{{0, 1, 2}, {3, 4, 5}}));
  for (const char* foreign : {"0 1 2 3 4 x", "0 1 2 3 4 5.5", "0 1 2 3 4 99999999999", "0 1 2 3 4 5,"})
    EXPECT_TRUE(says(line_of([&] { read(foreign); }), {path.c_str(), "place 6", "is not the number of a slot"}))
        << foreign;
  for (const char* wrong : {"", "0 1 2 3 4", "0 1 2 3 4 5 6"})
    EXPECT_TRUE(says(line_of([&] { read(wrong); }), {path.c_str(), "numbers, not 3 for each of 2 layers"})) << wrong;
  std::remove(path.c_str());
  EXPECT_TRUE(says(line_of([&] { read_places(path, 2, 3); }), {path.c_str()}));
}

}  // namespace
