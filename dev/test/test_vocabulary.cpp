// Embedding and classifier over ranks that share the vocabulary, all ranks in one process, against those of one rank.
#include "llmc/vocabulary.h"

#include <gtest/gtest.h>

#include "dev/test/op_test.h"
#include "dev/test/vocabulary_parts.h"

namespace {

const struct Case {
  int64_t V;
  int ranks;
} cases[] = {{1, 2}, {5, 4}, {64, 2}, {257, 2}, {257, 4}, {257, 3}, {1000, 4}};

template <class Real>
struct Vocabulary : ::testing::Test {};
TYPED_TEST_SUITE(Vocabulary, AllReals);

TEST(VocabularyParts, CoverEveryIdOnceAndLeaveARowOfZeros) {
  for (auto [V, ranks] : cases) {
    int64_t next = 0;
    for (const VocabularyPart& part : parts_of(V, ranks)) {
      EXPECT_TRUE(part.rows == 0 || part.first == next);
      next += part.rows;
      EXPECT_GE(part.rows, 0);
      EXPECT_GT(part.padded, part.rows);
      EXPECT_EQ(part.padded, parts_of(V, ranks)[0].padded);
      EXPECT_EQ(part.padded % 64, 0);
    }
    EXPECT_EQ(next, V);
  }
  EXPECT_EQ(parts_of(257, 1)[0].padded, 320);
}

TYPED_TEST(Vocabulary, LookUpsAreSummedAndGradientsStayApart) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  const int64_t N = 70, C = 9;
  for (auto [V, ranks] : cases) {
    SCOPED_TRACE(std::to_string(V) + " over " + std::to_string(ranks));
    auto tokens = random_ints("tokens", N, V);
    auto table = random_tensor<Real>("table", V * C), dout = random_tensor<Real>("dout", N * C);
    Cpu<Real> dev;
    auto whole = poisoned<Real>(N * C), sum = std::vector<Real>(size_t(N * C), Real(0));
    embedding_forward(dev, whole.data(), tokens.data(), table.data(), N, C, V);
    std::vector<Acc> expected(size_t(V * C), Acc(0)), found;
    Scratch scratch(embedding_backward_scratch_bytes<Cpu<Real>>(N, C, V));
    embedding_backward(dev, Grad<Cpu<Real>>{expected.data()}, scratch, tokens.data(), dout.data(), N, C, V);
    for (const VocabularyPart& part : parts_of(V, ranks)) {
      DeviceStatus status;
      Cpu<Real> watched{.status = &status};
      std::vector<int32_t> rows(size_t(N), -77);
      vocabulary_rows(watched, rows.data(), tokens.data(), N, part);
      std::vector<Real> own(size_t(part.padded * C), Real(0)), out = poisoned<Real>(N * C);
      std::copy_n(table.data() + part.first * C, part.rows * C, own.data());
      embedding_forward(watched, out.data(), rows.data(), own.data(), N, C, part.padded);
      EXPECT_EQ(status.code, DeviceStatus::ok);
      for (int64_t i = 0; i < N * C; ++i) sum[i] = from_double<Real>(as_double(sum[i]) + as_double(out[i]));
      std::vector<Acc> gradient(size_t(part.padded * C), Acc(0));
      Scratch of_part(embedding_backward_scratch_bytes<Cpu<Real>>(N, C, part.rows));
      embedding_backward(dev, Grad<Cpu<Real>>{gradient.data()}, of_part, rows.data(), dout.data(), N, C, part.rows);
      found.insert(found.end(), gradient.begin(), gradient.begin() + part.rows * C);
      EXPECT_EQ(std::count(gradient.begin() + part.rows * C, gradient.end(), Acc(0)), (part.padded - part.rows) * C);
    }
    EXPECT_EQ(converted<double>(sum), converted<double>(whole));
    EXPECT_EQ(found, expected);
  }
}

TYPED_TEST(Vocabulary, ForeignTokensAreReportedAndReadZeros) {
  for (int32_t foreign : {257, -1, INT32_MAX, INT32_MIN})
    for (const VocabularyPart& part : parts_of(257, 4)) {
      DeviceStatus status;
      Cpu<TypeParam> dev{.status = &status};
      const std::vector<int32_t> tokens = {0, foreign, 256};
      std::vector<int32_t> rows(3, -77);
      vocabulary_rows(dev, rows.data(), tokens.data(), 3, part);
      EXPECT_EQ(status.code, DeviceStatus::token_out_of_range);
      EXPECT_EQ(status.token, 1);
      EXPECT_EQ(status.value, foreign);
      EXPECT_EQ(rows[1], part.padded - 1);
    }
}

