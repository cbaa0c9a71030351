// The matrix product of one tile: the library's single-threaded sgemm/dgemm, or the plain loop.
#ifdef GPT_MOE_DNNL
#include <dnnl.h>
#endif
#ifdef GPT_MOE_OPENBLAS
#include <cblas.h>
#endif
#include <cstring>

#include "llmc/cpu_math.h"

namespace {

// The plain loop keeps a tile of C in registers while the sum over K runs, in order: `tile_m` rows of A against a panel
// of B two vectors wide, copied so that its rows follow each other.
#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64, tile_m = 8;
#elif defined(__AVX__)
constexpr int64_t vector_bytes = 32, tile_m = 4;
#else
constexpr int64_t vector_bytes = 16, tile_m = 4;
#endif
constexpr int64_t vectors = 2;
constexpr int64_t panel_k = 256;  // longest sum in registers; a panel of that height stays in L1

template <class Acc>
struct Vector {
  static constexpr int64_t lanes = vector_bytes / sizeof(Acc);
  typedef Acc type __attribute__((vector_size(vector_bytes), aligned(sizeof(Acc)), may_alias));
};

// C (rows, n) = alpha * A * panel + beta * C. Element (i,k) of A is A[i * row + k * col].
template <int64_t rows, class Acc>
void tile_product(int64_t n, int64_t K, Acc alpha, const Acc* A, int64_t row, int64_t col, const Acc* panel, Acc beta,
                  Acc* C, int64_t ldc) {
  using Lanes = typename Vector<Acc>::type;
  constexpr int64_t lanes = Vector<Acc>::lanes;
  Lanes sum[rows][vectors] = {};
  for (int64_t k = 0; k < K; ++k) {
    const Acc* b = panel + k * vectors * lanes;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] += A[i * row + k * col] * *(const Lanes*)(b + v * lanes);
  }
  for (int64_t i = 0; i < rows; ++i) {
    Acc* c = C + i * ldc;
    Acc value[vectors * lanes];
    for (int64_t v = 0; v < vectors; ++v) *(Lanes*)(value + v * lanes) = alpha * sum[i][v];
    if (beta == 0)
      std::copy_n(value, n, c);
    else
      for (int64_t j = 0; j < n; ++j) c[j] = value[j] + beta * c[j];
  }
}

template <class Acc>
void plain_gemm(bool ta, bool tb, int64_t M, int64_t N, int64_t K, Acc alpha, const Acc* A, int64_t lda, const Acc* B,
                int64_t ldb, Acc beta, Acc* C, int64_t ldc) {
  constexpr int64_t width = vectors * Vector<Acc>::lanes;
  alignas(64) Acc panel[panel_k * width];
  int64_t row = ta ? 1 : lda, col = ta ? lda : 1;
  for (int64_t k0 = 0; k0 < std::max<int64_t>(K, 1); k0 += panel_k)
    for (int64_t j0 = 0; j0 < N; j0 += width) {
      int64_t k = std::min(panel_k, K - k0), n = std::min(width, N - j0);
      if (n < width) std::fill_n(panel, k * width, Acc(0));
      if (tb)
        for (int64_t j = 0; j < n; ++j)
          for (int64_t i = 0; i < k; ++i) panel[i * width + j] = B[(j0 + j) * ldb + k0 + i];
      else
        for (int64_t i = 0; i < k; ++i) std::copy_n(B + (k0 + i) * ldb + j0, n, panel + i * width);
      Acc b = k0 == 0 ? beta : Acc(1);
      const Acc* a = A + k0 * col;
      int64_t i = 0;
      auto tiles = [&](auto rows) {
        for (; i + rows() <= M; i += rows())
          tile_product<rows()>(n, k, alpha, a + i * row, row, col, panel, b, C + i * ldc + j0, ldc);
      };
      tiles(std::integral_constant<int64_t, tile_m>());
      tiles(std::integral_constant<int64_t, tile_m / 2>());
      tiles(std::integral_constant<int64_t, 1>());
    }
}

#ifdef GPT_MOE_OPENBLAS
// Ops divide their work among threads themselves; the library must not do it a second time. A release that does not know
// the processor takes it for a Prescott (2004), and is then slower than the plain loop.
bool openblas_is_fast() {
  static const bool fast = [] {
    openblas_set_num_threads(1);
    return std::strcmp(openblas_get_corename(), "Prescott") != 0;
  }();
  return fast;
}
#endif

}  // namespace

template <>
void gemm<float>(bool plain, bool ta, bool tb, int64_t M, int64_t N, int64_t K, float alpha, const float* A,
                 int64_t lda, const float* B, int64_t ldb, float beta, float* C, int64_t ldc) {
  if (M <= 0 || N <= 0) return;
#if defined(GPT_MOE_DNNL)
  if (!plain && K > 0 &&
      dnnl_sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', M, N, K, alpha, A, lda, B, ldb, beta, C, ldc) == dnnl_success)
    return;
#elif defined(GPT_MOE_OPENBLAS)
  if (!plain && K > 0 && openblas_is_fast())
    return cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, M, N, K, alpha, A,
                       lda, B, ldb, beta, C, ldc);
#endif
  (void)plain;
  plain_gemm(ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
}

template <>
void gemm<double>(bool plain, bool ta, bool tb, int64_t M, int64_t N, int64_t K, double alpha, const double* A,
                  int64_t lda, const double* B, int64_t ldb, double beta, double* C, int64_t ldc) {
  if (M <= 0 || N <= 0) return;
#if defined(GPT_MOE_OPENBLAS)
  if (!plain && K > 0 && openblas_is_fast())
    return cblas_dgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, M, N, K, alpha, A,
                       lda, B, ldb, beta, C, ldc);
#endif
  (void)plain;
  plain_gemm(ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
}
