// AdamW, the global gradient norm, and the decisions that are taken from it.
#include <gtest/gtest.h>

#include "dev/test/op_test.h"
#include "llmc/adamw.h"
#include "llmc/global_norm.h"

namespace {

template <class Real>
struct Update : ::testing::Test {};
TYPED_TEST_SUITE(Update, AllReals);

// A buffer of weights with all its state, and views of it.
template <class Real>
struct Buffer {
  using Acc = typename Cpu<Real>::Acc;
  static constexpr bool has_master = !std::is_same_v<Real, Acc>;
  std::vector<Real> weight, narrow_grad;
  std::vector<Acc> master, m, v, grad, second;
  bool narrow;
  Buffer(const std::string& name, int64_t n, bool narrow) : narrow(narrow) {
    weight = random_tensor<Real>(name + ".weight", n);
    master = has_master ? converted<Acc>(weight) : std::vector<Acc>();
    m = random_tensor<Acc>(name + ".m", n, 0.1), v = random_tensor<Acc>(name + ".v", n, 0.1);
    for (Acc& a : v) a = std::abs(a);
    grad = random_tensor<Acc>(name + ".grad", n), second = random_tensor<Acc>(name + ".second", n);
    narrow_grad = converted<Real>(grad);
  }
  ParameterView<Cpu<Real>> view(RowMap map, int64_t rows, int64_t cols, int64_t first_partial, bool decay, bool tied) {
    Acc* masters;
    if constexpr (has_master)
      masters = master.data();
    else
      masters = weight.data();
    Grad<Cpu<Real>> g = narrow ? Grad<Cpu<Real>>{narrow_grad.data(), false} : Grad<Cpu<Real>>{grad.data(), true};
    return {weight.data(), masters, m.data(), v.data(),      g,    {tied ? second.data() : nullptr, true},
            map,           rows,    cols,     first_partial, decay};
  }
  double master_at(size_t i) const { return has_master ? master[i] : as_double(weight[i]); }
  std::string bits() const { return bits_of(weight, narrow_grad, master, m, v, grad, second); }
};

constexpr AdamWConfig kAdamW{0.9, 0.95, 1e-3, 0.1};

TYPED_TEST(Update, AdamWIsTheTextbookLoop) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  const int64_t rows = 24, cols = 5;
  for (bool decay : {false, true})
    for (bool tied : {false, true})
      for (bool narrow : {false, true}) {
        Buffer<Real> b("w", rows * cols, narrow);
        Buffer<double> r("w", rows * cols, false);
        auto view = b.view({0, 1, 1}, rows, cols, 0, decay, tied);
        Cpu<Real> dev;
        for (int step = 1; step <= 4; ++step) {
          StepParams params{.learning_rate = 0.01 * step, .step = step};
          StepStats stats{.clip = 0.5 / step};
          auto before = b;
          auto old = r;
          adamw(dev, &view, &params, &stats, 1, kAdamW);
          std::vector<double> moved, expected;  // the differences: a small move on a large weight must be right too
          for (int64_t i = 0; i < rows * cols; ++i) {
            double g = stats.clip * (r.grad[i] + (tied ? r.second[i] : 0.0));
            r.m[i] = 0.9 * r.m[i] + (1 - 0.9) * g;
            r.v[i] = 0.95 * r.v[i] + (1 - 0.95) * g * g;
            double m_hat = r.m[i] / (1 - std::pow(0.9, step)), v_hat = r.v[i] / (1 - std::pow(0.95, step));
            r.weight[i] -=
                params.learning_rate * (m_hat / (std::sqrt(v_hat) + 1e-3) + (decay ? 0.1 : 0.0) * r.weight[i]);
            moved.push_back(b.master_at(i) - before.master_at(i));
            expected.push_back(r.weight[i] - old.weight[i]);
            EXPECT_EQ(as_double(b.weight[i]), as_double(from_double<Real>(b.master_at(i))));
          }
          EXPECT_CLOSE(b.m, r.m, tolerance<Acc>());
          EXPECT_CLOSE(b.v, r.v, tolerance<Acc>());
          EXPECT_CLOSE(moved, expected, tolerance<Acc>(40));
        }
      }
}

