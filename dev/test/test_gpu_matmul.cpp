// Dense products, cross-entropy and the classifier on the GPU.
#include <gtest/gtest.h>

#include "dev/test/gpu_test.h"
#include "llmc/classifier.h"

namespace {

template <class Real>
struct GpuMatmul : GpuTest {};
TYPED_TEST_SUITE(GpuMatmul, GpuReals);
template <class Real>
struct GpuClassifier : GpuTest {};
TYPED_TEST_SUITE(GpuClassifier, GpuReals);

struct Gpu16 : GpuTest {};

struct Sizes {
  int64_t N, IC, OC;
};

template <class Real>
void check_matmul(Sizes s) {
  SCOPED_TRACE(std::to_string(s.N) + " " + std::to_string(s.IC) + " " + std::to_string(s.OC));
  expect_calibrated<Real>(
      [&]<class D>(Buffers<D>& b) {
        auto *x = b.real("x", s.N * s.IC), *w = b.real("w", s.OC * s.IC), *dout = b.real("dout", s.N * s.OC);
        void* scratch = b.scratch(matmul_scratch_bytes<D>(s.N, s.IC, s.OC));
        matmul_forward(b.dev, b.out("out", s.N * s.OC), scratch, x, w, s.N, s.IC, s.OC);
        matmul_backward_input(b.dev, b.out("dx", s.N * s.IC), scratch, dout, w, s.N, s.IC, s.OC);
        for (Onto onto : all_onto)
          matmul_backward_weight(b.dev, b.grad("dw", s.OC * s.IC, onto), scratch, dout, x, s.N, s.IC, s.OC);
      },
      std::max({s.N, s.IC, s.OC}));
}

TYPED_TEST(GpuMatmul, Small) {
  for (Sizes s : {Sizes{1, 1, 1}, {3, 5, 7}, {1, 37, 8}, {70, 8, 16}, {1, 64, 24}, {37, 37, 37}})
    check_matmul<TypeParam>(s);
}
TYPED_TEST(GpuMatmul, ThreeProducts) {
  for (Sizes s : {Sizes{70, 37, 50},
                  {64, 64, 64},
                  {257, 96, 130},
                  {128, 512, 256},
                  {1, 768, 1000},
                  {1027, 7, 259},
                  {300, 768, 192},
                  {2051, 3, 5},
                  {3, 515, 1027},
                  {70, 1300, 9},
                  {4100, 64, 72}})
    check_matmul<TypeParam>(s);
}
// Pointers into the middle of a matrix: aligned to nothing but the type.
TYPED_TEST(GpuMatmul, UnalignedSmall) {
  const int64_t N = 21, IC = 16, OC = 24;
  expect_calibrated<TypeParam>([&]<class D>(Buffers<D>& b) {
    auto *x = b.real("x", N * IC + 1) + 1, *w = b.real("w", OC * IC + 3) + 3, *dout = b.real("dout", N * OC + 1) + 1;
    void* scratch = b.scratch(matmul_scratch_bytes<D>(N, IC, OC));
    auto *out = b.real("out", N * OC + 1) + 1, *dx = b.real("dx", N * IC + 1) + 1;
    matmul_forward(b.dev, b.watch("out", Output::stored, out, N * OC), scratch, x, w, N, IC, OC);
    matmul_backward_input(b.dev, b.watch("dx", Output::stored, dx, N * IC), scratch, dout, w, N, IC, OC);
    matmul_backward_weight(b.dev, b.grad("dw", OC * IC, Onto::wide), scratch, dout, x, N, IC, OC);
  });
}

// A narrow gradient is written by one product, onto zeros, and rounded once then. (Onto anything else the library may
// round the product first.)
TEST_F(Gpu16, MatmulGradientIsRoundedOnceSmall) {
  for (Sizes s : {Sizes{70, 37, 50}, {300, 40, 48}})
    expect_rounded_once(
        s.OC * s.IC,
        [&](auto& b, Grad<Gpu<bf16>> g) {
          matmul_backward_weight(b.dev, g, b.scratch(matmul_scratch_bytes<Gpu<bf16>>(s.N, s.IC, s.OC)),
                                 b.real("dout", s.N * s.OC), b.real("x", s.N * s.IC), s.N, s.IC, s.OC);
        },
        true);
}

template <class Real>
void check_written(const std::vector<Sizes>& all) {
  for (Sizes s : all) {
    SCOPED_TRACE(std::to_string(s.N) + " " + std::to_string(s.IC) + " " + std::to_string(s.OC));
    expect_written<Real>(s.OC * s.IC, [&](auto& b, Grad<Gpu<Real>> g) {
      matmul_backward_weight(b.dev, g, b.scratch(matmul_scratch_bytes<Gpu<Real>>(s.N, s.IC, s.OC)),
                             b.real("dout", s.N * s.OC), b.real("x", s.N * s.IC), s.N, s.IC, s.OC);
    });
  }
}
TYPED_TEST(GpuMatmul, AWrittenGradientIsTheOneAddedToZerosSmall) {
  check_written<TypeParam>({{1, 1, 1}, {3, 5, 7}, {70, 8, 16}, {37, 37, 37}});
}
TYPED_TEST(GpuMatmul, AWrittenGradientIsTheOneAddedToZeros) {
  check_written<TypeParam>({{70, 37, 50}, {257, 96, 130}, {128, 512, 256}, {2051, 3, 5}, {4100, 64, 72}});
}

// ---- cross-entropy

std::vector<int32_t> some_targets(int64_t N, int64_t V) {
  auto targets = random_ints("targets", N, V);
  targets[0] = int32_t(V - 1);
  if (N > 4) targets[1] = 0, targets[4] = targets[N - 1] = -1;
  return targets;
}

// Logits whose padding is NaN: it must not be read.
std::vector<double> some_logits(int64_t n, int64_t V, int64_t Vp, double scale) {
  auto logits = random_values("logits", n * Vp, scale);
  for (int64_t i = 0; i < n * Vp; ++i)
    if (i % Vp >= V) logits[i] = std::numeric_limits<double>::quiet_NaN();
  return logits;
}

template <class Real>
void check_cross_entropy(int64_t n, int64_t V, int64_t Vp, double scale) {
  SCOPED_TRACE(std::to_string(n) + " " + std::to_string(V) + " " + std::to_string(Vp));
  for (bool gradient : {false, true})
    expect_calibrated<Real>(
        [&]<class D>(Buffers<D>& b) {
          auto* logits = b.inout("logits", some_logits(n, V, Vp, scale), gradient ? Output::stored : Output::exact);
          cross_entropy(b.dev, b.out_acc("losses", n), logits, b.upload(some_targets(n, V)),
                        b.params({.loss_scale = 0.25}), 0, n, V, Vp, gradient);
        },
        V);
}

TYPED_TEST(GpuClassifier, CrossEntropySmall) {
  check_cross_entropy<TypeParam>(1, 1, 1, 1);
  check_cross_entropy<TypeParam>(5, 3, 8, 4);
  check_cross_entropy<TypeParam>(9, 13, 13, 4);
  check_cross_entropy<TypeParam>(7, 300, 384, 4);
}
TYPED_TEST(GpuClassifier, CrossEntropy) {
  check_cross_entropy<TypeParam>(70, 1000, 1024, 4);
  check_cross_entropy<TypeParam>(6, 50257, 50304, 4);
  check_cross_entropy<TypeParam>(3, 50257, 50257, 2);
  check_cross_entropy<TypeParam>(33, 700, 768, 300);  // exp overflows but for the maximum
}

TYPED_TEST(GpuClassifier, ForeignTargetSmall) {
  for (int32_t foreign : {13, -2, INT32_MAX, INT32_MIN}) {
    expect_calibrated<TypeParam>([&]<class D>(Buffers<D>& b) {
      auto* logits = b.inout("logits", some_logits(4, 13, 16, 1));
      cross_entropy(b.dev, b.out_acc("losses", 4), logits, b.upload(std::vector<int32_t>{1, 2, foreign, -1}),
                    b.params({}), 10, 4, 13, 16, true);
    });
    Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
    cross_entropy(b.dev, b.out_acc("losses", 4), b.real("logits", 64),
                  b.upload(std::vector<int32_t>{1, 2, foreign, -1}), b.params({}), 10, 4, 13, 16, false);
    DeviceStatus status = b.status();
    EXPECT_EQ(status.code, DeviceStatus::token_out_of_range);
    EXPECT_EQ(status.layer, 7);
    EXPECT_EQ(status.token, 12);
    EXPECT_EQ(status.value, foreign);
  }
}

TYPED_TEST(GpuClassifier, LossSumSmall) {
  for (int64_t N : {1, 70, 1000, 32768}) {
    SCOPED_TRACE(N);
    expect_calibrated<TypeParam>([&]<class D>(Buffers<D>& b) {
      loss_sum(b.dev, b.stats({{.loss = 0.25}}), b.acc("losses", N, 1, 3), b.params({.loss_scale = 1.0 / 1024}), N);
    });
  }
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    auto losses = random_values("losses", 1000);
    losses[777] = bad;
    Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
    StepStats* stats = b.stats();
    loss_sum(b.dev, stats, b.acc(losses), b.params({}), 1000);
    EXPECT_EQ(b.read(stats)[0].bad_tensor, -2);
    EXPECT_FALSE(std::isfinite(b.read(stats)[0].loss));
  }
}

