// The routing plan, its gather, and combine() on the GPU.
#include <gtest/gtest.h>

#include "dev/test/gpu_test.h"
#include "moe/combine.h"
#include "moe/dispatch.h"

namespace {

template <class Real>
struct GpuDispatch : GpuTest {};
TYPED_TEST_SUITE(GpuDispatch, GpuReals);

struct Planned {
  int32_t *counts, *offsets, *row_slot, *slot_row;
};
template <class D>
Planned plan(Buffers<D>& b, const Routing& r, int64_t capacity) {
  Planned p{b.out_int("counts", r.E), b.out_int("offsets", r.E + 1), b.out_int("row_slot", r.N * r.K),
            b.out_int("slot_row", r.N * r.K)};
  dispatch_plan(b.dev, {p.counts, p.offsets, p.row_slot, p.slot_row},
                b.scratch(dispatch_scratch_bytes<D>(r.N, r.K, r.E)), b.upload(r.index), r.N, r.K, r.E, capacity);
  return p;
}

template <class Real>
void check_plan(const Routing& r, const std::vector<int64_t>& capacities) {
  for (int64_t capacity : capacities) {
    SCOPED_TRACE(r.name + " N " + std::to_string(r.N) + " K " + std::to_string(r.K) + " E " + std::to_string(r.E) +
                 " capacity " + std::to_string(capacity));
    expect_calibrated<Real>([&](auto& b) { plan(b, r, capacity); });
  }
}

TYPED_TEST(GpuDispatch, PlanSmall) {
  for (const Routing& r :
       {random_routing(1, 1, 1), random_routing(1, 2, 8), random_routing(50, 1, 1), random_routing(33, 4, 4),
        random_routing(60, 3, 9, 4), same_for_all(70, 1, 8, 0), same_for_all(70, 1, 8, 7), same_for_all(70, 2, 8, 6),
        round_robin(64, 2, 8), round_robin(37, 1, 64), empty_and_single(90, 5), random_routing(100, 16, 512)})
    check_plan<TypeParam>(r, {0, 1, 2, (r.N * r.K + r.E - 1) / r.E, r.N * r.K, r.N * r.K + 100});
}
TYPED_TEST(GpuDispatch, Plan) {
  for (int64_t i = 0; i < 20; ++i) {
    int64_t E = 1 + int64_t(random_bits(4, 0, i) % 130),
            K = 1 + int64_t(random_bits(4, 1, i) % uint64_t(std::min<int64_t>(E, 8)));
    int64_t N = 1 + int64_t(random_bits(4, 2, i) % 2000);
    check_plan<TypeParam>(random_routing(N, K, E, i % 2 ? std::min(K + 1, E) : 0), {0, 1 + N * K / E});
  }
}
TYPED_TEST(GpuDispatch, PlanOfManyTokens) {
  check_plan<TypeParam>(random_routing(32768, 8, 128), {0, 2048, 2000});
  check_plan<TypeParam>(random_routing(32768, 2, 8), {0, 8192});
  check_plan<TypeParam>(random_routing(32768, 8, 128, 12), {0, 3000});
  check_plan<TypeParam>(same_for_all(32768, 1, 1, 0), {0, 10000});
  check_plan<TypeParam>(same_for_all(32768, 8, 128, 124), {0, 32767});
  check_plan<TypeParam>(same_for_all(32768, 1, 8, 5), {0, 1});
  check_plan<TypeParam>(round_robin(32768, 8, 128), {0});
  check_plan<TypeParam>(empty_and_single(32767, 8), {0, 20000});
}

// An index outside is named and its slot dropped; slots after it do not take its place in a full expert.
TYPED_TEST(GpuDispatch, ForeignExpertsSmall) {
  for (int32_t foreign : {8, -2, INT32_MAX, INT32_MIN})
    for (int64_t slot : {0, 137, 399}) {
      Routing r = random_routing(200, 2, 8);
      r.index[slot] = foreign;
      check_plan<TypeParam>(r, {0, 20});
      Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
      plan(b, r, 0);
      DeviceStatus status = b.status();
      EXPECT_EQ(status.code, DeviceStatus::expert_out_of_range);
      EXPECT_EQ(status.layer, 7);
      EXPECT_EQ(status.token, slot / 2);
      EXPECT_EQ(status.value, foreign);
    }
  Routing none{"nothing valid", 10, 2, 4, std::vector<int32_t>(20, 4)};
  Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
  Planned p = plan(b, none, 0);
  EXPECT_EQ(b.read(p.offsets), std::vector<int32_t>(5, 0));
  EXPECT_EQ(b.read(p.row_slot), std::vector<int32_t>(20, -1));
  EXPECT_EQ(b.read(p.slot_row), std::vector<int32_t>(20, -1));
  EXPECT_EQ(b.status().code, DeviceStatus::expert_out_of_range);
}

// -1 is a choice of another rank's expert: no row, and no fault.
Routing with_choices_elsewhere(Routing r, uint64_t one_in = 3) {
  r.name += ", some elsewhere";
  for (size_t i = 0; i < r.index.size(); ++i)
    if (random_bits(6, 0, i) % one_in == 0) r.index[i] = -1;
  return r;
}
TYPED_TEST(GpuDispatch, ChoicesElsewhereSmall) {
  for (const Routing& r : {random_routing(60, 3, 9, 4), same_for_all(70, 2, 8, 6), random_routing(100, 16, 512)})
    for (uint64_t one_in : {1, 2, 5}) check_plan<TypeParam>(with_choices_elsewhere(r, one_in), {0, 2});
  check_plan<TypeParam>(with_choices_elsewhere(random_routing(5000, 8, 128)), {0, 200});
}

// Parts of a plan, and rows past its end.
template <class Real>
void check_parts(const Routing& r, std::initializer_list<int64_t> sizes) {
  const int64_t slots = r.N * r.K;
  for (int64_t n : sizes)
    for (int64_t first : {int64_t(0), n, slots / 2, slots - 1, slots + 5}) {
      SCOPED_TRACE(r.name + ", rows " + std::to_string(first) + " and " + std::to_string(n) + " of " +
                   std::to_string(slots));
      expect_calibrated<Real>([&](auto& b) {
        Planned whole = plan(b, r, 0);
        dispatch_part(b.dev,
                      {b.out_int("part.counts", r.E), b.out_int("part.offsets", r.E + 1), b.out_int("part.row_slot", n),
                       b.out_int("part.slot_row", slots)},
                      {whole.counts, whole.offsets, whole.row_slot, whole.slot_row}, first, n, r.N, r.K, r.E);
      });
    }
}
TYPED_TEST(GpuDispatch, PartSmall) {
  check_parts<TypeParam>(random_routing(1, 1, 1), {1, 64});
  check_parts<TypeParam>(random_routing(3, 1, 512), {1, 2, 64});  // more experts than slots
  check_parts<TypeParam>(random_routing(60, 3, 9, 4), {1, 64, 100, 180, 300});
  check_parts<TypeParam>(same_for_all(70, 2, 8, 6), {64, 128});
  check_parts<TypeParam>(with_choices_elsewhere(random_routing(200, 4, 16)), {64, 256, 800});
}
TYPED_TEST(GpuDispatch, Part) {
  check_parts<TypeParam>(with_choices_elsewhere(random_routing(4000, 8, 128)), {4096, 10000});
}

// ---- gather and combine. Slots are dropped by a capacity.

struct Case {
  Routing routing;
  int64_t capacity, C;
};
template <class Real>
void check_rows(const Case& c) {
  const Routing& r = c.routing;
  SCOPED_TRACE(r.name + " N " + std::to_string(r.N) + " K " + std::to_string(r.K) + " C " + std::to_string(c.C));
  const int64_t n = r.N * c.C, R = r.N * r.K;
  HostPlan host(r, c.capacity);
  const int64_t rows = host.rows();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  auto y = random_values("y", R * c.C), gates = random_values("gates", R, 0.3, 0.5);
  std::fill(y.begin() + rows * c.C, y.end(), nan);  // rows of nobody, and gates of dropped slots
  for (int64_t slot = 0; slot < R; ++slot)
    if (host.slot_row[slot] < 0) gates[slot] = nan;
  expect_calibrated<Real>([&](auto& b) {
    auto *row_slot = b.upload(host.row_slot), *slot_row = b.upload(host.slot_row);
    dispatch_gather(b.dev, b.out("rows", R * c.C, Output::exact, rows * c.C), b.real("x", n), b.upload(host.offsets),
                    row_slot, r.N, r.K, r.E, c.C);
    auto addend = random_values("residual", n);
    auto *in_rows = b.real(y), *residual = b.real(addend), *over = b.inout("over", addend),
         *over_sum = b.inout("over, no gates", addend);
    auto* in_gates = b.acc(gates);
    combine(b.dev, b.out("out", n), in_rows, residual, in_gates, slot_row, r.N, r.K, c.C);
    combine(b.dev, b.out("no gates", n), in_rows, residual, nullptr, slot_row, r.N, r.K, c.C);
    combine(b.dev, over, in_rows, over, in_gates, slot_row, r.N, r.K, c.C);
    combine(b.dev, over_sum, in_rows, over_sum, nullptr, slot_row, r.N, r.K, c.C);
  });
}
TYPED_TEST(GpuDispatch, GatherAndCombineSmall) {
  for (const Case& c : {Case{random_routing(1, 1, 1), 0, 1},
                        {random_routing(9, 3, 4), 4, 3},
                        {random_routing(20, 2, 8), 3, 8},
                        {random_routing(7, 8, 8), 0, 37},
                        {same_for_all(20, 2, 8, 6), 11, 16},
                        {same_for_all(9, 1, 4, 2), 4, 24}})
    check_rows<TypeParam>(c);
}
TYPED_TEST(GpuDispatch, GatherAndCombine) {
  for (const Case& c : {Case{random_routing(200, 8, 128), 0, 133},
                        {random_routing(150, 5, 64), 9, 72},
                        {random_routing(70, 2, 8), 12, 1024},
                        {empty_and_single(300, 5), 200, 600},
                        {random_routing(60, 3, 9, 4), 9, 2050},
                        {same_for_all(70, 1, 8, 3), 0, 768}})
    check_rows<TypeParam>(c);
}

}  // namespace
