// Embedding, RMSNorm, QK-norm with RoPE, SwiGLU, residual addition: values, gradients, bits.
#include <gtest/gtest.h>

#include "dev/test/op_test.h"
#include "llmc/embedding.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
#include "llmc/swiglu.h"

namespace {

template <class Real>
struct Ops : ::testing::Test {};
TYPED_TEST_SUITE(Ops, AllReals);

// ---- embedding

TYPED_TEST(Ops, EmbeddingCopiesRowsAndReportsForeignTokens) {
  using Real = TypeParam;
  const int64_t C = 5, V = 4;
  std::vector<int32_t> tokens = {3, 0, 3, 4, 1, -1, 2};
  auto table = random_tensor<Real>("table", V * C), out = poisoned<Real>(7 * C);
  DeviceStatus status;
  Cpu<Real> dev{.status = &status, .layer = 9};
  embedding_forward(dev, out.data(), tokens.data(), table.data(), 3, C, V);
  EXPECT_EQ(status.code, DeviceStatus::ok);
  embedding_forward(dev, out.data(), tokens.data(), table.data(), 7, C, V);
  for (int n = 0; n < 7; ++n) {
    int row = tokens[n] < 0 || tokens[n] >= V ? 0 : tokens[n];
    for (int c = 0; c < C; ++c) EXPECT_EQ(as_double(out[n * C + c]), as_double(table[row * C + c]));
  }
  EXPECT_EQ(status.code, DeviceStatus::token_out_of_range);
  EXPECT_EQ(status.layer, 9);
  EXPECT_TRUE((status.token == 3 && status.value == 4) || (status.token == 5 && status.value == -1));
}

TYPED_TEST(Ops, EmbeddingGradientSumsTheRowsOfRepeatedTokensInOrder) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  const int64_t N = 150, C = 33, V = 40;
  auto tokens = random_ints("tokens", N, V / 2);  // the upper half hardly occurs
  tokens[3] = V - 1, tokens[4] = 0;
  tokens[7] = V, tokens[8] = -1;  // foreign: they contribute nowhere
  auto dout = third(random_tensor<Real>("dout", N * C));
  Cpu<Real> dev;
  auto run = [&](Grad<Cpu<Real>> g) {
    Scratch scratch(embedding_backward_scratch_bytes<Cpu<Real>>(N, C, V));
    embedding_backward(dev, g, scratch, tokens.data(), dout.data(), N, C, V);
  };
  std::vector<Acc> gradient(V * C, Acc(0)), expected = gradient;
  run({gradient.data(), true});
  for (int n = 0; n < N; ++n)
    if (n != 7 && n != 8)
      for (int c = 0; c < C; ++c) expected[tokens[n] * C + c] += Acc(dout[n * C + c]);
  EXPECT_TRUE(bits_of(gradient) == bits_of(expected));
  expect_accumulates<Real>(V * C, run);
}

TEST(Gradients, Embedding) {
  const int64_t N = 7, C = 3, V = 5;
  std::vector<int32_t> tokens = {4, 0, 4, 2, 4, 2, 1};
  auto table = random_tensor<double>("table", V * C), dout = random_tensor<double>("dout", N * C);
  std::vector<double> out(N * C), gradient(V * C, 0.0);
  std::vector<char> scratch(embedding_backward_scratch_bytes<Cpu<double>>(N, C, V));
  Cpu<double> dev;
  auto objective = [&] {
    embedding_forward(dev, out.data(), tokens.data(), table.data(), N, C, V);
    return weighted_sum(out, dout);
  };
  embedding_backward(dev, Grad<Cpu<double>>{gradient.data(), true}, scratch.data(), tokens.data(), dout.data(), N, C,
                     V);
  EXPECT_LT(gradient_error(table, gradient, objective), gradient_limit);
}

// The gradient that passes the norm by (dresidual) is that of the sum too: both inputs get the same.
TEST(Gradients, ResidualRmsnorm) {
  const int64_t N = 4, C = 6;
  auto a = random_tensor<double>("a", N * C), b = random_tensor<double>("b", N * C), w = random_tensor<double>("w", C);
  auto dout = random_tensor<double>("dout", N * C), past = random_tensor<double>("past", N * C);
  std::vector<double> sum(N * C), out(N * C), rstd(N), dx(N * C), dw(C, 0.0);
  std::vector<char> scratch(rmsnorm_backward_scratch_bytes<Cpu<double>>(N, C));
  Cpu<double> dev;
  auto objective = [&] {
    residual_rmsnorm_forward(dev, sum.data(), out.data(), rstd.data(), a.data(), b.data(), w.data(), N, C, 1e-6);
    return weighted_sum(out, dout) + weighted_sum(sum, past);
  };
  objective();
  rmsnorm_backward(dev, dx.data(), Grad<Cpu<double>>{dw.data(), true}, scratch.data(), dout.data(), past.data(),
                   sum.data(), w.data(), rstd.data(), N, C);
  EXPECT_LT(gradient_error(a, dx, objective), gradient_limit);
  EXPECT_LT(gradient_error(b, dx, objective), gradient_limit);
  EXPECT_LT(gradient_error(w, dw, objective), gradient_limit);
}

