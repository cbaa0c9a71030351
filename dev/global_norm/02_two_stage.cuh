// Rung 2: no atomics. A block sums the squares of 64 rows into a place of its own; a last block sums these partial
// sums, in fp64. Which value is added to which, and when, is fixed: the same bits every time. A warp takes a row, a
// lane 16 bytes at a time, and the place of a row in its buffer is found once a row.
//
// Predicted: the bytes of the op, in a stream of 16-byte loads. But a launch a tensor has as many blocks as the tensor
// has times 64 rows: 32 for an expert's gate of 2048 rows, on 132 multiprocessors, and each walks along its 64 rows by
// itself: 8 for each warp, a few trips to memory each. About ten microseconds a tensor, most of the chip idle, whatever
// it holds.
//
// Sizes: columns a multiple of 8.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/parameters.h"

namespace two_stage {

using View = ParameterView<Gpu<bf16>>;
constexpr int threads = 256, warps = threads / 32;

template <class T>
__device__ float sum_squares(const T* grad, const View& p, int64_t row0) {
  constexpr int width = Pack<T>::n;
  const int64_t end = min(p.rows, row0 + norm_block_rows);
  float sum = 0;
  for (int64_t row = row0 + threadIdx.x / 32; row < end; row += warps) {
    const T* from = grad + p.map(row) * p.cols;
    for (int64_t c = threadIdx.x % 32 * width; c < p.cols; c += 32 * width) {
      const Pack<T> g = *reinterpret_cast<const Pack<T>*>(from + c);
#pragma unroll
      for (int j = 0; j < width; ++j) sum += g[j] * g[j];
    }
  }
  return sum;
}

__global__ void __launch_bounds__(threads) partial_sums(float* partials, View p) {
  const int64_t row0 = int64_t(blockIdx.x) * norm_block_rows;
  float sum = p.grad.wide ? sum_squares(static_cast<const float*>(p.grad.data), p, row0)
                          : sum_squares(static_cast<const bf16*>(p.grad.data), p, row0);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[p.first_partial + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(1024) sum_partials(float* norm, const float* partials, int64_t n) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += 1024) sum += double(partials[i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) *norm = float(sqrt(sum));
}

// norm: of all gradients; partials (n_partials) as global_norm_partials(). No tensor has a second gradient.
inline void global_norm(GpuBase& dev, float* norm, float* partials, const std::vector<View>& views,
                        int64_t n_partials) {
  for (const View& p : views) {
    if (p.cols % 8) fail("global_norm 02_two_stage: columns must be a multiple of 8, not ", p.cols);
    launch(dev, partial_sums, unsigned(ceil_div(p.rows, norm_block_rows)), threads, 0, partials, p);
  }
  launch(dev, sum_partials, 1, 1024, 0, norm, partials, n_partials);
}

}  // namespace two_stage
