// Walking all parameters at once: the work of the update is cut into blocks of 64 logical rows, numbered view by view, so
// that tensors of any size share the GPU evenly.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/parameters.h"

inline constexpr int view_threads = 256;

// The end of the row blocks of these views, which begin with views[0].first_block.
template <class Device>
__device__ int64_t view_blocks(const ParameterView<Device>* views, int64_t n_views) {
  if (n_views == 0) return 0;
  const ParameterView<Device>& last = views[n_views - 1];
  return last.first_block + norm_blocks(last.rows);
}
// The view that holds row block b.
template <class Device>
__device__ int64_t view_of_block(const ParameterView<Device>* views, int64_t n_views, int64_t b) {
  int64_t low = 0, high = n_views - 1;
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (views[middle].first_block <= b)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}
// Calls f(first element in the buffer) for every piece of W neighbouring columns of row block b of view p that is this
// thread's. cols is a multiple of W.
template <int W, class Device, class F>
__device__ void each_piece(const ParameterView<Device>& p, int64_t b, F f) {
  int64_t row0 = (b - p.first_block) * norm_block_rows;
  int rows = int(p.rows - row0 < norm_block_rows ? p.rows - row0 : norm_block_rows);
  unsigned pieces = unsigned(p.cols / W), total = unsigned(rows) * pieces;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < total; i += view_threads) {
    unsigned row = i / pieces, piece = i - row * pieces;
    f(p.map(row0 + row) * p.cols + int64_t(piece) * W);
  }
}

template <class T, int W>
struct alignas(sizeof(T) * W) PieceOf {
  T v[W];
};
template <int W, class T>
__device__ __forceinline__ PieceOf<T, W> load_piece(const T* p) {
  return *reinterpret_cast<const PieceOf<T, W>*>(p);
}
template <int W, class T>
__device__ __forceinline__ void store_piece(T* p, const PieceOf<T, W>& v) {
  *reinterpret_cast<PieceOf<T, W>*>(p) = v;
}
// The gradient at elements [at, at + W): both parts of a tied one.
template <int W, class Device>
__device__ __forceinline__ void load_gradient(float (&g)[W], const ParameterView<Device>& p, int64_t at) {
  if (p.grad.wide) {
    auto v = load_piece<W>(static_cast<const float*>(p.grad.data) + at);
#pragma unroll
    for (int i = 0; i < W; ++i) g[i] = v.v[i];
  } else {
    auto v = load_piece<W>(static_cast<const typename Device::Real*>(p.grad.data) + at);
#pragma unroll
    for (int i = 0; i < W; ++i) g[i] = to_float(v.v[i]);
  }
  if (p.second_grad.data) {
    auto v = load_piece<W>(static_cast<const float*>(p.second_grad.data) + at);
#pragma unroll
    for (int i = 0; i < W; ++i) g[i] += v.v[i];
  }
}
// Enough blocks to fill the GPU; each walks the row blocks from its own number on.
inline dim3 view_grid(const GpuBase& dev) { return dim3(unsigned(dev.multiprocessors * 8)); }