// ---- RMSNorm

template <class Real>
std::vector<double> plain_rmsnorm(const std::vector<Real>& x, const std::vector<Real>& w, int64_t C, double eps) {
  std::vector<double> out(x.size());
  for (size_t n = 0; n < x.size() / C; ++n) {
    double sum = 0;
    for (int c = 0; c < C; ++c) sum += as_double(x[n * C + c]) * as_double(x[n * C + c]);
    for (int c = 0; c < C; ++c) out[n * C + c] = as_double(x[n * C + c]) / std::sqrt(sum / C + eps) * as_double(w[c]);
  }
  return out;
}

TYPED_TEST(Ops, RmsnormForward) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  const int64_t N = 70, C = 37;
  const double eps = 0.3;  // large, so that forgetting it shows
  auto x = random_tensor<Real>("x", N * C), w = random_tensor<Real>("w", C),
       branch = random_tensor<Real>("branch", N * C);
  auto out = poisoned<Real>(N * C), sum = poisoned<Real>(N * C), out2 = out;
  auto rstd = poisoned<Acc>(N), rstd2 = rstd;
  Cpu<Real> dev;
  rmsnorm_forward(dev, out.data(), rstd.data(), x.data(), w.data(), N, C, eps);
  EXPECT_CLOSE(out, plain_rmsnorm(x, w, C, eps), tolerance<Real>());
  for (int n = 0; n < N; ++n) {
    double squares = 0;
    for (int c = 0; c < C; ++c) squares += as_double(x[n * C + c]) * as_double(x[n * C + c]);
    EXPECT_NEAR(rstd[n], 1 / std::sqrt(squares / C + eps), 1e-6);
  }
  // With the residual: the sum is rounded first, the norm is that of the rounded sum.
  residual_rmsnorm_forward(dev, sum.data(), out2.data(), rstd2.data(), x.data(), branch.data(), w.data(), N, C, eps);
  for (int i = 0; i < N * C; ++i) ASSERT_EQ(as_double(sum[i]), as_double(Real(Acc(x[i]) + Acc(branch[i]))));
  rmsnorm_forward(dev, out.data(), rstd.data(), sum.data(), w.data(), N, C, eps);
  EXPECT_TRUE(bits_of(out, rstd) == bits_of(out2, rstd2));
  auto in_place = x, out3 = poisoned<Real>(N * C);
  residual_rmsnorm_forward(dev, in_place.data(), out3.data(), rstd.data(), in_place.data(), branch.data(), w.data(), N,
                           C, eps);
  EXPECT_TRUE(bits_of(in_place, out3, rstd) == bits_of(sum, out2, rstd2));
}

// Everything that one backward pass writes, dweight from zeros.
template <class Real>
struct RmsnormGradient {
  std::vector<Real> dx;
  std::vector<typename Cpu<Real>::Acc> dw;
};
template <class Real>
RmsnormGradient<Real> rmsnorm_gradient(int64_t N, int64_t C, bool residual, bool in_place) {
  using Acc = typename Cpu<Real>::Acc;
  auto x = random_tensor<Real>("x", N * C), w = random_tensor<Real>("w", C), dout = random_tensor<Real>("dout", N * C);
  auto past = random_tensor<Real>("dresidual", N * C), out = poisoned<Real>(N * C);
  auto rstd = poisoned<Acc>(N);
  Cpu<Real> dev;
  rmsnorm_forward(dev, out.data(), rstd.data(), x.data(), w.data(), N, C, 0.3);
  RmsnormGradient<Real> g{in_place ? past : poisoned<Real>(N * C), std::vector<Acc>(C, Acc(0))};
  Scratch scratch(rmsnorm_backward_scratch_bytes<Cpu<Real>>(N, C));
  rmsnorm_backward(dev, g.dx.data(), Grad<Cpu<Real>>{g.dw.data(), true}, scratch, dout.data(),
                   !residual  ? nullptr
                   : in_place ? g.dx.data()
                              : past.data(),
                   x.data(), w.data(), rstd.data(), N, C);
  return g;
}

