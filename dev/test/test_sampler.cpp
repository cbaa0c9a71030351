#include "llmc/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "dev/test/error_line.h"
#include "llmc/random.h"

namespace {

constexpr double kAlmostOne = 0x1.fffffffffffffp-1;  // the largest number below 1

// The token for each of n evenly spaced numbers: frequencies are then exact to 1/n, without luck.
std::map<int, double> frequencies(const std::vector<float>& logits, const SamplerOptions& options, int n = 10000) {
  std::map<int, double> count;
  for (int i = 0; i < n; i++) count[sample_token(logits, options, (i + 0.5) / n)] += 1.0 / n;
  return count;
}

std::vector<float> logs(std::vector<double> probabilities) {
  std::vector<float> logits;
  for (double p : probabilities) logits.push_back(float(std::log(p)));
  return logits;
}

TEST(Sampler, TemperatureZeroTakesTheLargestAndTheLowerOfEquals) {
  EXPECT_EQ(sample_token(std::vector<float>{1, 3, 2}, {0, 0, 1}, 0.99), 1);
  EXPECT_EQ(sample_token(std::vector<float>{1, 3, 3, 3}, {0, 0, 1}, 0.99), 1);
  EXPECT_EQ(sample_token(std::vector<float>{-7}, {0, 5, 0.5}, 0), 0);
}

TEST(Sampler, FrequenciesAreTheSoftmax) {
  std::vector<double> p = {0.1, 0.4, 0.05, 0.25, 0.2};
  auto f = frequencies(logs(p), {1, 0, 1});
  for (int i = 0; i < 5; i++) EXPECT_NEAR(f[i], p[i], 3e-4) << i;
}

TEST(Sampler, RandomNumbersGiveTheFrequenciesToo) {
  std::vector<double> p = {0.1, 0.4, 0.05, 0.25, 0.2};
  std::vector<float> logits = logs(p);
  std::vector<double> f(5);
  constexpr int n = 100000;
  for (int i = 0; i < n; i++) f[sample_token(logits, {1, 0, 1}, random_uniform(1, 2, i))] += 1.0 / n;
  for (int i = 0; i < 5; i++) EXPECT_NEAR(f[i], p[i], 5 * std::sqrt(p[i] * (1 - p[i]) / n)) << i;
}

TEST(Sampler, TemperatureSharpensAndFlattens) {
  std::vector<float> logits = logs({0.2, 0.8});
  EXPECT_NEAR(frequencies(logits, {0.5, 0, 1})[0], 0.04 / (0.04 + 0.64), 2e-4);
  EXPECT_NEAR(frequencies(logits, {2, 0, 1})[0], std::sqrt(0.2) / (std::sqrt(0.2) + std::sqrt(0.8)), 2e-4);
  EXPECT_EQ(frequencies(logits, {1e-300, 0, 1}).size(), 1u);
  EXPECT_NEAR(frequencies(logits, {1e300, 0, 1})[0], 0.5, 2e-4);
}

TEST(Sampler, TopKKeepsTheLargestRenormalised) {
  std::vector<float> logits = logs({0.1, 0.4, 0.05, 0.25, 0.2});
  auto f = frequencies(logits, {1, 2, 1});
  EXPECT_EQ(f.size(), 2u);
  EXPECT_NEAR(f[1], 0.4 / 0.65, 3e-4);
  EXPECT_NEAR(f[3], 0.25 / 0.65, 3e-4);
  EXPECT_EQ(frequencies(logits, {1, 1, 1}).size(), 1u);
  EXPECT_EQ(frequencies(logits, {1, 5, 1}), frequencies(logits, {1, 0, 1}));
  EXPECT_EQ(frequencies(logits, {1, 1000000, 1}), frequencies(logits, {1, 0, 1}));
  auto ties = frequencies({0, 0, 0, 0}, {1, 2, 1});
  EXPECT_EQ(ties.size(), 2u);
  EXPECT_NEAR(ties[0], 0.5, 1e-9);
  EXPECT_NEAR(ties[1], 0.5, 1e-9);
}

TEST(Sampler, TopPKeepsTheFewestThatReachIt) {
  std::vector<float> logits = logs({0.1, 0.4, 0.05, 0.25, 0.2});
  auto f = frequencies(logits, {1, 0, 0.6});  // 0.4 + 0.25
  EXPECT_EQ(f.size(), 2u);
  EXPECT_NEAR(f[1], 0.4 / 0.65, 3e-4);
  EXPECT_EQ(frequencies(logits, {1, 0, 0.7}).size(), 3u);
  EXPECT_EQ(frequencies(logits, {1, 0, 1e-12}), (std::map<int, double>{{1, frequencies(logits, {0, 0, 1})[1]}}));
  // Exactly reached: 0.5 of {0.5, 0.5} is one token, and anything above needs both.
  EXPECT_EQ(frequencies({0, 0}, {1, 0, 0.5}).size(), 1u);
  EXPECT_EQ(frequencies({0, 0}, {1, 0, 0.500001}).size(), 2u);
  // After top-k, of what top-k left: 0.4 of 0.65 is already 0.6.
  EXPECT_EQ(frequencies(logits, {1, 2, 0.6}).size(), 1u);
}

TEST(Sampler, EndsOfTheInterval) {
  std::vector<float> logits = {-1e30f, 0, 0, -1e30f};  // weights 0, 1, 1, 0
  EXPECT_EQ(sample_token(logits, {1, 0, 1}, 0), 1);
  EXPECT_EQ(sample_token(logits, {1, 0, 1}, kAlmostOne), 2);
  EXPECT_EQ(sample_token(logits, {1, 3, 0.9999}, 0), 1);
  EXPECT_EQ(sample_token(logits, {1, 3, 0.9999}, kAlmostOne), 2);
  float big = std::numeric_limits<float>::max();
  EXPECT_EQ(sample_token(std::vector<float>{-big, big}, {1e-300, 0, 1}, 0), 1);
  EXPECT_EQ(sample_token(std::vector<float>{-big, big}, {1e-300, 2, 0.5}, kAlmostOne), 1);
}

TEST(Sampler, EveryTokenIsInRangeForAnyOptions) {
  for (uint64_t i = 0; i < 20000; i++) {
    std::vector<float> logits(1 + random_bits(3, 0, i) % 20);
    for (size_t j = 0; j < logits.size(); j++) logits[j] = float(std::round(4 * random_normal(4, i, j)));
    SamplerOptions options{random_uniform(5, 0, i) * 2, int64_t(random_bits(5, 1, i) % 25),
                           1 - random_uniform(5, 2, i)};
    double u = random_uniform(5, 3, i);
    int32_t token = sample_token(logits, options, u);
    ASSERT_GE(token, 0);
    ASSERT_LT(size_t(token), logits.size());
    ASSERT_EQ(token, sample_token(logits, options, u));
  }
}

TEST(Sampler, RefusesWhatCannotBeSampled) {
  float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  expect_refused([&] { sample_token(std::vector<float>{0, 1, nan}, {1, 0, 1}, 0); }, "logit of token 2");
  expect_refused([&] { sample_token(std::vector<float>{0, inf, 1}, {0, 0, 1}, 0); }, "logit of token 1");
  expect_refused([&] { sample_token(std::vector<float>{-inf, 0}, {1, 0, 1}, 0); }, "logit of token 0");
  expect_refused([&] { sample_token({}, {1, 0, 1}, 0); }, "no logits");
  std::vector<float> logits = {0, 1};
  expect_refused([&] { sample_token(logits, {-1, 0, 1}, 0); }, "temperature");
  expect_refused([&] { sample_token(logits, {inf, 0, 1}, 0); }, "temperature");
  expect_refused([&] { sample_token(logits, {nan, 0, 1}, 0); }, "temperature");
  expect_refused([&] { sample_token(logits, {1, -1, 1}, 0); }, "top-k");
  expect_refused([&] { sample_token(logits, {1, 0, 0}, 0); }, "top-p");
  expect_refused([&] { sample_token(logits, {1, 0, 1.01}, 0); }, "top-p");
  expect_refused([&] { sample_token(logits, {1, 0, nan}, 0); }, "top-p");
  expect_refused([&] { sample_token(logits, {1, 0, 1}, 1); }, "uniform");
  expect_refused([&] { sample_token(logits, {1, 0, 1}, -0.1); }, "uniform");
}

}  // namespace
