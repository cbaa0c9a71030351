// Matrix products against the plain triple loop, and the classifier against log-softmax.
#include <gtest/gtest.h>

#include "dev/test/op_test.h"
#include "llmc/classifier.h"

namespace {

template <class Real>
struct Matmul : ::testing::Test {};
TYPED_TEST_SUITE(Matmul, AllReals);

struct Sizes {
  int64_t N, IC, OC;
};
// Around and across the tiles: 256 rows, 512 columns, 1024 along the sum of a weight gradient.
const std::vector<Sizes> kSizes = {{1, 1, 1},      {3, 5, 7},      {256, 8, 512}, {259, 9, 515},  {259, 515, 9},
                                   {3, 515, 1027}, {1027, 7, 259}, {2051, 3, 5},  {257, 9, 1300}, {257, 1300, 9}};

// The three products, and their reference in double from the same inputs.
template <class Real>
struct Products {
  using Acc = typename Cpu<Real>::Acc;
  std::vector<Real> x, w, dout, out, dx;
  std::vector<Acc> dw;
  Products(Sizes s, bool plain) {
    x = random_tensor<Real>("x", s.N * s.IC), w = random_tensor<Real>("w", s.OC * s.IC);
    dout = random_tensor<Real>("dout", s.N * s.OC);
    out = poisoned<Real>(s.N * s.OC), dx = poisoned<Real>(s.N * s.IC);
    dw.assign(s.OC * s.IC, Acc(0));
    Cpu<Real> dev{.plain_matmul = plain};
    matmul_forward(dev, out.data(), Scratch(bytes(s)), x.data(), w.data(), s.N, s.IC, s.OC);
    matmul_backward_input(dev, dx.data(), Scratch(bytes(s)), dout.data(), w.data(), s.N, s.IC, s.OC);
    matmul_backward_weight(dev, Grad<Cpu<Real>>{dw.data(), true}, Scratch(bytes(s)), dout.data(), x.data(), s.N, s.IC,
                           s.OC);
  }
  static size_t bytes(Sizes s) { return matmul_scratch_bytes<Cpu<Real>>(s.N, s.IC, s.OC); }
};
struct TripleLoop {
  std::vector<double> out, dx, dw;
  explicit TripleLoop(Sizes s) {
    auto x = random_tensor<double>("x", s.N * s.IC), w = random_tensor<double>("w", s.OC * s.IC);
    auto dout = random_tensor<double>("dout", s.N * s.OC);
    out.assign(s.N * s.OC, 0), dx.assign(s.N * s.IC, 0), dw.assign(s.OC * s.IC, 0);
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t o = 0; o < s.OC; ++o)
        for (int64_t i = 0; i < s.IC; ++i) {
          out[n * s.OC + o] += x[n * s.IC + i] * w[o * s.IC + i];
          dx[n * s.IC + i] += dout[n * s.OC + o] * w[o * s.IC + i];
          dw[o * s.IC + i] += dout[n * s.OC + o] * x[n * s.IC + i];
        }
  }
};

TEST(Gradients, Matmul) {
  Sizes s{5, 7, 3};
  auto x = random_tensor<double>("x", s.N * s.IC), w = random_tensor<double>("w", s.OC * s.IC);
  auto dout = random_tensor<double>("dout", s.N * s.OC);
  std::vector<double> out(s.N * s.OC), dx(s.N * s.IC), dw(s.OC * s.IC, 0.0);
  std::vector<char> scratch(matmul_scratch_bytes<Cpu<double>>(s.N, s.IC, s.OC));
  Cpu<double> dev;
  auto objective = [&] {
    matmul_forward(dev, out.data(), scratch.data(), x.data(), w.data(), s.N, s.IC, s.OC);
    return weighted_sum(out, dout);
  };
  matmul_backward_input(dev, dx.data(), scratch.data(), dout.data(), w.data(), s.N, s.IC, s.OC);
  matmul_backward_weight(dev, Grad<Cpu<double>>{dw.data(), true}, scratch.data(), dout.data(), x.data(), s.N, s.IC,
                         s.OC);
  EXPECT_LT(gradient_error(x, dx, objective), gradient_limit);
  EXPECT_LT(gradient_error(w, dw, objective), gradient_limit);
}

TYPED_TEST(Matmul, ThreeProductsAreTheTripleLoop) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  for (Sizes s : kSizes) {
    TripleLoop expected(s);
    for (bool plain : {false, true}) {
      Products<Real> p(s, plain);
      EXPECT_CLOSE(p.out, expected.out, tolerance<Real>()) << s.N << " " << s.IC << " " << s.OC << " plain " << plain;
      EXPECT_CLOSE(p.dx, expected.dx, tolerance<Real>()) << s.N << " " << s.IC << " " << s.OC << " plain " << plain;
      EXPECT_CLOSE(p.dw, expected.dw, tolerance<Acc>(2)) << s.N << " " << s.IC << " " << s.OC << " plain " << plain;
    }
  }
}