TEST(Gradients, Rmsnorm) {
  const int64_t N = 67, C = 6;
  auto x = random_tensor<double>("x", N * C), w = random_tensor<double>("w", C),
       dout = random_tensor<double>("dout", N * C);
  auto past = random_tensor<double>("dresidual", N * C);
  auto g = rmsnorm_gradient<double>(N, C, false, false);
  auto objective = [&] { return weighted_sum(plain_rmsnorm(x, w, C, 0.3), dout); };
  EXPECT_LT(gradient_error(x, g.dx, objective), gradient_limit);
  EXPECT_LT(gradient_error(w, g.dw, objective), gradient_limit);
  auto with = rmsnorm_gradient<double>(N, C, true, false);
  EXPECT_LT(gradient_error(x, with.dx, [&] { return objective() + weighted_sum(x, past); }), gradient_limit);
  EXPECT_TRUE(bits_of(with.dw) == bits_of(g.dw));
}

TYPED_TEST(Ops, RmsnormBackward) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  const int64_t N = 200, C = 37;
  for (bool residual : {false, true}) {
    auto g = rmsnorm_gradient<Real>(N, C, residual, false);
    auto reference = rmsnorm_gradient<double>(N, C, residual, false);
    EXPECT_CLOSE(g.dx, reference.dx, tolerance<Real>());
    EXPECT_CLOSE(g.dw, reference.dw, tolerance<Acc>());
  }
  auto apart = rmsnorm_gradient<Real>(N, C, true, false), in_place = rmsnorm_gradient<Real>(N, C, true, true);
  EXPECT_TRUE(bits_of(apart.dx, apart.dw) == bits_of(in_place.dx, in_place.dw));
  auto x = random_tensor<Real>("x", N * C), w = random_tensor<Real>("w", C), dx = poisoned<Real>(N * C);
  auto rstd = random_tensor<Acc>("rstd", N);
  Cpu<Real> dev;
  expect_accumulates<Real>(C, [&](Grad<Cpu<Real>> dw) {
    Scratch scratch(rmsnorm_backward_scratch_bytes<Cpu<Real>>(N, C));
    rmsnorm_backward(dev, dx.data(), dw, scratch, x.data(), nullptr, x.data(), w.data(), rstd.data(), N, C);
  });
}

TYPED_TEST(Ops, ResidualAdd) {
  using Real = TypeParam;
  auto a = random_tensor<Real>("a", 99), b = random_tensor<Real>("b", 99), out = poisoned<Real>(99), a2 = a, b2 = b;
  Cpu<Real> dev;
  residual_add(dev, out.data(), a.data(), b.data(), 99);
  for (int i = 0; i < 99; ++i)
    EXPECT_EQ(as_double(out[i]), as_double(from_double<Real>(as_double(a[i]) + as_double(b[i]))));
  residual_add(dev, a2.data(), a2.data(), b.data(), 99);
  residual_add(dev, b2.data(), a.data(), b2.data(), 99);
  EXPECT_TRUE(bits_of(out) == bits_of(a2) && bits_of(out) == bits_of(b2));
}

// ---- QK-norm and RoPE

constexpr HeadShape kHeads{3, 2, 10};
constexpr double kEps = 0.1;
std::vector<int32_t> some_positions(int64_t N) { return random_ints("positions", N, 50); }

// The formulas of the header, one value at a time.
std::vector<double> plain_qknorm_rope(const std::vector<double>& qkv, const std::vector<double>& qw,
                                      const std::vector<double>& kw, bool norm, const std::vector<int32_t>& positions) {
  int64_t HD = kHeads.head_dim, half = HD / 2, H = kHeads.n_head + kHeads.n_kv_head;
  std::vector<double> out;
  for (size_t n = 0; n < positions.size(); ++n)
    for (int64_t h = 0; h < H; ++h) {
      std::vector<double> v(qkv.begin() + n * kHeads.qkv_width() + h * HD,
                            qkv.begin() + n * kHeads.qkv_width() + (h + 1) * HD);
      double squares = 0;
      for (double a : v) squares += a * a;
      for (int64_t i = 0; norm && i < HD; ++i)
        v[i] *= (h < kHeads.n_head ? qw : kw)[i] / std::sqrt(squares / HD + kEps);
      for (int64_t i = 0; i < HD; ++i) {
        double angle = positions[n] * std::pow(100.0, -2.0 * (i % half) / HD);
        out.push_back(v[i] * std::cos(angle) + (i < half ? -v[i + half] : v[i - half]) * std::sin(angle));
      }
    }
  return out;
}

