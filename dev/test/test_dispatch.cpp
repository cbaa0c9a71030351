// The routing plan: properties that hold for any routing, over random and adversarial ones.
#include <gtest/gtest.h>

#include "dev/test/op_test.h"
#include "moe/dispatch.h"

namespace {

struct Routing {
  std::string name;
  int64_t N, K, E;
  std::vector<int32_t> index;  // (N,K)
};

// K different experts a token, at random; `popular` > 0 draws most of them from the first few.
Routing random_routing(const std::string& name, int64_t N, int64_t K, int64_t E, int64_t popular = 0) {
  Routing r{name, N, K, E, {}};
  for (int64_t t = 0; t < N; ++t) {
    std::vector<int32_t> order(E);
    for (int32_t e = 0; e < E; ++e) order[e] = e;
    for (int64_t k = 0; k < K; ++k) {
      uint64_t bits = random_bits(3, hash_name(name), uint64_t(t * K + k));
      int64_t range = popular > K && bits >> 60 ? popular - k : E - k;
      std::swap(order[k], order[k + int64_t((bits & 0xFFFFFFFF) % uint64_t(range))]);
    }
    r.index.insert(r.index.end(), order.begin(), order.begin() + K);
  }
  return r;
}

std::vector<Routing> all_routings() {
  std::vector<Routing> all = {random_routing("random", 200, 2, 8),      random_routing("skewed", 300, 2, 16, 3),
                              random_routing("one token", 1, 2, 8),     random_routing("one expert", 50, 1, 1),
                              random_routing("K = E", 33, 4, 4),        random_routing("E 512, K 16", 100, 16, 512),
                              random_routing("few of many", 3, 1, 512), random_routing("one of each", 1, 1, 1)};
  for (int32_t e : {0, 3, 7})
    all.push_back({"all tokens to expert " + std::to_string(e), 70, 1, 8, std::vector<int32_t>(70, e)});
  Routing pairs{"all tokens to the same two", 70, 2, 8, {}};
  for (int i = 0; i < 70; ++i) pairs.index.insert(pairs.index.end(), {6, 1});
  all.push_back(pairs);
  Routing twice{"an expert twice in a token", 20, 2, 4,
                std::vector<int32_t>(40, 2)};  // no router does it; the plan holds
  all.push_back(twice);
  Routing descending{"descending", 64, 1, 64, {}};
  for (int i = 0; i < 64; ++i) descending.index.push_back(63 - i);
  all.push_back(descending);
  for (int i = 0; i < 40; ++i) {
    int64_t E = 1 + int64_t(random_bits(4, 0, i) % 20), K = 1 + int64_t(random_bits(4, 1, i) % uint64_t(E));
    int64_t N = 1 + int64_t(random_bits(4, 2, i) % 60);
    all.push_back(random_routing("random " + std::to_string(i), N, K, E, i % 2 ? std::min(K + 1, E) : 0));
  }
  return all;
}

struct Planned {
  std::vector<int32_t> counts, offsets, row_slot, slot_row;
  DeviceStatus status;
  Planned(const Routing& r, int64_t capacity)
      : counts(r.E, -77), offsets(r.E + 1, -77), row_slot(r.N * r.K, -77), slot_row(r.N * r.K, -77) {
    Cpu<float> dev{.status = &status, .layer = 5};
    Scratch scratch(dispatch_scratch_bytes<Cpu<float>>(r.N, r.K, r.E));
    dispatch_plan(dev, {counts.data(), offsets.data(), row_slot.data(), slot_row.data()}, scratch, r.index.data(), r.N,
                  r.K, r.E, capacity);
  }
};

void expect_plan(const Routing& r, int64_t capacity) {
  SCOPED_TRACE(r.name + ", capacity " + std::to_string(capacity));
  Planned p(r, capacity);
  const int64_t R = r.N * r.K;
  // What each expert keeps, and in which order: the first slots in token order.
  std::vector<std::vector<int32_t>> kept(r.E);
  for (int64_t slot = 0; slot < R; ++slot) {
    int32_t e = r.index[slot];
    bool valid = e >= 0 && e < r.E;
    if (valid && (capacity == 0 || int64_t(kept[e].size()) < capacity))
      kept[e].push_back(int32_t(slot));
    else
      EXPECT_EQ(p.slot_row[slot], -1) << slot;
  }
  EXPECT_EQ(p.offsets[0], 0);
  int64_t rows = 0;
  for (int64_t e = 0; e < r.E; ++e) {
    EXPECT_EQ(p.counts[e], int64_t(kept[e].size()));
    ASSERT_EQ(p.offsets[e], rows);
    for (int32_t slot : kept[e]) {
      ASSERT_EQ(p.row_slot[rows], slot);
      ASSERT_EQ(p.slot_row[slot], rows);
      ++rows;
    }
  }
  EXPECT_EQ(p.offsets[r.E], rows);
  // The same as properties, which do not lean on the loop above: inverse relations, ascending within an expert.
  EXPECT_LE(p.offsets[r.E], R);
  for (int64_t row = 0; row < R; ++row)
    if (row >= p.offsets[r.E]) {
      EXPECT_EQ(p.row_slot[row], -1);
    } else {
      EXPECT_EQ(p.slot_row[p.row_slot[row]], row);
    }
  for (int64_t slot = 0; slot < R; ++slot)
    if (p.slot_row[slot] >= 0) {
      EXPECT_EQ(p.row_slot[p.slot_row[slot]], slot);
      int32_t e = r.index[slot];
      EXPECT_TRUE(p.slot_row[slot] >= p.offsets[e] && p.slot_row[slot] < p.offsets[e + 1]);
    }
  for (int64_t e = 0; e < r.E; ++e)
    for (int64_t row = p.offsets[e] + 1; row < p.offsets[e + 1]; ++row) EXPECT_LT(p.row_slot[row - 1], p.row_slot[row]);
}

TEST(DispatchPlan, HoldsForAnyRoutingAndCapacity) {
  for (const Routing& r : all_routings())
    for (int64_t capacity :
         {int64_t(0), int64_t(1), int64_t(2), (r.N * r.K + r.E - 1) / r.E, r.N * r.K, r.N * r.K + 100})
      expect_plan(r, capacity);
}

TEST(DispatchPlan, DroplessKeepsEverySlot) {
  for (const Routing& r : all_routings()) {
    Planned p(r, 0);
    EXPECT_EQ(p.offsets[r.E], r.N * r.K) << r.name;
    EXPECT_EQ(std::count(p.slot_row.begin(), p.slot_row.end(), -1), 0) << r.name;
    EXPECT_EQ(p.status.code, DeviceStatus::ok) << r.name;
  }
}

TEST(DispatchPlan, IndicesOutsideAreReportedAndDropped) {
  for (int32_t foreign : {8, -2, INT32_MAX, INT32_MIN})
    for (int64_t slot : {0, 137, 399})
      for (int64_t capacity : {0, 20}) {
        Routing r = random_routing("random", 200, 2, 8);
        r.index[slot] = foreign;
        Planned p(r, capacity);
        EXPECT_EQ(p.status.code, DeviceStatus::expert_out_of_range);
        EXPECT_EQ(p.status.layer, 5);
        EXPECT_EQ(p.status.token, slot / 2);
        EXPECT_EQ(p.status.value, foreign);
        EXPECT_EQ(p.slot_row[slot], -1);
        expect_plan(r, capacity);
      }
  Routing all{"nothing valid", 10, 2, 4, std::vector<int32_t>(20, 4)};
  all.index[5] = -9;
  Planned p(all, 0);
  EXPECT_EQ(p.status.token, 0);  // the first fault stays
  EXPECT_EQ(p.status.value, 4);
  EXPECT_EQ(p.offsets[4], 0);
  expect_plan(all, 0);
}

// -1 is a choice of another rank's expert: no row, and no fault.
Routing with_choices_elsewhere(Routing r) {
  r.name += ", some elsewhere";
  for (size_t i = 0; i < r.index.size(); ++i)
    if (random_bits(6, hash_name(r.name), i) % 3 == 0) r.index[i] = -1;
  return r;
}

TEST(DispatchPlan, ChoicesOfOtherRanksHaveNoRow) {
  for (Routing r : all_routings()) {
    r = with_choices_elsewhere(r);
    const int64_t kept = std::count_if(r.index.begin(), r.index.end(), [](int32_t e) { return e >= 0; });
    for (int64_t capacity : {int64_t(0), int64_t(2), r.N * r.K}) expect_plan(r, capacity);
    Planned p(r, 0);
    EXPECT_EQ(p.offsets[r.E], kept) << r.name;
    EXPECT_EQ(p.status.code, DeviceStatus::ok) << r.name;
  }
  Routing none{"all elsewhere", 10, 2, 4, std::vector<int32_t>(20, -1)};
  Planned p(none, 0);
  EXPECT_EQ(p.status.code, DeviceStatus::ok);
  EXPECT_EQ(p.offsets, std::vector<int32_t>(5, 0));
  EXPECT_EQ(p.row_slot, std::vector<int32_t>(20, -1));
}

// Parts of n rows, one after another, are the plan: each slot has its row in one of them, experts keep their order.
TEST(DispatchPart, PartsMakeUpThePlan) {
  for (Routing r : all_routings())
    for (bool elsewhere : {false, true}) {
      if (elsewhere) r = with_choices_elsewhere(r);
      const int64_t slots = r.N * r.K;
      for (int64_t n : {int64_t(1), int64_t(7), int64_t(64), slots, slots + 30}) {
        if (n == 1 && slots > 200) continue;
        SCOPED_TRACE(r.name + ", parts of " + std::to_string(n));
        Planned whole(r, 0);
        std::vector<int32_t> row_of(size_t(slots), -1);
        for (int64_t first = 0; first < slots + n; first += n) {
          std::vector<int32_t> counts(r.E, -77), offsets(r.E + 1, -77), row_slot(n, -77), slot_row(slots, -77);
          Cpu<float> dev;
          dispatch_part(dev, {counts.data(), offsets.data(), row_slot.data(), slot_row.data()},
                        {whole.counts.data(), whole.offsets.data(), whole.row_slot.data(), whole.slot_row.data()},
                        first, n, r.N, r.K, r.E);
          const int64_t rows = std::clamp<int64_t>(whole.offsets[r.E] - first, 0, n);
          ASSERT_EQ(offsets[0], 0);
          ASSERT_EQ(offsets[r.E], rows);
          for (int64_t e = 0; e < r.E; ++e) {
            ASSERT_EQ(counts[e], offsets[e + 1] - offsets[e]);
            ASSERT_GE(counts[e], 0);
            for (int64_t row = offsets[e]; row < offsets[e + 1]; ++row) EXPECT_EQ(r.index[row_slot[row]], e);
          }
          for (int64_t row = 0; row < n; ++row) {
            if (row < rows) {
              ASSERT_EQ(row_slot[row], whole.row_slot[first + row]);
              EXPECT_EQ(slot_row[row_slot[row]], row);
              EXPECT_EQ(row_of[row_slot[row]], -1) << "a slot in two parts";
              row_of[row_slot[row]] = int32_t(first + row);
            } else {
              EXPECT_EQ(row_slot[row], -1);
            }
          }
          EXPECT_EQ(std::count(slot_row.begin(), slot_row.end(), -1), slots - rows);
        }
        EXPECT_EQ(row_of, whole.slot_row);
      }
    }
}

template <class Real>
struct Gather : ::testing::Test {};
TYPED_TEST_SUITE(Gather, AllReals);

TYPED_TEST(Gather, CopiesTheTokenOfEachRowAndLeavesTheRest) {
  using Real = TypeParam;
  const int64_t C = 7;
  for (int64_t capacity : {0, 9}) {
    Routing r = random_routing("skewed", 60, 3, 9, 4);
    Planned p(r, capacity);
    auto x = random_tensor<Real>("x", r.N * C);
    expect_same_bits_on_any_threads([&] {
      auto rows = random_tensor<Real>("stale", r.N * r.K * C), stale = rows;
      Cpu<Real> dev;
      dispatch_gather(dev, rows.data(), x.data(), p.offsets.data(), p.row_slot.data(), r.N, r.K, r.E, C);
      for (int64_t row = 0; row < r.N * r.K; ++row) {
        const Real* expected = row < p.offsets[r.E] ? &x[p.row_slot[row] / r.K * C] : &stale[row * C];
        EXPECT_EQ(std::memcmp(&rows[row * C], expected, C * sizeof(Real)), 0) << row;
      }
      return bits_of(rows);
    });
  }
}

}  // namespace