TYPED_TEST(Matmul, WeightGradientIsRoundedOnce) {
  using Real = TypeParam;
  for (Sizes s : {Sizes{5, 6, 7}, Sizes{1027, 7, 259}}) {
    Products<Real> p(s, false);
    expect_accumulates<Real>(s.OC * s.IC, [&](Grad<Cpu<Real>> g) {
      Cpu<Real> dev;
      Scratch scratch(p.bytes(s));
      matmul_backward_weight(dev, g, scratch, p.dout.data(), p.x.data(), s.N, s.IC, s.OC);
    });
  }
}

TYPED_TEST(Matmul, AWrittenWeightGradientIsTheOneAddedToZeros) {
  using Real = TypeParam;
  for (Sizes s : kSizes)
    for (bool plain : {false, true}) {
      auto x = random_tensor<Real>("x", s.N * s.IC), dout = random_tensor<Real>("dout", s.N * s.OC);
      expect_writes<Real>(s.OC * s.IC, [&](Grad<Cpu<Real>> g) {
        Cpu<Real> dev{.plain_matmul = plain};
        Scratch scratch(Products<Real>::bytes(s));
        matmul_backward_weight(dev, g, scratch, dout.data(), x.data(), s.N, s.IC, s.OC);
      });
    }
}

TYPED_TEST(Matmul, BitsDoNotDependOnTheNumberOfThreads) {
  using Real = TypeParam;
  for (bool plain : {false, true})
    for (Sizes s : {Sizes{300, 70, 600}, Sizes{1100, 33, 20}})
      expect_same_bits_on_any_threads([&] {
        Products<Real> p(s, plain);
        return bits_of(p.out, p.dx, p.dw);
      });
}

// ---- classifier

template <class Real>
struct Classifier : ::testing::Test {};
TYPED_TEST_SUITE(Classifier, AllReals);

constexpr int64_t kN = 23, kC = 9, kV = 13, kVp = 16;
constexpr double kScale = 1.0 / 23;

std::vector<int32_t> some_targets() {
  auto targets = random_ints("targets", kN, kV);
  targets[0] = 0, targets[1] = kV - 1, targets[4] = targets[kN - 1] = -1;
  return targets;
}

// Losses by the textbook, in double.
std::vector<double> plain_losses(const std::vector<double>& x, const std::vector<double>& w,
                                 const std::vector<int32_t>& targets) {
  std::vector<double> losses;
  for (int64_t n = 0; n < int64_t(targets.size()); ++n) {
    double sum = 0, at_target = 0;
    for (int64_t v = 0; v < kV; ++v) {
      double s = 0;
      for (int64_t c = 0; c < kC; ++c) s += x[n * kC + c] * w[v * kC + c];
      sum += std::exp(s);
      if (v == targets[n]) at_target = s;
    }
    losses.push_back(targets[n] < 0 ? 0 : std::log(sum) - at_target);
  }
  return losses;
}

template <class Real>
struct ClassifierRun {
  using Acc = typename Cpu<Real>::Acc;
  std::vector<Real> x = random_tensor<Real>("x", kN*kC), w = random_tensor<Real>("w", kVp*kC),
                    dx = poisoned<Real>(kN * kC);
  std::vector<Acc> losses = poisoned<Acc>(kN), dw = std::vector<Acc>(kVp * kC, Acc(0));
  ClassifierRun(int64_t chunk, bool train, std::vector<int32_t> targets = some_targets(),
                DeviceStatus* status = nullptr) {
    Cpu<Real> dev{.status = status};
    StepParams params{.loss_scale = kScale};
    Scratch scratch(classifier_scratch_bytes<Cpu<Real>>(kC, kVp, chunk));
    classifier(dev, losses.data(), train ? dx.data() : nullptr, train ? dw.data() : nullptr, scratch, x.data(),
               w.data(), targets.data(), &params, kN, kC, kV, kVp, chunk);
  }
};

TYPED_TEST(Classifier, LossesAndGradientsOfAnyChunk) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  ClassifierRun<double> reference(kN, true);
  auto expected = plain_losses(reference.x, reference.w, some_targets());
  for (int64_t chunk : {1, 4, 22, 23, 100}) {
    ClassifierRun<Real> run(chunk, true), evaluation(chunk, false);
    EXPECT_CLOSE(run.losses, expected, tolerance<Real>()) << chunk;
    EXPECT_CLOSE(run.dx, reference.dx, tolerance<Real>(2)) << chunk;
    EXPECT_CLOSE(run.dw, reference.dw, tolerance<Real>(2)) << chunk;
    EXPECT_TRUE(bits_of(run.losses) == bits_of(evaluation.losses));
    for (int64_t c = 0; c < kC; ++c) {  // ignored rows and padding have no gradient, not even rounding
      EXPECT_EQ(as_double(run.dx[4 * kC + c]), 0);
      for (int64_t v = kV; v < kVp; ++v) EXPECT_EQ(run.dw[v * kC + c], Acc(0));
    }
  }
}

TEST(Gradients, Classifier) {
  ClassifierRun<double> run(5, true);
  auto targets = some_targets();
  auto objective = [&] {
    double sum = 0;
    for (double loss : plain_losses(run.x, run.w, targets)) sum += loss;
    return kScale * sum;
  };
  EXPECT_LT(gradient_error(run.x, run.dx, objective), gradient_limit);
  EXPECT_LT(gradient_error(run.w, run.dw, objective), gradient_limit);
}