// ---- the classifier

struct ClassifierCase {
  int64_t N, C, V, Vp;
  std::vector<int64_t> chunks;
};

template <class Real>
void check_classifier(const ClassifierCase& c) {
  auto run = [&]<class D>(Buffers<D>& b, int64_t chunk, bool train, Onto onto) {
    auto* dx = train ? b.out("dx", c.N * c.C) : nullptr;
    auto* dw = train ? static_cast<typename D::Acc*>(b.grad("dw", c.Vp * c.C, onto).data) : nullptr;
    auto* losses = b.out_acc("losses", c.N);
    classifier(b.dev, losses, dx, dw, b.scratch(classifier_scratch_bytes<D>(c.C, c.Vp, chunk)), b.real("x", c.N * c.C),
               b.real("w", c.Vp * c.C, 3 / std::sqrt(double(c.C))), b.upload(some_targets(c.N, c.V)),
               b.params({.loss_scale = 1.0 / double(c.N)}), c.N, c.C, c.V, c.Vp, chunk);
    return losses;
  };
  for (int64_t chunk : c.chunks) {
    SCOPED_TRACE("V " + std::to_string(c.V) + " chunk " + std::to_string(chunk));
    for (Onto onto : {Onto::zeros, Onto::wide})
      expect_calibrated<Real>([&](auto& b) { run(b, chunk, true, onto); }, c.Vp);
    expect_calibrated<Real>([&](auto& b) { run(b, chunk, false, Onto::zeros); }, c.Vp);
    Buffers<Gpu<Real>> b(gpu<Real>());
    auto *training = run(b, chunk, true, Onto::zeros), *evaluation = run(b, chunk, false, Onto::zeros);
    EXPECT_TRUE(bits_of(b.read(training)) == bits_of(b.read(evaluation)));
  }
}

