// Attention on the GPU: values and gradients, what it may see, decoding.
#include <gtest/gtest.h>

#include "dev/test/gpu_test.h"
#include "llmc/attention.h"

namespace {

template <class Real>
struct GpuAttention : GpuTest {};
TYPED_TEST_SUITE(GpuAttention, GpuReals);

struct Case {
  int64_t B, T;
  HeadShape heads;
  int64_t rows() const { return B * T; }
  int64_t q_size() const { return rows() * heads.q_width(); }
  int64_t qk_size() const { return rows() * heads.qk_width(); }
  int64_t qkv_size() const { return rows() * heads.qkv_width(); }
  std::string text() const {
    return "B " + std::to_string(B) + " T " + std::to_string(T) + " NH " + std::to_string(heads.n_head) + " NKV " +
           std::to_string(heads.n_kv_head) + " HD " + std::to_string(heads.head_dim);
  }
};
const std::vector<Case> kSmall = {{1, 1, {2, 1, 16}},  {2, 5, {4, 2, 16}}, {1, 17, {2, 2, 32}}, {3, 1, {1, 1, 64}},
                                  {1, 33, {2, 1, 64}}, {1, 9, {2, 1, 96}}, {1, 9, {4, 1, 128}}, {1, 66, {1, 1, 32}}};
// Lengths around tiles of 64, 128 and 192, one query head a key head, several, and all on one; more tiles of queries than
// a GPU has multiprocessors.
const std::vector<Case> kCases = {
    {2, 64, {2, 2, 32}},   {1, 65, {3, 1, 64}},   {1, 130, {4, 2, 64}},  {3, 63, {1, 1, 16}},
    {2, 200, {4, 1, 128}}, {1, 257, {6, 2, 96}},  {1, 512, {4, 2, 64}},  {1, 300, {8, 8, 32}},
    {2, 127, {4, 4, 128}}, {1, 129, {2, 1, 32}},  {5, 128, {2, 1, 64}},  {1, 385, {2, 1, 64}},
    {1, 193, {2, 1, 128}}, {8, 200, {16, 4, 64}}, {1, 300, {16, 1, 64}}, {1, 300, {16, 1, 128}}};

// Queries, keys and values; of qkv only the values may be read.
std::vector<double> some_qk(const Case& c) { return random_values("qk", c.qk_size(), 1.5); }
std::vector<double> some_qkv(const Case& c) {
  auto qkv = random_values("qkv", c.qkv_size());
  for (int64_t n = 0; n < c.rows(); ++n)
    std::fill_n(&qkv[n * c.heads.qkv_width()], c.heads.qk_width(), std::numeric_limits<double>::quiet_NaN());
  return qkv;
}

template <class D>
struct Attended {
  typename D::Real *o, *dqkv;
  typename D::Acc* lse;
};
template <class D>
Attended<D> attend(Buffers<D>& b, const Case& c, const std::vector<double>& qk_values,
                   const std::vector<double>& qkv_values) {
  auto *qk = b.real(qk_values), *qkv = b.real(qkv_values), *o = b.out("o", c.q_size());
  auto* lse = b.out_acc("lse", c.rows() * c.heads.n_head);
  size_t bytes = attention_scratch_bytes<D>(c.B, c.T, c.heads);
  attention_forward(b.dev, o, lse, b.scratch(bytes), qk, qkv, c.B, c.T, c.heads);
  auto* dqkv = b.out("dqkv", c.qkv_size());
  attention_backward(b.dev, dqkv, b.scratch(bytes), b.real("dout", c.q_size()), o, lse, qk, qkv, c.B, c.T, c.heads);
  return {o, dqkv, lse};
}

template <class Real>
void check_attention(const Case& c) {
  SCOPED_TRACE(c.text());
  expect_calibrated<Real>([&](auto& b) { attend(b, c, some_qk(c), some_qkv(c)); });
}
TYPED_TEST(GpuAttention, Small) {
  for (const Case& c : kSmall) check_attention<TypeParam>(c);
}
TYPED_TEST(GpuAttention, ForwardAndBackward) {
  for (const Case& c : kCases) check_attention<TypeParam>(c);
}

// In float any head size up to the largest; in bf16 others than those above are refused.
TYPED_TEST(GpuAttention, OtherHeadSizesSmall) {
  for (const Case& c :
       {Case{1, 70, {2, 1, 5}}, Case{2, 33, {2, 2, 48}}, Case{1, 66, {3, 1, 80}}, Case{1, 20, {2, 1, max_head_dim}}})
    if constexpr (std::is_same_v<TypeParam, float>) {
      check_attention<TypeParam>(c);
    } else {
      Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
      EXPECT_THROW(attend(b, c, some_qk(c), some_qkv(c)), Error) << c.text();
    }
}

// More keys and values than fit into a cache: a sequence gives the same bits alone and beside others.
TYPED_TEST(GpuAttention, SequencesTogetherAndAlone) {
  using D = Gpu<TypeParam>;
  const Case all{4, 1024, {16, 16, 128}}, one{1, 1024, all.heads};
  auto repeated = [](int64_t n) {
    const auto& period = random_values("period", 99991);
    std::vector<TypeParam> v(n);
    for (int64_t i = 0; i < n; ++i) v[i] = from_double<TypeParam>(period[i % 99991]);
    return v;
  };
  Buffers<D> b(gpu<TypeParam>());
  auto *qk = b.upload(repeated(all.qk_size())), *qkv = b.upload(repeated(all.qkv_size())),
       *dout = b.upload(repeated(all.q_size()));
  auto run = [&](const Case& c, int64_t parts) {
    auto *o = b.out("o", all.q_size()), *dqkv = b.out("dqkv", all.qkv_size());
    auto* lse = b.out_acc("lse", all.rows() * all.heads.n_head);
    void* scratch = b.scratch(attention_scratch_bytes<D>(c.B, c.T, c.heads));
    for (int64_t i = 0; i < parts; ++i) {
      auto *o_i = o + i * c.q_size(), *lse_i = lse + i * c.rows() * c.heads.n_head;
      auto *qk_i = qk + i * c.qk_size(), *qkv_i = qkv + i * c.qkv_size();
      attention_forward(b.dev, o_i, lse_i, scratch, qk_i, qkv_i, c.B, c.T, c.heads);
      attention_backward(b.dev, dqkv + i * c.qkv_size(), scratch, dout + i * c.q_size(), o_i, lse_i, qk_i, qkv_i, c.B,
                         c.T, c.heads);
    }
    return bits_of(b.read(o), b.read(lse), b.read(dqkv));
  };
  std::string together = run(all, 1);
  EXPECT_TRUE(run(one, 4) == together);
  EXPECT_TRUE(run(all, 1) == together) << "another run gives other bits";
}

// With norm and rotation before and after: what a layer of the model runs.
TYPED_TEST(GpuAttention, WithQknormAndRope) {
  for (const Case& c : {Case{2, 70, {4, 2, 64}}, Case{1, 150, {3, 1, 32}}, Case{2, 65, {2, 2, 128}}})
    for (bool norm : {false, true}) {
      SCOPED_TRACE(c.text() + (norm ? " norm" : ""));
      expect_calibrated<TypeParam>([&]<class D>(Buffers<D>& b) {
        const int64_t N = c.rows(), HD = c.heads.head_dim;
        std::vector<int32_t> positions;
        for (int64_t n = 0; n < N; ++n) positions.push_back(int32_t(n % c.T));
        auto *qkv = b.real("qkv", c.qkv_size()), *q = norm ? b.real("qw", HD, 0.2, 1) : nullptr,
             *k = norm ? b.real("kw", HD, 0.2, 1) : nullptr;
        auto *table = b.acc(rope_table(c.T, HD, 10000)),
             *rstd = norm ? b.out_acc("rstd", N * (c.heads.n_head + c.heads.n_kv_head)) : nullptr,
             *lse = b.out_acc("lse", N * c.heads.n_head);
        const int32_t* at = b.upload(positions);
        auto *qk = b.out("qk", c.qk_size()), *o = b.out("o", c.q_size()), *dqkv = b.out("dqkv", c.qkv_size());
        size_t bytes = attention_scratch_bytes<D>(c.B, c.T, c.heads);
        qknorm_rope_forward(b.dev, qk, rstd, qkv, q, k, table, at, N, c.heads, 1e-6);
        attention_forward(b.dev, o, lse, b.scratch(bytes), qk, qkv, c.B, c.T, c.heads);
        attention_backward(b.dev, dqkv, b.scratch(bytes), b.real("dout", c.q_size()), o, lse, qk, qkv, c.B, c.T,
                           c.heads);
        Grad<D> dq = norm ? b.grad("dq_weight", HD, Onto::zeros) : Grad<D>{};
        Grad<D> dk = norm ? b.grad("dk_weight", HD, Onto::zeros) : Grad<D>{};
        qknorm_rope_backward(b.dev, dqkv, dq, dk, b.scratch(qknorm_rope_backward_scratch_bytes<D>(N, c.heads)), qkv,
                             rstd, q, k, table, at, N, c.heads);
      });
    }
}

TYPED_TEST(GpuAttention, ScoresOfAnySizeAreFiniteSmall) {
  for (const Case& c : {Case{1, 70, {2, 1, 16}}, Case{1, 70, {2, 1, 64}}}) {
    auto qk = some_qk(c);
    for (double& v : qk) v *= 64;  // scores of some ten thousand: exp overflows
    for_each_kernel_choice(gpu<TypeParam>(), [&] {
      Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
      auto run = attend(b, c, qk, some_qkv(c));
      for (auto v : b.read(run.o)) ASSERT_TRUE(std::isfinite(as_double(v)));
      for (auto v : b.read(run.dqkv)) ASSERT_TRUE(std::isfinite(as_double(v)));
    });
  }
}

TYPED_TEST(GpuAttention, APositionSeesNeitherTheFutureNorOtherSequencesSmall) {
  for (const Case& c : {Case{2, 130, {2, 1, 16}}, Case{2, 130, {2, 2, 64}}}) {
    auto qk = some_qk(c), qkv = some_qkv(c), changed_qk = qk, changed_qkv = qkv;
    for (int64_t n = 70; n < c.T; ++n) {  // the end of the first sequence
      std::fill_n(&changed_qk[n * c.heads.qk_width()], c.heads.qk_width(), 7);
      std::fill_n(&changed_qkv[n * c.heads.qkv_width()], c.heads.qkv_width(), 9);
    }
    for_each_kernel_choice(gpu<TypeParam>(), [&] {
      Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
      auto before = attend(b, c, qk, qkv), after = attend(b, c, changed_qk, changed_qkv);
      auto o = b.read(before.o), changed = b.read(after.o);
      auto dqkv = b.read(before.dqkv), changed_dqkv = b.read(after.dqkv);
      for (int64_t n = 0; n < c.rows(); ++n) {
        bool mine = n >= 70 && n < c.T;
        int64_t width = c.heads.q_width();
        bool same = std::memcmp(&o[n * width], &changed[n * width], width * sizeof(o[0])) == 0;
        EXPECT_EQ(same, !mine) << n;
      }
      // Keys of the second sequence get no gradient from the first.
      EXPECT_EQ(std::memcmp(&dqkv[c.T * c.heads.qkv_width()], &changed_dqkv[c.T * c.heads.qkv_width()],
                            c.T * c.heads.qkv_width() * sizeof(dqkv[0])),
                0);
    });
  }
}

// Two sequences, the second three positions ahead, decoded step by step: what is not yet stored must not be read.
template <class Real>
void check_decode(const Case& c, int64_t S) {
  SCOPED_TRACE(c.text());
  const int64_t width = c.heads.n_kv_head * c.heads.head_dim;
  auto body = [&]<class D>(Buffers<D>& b) {
    auto qk = some_qk(c), qkv = some_qkv(c);
    auto *k_cache = b.out("k_cache", 2 * S * width, Output::exact),
         *v_cache = b.out("v_cache", 2 * S * width, Output::exact);
    void* scratch = b.scratch(attention_decode_scratch_bytes<D>(S, c.heads.head_dim));
    for (int64_t step = -3; step < c.T; ++step) {
      std::vector<double> qk_rows, qkv_rows;
      std::vector<int32_t> positions;
      for (int64_t s = 0; s < 2; ++s) {
        int64_t t = std::clamp<int64_t>(step + 3 * s, 0, c.T - 1), n = s * c.T + t;
        positions.push_back(int32_t(t));  // ends repeat a position: it is stored again
        qk_rows.insert(qk_rows.end(), &qk[n * c.heads.qk_width()], &qk[n * c.heads.qk_width()] + c.heads.qk_width());
        qkv_rows.insert(qkv_rows.end(), &qkv[n * c.heads.qkv_width()],
                        &qkv[n * c.heads.qkv_width()] + c.heads.qkv_width());
      }
      attention_decode(b.dev, b.out("o at " + std::to_string(step), 2 * c.heads.q_width()), k_cache, v_cache, scratch,
                       b.real(qk_rows), b.real(qkv_rows), b.upload(positions), 2, S, c.heads);
    }
  };
  expect_calibrated<Real>(body);
}
TYPED_TEST(GpuAttention, DecodeSmall) {
  check_decode<TypeParam>({2, 5, {4, 2, 16}}, 5);
  check_decode<TypeParam>({2, 4, {2, 1, 128}}, 9);
}
TYPED_TEST(GpuAttention, Decode) {
  check_decode<TypeParam>({2, 70, {4, 2, 64}}, 75);
  check_decode<TypeParam>({2, 40, {6, 1, 32}}, 300);
  check_decode<TypeParam>({2, 34, {2, 2, 96}}, 1000);
}

// A long cache, filled at once.
TYPED_TEST(GpuAttention, DecodeAtTheEndOfALongCache) {
  const HeadShape heads{4, 2, 64};
  const int64_t S = 2000, B = 3;
  expect_calibrated<TypeParam>([&]<class D>(Buffers<D>& b) {
    auto *k = b.inout("k_cache", random_values("k", B * S * 128), Output::exact),
         *v = b.inout("v_cache", random_values("v", B * S * 128), Output::exact);
    attention_decode(b.dev, b.out("o", B * heads.q_width()), k, v,
                     b.scratch(attention_decode_scratch_bytes<D>(S, heads.head_dim)),
                     b.real("qk", B * heads.qk_width()), b.real("qkv", B * heads.qkv_width()),
                     b.upload(std::vector<int32_t>{1999, 0, 1023}), B, S, heads);
  });
}

}  // namespace