template <class Real>
struct RopeRun {
  using Acc = typename Cpu<Real>::Acc;
  std::vector<Real> qk, dqkv;
  std::vector<Acc> rstd, dq_weight, dk_weight;
  RopeRun(int64_t N, bool norm) {
    auto qkv = random_tensor<Real>("qkv", N * kHeads.qkv_width());
    auto qw = random_tensor<Real>("qw", kHeads.head_dim), kw = random_tensor<Real>("kw", kHeads.head_dim);
    auto table = converted<Acc>(rope_table(50, kHeads.head_dim, 100));
    auto positions = some_positions(N);
    qk = poisoned<Real>(N * kHeads.qk_width());
    rstd.resize(norm ? N * (kHeads.n_head + kHeads.n_kv_head) : 0);
    dqkv = random_tensor<Real>("dqkv", N * kHeads.qkv_width());
    dq_weight = dk_weight = std::vector<Acc>(kHeads.head_dim, Acc(0));
    Cpu<Real> dev;
    const Real *q = norm ? qw.data() : nullptr, *k = norm ? kw.data() : nullptr;
    qknorm_rope_forward(dev, qk.data(), rstd.data(), qkv.data(), q, k, table.data(), positions.data(), N, kHeads, kEps);
    auto backward = [&](Grad<Cpu<Real>> dq, Grad<Cpu<Real>> dk) {
      Scratch scratch(qknorm_rope_backward_scratch_bytes<Cpu<Real>>(N, kHeads));
      qknorm_rope_backward(dev, dqkv.data(), dq, dk, scratch, qkv.data(), rstd.data(), q, k, table.data(),
                           positions.data(), N, kHeads);
    };
    backward({norm ? dq_weight.data() : nullptr, true}, {norm ? dk_weight.data() : nullptr, true});
    if (!norm) return;
    auto start = random_tensor<Real>("dqkv", N * kHeads.qkv_width());
    auto written = dqkv;
    expect_accumulates<Real>(2 * kHeads.head_dim, [&](Grad<Cpu<Real>> g) {
      Grad<Cpu<Real>> second = g;
      g.visit([&](auto* p) { second.data = p + kHeads.head_dim; });
      dqkv = start;
      backward(g, second);
    });
    EXPECT_TRUE(bits_of(written) == bits_of(dqkv));
  }
};

TEST(Gradients, QknormRope) {
  const int64_t N = 66;
  auto qkv = random_tensor<double>("qkv", N * kHeads.qkv_width());
  auto qw = random_tensor<double>("qw", kHeads.head_dim), kw = random_tensor<double>("kw", kHeads.head_dim);
  auto given = random_tensor<double>("dqkv", N * kHeads.qkv_width());
  std::vector<double> weights;
  for (int64_t n = 0; n < N; ++n)
    weights.insert(weights.end(), given.begin() + n * kHeads.qkv_width(),
                   given.begin() + n * kHeads.qkv_width() + kHeads.qk_width());
  for (bool norm : {false, true}) {
    RopeRun<double> run(N, norm);
    auto objective = [&] { return weighted_sum(plain_qknorm_rope(qkv, qw, kw, norm, some_positions(N)), weights); };
    for (int64_t n = 0; n < N; ++n)  // the value part stays as it was; the objective does not depend on it
      for (int64_t i = kHeads.qk_width(); i < kHeads.qkv_width(); ++i) {
        double& v = run.dqkv[n * kHeads.qkv_width() + i];
        EXPECT_EQ(v, given[n * kHeads.qkv_width() + i]);
        v = 0;
      }
    EXPECT_LT(gradient_error(qkv, run.dqkv, objective, 300), gradient_limit) << norm;
    if (!norm) continue;
    EXPECT_LT(gradient_error(qw, run.dq_weight, objective), gradient_limit);
    EXPECT_LT(gradient_error(kw, run.dk_weight, objective), gradient_limit);
  }
}

