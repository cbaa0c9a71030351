#include "llmc/schedule.h"

#include <gtest/gtest.h>

#include <limits>

#include "dev/test/error_line.h"

namespace {

Schedule make(ScheduleKind kind) { return {kind, 1e-3, 10, 110, 0.1, 0.2}; }

constexpr ScheduleKind kAll[] = {ScheduleKind::cosine, ScheduleKind::linear, ScheduleKind::constant, ScheduleKind::wsd};

TEST(Schedule, WarmUpIsLinearAndEndsAtThePeak) {
  for (ScheduleKind kind : kAll) {
    Schedule s = make(kind);
    for (int step = 0; step < 10; step++) EXPECT_DOUBLE_EQ(learning_rate(s, step), 1e-3 * (step + 1) / 10);
    EXPECT_DOUBLE_EQ(learning_rate(s, 10), 1e-3);
  }
}

TEST(Schedule, KnownValues) {
  EXPECT_NEAR(learning_rate(make(ScheduleKind::cosine), 60), 1e-3 * (0.1 + 0.9 * 0.5), 1e-15);
  EXPECT_NEAR(learning_rate(make(ScheduleKind::cosine), 35), 1e-3 * (0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5))), 1e-15);
  EXPECT_NEAR(learning_rate(make(ScheduleKind::linear), 35), 1e-3 * (0.1 + 0.9 * 0.75), 1e-15);
  EXPECT_EQ(learning_rate(make(ScheduleKind::constant), 109), 1e-3);
  EXPECT_EQ(learning_rate(make(ScheduleKind::constant), 1000), 1e-3);
  Schedule wsd = make(ScheduleKind::wsd);  // falls from step 88 to step 110
  EXPECT_EQ(learning_rate(wsd, 50), 1e-3);
  EXPECT_EQ(learning_rate(wsd, 88), 1e-3);
  EXPECT_LT(learning_rate(wsd, 89), 1e-3);
  EXPECT_NEAR(learning_rate(wsd, 99), 1e-3 * 0.55, 1e-15);
}

TEST(Schedule, FallsTowardsTheFinalFractionAndStaysThere) {
  for (ScheduleKind kind : {ScheduleKind::cosine, ScheduleKind::linear, ScheduleKind::wsd}) {
    Schedule s = make(kind);
    for (int step = 11; step <= 110; step++) EXPECT_LE(learning_rate(s, step), learning_rate(s, step - 1)) << step;
    EXPECT_GT(learning_rate(s, 109), 1e-4);
    for (int step : {110, 111, 100000}) EXPECT_NEAR(learning_rate(s, step), 1e-4, 1e-18);
  }
}

TEST(Schedule, Corners) {
  for (ScheduleKind kind : kAll) {
    for (Schedule s : {Schedule{kind, 1e-3, 0, 0, 0.5, 0.2}, Schedule{kind, 1e-3, 0, 1, 0.5, 1},
                       Schedule{kind, 1e-3, 7, 7, 0.5, 1}, Schedule{kind, 1e-3, 5, 7, 0, 0}}) {
      check_schedule(s);
      for (int step = 0; step < 12; step++) {
        double rate = learning_rate(s, step);
        EXPECT_TRUE(rate >= 0 && rate <= 1e-3) << rate;  // also refuses NaN
      }
    }
  }
  // A decay that would begin inside the warm-up begins after it.
  EXPECT_DOUBLE_EQ(learning_rate({ScheduleKind::wsd, 1, 10, 20, 0, 1}, 15), 0.5);
}

TEST(Schedule, NamesAndValuesAreChecked) {
  EXPECT_EQ(parse_schedule_kind("cosine"), ScheduleKind::cosine);
  EXPECT_EQ(parse_schedule_kind("linear"), ScheduleKind::linear);
  EXPECT_EQ(parse_schedule_kind("constant"), ScheduleKind::constant);
  EXPECT_EQ(parse_schedule_kind("wsd"), ScheduleKind::wsd);
  expect_refused([&] { parse_schedule_kind("cosin"); }, "'cosin': choose cosine, linear, constant or wsd");
  double nan = std::numeric_limits<double>::quiet_NaN();
  expect_refused([&] { check_schedule({ScheduleKind::linear, nan, 1, 2, 0, 0}); }, "learning rate");
  expect_refused([&] { check_schedule({ScheduleKind::linear, -1, 1, 2, 0, 0}); }, "learning rate");
  expect_refused([&] { check_schedule({ScheduleKind::linear, 1, 3, 2, 0, 0}); }, "warm-up of 3 steps");
  expect_refused([&] { check_schedule({ScheduleKind::linear, 1, 0, -2, 0, 0}); }, "-2 steps");
  expect_refused([&] { check_schedule({ScheduleKind::linear, 1, 1, 2, 1.5, 0}); }, "final fraction");
  expect_refused([&] { check_schedule({ScheduleKind::wsd, 1, 1, 2, 0, nan}); }, "wsd decay fraction");
}

}  // namespace
