// Dense products through cuBLASLt: workspace handed in, the algorithm that its heuristic names first kept per shape,
// split-K only with fp32 partial sums reduced in a fixed order (no atomics).
#include "llmc/matmul.h"

#include <cublasLt.h>

#include <array>
#include <map>

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_matmul.cuh"

namespace {

void blas_check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) fail("cuBLASLt: ", call, ": ", cublasLtGetStatusString(status));
}
#define BLAS_CHECK(call) blas_check(call, #call)

constexpr size_t workspace_bytes = size_t(32) << 20;

struct Layout {
  cublasLtMatrixLayout_t layout;
  Layout(cudaDataType_t type, int64_t rows, int64_t cols, int64_t stride) {
    BLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, type, uint64_t(rows), uint64_t(cols), stride));
  }
  ~Layout() { cublasLtMatrixLayoutDestroy(layout); }
  Layout(const Layout&) = delete;
};

}  // namespace

struct GpuBase::Libraries {
  cublasLtHandle_t handle = nullptr;
  std::map<std::array<int64_t, 13>, cublasLtMatmulAlgo_t> chosen;
  ~Libraries() {
    if (handle) cublasLtDestroy(handle);
  }
};
std::shared_ptr<GpuBase::Libraries> GpuBase::open_libraries() {
  auto libraries = std::make_shared<Libraries>();
  BLAS_CHECK(cublasLtCreate(&libraries->handle));
  return libraries;
}

namespace {

// cuBLASLt's matrices are column-major; ours, row-major, are their transposes. So C = op(A) op(B) is computed as
// C^T = op(B)^T op(A)^T: the operands change places.
// False where its heuristic knows no algorithm (odd strides of bf16, say).
bool library_product(GpuBase& dev, const MatrixView& c, void* scratch, const MatrixView& a, bool transpose_a,
                     const MatrixView& b, bool transpose_b, int64_t M, int64_t N, int64_t K, bool accumulate) {
  float beta = accumulate ? 1 : 0;
  auto type = [](const MatrixView& m) { return m.is_bf16 ? CUDA_R_16BF : CUDA_R_32F; };
  // How well the addresses are aligned decides which algorithms may be used.
  auto alignment = [](const MatrixView& m) { return int64_t(reinterpret_cast<uintptr_t>(m.data) & 255); };
  std::array<int64_t, 13> key = {M,
                                 N,
                                 K,
                                 a.stride,
                                 b.stride,
                                 c.stride,
                                 type(a),
                                 type(c),
                                 transpose_a + 2 * transpose_b,
                                 accumulate,
                                 alignment(a),
                                 alignment(b),
                                 alignment(c)};
  auto& libraries = *dev.libraries;
  cublasLtMatmulDesc_t description;
  BLAS_CHECK(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  std::unique_ptr<cublasLtMatmulDescOpaque_t, void (*)(cublasLtMatmulDesc_t)> owner(
      description, [](cublasLtMatmulDesc_t d) { cublasLtMatmulDescDestroy(d); });
  cublasOperation_t op_first = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                    op_second = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  BLAS_CHECK(cublasLtMatmulDescSetAttribute(description, CUBLASLT_MATMUL_DESC_TRANSA, &op_first, sizeof op_first));
  BLAS_CHECK(cublasLtMatmulDescSetAttribute(description, CUBLASLT_MATMUL_DESC_TRANSB, &op_second, sizeof op_second));
  Layout first(type(b), transpose_b ? K : N, transpose_b ? N : K, b.stride);
  Layout second(type(a), transpose_a ? M : K, transpose_a ? K : M, a.stride);
  Layout result(type(c), N, M, c.stride);

  auto found = libraries.chosen.find(key);
  if (found == libraries.chosen.end()) {
    cublasLtMatmulPreference_t preference;
    BLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;  // partial sums in fp32, in the workspace
    size_t bytes = workspace_bytes;
    BLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions,
                                                    sizeof reductions));
    BLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                                    sizeof bytes));
    auto align = [&](cublasLtMatmulPreferenceAttributes_t attribute, const MatrixView& m) {
      uint32_t least = 256;
      while (alignment(m) % least) least /= 2;
      BLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &least, sizeof least));
    };
    align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b), align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a);
    align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c), align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c);
    cublasLtMatmulHeuristicResult_t best{};
    int n = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(libraries.handle, description, first.layout, second.layout,
                                                           result.layout, result.layout, preference, 1, &best, &n);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_SUCCESS || n == 0) return false;
    found = libraries.chosen.emplace(key, best.algo).first;
  }
  float one = 1;
  BLAS_CHECK(cublasLtMatmul(libraries.handle, description, &one, b.data, first.layout, a.data, second.layout, &beta,
                            c.data, result.layout, c.data, result.layout, &found->second, scratch, workspace_bytes,
                            dev.stream));
  return true;
}