TYPED_TEST(GpuClassifier, ClassifierSmall) {
  check_classifier<TypeParam>({1, 8, 13, 16, {1, 5}});
  check_classifier<TypeParam>({23, 9, 13, 16, {1, 4, 22, 23, 100}});
}
TYPED_TEST(GpuClassifier, Classifier) {
  check_classifier<TypeParam>({70, 37, 300, 320, {32, 33}});
  check_classifier<TypeParam>({130, 64, 1000, 1000, {64}});
  check_classifier<TypeParam>({5, 16, 50257, 50304, {3}});
  check_classifier<TypeParam>({200, 96, 2001, 2048, {128}});
}

// Ignored positions and padding have no gradient, not even rounding.
TYPED_TEST(GpuClassifier, IgnoredTargetsHaveNoGradientSmall) {
  using Real = TypeParam;
  Buffers<Gpu<Real>> b(gpu<Real>());
  Real* dx = b.out("dx", 23 * 9);
  float* dw = b.acc("none", 16 * 9, 0);
  classifier(b.dev, b.out_acc("losses", 23), dx, dw, b.scratch(classifier_scratch_bytes<Gpu<Real>>(9, 16, 5)),
             b.real("x", 23 * 9), b.real("w", 16 * 9), b.upload(some_targets(23, 13)), b.params({}), 23, 9, 13, 16, 5);
  auto dx_values = b.read(dx);
  auto dw_values = b.read(dw);
  for (int64_t c = 0; c < 9; ++c)
    EXPECT_TRUE(as_double(dx_values[4 * 9 + c]) == 0 && as_double(dx_values[22 * 9 + c]) == 0);
  for (int64_t i = 13 * 9; i < 16 * 9; ++i) EXPECT_EQ(dw_values[i], 0);
}

}  // namespace
