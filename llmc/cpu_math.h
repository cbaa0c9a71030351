// Helpers of the CPU reference: a vectorisable exponential, tiles converted to the type of sums, and the matrix product
// that all tiles go through.
#pragma once
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "llmc/types.h"

// C (M,N) = alpha * op(A) * op(B) + beta * C, row-major, on the calling thread alone. op(A) is (M,K), op(B) is (K,N);
// lda, ldb, ldc are the distances between stored rows. `plain` selects the plain loop instead of the library. beta = 0
// never reads C.
template <class Acc>
void gemm(bool plain, bool trans_a, bool trans_b, int64_t M, int64_t N, int64_t K, Acc alpha, const Acc* A, int64_t lda,
          const Acc* B, int64_t ldb, Acc beta, Acc* C, int64_t ldc);

// exp for float in the form that compilers vectorise: 2^n * polynomial(r) with x = n ln 2 + r, |r| <= ln 2 / 2.
// Relative error under 2e-7. Arguments under -87 give 0, above 88 infinity; NaN gives NaN.
inline float exp_of(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  float t = x * 1.44269504088896341f + shift;
  float n = t - shift;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p *= std::bit_cast<float>((std::bit_cast<uint32_t>(t) + 127u) << 23);
  p = x < -87.0f ? 0.0f : p;
  return x > 88.0f ? std::numeric_limits<float>::infinity() : p;
}
inline double exp_of(double x) { return std::exp(x); }

template <class Acc>
inline Acc sigmoid_of(Acc x) {
  return Acc(1) / (Acc(1) + exp_of(-x));
}

// Sum of term(0) ... term(n-1): 16 interleaved partial sums, then those in a tree. The order does not depend on the
// width of the machine's vectors.
template <class Acc, class Term>
inline Acc sum_of(int64_t n, Term term) {
  Acc part[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t l = 0; l < 16; ++l) part[l] += term(i + l);
  for (int64_t l = 0; i < n; ++i, ++l) part[l] += term(i);
  for (int64_t width = 8; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) part[l] += part[l + width];
  return part[0];
}

// out[i] = (add: out[i] +) part 0 [i] + part 1 [i] + ..., one after the other in Acc, rounded once. Parts are of In, one or
// more; out may be one of them.
template <class In, class Acc, class Out>
void sum_in_order(Out* out, std::span<const void* const> parts, bool add, int64_t n) {
  constexpr int64_t block = 1024;
#pragma omp parallel for schedule(static) if (n > 1 << 16)
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t count = std::min(block, n - begin);
    Acc total[block];
    for (int64_t i = 0; add && i < count; ++i) total[i] = Acc(out[begin + i]);
    for (size_t p = 0; p < parts.size(); ++p) {
      const In* part = static_cast<const In*>(parts[p]) + begin;
      for (int64_t i = 0; i < count; ++i) total[i] = p || add ? total[i] + Acc(part[i]) : Acc(part[i]);
    }
    for (int64_t i = 0; i < count; ++i) out[begin + i] = Out(total[i]);
  }
}

// The value that storing as Real and loading again gives.
template <class Real, class Acc>
inline Acc rounded(Acc v) {
  return Acc(Real(v));
}

// A (rows, cols) block of a matrix in the type of sums: the block itself where types agree, else a converted copy.
template <class Acc>
struct Block {
  const Acc* data;
  int64_t stride;
};
template <class Acc, class Real>
Block<Acc> load_block(const Real* source, int64_t stride, int64_t rows, int64_t cols, Acc* copy) {
  if constexpr (std::is_same_v<Acc, Real>) {
    (void)rows, (void)cols, (void)copy;
    return {source, stride};
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) copy[r * cols + c] = Acc(source[r * stride + c]);
    return {copy, cols};
  }
}

// How many values of Acc a converted copy of that many elements takes: none where no copy is made.
template <class Acc, class Real>
constexpr int64_t block_size(int64_t elements) {
  return std::is_same_v<Acc, Real> ? 0 : elements;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch is handed in as bytes, one equal share a thread.
template <class Acc>
Acc* thread_share(void* scratch, int64_t values) {
  return static_cast<Acc*>(scratch) + values * omp_get_thread_num();
}
