// What the tests of ops share: random tensors, tensors and scratch of the exact size on the heap (so that a memory
// checker sees every overrun), comparison by norm in which NaN fails, gradients by finite differences.
#pragma once
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "llmc/device.h"
#include "llmc/gradient.h"
#include "llmc/random.h"

// The types that value tests run for.
using AllReals = ::testing::Types<double, float, bf16>;

template <class T>
double as_double(T v) {
  if constexpr (std::is_same_v<T, bf16>)
    return double(float(v));
  else
    return double(v);
}
template <class T>
T from_double(double v) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16(float(v));
  else
    return T(v);
}
template <class To, class From>
std::vector<To> converted(const std::vector<From>& v) {
  std::vector<To> out(v.size());
  for (size_t i = 0; i < v.size(); ++i) out[i] = from_double<To>(as_double(v[i]));
  return out;
}

// n values of N(mean, scale), keyed by the name. The values of a float or double tensor are those of the bf16 tensor of
// the same name, so that every type computes with the same inputs and results can be compared.
template <class T>
std::vector<T> random_tensor(std::string_view name, int64_t n, double scale = 1, double mean = 0) {
  std::vector<T> out(n);
  for (int64_t i = 0; i < n; ++i)
    out[i] = from_double<T>(as_double(from_double<bf16>(mean + scale * random_normal(1, hash_name(name), i))));
  return out;
}
// v / 3: values whose sums are not exact, so that the order of a sum shows.
template <class T>
std::vector<T> third(std::vector<T> v) {
  for (T& a : v) a = from_double<T>(as_double(a) / 3);
  return v;
}
// n integers of [0, bound).
inline std::vector<int32_t> random_ints(std::string_view name, int64_t n, int64_t bound) {
  std::vector<int32_t> out(n);
  for (int64_t i = 0; i < n; ++i) out[i] = int32_t(random_bits(1, hash_name(name), i) % uint64_t(bound));
  return out;
}
// An output before the op has written it: all NaN.
template <class T>
std::vector<T> poisoned(int64_t n) {
  return std::vector<T>(n, from_double<T>(std::numeric_limits<double>::quiet_NaN()));
}
// Scratch of exactly that many bytes, which read as NaN.
struct Scratch {
  std::vector<unsigned char> bytes;
  explicit Scratch(size_t n) : bytes(n, 0xFF) {}
  operator void*() { return bytes.data(); }
};

// The bits of vectors, one after another.
template <class... Vectors>
std::string bits_of(const Vectors&... vectors) {
  std::string bits;
  (bits.append(reinterpret_cast<const char*>(vectors.data()), vectors.size() * sizeof(vectors[0])), ...);
  return bits;
}

// ||a - b|| / ||b||; NaN where either holds one, infinity where sizes differ or only b is zero.
template <class A, class B>
double relative_error(const std::vector<A>& a, const std::vector<B>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    double d = as_double(a[i]) - as_double(b[i]);
    difference += d * d;
    norm += as_double(b[i]) * as_double(b[i]);
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);  // 0 only if it is 0: NaN is not
}
// NaN fails, because it is not below any limit.
#define EXPECT_CLOSE(a, b, limit) EXPECT_LE(relative_error(a, b), limit)

// Limit on relative_error for results of Real: `roundings` times what storing once as Real costs.
template <class Real>
constexpr double tolerance(double roundings = 1) {
  if (std::is_same_v<Real, double>) return roundings * 2e-15;
  if (std::is_same_v<Real, float>) return roundings * 5e-7;
  return roundings * 2.5e-3;
}