TYPED_TEST(Update, AdamWTouchesTheRowsOfItsViewsOnly) {
  using Real = TypeParam;
  const int64_t cols = 3, rows = 64;
  Buffer<Real> b("w", rows * cols, false), before = b;
  // Rows 0..7 of every 16, from row 16 on: the gate rows of an expert.
  ParameterView<Cpu<Real>> view = b.view({16, 8, 16}, 24, cols, 0, true, false);
  Cpu<Real> dev;
  StepParams params{.learning_rate = 0.1, .step = 1};
  StepStats stats;
  adamw(dev, &view, &params, &stats, 1, kAdamW);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = row * cols; i < (row + 1) * cols; ++i) {
      bool mine = row >= 16 && row % 16 < 8;
      EXPECT_EQ(b.master_at(i) != before.master_at(i), mine) << row;
      EXPECT_EQ(b.m[i] != before.m[i], mine) << row;
      EXPECT_EQ(b.v[i] != before.v[i], mine) << row;
    }
}

TYPED_TEST(Update, ASkippedStepLeavesAllBitsAlone) {
  using Real = TypeParam;
  Buffer<Real> b("w", 40, false);
  b.grad[3] = std::numeric_limits<double>::quiet_NaN();
  auto view = b.view({0, 1, 1}, 8, 5, 0, true, false);
  std::string before = b.bits();
  Cpu<Real> dev;
  StepParams params{.learning_rate = 0.1, .step = 1};
  StepStats stats{.skip = 1};
  adamw(dev, &view, &params, &stats, 1, kAdamW);
  EXPECT_TRUE(b.bits() == before);
}

TEST(Bf16Master, UpdatesFarBelowTheSpacingOfBf16AddUp) {
  Buffer<bf16> b("w", 1, false);
  b.weight[0] = bf16(1), b.master[0] = 1, b.m[0] = b.v[0] = 0, b.grad[0] = 1;
  auto view = b.view({0, 1, 1}, 1, 1, 0, false, false);
  Cpu<bf16> dev;
  StepStats stats;
  for (int step = 1; step <= 100; ++step) {
    StepParams params{.learning_rate = 1e-4, .step = step};
    adamw(dev, &view, &params, &stats, 1, {0.9, 0.95, 0, 0});
  }
  EXPECT_NEAR(b.master[0], 0.99, 1e-5);  // a constant gradient moves by lr a step
  EXPECT_EQ(float(b.weight[0]), float(bf16(0.99f)));
}

// Three tensors in two buffers: rows 130, 24 (interleaved, with NaN in the rows of nobody), 7.
template <class Real>
struct NormCase {
  using Acc = typename Cpu<Real>::Acc;
  Buffer<Real> a{"a", 130 * 3, false}, b{"b", 64 * 5, true};
  std::vector<ParameterView<Cpu<Real>>> views;
  static constexpr int64_t n_partials = 3 + 1 + 1, first_partials[] = {0, 3, 4, 5};
  std::vector<Acc> partials = poisoned<Acc>(n_partials);
  NormCase() {
    for (int64_t row = 0; row < 64; ++row)
      if (!(row >= 16 && row % 16 < 8) && row >= 7) std::fill_n(&b.narrow_grad[row * 5], 5, poisoned<Real>(1)[0]);
    views = {a.view({0, 1, 1}, 130, 3, 0, true, true), b.view({16, 8, 16}, 24, 5, 3, true, false),
             b.view({0, 1, 1}, 7, 5, 4, false, false)};
  }
  void compute() {
    Cpu<Real> dev;
    global_norm_partials(dev, partials.data(), views.data(), 3);
  }
  StepStats decide(UpdateRules rules, OutlierState* outliers, StepStats stats = {}) {
    Cpu<Real> dev;
    update_decision(dev, &stats, outliers, partials.data(), first_partials, 3, rules);
    return stats;
  }
};