TYPED_TEST(Ops, QknormRope) {
  using Real = TypeParam;
  const int64_t N = 140;
  auto qkv = random_tensor<double>("qkv", N * kHeads.qkv_width());
  auto qw = random_tensor<double>("qw", kHeads.head_dim), kw = random_tensor<double>("kw", kHeads.head_dim);
  for (bool norm : {false, true}) {
    RopeRun<Real> run(N, norm);
    RopeRun<double> reference(N, norm);
    EXPECT_CLOSE(run.qk, plain_qknorm_rope(qkv, qw, kw, norm, some_positions(N)), tolerance<Real>());
    EXPECT_CLOSE(run.dqkv, reference.dqkv, tolerance<Real>());
    EXPECT_CLOSE(run.dq_weight, reference.dq_weight, tolerance<typename Cpu<Real>::Acc>());
    EXPECT_CLOSE(run.dk_weight, reference.dk_weight, tolerance<typename Cpu<Real>::Acc>());
  }
}

// ---- SwiGLU

template <class Real>
std::vector<double> plain_swiglu(const std::vector<Real>& h, int64_t F) {
  std::vector<double> a;
  for (size_t n = 0; n < h.size() / (2 * F); ++n)
    for (int64_t f = 0; f < F; ++f) {
      int64_t gate = n * 2 * F + f / 8 * 16 + f % 8;
      double g = as_double(h[gate]), u = as_double(h[gate + 8]);
      a.push_back(g / (1 + std::exp(-g)) * u);
    }
  return a;
}

TYPED_TEST(Ops, Swiglu) {
  using Real = TypeParam;
  for (int64_t F : {8, 72, 520}) {  // one group, and odd pieces of the chunks in which rows are processed
    const int64_t N = 5;
    auto h = random_tensor<Real>("h", N * 2 * F, 3), da = random_tensor<Real>("da", N * F);
    auto a = poisoned<Real>(N * F), dh = poisoned<Real>(N * 2 * F);
    Cpu<Real> dev;
    swiglu_forward(dev, a.data(), h.data(), N, F);
    EXPECT_CLOSE(a, plain_swiglu(h, F), tolerance<Real>());
    swiglu_backward(dev, dh.data(), da.data(), h.data(), N, F);
    auto h64 = converted<double>(h), da64 = converted<double>(da), dh64 = poisoned<double>(N * 2 * F);
    Cpu<double> reference;
    swiglu_backward(reference, dh64.data(), da64.data(), h64.data(), N, F);
    EXPECT_CLOSE(dh, dh64, tolerance<Real>());
    auto objective = [&] { return weighted_sum(plain_swiglu(h64, F), da64); };
    EXPECT_LT(gradient_error(h64, dh64, objective, 100), gradient_limit) << F;
  }
}

TYPED_TEST(Ops, SwigluOfHugeInputsIsFinite) {
  using Real = TypeParam;
  std::vector<Real> h(16, from_double<Real>(-500)), a(8), dh(16), da(8, from_double<Real>(1));
  for (int i = 0; i < 4; ++i) h[i] = from_double<Real>(500);
  Cpu<Real> dev;
  swiglu_forward(dev, a.data(), h.data(), 1, 8);
  swiglu_backward(dev, dh.data(), da.data(), h.data(), 1, 8);
  EXPECT_CLOSE(a, plain_swiglu(h, 8), tolerance<Real>());
  for (Real d : dh) EXPECT_TRUE(std::isfinite(as_double(d)));
}

// ---- all of them

TYPED_TEST(Ops, BitsDoNotDependOnTheNumberOfThreads) {
  using Real = TypeParam;
  expect_same_bits_on_any_threads([] {
    const int64_t N = 333, C = 19, V = 50;
    auto tokens = random_ints("tokens", N, V);
    auto table = third(random_tensor<Real>("table", V * C)), out = poisoned<Real>(N * C),
         dtable = random_tensor<Real>("dtable", V * C);
    Cpu<Real> dev;
    embedding_forward(dev, out.data(), tokens.data(), table.data(), N, C, V);
    Scratch scratch(embedding_backward_scratch_bytes<Cpu<Real>>(N, C, V));
    embedding_backward(dev, Grad<Cpu<Real>>{dtable.data(), false}, scratch, tokens.data(), out.data(), N, C, V);
    auto norm = rmsnorm_gradient<Real>(N, C, true, false);
    RopeRun<Real> rope(N, true);
    auto h = random_tensor<Real>("h", 9 * 80), a = poisoned<Real>(9 * 40), dh = poisoned<Real>(9 * 80);
    swiglu_forward(dev, a.data(), h.data(), 9, 40);
    swiglu_backward(dev, dh.data(), a.data(), h.data(), 9, 40);
    return bits_of(out, dtable, norm.dx, norm.dw, rope.qk, rope.rstd, rope.dqkv, rope.dq_weight, rope.dk_weight, a, dh);
  });
}

}  // namespace