// Compares `gradient` of objective() with respect to x with central differences at `samples` places (or all of them):
// the worst of |g - d| / (|d| + rms of d). NaN if either is NaN; infinity for a gradient that is zero everywhere, which
// tests nothing.
inline double gradient_error(std::vector<double>& x, const std::vector<double>& gradient,
                             const std::function<double()>& objective, int64_t samples = 1 << 20) {
  const double h = 1e-5;
  int64_t n = int64_t(x.size());
  if (int64_t(gradient.size()) != n) return std::numeric_limits<double>::infinity();
  std::vector<int64_t> at(std::min(n, samples));
  for (int64_t i = 0; i < int64_t(at.size()); ++i)
    at[i] = n <= samples ? i : int64_t(random_bits(2, 0, i) % uint64_t(n));
  std::vector<double> difference;
  double squares = 0, worst = 0;
  for (int64_t i : at) {
    double x0 = x[i];
    x[i] = x0 + h;
    double up = objective();
    x[i] = x0 - h;
    double down = objective();
    x[i] = x0;
    difference.push_back((up - down) / (2 * h));
    squares += difference.back() * difference.back();
  }
  double rms = std::sqrt(squares / double(at.size()));
  if (rms == 0) return std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < at.size(); ++i) {
    double error = std::abs(gradient[at[i]] - difference[i]) / (std::abs(difference[i]) + rms);
    if (std::isnan(error)) return error;
    worst = std::max(worst, error);
  }
  return worst;
}
inline constexpr double gradient_limit = 1e-7;

// sum (out * weights): the scalar whose gradient with respect to out is `weights`.
inline double weighted_sum(const std::vector<double>& out, const std::vector<double>& weights) {
  double sum = 0;
  for (size_t i = 0; i < out.size(); ++i) sum += out[i] * weights[i];
  return sum;
}

// A parameter gradient of n elements that `run` adds to: what it adds to zeros must be added to anything else with one
// rounding, in the type of sums and in the storage type.
template <class Real>
void expect_accumulates(int64_t n, const std::function<void(Grad<Cpu<Real>>)>& run) {
  using Acc = typename Cpu<Real>::Acc;
  std::vector<Acc> contribution(n, Acc(0));
  run({contribution.data(), true});
  auto wide = random_tensor<Acc>("gradient so far", n), wide_sum = wide;
  for (int64_t i = 0; i < n; ++i) wide_sum[i] += contribution[i];
  run({wide.data(), true});
  EXPECT_TRUE(bits_of(wide) == bits_of(wide_sum)) << "type of sums: " << relative_error(wide, wide_sum);
  auto narrow = random_tensor<Real>("gradient so far", n), narrow_sum = narrow;
  for (int64_t i = 0; i < n; ++i) narrow_sum[i] = Real(Acc(narrow_sum[i]) + contribution[i]);
  run({narrow.data(), false});
  EXPECT_TRUE(bits_of(narrow) == bits_of(narrow_sum)) << "storage type: " << relative_error(narrow, narrow_sum);
}

// `run` told to write a parameter gradient of n elements over NaN leaves what adding to zeros does, up to the sign of a
// zero, in the type of sums and in the storage type.
template <class Real>
void expect_writes(int64_t n, const std::function<void(Grad<Cpu<Real>>)>& run) {
  auto check = [&]<class T>(std::vector<T> written, bool wide) {
    std::vector<T> sum(n, from_double<T>(0));
    run({sum.data(), wide, true}), run({written.data(), wide, false});
    EXPECT_TRUE(converted<double>(written) == converted<double>(sum))  // NaN is equal to nothing
        << (wide ? "type of sums: " : "storage type: ") << relative_error(written, sum);
  };
  check(poisoned<typename Cpu<Real>::Acc>(n), true), check(poisoned<Real>(n), false);
}

// `run` returns the bits of all it computed; they must not depend on the number of threads.
inline void expect_same_bits_on_any_threads(const std::function<std::string()>& run) {
  int before = omp_get_max_threads();
  omp_set_num_threads(1);
  std::string one = run();
  for (int threads : {2, 3}) {
    omp_set_num_threads(threads);
    EXPECT_TRUE(run() == one) << threads << " threads";
  }
  omp_set_num_threads(before);
}
