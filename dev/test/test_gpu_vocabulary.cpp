// Embedding and classifier over ranks that share the vocabulary, on the GPU: every rank's part of the work.
#include <gtest/gtest.h>

#include "dev/test/gpu_test.h"
#include "dev/test/vocabulary_parts.h"

namespace {

template <class Real>
struct GpuVocabulary : GpuTest {};
TYPED_TEST_SUITE(GpuVocabulary, GpuReals);

std::vector<int32_t> some_targets(int64_t n, int64_t V) {
  auto targets = random_ints("targets", n, V);
  targets[0] = int32_t(V - 1);
  if (n > 4) targets[1] = 0, targets[4] = targets[n - 1] = -1;
  return targets;
}

template <class Real>
void check_cross_entropy(int64_t n, int64_t V, int ranks, double scale) {
  SCOPED_TRACE(std::to_string(n) + " " + std::to_string(V) + " over " + std::to_string(ranks));
  const auto parts = parts_of(V, ranks);
  const auto& logits = random_values("logits", n * V, scale);
  for (bool gradient : {false, true})
    expect_calibrated<Real>(
        [&]<class D>(Buffers<D>& b) {
          auto* targets = b.upload(some_targets(n, V));
          auto* sums = b.out_acc("sums", ranks * n * 3);
          std::vector<typename D::Real*> own;
          for (const VocabularyPart& part : parts) {
            const auto columns = columns_of(logits, n, part, std::numeric_limits<double>::quiet_NaN());
            own.push_back(b.inout("logits", columns, gradient ? Output::stored : Output::exact));
            cross_entropy_sums(b.dev, sums + (own.size() - 1) * n * 3, own.back(), targets, 0, n, part);
          }
          for (size_t r = 0; r < parts.size(); ++r)
            cross_entropy_of_part(b.dev, b.out_acc("losses", n), own[r], sums, targets, b.params({.loss_scale = 0.25}),
                                  n, ranks, parts[r], gradient);
        },
        V);
}
TYPED_TEST(GpuVocabulary, CrossEntropySmall) {
  check_cross_entropy<TypeParam>(1, 1, 2, 1);
  check_cross_entropy<TypeParam>(9, 5, 4, 4);
  check_cross_entropy<TypeParam>(7, 300, 2, 4);
  check_cross_entropy<TypeParam>(7, 257, 4, 4);
}
TYPED_TEST(GpuVocabulary, CrossEntropy) {
  check_cross_entropy<TypeParam>(70, 1000, 2, 4);
  check_cross_entropy<TypeParam>(6, 50257, 2, 4);
  check_cross_entropy<TypeParam>(6, 50257, 8, 4);
  check_cross_entropy<TypeParam>(33, 700, 4, 300);  // exp overflows but for the maximum
}

template <class Real>
void check_embedding(int64_t N, int64_t C, int64_t V, int ranks) {
  for (const VocabularyPart& part : parts_of(V, ranks)) {
    SCOPED_TRACE(std::to_string(N) + " " + std::to_string(C) + " " + std::to_string(V) + " from " +
                 std::to_string(part.first));
    auto table = random_values("table", part.padded * C);
    std::fill(table.begin() + part.rows * C, table.end(), 0.0);
    expect_calibrated<Real>([&]<class D>(Buffers<D>& b) {
      auto* rows = b.out_int("rows", N);
      vocabulary_rows(b.dev, rows, b.upload(random_ints("tokens", N, V)), N, part);
      embedding_forward(b.dev, b.out("out", N * C, Output::exact), rows, b.real(table), N, C, part.padded);
      embedding_backward(b.dev, b.grad("dtable", part.padded * C, Onto::zeros),
                         b.scratch(embedding_backward_scratch_bytes<D>(N, C, part.rows)), rows, b.real("dout", N * C),
                         N, C, part.rows);
    });
  }
}
TYPED_TEST(GpuVocabulary, EmbeddingSmall) {
  check_embedding<TypeParam>(1, 1, 1, 2);
  check_embedding<TypeParam>(70, 9, 5, 4);
  check_embedding<TypeParam>(70, 16, 257, 2);
}
TYPED_TEST(GpuVocabulary, Embedding) { check_embedding<TypeParam>(3000, 256, 50257, 4); }

TYPED_TEST(GpuVocabulary, ForeignIdsAreReported) {
  for (int32_t foreign : {257, -2, INT32_MAX, INT32_MIN})
    for (const VocabularyPart& part : parts_of(257, 2))
      expect_calibrated<TypeParam>([&]<class D>(Buffers<D>& b) {
        vocabulary_rows(b.dev, b.out_int("rows", 3), b.upload(std::vector<int32_t>{1, foreign, 256}), 3, part);
        cross_entropy_sums(b.dev, b.out_acc("sums", 9), b.real("logits", 3 * part.padded),
                           b.upload(std::vector<int32_t>{1, foreign, -1}), 10, 3, part);
      });
}

}  // namespace