// The plain product (--plain-matmul): 32 x 32 tiles through shared memory, one thread an element, k ascending.
// C (M,N) = A B with any strides between rows and columns, or C += A B.
template <class A, class C>
__global__ void plain_product(C* c, int64_t c_row, const A* a, const A* b, int64_t M, int64_t N, int64_t K,
                              int64_t a_row, int64_t a_col, int64_t b_row, int64_t b_col, bool accumulate) {
  constexpr int tile = 32;
  __shared__ float as[tile][tile + 1], bs[tile][tile + 1];
  int64_t m0 = int64_t(blockIdx.x) * tile, n0 = int64_t(blockIdx.y) * tile;
  int tx = threadIdx.x % tile, ty = threadIdx.x / tile;  // 32 x 8 threads, four rows each
  float sum[4] = {};
  for (int64_t k0 = 0; k0 < K; k0 += tile) {
    for (int i = ty; i < tile; i += 8) {
      // Neighbouring threads read neighbouring elements, whichever way the matrix lies.
      int64_t am = a_col == 1 ? m0 + i : m0 + tx, ak = a_col == 1 ? k0 + tx : k0 + i;
      float av = am < M && ak < K ? to_float(a[am * a_row + ak * a_col]) : 0;
      as[am - m0][ak - k0] = av;
      int64_t bk = b_col == 1 ? k0 + i : k0 + tx, bn = b_col == 1 ? n0 + tx : n0 + i;
      float bv = bk < K && bn < N ? to_float(b[bk * b_row + bn * b_col]) : 0;
      bs[bk - k0][bn - n0] = bv;
    }
    __syncthreads();
    for (int k = 0; k < tile; ++k)
      for (int i = 0; i < 4; ++i) sum[i] += as[ty + 8 * i][k] * bs[k][tx];
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    int64_t m = m0 + ty + 8 * i, n = n0 + tx;
    C* at = c + m * c_row + n;
    if (m < M && n < N) *at = from_float<C>(accumulate ? to_float(*at) + sum[i] : sum[i]);
  }
}

template <class A, class C>
void plain(GpuBase& dev, const MatrixView& c, const MatrixView& a, bool transpose_a, const MatrixView& b,
           bool transpose_b, int64_t M, int64_t N, int64_t K, bool accumulate) {
  launch(dev, plain_product<A, C>, dim3(unsigned(ceil_div(M, 32)), unsigned(ceil_div(N, 32))), 256, 0,
         static_cast<C*>(c.data), c.stride, static_cast<const A*>(a.data), static_cast<const A*>(b.data), M, N, K,
         transpose_a ? 1 : a.stride, transpose_a ? a.stride : 1, transpose_b ? 1 : b.stride, transpose_b ? b.stride : 1,
         accumulate);
}

}  // namespace

void dense_product(GpuBase& dev, const MatrixView& c, void* scratch, const MatrixView& a, bool transpose_a,
                   const MatrixView& b, bool transpose_b, int64_t M, int64_t N, int64_t K, bool accumulate) {
  if (!dev.plain_matmul && library_product(dev, c, scratch, a, transpose_a, b, transpose_b, M, N, K, accumulate))
    return;
  if (!a.is_bf16)
    plain<float, float>(dev, c, a, transpose_a, b, transpose_b, M, N, K, accumulate);
  else if (c.is_bf16)
    plain<bf16, bf16>(dev, c, a, transpose_a, b, transpose_b, M, N, K, accumulate);
  else
    plain<bf16, float>(dev, c, a, transpose_a, b, transpose_b, M, N, K, accumulate);
}
size_t dense_scratch_bytes() { return workspace_bytes; }

template <class Device>
void matmul_forward(Device& dev, typename Device::Real* out, void* scratch, const typename Device::Real* x,
                    const typename Device::Real* weight, int64_t N, int64_t IC, int64_t OC) {
  dense_product(dev, view(out, OC), scratch, view(x, IC), false, view(weight, IC), true, N, OC, IC, false);
}

template <class Device>
void matmul_backward_input(Device& dev, typename Device::Real* dx, void* scratch, const typename Device::Real* dout,
                           const typename Device::Real* weight, int64_t N, int64_t IC, int64_t OC) {
  dense_product(dev, view(dx, IC), scratch, view(dout, OC), false, view(weight, IC), false, N, IC, OC, false);
}

template <class Device>
void matmul_backward_weight(Device& dev, Grad<Device> dweight, void* scratch, const typename Device::Real* dout,
                            const typename Device::Real* x, int64_t N, int64_t IC, int64_t OC) {
  dweight.visit([&](auto* dw) {
    dense_product(dev, view(dw, IC), scratch, view(dout, OC), true, view(x, IC), false, OC, IC, N, dweight.add);
  });
}

template <class Device>
size_t matmul_scratch_bytes(int64_t, int64_t, int64_t) {
  return workspace_bytes;
}

#define INSTANTIATE(Real)                                                                                              \
  template void matmul_forward(Gpu<Real>&, Real*, void*, const Real*, const Real*, int64_t, int64_t, int64_t);         \
  template void matmul_backward_input(Gpu<Real>&, Real*, void*, const Real*, const Real*, int64_t, int64_t, int64_t);  \
  template void matmul_backward_weight(Gpu<Real>&, Grad<Gpu<Real>>, void*, const Real*, const Real*, int64_t, int64_t, \
                                       int64_t);                                                                       \
  template size_t matmul_scratch_bytes<Gpu<Real>>(int64_t, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