// Losses and gradients (n,V) put together from all parts.
template <class Real>
struct Classified {
  std::vector<typename Cpu<Real>::Acc> losses;
  std::vector<Real> gradient;
};
template <class Real>
Classified<Real> over_ranks(const std::vector<Real>& logits, const std::vector<int32_t>& targets, int64_t V, int ranks,
                            bool with_gradient) {
  using Acc = typename Cpu<Real>::Acc;
  const int64_t n = int64_t(targets.size());
  const StepParams params{.loss_scale = 0.25};
  Cpu<Real> dev;
  const auto parts = parts_of(V, ranks);
  auto sums = poisoned<Acc>(ranks * n * 3);
  std::vector<std::vector<Real>> own;
  for (int r = 0; r < ranks; ++r) {
    own.push_back(columns_of(logits, n, parts[r], poisoned<Real>(1)[0]));
    cross_entropy_sums(dev, sums.data() + r * n * 3, own[r].data(), targets.data(), 0, n, parts[r]);
  }
  Classified<Real> out{{}, poisoned<Real>(n * V)};
  for (int r = 0; r < ranks; ++r) {
    auto losses = poisoned<Acc>(n);
    const std::string before = bits_of(own[r]);
    cross_entropy_of_part(dev, losses.data(), own[r].data(), sums.data(), targets.data(), &params, n, ranks, parts[r],
                          with_gradient);
    EXPECT_TRUE(r == 0 || bits_of(losses) == bits_of(out.losses)) << "rank " << r;
    out.losses = losses;
    EXPECT_TRUE(with_gradient || bits_of(own[r]) == before) << "logits have changed";
    for (int64_t i = 0; i < n; ++i)
      for (int64_t v = 0; v < parts[r].padded; ++v) {
        const Real value = own[r][i * parts[r].padded + v];
        if (v < parts[r].rows)
          out.gradient[i * V + parts[r].first + v] = value;
        else
          EXPECT_TRUE(!with_gradient || as_double(value) == 0) << "padding";
      }
  }
  return out;
}

TYPED_TEST(Vocabulary, CrossEntropyIsThatOfWholeRows) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  const int64_t n = 23;
  for (double scale : {2.0, 300.0})  // exp overflows but for the maximum
    for (auto [V, ranks] : cases)
      for (bool gradient : {true, false}) {
        SCOPED_TRACE(std::to_string(V) + " over " + std::to_string(ranks) + ", scale " + std::to_string(scale));
        auto logits = random_tensor<Real>("logits", n * V, scale), whole = logits;
        auto targets = random_ints("targets", n, V);
        targets[3] = targets[n - 1] = -1, targets[4] = int32_t(V - 1), targets[5] = 0;
        auto losses = poisoned<Acc>(n);
        const StepParams params{.loss_scale = 0.25};
        Cpu<Real> dev;
        cross_entropy(dev, losses.data(), whole.data(), targets.data(), &params, 0, n, V, V, gradient);
        const auto found = over_ranks(logits, targets, V, ranks, gradient);
        EXPECT_CLOSE(found.losses, losses, tolerance<Acc>(4));
        EXPECT_EQ(found.losses[3], 0);
        EXPECT_LE(gradient ? relative_error(found.gradient, whole) : 0.0, tolerance<Real>(4));
      }
}

TYPED_TEST(Vocabulary, ForeignTargetsAreReportedAndIgnored) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  for (int32_t foreign : {257, -2, INT32_MAX, INT32_MIN})
    for (const VocabularyPart& part : parts_of(257, 2)) {
      DeviceStatus status;
      Cpu<Real> dev{.status = &status};
      auto logits = random_tensor<Real>("logits", 3 * part.padded);
      const std::vector<int32_t> targets = {1, foreign, -1};
      auto sums = poisoned<Acc>(9);
      cross_entropy_sums(dev, sums.data(), logits.data(), targets.data(), 10, 3, part);
      EXPECT_EQ(status.code, DeviceStatus::token_out_of_range);
      EXPECT_EQ(status.token, 11);
      EXPECT_EQ(status.value, foreign);
      for (int i = 3; i < 9; ++i) EXPECT_EQ(sums[i], 0);
    }
}

TYPED_TEST(Vocabulary, TheSameBitsOnAnyThreads) {
  using Real = TypeParam;
  const int64_t V = 257, n = 40;
  auto logits = random_tensor<Real>("logits", n * V);
  auto targets = random_ints("targets", n, V);
  expect_same_bits_on_any_threads([&] {
    const auto found = over_ranks(logits, targets, V, 4, true);
    return bits_of(found.losses, found.gradient);
  });
}

}  // namespace
