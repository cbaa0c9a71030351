// Sums of gradients that several ranks sent: every part is read once.
#include "llmc/homes.h"

#include "llmc/cuda_views.cuh"

namespace {

// n counts pieces of W.
template <int W, class T>
__global__ void __launch_bounds__(256) sum_kernel(float* out, SumParts parts, bool add, int64_t n) {
  const int64_t step = int64_t(gridDim.x) * 256;
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < n; i += step) {
    PieceOf<float, W> sum = {};
    if (add) sum = load_piece<W>(out + i * W);
#pragma unroll 4
    for (int r = 0; r < parts.n; ++r) {
      const auto value = load_piece<W>(static_cast<const T*>(parts.part[r]) + i * W);
#pragma unroll
      for (int k = 0; k < W; ++k) sum.v[k] = r == 0 && !add ? to_float(value.v[k]) : sum.v[k] + to_float(value.v[k]);
    }
    store_piece<W>(out + i * W, sum);
  }
}

template <int W, class T>
void sum_pieces(GpuBase& dev, float* out, const SumParts& parts, bool add, int64_t n) {
  const dim3 grid(unsigned(std::min<int64_t>(ceil_div(n / W, 256), int64_t(dev.multiprocessors) * 32)));
  launch(dev, sum_kernel<W, T>, grid, 256, 0, out, parts, add, n / W);
}

// In pieces of 16 bytes where parts and sum begin and end with whole ones.
template <class T>
void sum_of(GpuBase& dev, float* out, const SumParts& parts, bool add, int64_t n) {
  constexpr int W = 16 / int(sizeof(T));
  auto begins = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  bool whole = n % W == 0 && begins(out, W * sizeof(float));
  for (int r = 0; r < parts.n; ++r) whole = whole && begins(parts.part[r], 16);
  whole ? sum_pieces<W, T>(dev, out, parts, add, n) : sum_pieces<1, T>(dev, out, parts, add, n);
}

}  // namespace

template <class Device>
void sum_parts(Device& dev, typename Device::Acc* out, SumParts parts, bool wide, bool add, int64_t n) {
  if (n == 0) return;
  wide ? sum_of<float>(dev, out, parts, add, n) : sum_of<typename Device::Real>(dev, out, parts, add, n);
}

#define INSTANTIATE(Real) template void sum_parts(Gpu<Real>&, float*, SumParts, bool, bool, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