TYPED_TEST(Classifier, DweightIsAddedToAndDxIsWritten) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  ClassifierRun<Real> once(7, true);
  auto targets = some_targets();
  auto start = random_tensor<Acc>("start", kVp * kC), dw = start;
  Cpu<Real> dev;
  StepParams params{.loss_scale = kScale};
  Scratch scratch(classifier_scratch_bytes<Cpu<Real>>(kC, kVp, 7));
  classifier(dev, once.losses.data(), once.dx.data(), dw.data(), scratch, once.x.data(), once.w.data(), targets.data(),
             &params, kN, kC, kV, kVp, 7);
  for (size_t i = 0; i < dw.size(); ++i) EXPECT_NEAR(dw[i] - start[i], once.dw[i], 1e-6);
  EXPECT_TRUE(bits_of(once.dx) == bits_of(ClassifierRun<Real>(7, true).dx));
}

TYPED_TEST(Classifier, PaddingIsNotReadAndAnyLogitIsStable) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  const int64_t V = 3, Vp = 5;
  auto nan = poisoned<Real>(1)[0];
  auto r = [](double v) { return from_double<Real>(v); };
  std::vector<Real> logits = {r(10000), r(9999), r(-10000), nan, r(30000), r(-300), r(-300), r(-300), r(30000), nan};
  std::vector<int32_t> targets = {1, 0};
  auto losses = poisoned<Acc>(2);
  Cpu<Real> dev;
  StepParams params{.loss_scale = 2};
  cross_entropy(dev, losses.data(), logits.data(), targets.data(), &params, 0, 2, V, Vp, true);
  double gap = as_double(r(10000)) - as_double(r(9999)), p = 1 / (1 + std::exp(gap));
  EXPECT_NEAR(losses[0], -std::log(p), 1e-5 * gap + 1e-6);
  EXPECT_NEAR(losses[1], std::log(3.0), 1e-6);
  std::vector<double> expected = {2 * (1 - p), 2 * (p - 1), 0, 0, 0, -4.0 / 3, 2.0 / 3, 2.0 / 3, 0, 0};
  EXPECT_CLOSE(logits, expected, tolerance<Real>());
}

TYPED_TEST(Classifier, ForeignTargetsAreReportedAndIgnored) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  for (int32_t foreign : {int32_t(kV), -2, INT32_MAX, INT32_MIN}) {  // V..Vp-1 is padding, no token
    auto logits = random_tensor<Real>("logits", 4 * kVp);
    std::vector<int32_t> targets = {1, 2, foreign, -1};
    auto losses = poisoned<Acc>(4);
    DeviceStatus status;
    Cpu<Real> dev{.status = &status};
    StepParams params;
    cross_entropy(dev, losses.data(), logits.data(), targets.data(), &params, 0, 2, kV, kVp, false);
    EXPECT_EQ(status.code, DeviceStatus::ok);
    cross_entropy(dev, losses.data(), logits.data(), targets.data(), &params, 10, 4, kV, kVp,
                  true);  // tokens 10 to 13 of the micro-batch
    EXPECT_EQ(status.code, DeviceStatus::token_out_of_range);
    EXPECT_EQ(status.token, 12);
    EXPECT_EQ(status.value, foreign);
    EXPECT_EQ(losses[2], 0);
    for (int64_t v = 0; v < kVp; ++v) EXPECT_EQ(as_double(logits[2 * kVp + v]), 0);
  }
}

TYPED_TEST(Classifier, AForeignTargetIsNamedByItsPositionInTheMicroBatch) {
  using Real = TypeParam;
  auto targets = some_targets();
  targets[17] = 99;
  DeviceStatus status;
  ClassifierRun<Real> run(5, false, targets, &status);
  EXPECT_EQ(status.token, 17);
  EXPECT_EQ(status.value, 99);
}

TYPED_TEST(Classifier, LossSum) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  auto losses = random_tensor<Acc>("losses", 1000, 1, 3);
  double sum = 0;
  for (Acc l : losses) sum += l;
  Cpu<Real> dev;
  StepParams params{.loss_scale = 0.25};
  StepStats stats{.loss = 7};
  loss_sum(dev, &stats, losses.data(), &params, 1000);
  EXPECT_NEAR(stats.loss, 7 + sum / 4, 1e-9);
  EXPECT_EQ(stats.bad_tensor, -1);
  for (Acc bad : {std::numeric_limits<Acc>::quiet_NaN(), std::numeric_limits<Acc>::infinity()}) {
    losses[500] = bad;
    StepStats hurt;
    loss_sum(dev, &hurt, losses.data(), &params, 1000);
    EXPECT_EQ(hurt.bad_tensor, -2);
  }
}

TYPED_TEST(Classifier, BitsDoNotDependOnTheNumberOfThreads) {
  using Real = TypeParam;
  expect_same_bits_on_any_threads([] {
    ClassifierRun<Real> run(10, true);
    return bits_of(run.losses, run.dx, run.dw);
  });
}

}  // namespace