TYPED_TEST(Update, NormPartialsAreBlocksOf64LogicalRows) {
  using Real = TypeParam;
  NormCase<Real> c;
  c.compute();
  std::vector<double> expected(5, 0.0);
  for (int64_t i = 0; i < 130 * 3; ++i)
    expected[i / 3 / 64] += std::pow(double(c.a.grad[i]) + double(c.a.second[i]), 2);
  for (int64_t row = 0; row < 64; ++row)
    for (int64_t i = row * 5; i < (row + 1) * 5; ++i) {
      if (row >= 16 && row % 16 < 8) expected[3] += std::pow(as_double(c.b.narrow_grad[i]), 2);
      if (row < 7) expected[4] += std::pow(as_double(c.b.narrow_grad[i]), 2);
    }
  for (int i = 0; i < 5; ++i) EXPECT_NEAR(c.partials[i] / expected[i], 1, 1e-6) << i;
  OutlierState outliers;
  double norm = std::sqrt(expected[0] + expected[1] + expected[2] + expected[3] + expected[4]);
  StepStats far = c.decide({.clip_norm = 2 * norm}, &outliers), never = c.decide({.clip_norm = 0}, &outliers);
  StepStats clipped = c.decide({.clip_norm = norm / 4}, &outliers);
  for (const StepStats& s : {far, never, clipped}) {
    EXPECT_NEAR(s.grad_norm / norm, 1, 1e-6);
    EXPECT_EQ(s.skip, 0);
    EXPECT_EQ(s.bad_tensor, -1);
  }
  EXPECT_EQ(far.clip, 1);
  EXPECT_EQ(never.clip, 1);
  EXPECT_NEAR(clipped.clip, 0.25, 1e-6);
  EXPECT_EQ(outliers.count, 3);
}

// A rank's views leave out the rows of others: their blocks of the table are not touched, and the others are those of the
// whole.
TYPED_TEST(Update, NormPartialsOfARankAreBlocksOfTheWhole) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  Cpu<Real> dev;
  Buffer<Real> a("a", 330 * 3, false), b("b", 200 * 5, true);
  const int64_t n_partials = norm_blocks(330) + norm_blocks(200);
  std::vector<ParameterView<Cpu<Real>>> all{a.view({0, 1, 1}, 330, 3, 0, true, true),
                                            b.view({0, 1, 1}, 200, 5, 6, true, false)};
  auto whole = poisoned<Acc>(n_partials);
  global_norm_partials(dev, whole.data(), all.data(), 2);
  auto part = poisoned<Acc>(n_partials);
  std::vector<ParameterView<Cpu<Real>>> some;
  // Rows 64 to 192 of the first; 320 to 330 of it; 128 to 200 of the second.
  some.push_back(a.view({64, 1, 1}, 128, 3, 1, true, true));
  some.push_back(a.view({320, 1, 1}, 10, 3, 5, true, true));
  some.push_back(b.view({128, 1, 1}, 72, 5, 8, true, false));
  some[0].first_block = 0, some[1].first_block = 2, some[2].first_block = 3;
  global_norm_partials(dev, part.data(), some.data(), 3);
  for (int64_t i = 0; i < n_partials; ++i) {
    if (i == 1 || i == 2 || i == 5 || i == 8 || i == 9)
      EXPECT_EQ(part[i], whole[i]) << i;
    else
      EXPECT_TRUE(std::isnan(part[i])) << i;
  }
  // The update of the rows likewise.
  const Buffer<Real> before = a;
  StepParams params{.learning_rate = 0.1, .step = 1};
  StepStats stats;
  adamw(dev, some.data(), &params, &stats, 3, kAdamW);
  for (int64_t i = 0; i < 330 * 3; ++i) {
    bool mine = (i / 3 >= 64 && i / 3 < 192) || i / 3 >= 320;
    EXPECT_EQ(a.m[i] != before.m[i], mine) << i / 3;
  }
}

TYPED_TEST(Update, NanAndInfSkipTheUpdateAndNameTheFirstBadTensor) {
  using Real = TypeParam;
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), -std::numeric_limits<double>::infinity()})
    for (int tensor = 0; tensor < 3; ++tensor) {
      NormCase<Real> c;
      if (tensor == 0) c.a.grad[129 * 3] = bad;  // in its last block
      if (tensor == 1) c.b.narrow_grad[16 * 5 + 1] = from_double<Real>(bad);
      if (tensor != 0) c.b.narrow_grad[6 * 5] = from_double<Real>(bad);
      c.compute();
      OutlierState outliers;
      StepStats s = c.decide({.clip_norm = 1, .skip_loss_z = 1e-9}, &outliers, {.loss = 3});
      EXPECT_EQ(s.skip, 1);
      EXPECT_EQ(s.bad_tensor, tensor);
      EXPECT_EQ(outliers.count, 0);  // it does not enter the window
      EXPECT_EQ(outliers.loss[0], 0);
    }
}

