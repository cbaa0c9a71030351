// Attention against the plain formula with all scores of a row at once: values, gradients, decoding, bits.
#include <gtest/gtest.h>

#include "dev/test/op_test.h"
#include "llmc/attention.h"

namespace {

template <class Real>
struct Attention : ::testing::Test {};
TYPED_TEST_SUITE(Attention, AllReals);

struct Case {
  int64_t B, T;
  HeadShape heads;
  int64_t rows() const { return B * T; }
};
// Lengths around the tile of 64, one query head a key head, several, and all on one.
const std::vector<Case> kCases = {{1, 1, {2, 1, 4}},  {2, 5, {4, 2, 6}},   {2, 64, {2, 2, 5}},
                                  {1, 65, {3, 1, 8}}, {1, 130, {4, 2, 7}}, {3, 63, {1, 1, 16}}};

struct Plain {
  std::vector<double> o, lse;
};
Plain plain_attention(const std::vector<double>& qk, const std::vector<double>& qkv, const Case& c) {
  int64_t HD = c.heads.head_dim, NH = c.heads.n_head, group = NH / c.heads.n_kv_head;
  Plain out;
  for (int64_t n = 0; n < c.rows(); ++n)
    for (int64_t h = 0; h < NH; ++h) {
      int64_t first = n / c.T * c.T;  // of the sequence
      const double* q = &qk[n * c.heads.qk_width() + h * HD];
      std::vector<double> p, o(HD, 0.0);
      double sum = 0;
      for (int64_t m = first; m <= n; ++m) {
        const double* k = &qk[m * c.heads.qk_width() + (NH + h / group) * HD];
        double s = 0;
        for (int64_t i = 0; i < HD; ++i) s += q[i] * k[i];
        p.push_back(std::exp(s / std::sqrt(double(HD))));
        sum += p.back();
      }
      for (int64_t m = first; m <= n; ++m)
        for (int64_t i = 0; i < HD; ++i)
          o[i] += p[m - first] / sum * qkv[m * c.heads.qkv_width() + (NH + c.heads.n_kv_head + h / group) * HD + i];
      out.o.insert(out.o.end(), o.begin(), o.end());
      out.lse.push_back(std::log(sum));
    }
  return out;
}

template <class Real>
struct AttentionRun {
  using Acc = typename Cpu<Real>::Acc;
  Case c;
  Cpu<Real> dev;
  std::vector<Real> qk, qkv, dout, o, dqkv;
  std::vector<Acc> lse;
  explicit AttentionRun(const Case& c, bool plain_matmul = false) : c(c), dev{.plain_matmul = plain_matmul} {
    qk = random_tensor<Real>("qk", c.rows() * c.heads.qk_width(), 1.5);
    qkv = random_tensor<Real>("qkv", c.rows() * c.heads.qkv_width());
    dout = random_tensor<Real>("dout", c.rows() * c.heads.q_width());
    for (int64_t n = 0; n < c.rows(); ++n)  // only the values may be read
      std::fill_n(&qkv[n * c.heads.qkv_width()], c.heads.qk_width(), poisoned<Real>(1)[0]);
    forward();
  }
  void forward() {
    o = poisoned<Real>(c.rows() * c.heads.q_width());
    lse = poisoned<Acc>(c.rows() * c.heads.n_head);
    Scratch scratch(attention_scratch_bytes<Cpu<Real>>(c.B, c.T, c.heads));
    attention_forward(dev, o.data(), lse.data(), scratch, qk.data(), qkv.data(), c.B, c.T, c.heads);
  }
  void backward() {
    dqkv = poisoned<Real>(c.rows() * c.heads.qkv_width());
    Scratch scratch(attention_scratch_bytes<Cpu<Real>>(c.B, c.T, c.heads));
    attention_backward(dev, dqkv.data(), scratch, dout.data(), o.data(), lse.data(), qk.data(), qkv.data(), c.B, c.T,
                       c.heads);
  }
};

TYPED_TEST(Attention, ForwardIsThePlainFormula) {
  using Real = TypeParam;
  for (const Case& c : kCases)
    for (bool plain_matmul : {false, true}) {
      AttentionRun<Real> run(c, plain_matmul);
      Plain expected = plain_attention(converted<double>(run.qk), converted<double>(run.qkv), c);
      EXPECT_CLOSE(run.o, expected.o, tolerance<Real>()) << "T " << c.T;
      EXPECT_CLOSE(run.lse, expected.lse, tolerance<typename Cpu<Real>::Acc>()) << "T " << c.T;
    }
}

TEST(Gradients, Attention) {
  for (const Case& c : kCases) {
    AttentionRun<double> run(c);
    run.backward();
    auto qk = run.qk, qkv = run.qkv;
    // Split the gradient as the inputs are: rotated queries and keys, and values.
    std::vector<double> dqk, dv, v;
    for (int64_t n = 0; n < c.rows(); ++n)
      for (int64_t i = 0; i < c.heads.qkv_width(); ++i) {
        (i < c.heads.qk_width() ? dqk : dv).push_back(run.dqkv[n * c.heads.qkv_width() + i]);
        if (i >= c.heads.qk_width()) v.push_back(qkv[n * c.heads.qkv_width() + i]);
      }
    auto objective = [&] {
      int64_t width = c.heads.qkv_width() - c.heads.qk_width();
      for (int64_t n = 0; n < c.rows(); ++n)
        std::copy_n(&v[n * width], width, &qkv[n * c.heads.qkv_width() + c.heads.qk_width()]);
      return weighted_sum(plain_attention(qk, qkv, c).o, run.dout);
    };
    if (c.T > 1) {
      EXPECT_LT(gradient_error(qk, dqk, objective, 80), gradient_limit) << "T " << c.T;
    } else {  // one key: its probability is 1 whatever the query
      for (double d : dqk) EXPECT_NEAR(d, 0, 1e-14);
    }
    EXPECT_LT(gradient_error(v, dv, objective, 40), gradient_limit) << "T " << c.T;
  }
}

TYPED_TEST(Attention, BackwardMatchesDouble) {
  using Real = TypeParam;
  for (const Case& c : kCases) {
    AttentionRun<Real> run(c);
    AttentionRun<double> reference(c);
    run.backward(), reference.backward();
    EXPECT_CLOSE(run.dqkv, reference.dqkv, tolerance<Real>(2)) << "T " << c.T;
    AttentionRun<Real> plain(c, true);
    plain.backward();
    EXPECT_CLOSE(plain.dqkv, reference.dqkv, tolerance<Real>(2)) << "T " << c.T;
  }
}

TYPED_TEST(Attention, ScoresOfAnySizeAreFinite) {
  using Real = TypeParam;
  Case c{1, 70, {2, 1, 8}};
  AttentionRun<Real> run(c);
  for (Real& v : run.qk) v = from_double<Real>(60 * as_double(v));  // scores of some ten thousand: exp overflows
  run.forward();
  run.backward();
  for (Real v : run.o) ASSERT_TRUE(std::isfinite(as_double(v)));
  for (Real v : run.dqkv) ASSERT_TRUE(std::isfinite(as_double(v)));
}

TYPED_TEST(Attention, APositionSeesNeitherTheFutureNorOtherSequences) {
  using Real = TypeParam;
  Case c{2, 130, {2, 1, 8}};
  AttentionRun<Real> run(c);
  auto before = run.o;
  auto change = [&](int64_t n) {
    for (int64_t i = 0; i < c.heads.qk_width(); ++i) run.qk[n * c.heads.qk_width() + i] = from_double<Real>(7);
    for (int64_t i = c.heads.qk_width(); i < c.heads.qkv_width(); ++i)
      run.qkv[n * c.heads.qkv_width() + i] = from_double<Real>(9);
  };
  for (int64_t t = 70; t < c.T; ++t) change(t);
  run.forward();
  for (int64_t n = 0; n < c.rows(); ++n) {
    bool same = std::memcmp(&run.o[n * c.heads.q_width()], &before[n * c.heads.q_width()],
                            c.heads.q_width() * sizeof(Real)) == 0;
    EXPECT_EQ(same, n < 70 || n >= c.T) << n;
  }
}

TYPED_TEST(Attention, DecodingGivesTheRowsOfTheForwardPass) {
  using Real = TypeParam;
  Case c{2, 70, {4, 2, 6}};
  const int64_t S = 75, width = c.heads.n_kv_head * c.heads.head_dim;
  AttentionRun<Real> run(c);
  auto k_cache = poisoned<Real>(c.B * S * width), v_cache = k_cache;  // what is not yet stored must not be read
  const int32_t ahead[2] = {0, 3};                                    // the second sequence is three positions ahead
  std::vector<Real> all(run.o.size());
  for (int64_t step = -3; step < c.T; ++step) {
    std::vector<int64_t> rows;
    std::vector<int32_t> positions;
    for (int b = 0; b < 2; ++b) {
      int64_t t = std::clamp<int64_t>(step + ahead[b], 0, c.T - 1);  // ends repeat a position: it is stored again
      positions.push_back(int32_t(t));
      rows.push_back(b * c.T + t);
    }
    std::vector<Real> qk, qkv;
    for (int64_t n : rows) {
      qk.insert(qk.end(), &run.qk[n * c.heads.qk_width()], &run.qk[n * c.heads.qk_width()] + c.heads.qk_width());
      qkv.insert(qkv.end(), &run.qkv[n * c.heads.qkv_width()], &run.qkv[n * c.heads.qkv_width()] + c.heads.qkv_width());
    }
    auto o = poisoned<Real>(2 * c.heads.q_width());
    Scratch scratch(attention_decode_scratch_bytes<Cpu<Real>>(S, c.heads.head_dim));
    attention_decode(run.dev, o.data(), k_cache.data(), v_cache.data(), scratch, qk.data(), qkv.data(),
                     positions.data(), c.B, S, c.heads);
    for (int b = 0; b < 2; ++b)
      std::copy_n(&o[b * c.heads.q_width()], c.heads.q_width(), &all[rows[b] * c.heads.q_width()]);
  }
  EXPECT_CLOSE(all, run.o, tolerance<Real>());
  for (int64_t b = 0; b < c.B; ++b)  // nothing was stored past the last position
    for (int64_t i = (b * S + c.T) * width; i < (b + 1) * S * width; ++i)
      EXPECT_TRUE(std::isnan(as_double(k_cache[i])) && std::isnan(as_double(v_cache[i])));
}

TYPED_TEST(Attention, BitsDoNotDependOnTheNumberOfThreads) {
  using Real = TypeParam;
  expect_same_bits_on_any_threads([] {
    Case c{2, 130, {4, 2, 16}};
    AttentionRun<Real> run(c);
    run.backward();
    std::vector<int32_t> positions = {9, 4};
    auto cache = random_tensor<Real>("cache", 2 * 10 * 32), o = poisoned<Real>(2 * c.heads.q_width());
    auto v_cache = cache;
    Scratch scratch(attention_decode_scratch_bytes<Cpu<Real>>(10, 16));
    attention_decode(run.dev, o.data(), cache.data(), v_cache.data(), scratch, run.qk.data(), run.qkv.data(),
                     positions.data(), 2, 10, c.heads);
    return bits_of(run.o, run.lse, run.dqkv, o);
  });
}

}  // namespace
