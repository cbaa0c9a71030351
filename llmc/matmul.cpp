#include "llmc/matmul.h"

#include "llmc/cpu_math.h"

// Every product is cut into tiles of fixed size, whatever the number of threads, so that the bits do not depend on it.
namespace {
constexpr int64_t tile_rows = 256, tile_cols = 512, tile_depth = 1024;

// out (M,J) = a (M,K) * op(b), where op(b) is (K,J): b is stored (J,K) if transposed, else (K,J).
template <class Device, class Real = typename Device::Real>
void tiled(Device& dev, Real* out, void* scratch, const Real* a, const Real* b, int64_t M, int64_t J, int64_t K,
           bool transposed) {
  using Acc = typename Device::Acc;
  int64_t rows = divide_up(M, tile_rows), cols = divide_up(J, tile_cols);
  int64_t share = block_size<Acc, Real>(tile_rows * K + tile_cols * K + tile_rows * tile_cols);
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      Acc* copy = thread_share<Acc>(scratch, share);
      int64_t i0 = i * tile_rows, j0 = j * tile_cols, m = std::min(tile_rows, M - i0), n = std::min(tile_cols, J - j0);
      auto A = load_block(a + i0 * K, K, m, K, copy);
      auto B = transposed ? load_block(b + j0 * K, K, n, K, copy + tile_rows * K)
                          : load_block(b + j0, J, K, n, copy + tile_rows * K);
      if constexpr (std::is_same_v<Acc, Real>) {
        gemm<Acc>(dev.plain_matmul, false, transposed, m, n, K, 1, A.data, A.stride, B.data, B.stride, 0,
                  out + i0 * J + j0, J);
      } else {
        Acc* C = copy + (tile_rows + tile_cols) * K;
        gemm<Acc>(dev.plain_matmul, false, transposed, m, n, K, 1, A.data, A.stride, B.data, B.stride, 0, C, n);
        for (int64_t r = 0; r < m; ++r)
          for (int64_t c = 0; c < n; ++c) out[(i0 + r) * J + j0 + c] = Real(C[r * n + c]);
      }
    }
}
}  // namespace

template <class Device>
void matmul_forward(Device& dev, typename Device::Real* out, void* scratch, const typename Device::Real* x,
                    const typename Device::Real* weight, int64_t N, int64_t IC, int64_t OC) {
  tiled(dev, out, scratch, x, weight, N, OC, IC, true);
}

template <class Device>
void matmul_backward_input(Device& dev, typename Device::Real* dx, void* scratch, const typename Device::Real* dout,
                           const typename Device::Real* weight, int64_t N, int64_t IC, int64_t OC) {
  tiled(dev, dx, scratch, dout, weight, N, IC, OC, false);
}

template <class Device>
void matmul_backward_weight(Device& dev, Grad<Device> dweight, void* scratch, const typename Device::Real* dout,
                            const typename Device::Real* x, int64_t N, int64_t IC, int64_t OC) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t rows = divide_up(OC, tile_rows), cols = divide_up(IC, tile_cols);
  int64_t share = tile_rows * tile_cols + block_size<Acc, Real>(tile_depth * (tile_rows + tile_cols));
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      Acc* tile = thread_share<Acc>(scratch, share);
      Acc* copy = tile + tile_rows * tile_cols;
      int64_t i0 = i * tile_rows, j0 = j * tile_cols, m = std::min(tile_rows, OC - i0),
              n = std::min(tile_cols, IC - j0);
      for (int64_t k0 = 0; k0 < N; k0 += tile_depth) {
        int64_t k = std::min(tile_depth, N - k0);
        auto A = load_block(dout + k0 * OC + i0, OC, k, m, copy);
        auto B = load_block(x + k0 * IC + j0, IC, k, n, copy + tile_depth * tile_rows);
        gemm<Acc>(dev.plain_matmul, true, false, m, n, k, 1, A.data, A.stride, B.data, B.stride, k0 ? 1 : 0, tile, n);
      }
      for (int64_t r = 0; r < m; ++r) add_to_gradient(dweight, (i0 + r) * IC + j0, tile + r * n, n);
    }
}

template <class Device>
size_t matmul_scratch_bytes(int64_t, int64_t IC, int64_t OC) {
  using Acc = typename Device::Acc;
  using Real = typename Device::Real;
  int64_t forward = block_size<Acc, Real>((tile_rows + tile_cols) * std::max(IC, OC) + tile_rows * tile_cols);
  int64_t backward = tile_rows * tile_cols + block_size<Acc, Real>(tile_depth * (tile_rows + tile_cols));
  return size_t(std::max(forward, backward) * omp_get_max_threads()) * sizeof(Acc);
}

#define INSTANTIATE(Real)                                                                                              \
  template void matmul_forward(Cpu<Real>&, Real*, void*, const Real*, const Real*, int64_t, int64_t, int64_t);         \
  template void matmul_backward_input(Cpu<Real>&, Real*, void*, const Real*, const Real*, int64_t, int64_t, int64_t);  \
  template void matmul_backward_weight(Cpu<Real>&, Grad<Cpu<Real>>, void*, const Real*, const Real*, int64_t, int64_t, \
                                       int64_t);                                                                       \
  template size_t matmul_scratch_bytes<Cpu<Real>>(int64_t, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