TYPED_TEST(Update, ALossThatIsNotFiniteSkipsTheUpdate) {
  using Real = TypeParam;
  const double inf = std::numeric_limits<double>::infinity();
  for (double loss : {std::numeric_limits<double>::quiet_NaN(), inf, -inf})
    for (bool bad_gradient : {false, true}) {  // the loss is where to look first
      NormCase<Real> c;
      if (bad_gradient) c.a.grad[0] = std::numeric_limits<double>::quiet_NaN();
      c.compute();
      OutlierState outliers;
      StepStats s = c.decide({}, &outliers, {.loss = loss});
      EXPECT_EQ(s.skip, 1);
      EXPECT_EQ(s.bad_tensor, -2);
      EXPECT_EQ(outliers.count, 0);
    }
}

TYPED_TEST(Update, OutliersAreSkippedOnceTheWindowIsFull) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  NormCase<Real> c;
  auto with = [&](double loss, double norm, UpdateRules rules, OutlierState* outliers) {
    std::fill(c.partials.begin(), c.partials.end(), Acc(0));
    c.partials[1] = Acc(norm * norm);
    return c.decide(rules, outliers, {.loss = loss});
  };
  const UpdateRules by_loss{0, 5, 0}, by_norm{0, 0, 5}, never{0, 0, 0};
  OutlierState outliers;
  for (int64_t i = 0; i < OutlierState::window;
       ++i) {  // losses 1 and 3, norms 10 and 30: mean 2 and 20, deviation 1 and 10
    StepStats s = with(i % 2 ? 1 : 3, i % 2 ? 10 : 30, by_loss, &outliers);
    EXPECT_EQ(s.skip, 0) << i;
    EXPECT_EQ(s.loss_z, 0);
    if (i == OutlierState::window / 2) {
      OutlierState early = outliers;  // far out, but the window is not full
      EXPECT_EQ(with(1000, 1000, by_loss, &early).skip, 0);
    }
  }
  ASSERT_EQ(outliers.count, OutlierState::window);
  auto decide = [&](double loss, double norm, UpdateRules rules) {
    OutlierState copy = outliers;
    return with(loss, norm, rules, &copy);
  };
  EXPECT_NEAR(decide(6, 40, by_loss).loss_z, 4, 1e-6);
  EXPECT_NEAR(decide(6, 40, by_loss).norm_z, 2, 1e-6);
  EXPECT_EQ(decide(6.9, 1000, by_loss).skip, 0);
  EXPECT_EQ(decide(7.1, 20, by_loss).skip, 1);
  EXPECT_EQ(decide(7.1, 20, by_loss).bad_tensor, -1);
  EXPECT_EQ(decide(-100, 20, by_loss).skip, 0);  // below the window is no harm
  EXPECT_EQ(decide(1000, 69, by_norm).skip, 0);
  EXPECT_EQ(decide(2, 71, by_norm).skip, 1);
  EXPECT_EQ(decide(1000, 1000, never).skip, 0);
  // A skipped outlier takes the oldest place of the window; its neighbours stay.
  EXPECT_EQ(with(100, 20, by_loss, &outliers).skip, 1);
  EXPECT_EQ(outliers.count, OutlierState::window + 1);
  EXPECT_EQ(outliers.loss[0], 100);
  EXPECT_NEAR(outliers.norm[0], 20, 1e-5);
  EXPECT_EQ(outliers.loss[1], 1);
  EXPECT_LT(with(100, 20, by_loss, &outliers).loss_z, 12);  // and widens it
}

TYPED_TEST(Update, BitsDoNotDependOnTheNumberOfThreads) {
  using Real = TypeParam;
  expect_same_bits_on_any_threads([] {
    NormCase<Real> c;
    c.compute();
    OutlierState outliers;
    StepStats stats = c.decide({}, &outliers);
    StepParams params{.learning_rate = 0.1, .step = 2};
    Cpu<Real> dev;
    adamw(dev, c.views.data(), &params, &stats, 3, kAdamW);
    return bits_of(c.partials) + bits_of(std::vector<double>{stats.grad_norm, stats.clip}) + c.a.bits() + c.b.bits();
  });
}

}  // namespace
