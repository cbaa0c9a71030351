// The matrix product of one tile: the library's single-threaded sgemm/dgemm, or the plain loop.
#ifdef GPT_MOE_DNNL
#include <dnnl.h>
#endif
#ifdef GPT_MOE_OPENBLAS
#include <cblas.h>
#endif

#include "llmc/cpu_math.h"

namespace {

// The specification. The inner loop runs over columns of C so that it vectorises; the sum over K is in order.
template <class Acc>
void plain_gemm(bool ta, bool tb, int64_t M, int64_t N, int64_t K, Acc alpha, const Acc* A, int64_t lda, const Acc* B,
                int64_t ldb, Acc beta, Acc* C, int64_t ldc) {
  for (int64_t i = 0; i < M; ++i) {
    Acc* c = C + i * ldc;
    if (tb) {  // rows of B are contiguous along K: dot products
      for (int64_t j = 0; j < N; ++j) {
        const Acc* b = B + j * ldb;
        Acc sum = 0;
        if (ta) {
          for (int64_t k = 0; k < K; ++k) sum += A[k * lda + i] * b[k];
        } else {
          const Acc* a = A + i * lda;
#pragma omp simd reduction(+ : sum)
          for (int64_t k = 0; k < K; ++k) sum += a[k] * b[k];
        }
        c[j] = alpha * sum + (beta == 0 ? Acc(0) : beta * c[j]);
      }
    } else {  // a rank-1 update of the row at a time, in tiles of columns that stay in registers or L1
      for (int64_t j0 = 0; j0 < N; j0 += 64) {
        int64_t n = std::min<int64_t>(64, N - j0);
        Acc sum[64] = {};
        for (int64_t k = 0; k < K; ++k) {
          Acc a = ta ? A[k * lda + i] : A[i * lda + k];
          const Acc* b = B + k * ldb + j0;
          for (int64_t j = 0; j < n; ++j) sum[j] += a * b[j];
        }
        for (int64_t j = 0; j < n; ++j) c[j0 + j] = alpha * sum[j] + (beta == 0 ? Acc(0) : beta * c[j0 + j]);
      }
    }
  }
}

#ifdef GPT_MOE_OPENBLAS
// Ops divide their work among threads themselves; the library must not do it a second time.
[[maybe_unused]] const bool openblas_single_threaded = [] { return openblas_set_num_threads(1), true; }();
#endif

}  // namespace

template <>
void gemm<float>(bool plain, bool ta, bool tb, int64_t M, int64_t N, int64_t K, float alpha, const float* A,
                 int64_t lda, const float* B, int64_t ldb, float beta, float* C, int64_t ldc) {
  if (M <= 0 || N <= 0) return;
#if defined(GPT_MOE_DNNL)
  if (!plain && K > 0 && dnnl_sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', M, N, K, alpha, A, lda, B, ldb, beta, C, ldc) == dnnl_success) return;
#elif defined(GPT_MOE_OPENBLAS)
  if (!plain && K > 0)
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
  if (!plain && K > 0)
    return cblas_dgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, M, N, K, alpha, A,
                       lda, B, ldb, beta, C, ldc);
#endif
  (void)plain;
  plain_gemm(ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
}
