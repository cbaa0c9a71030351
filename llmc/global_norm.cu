// The gradient norm on the GPU, and the decision that follows from it: one block decides, so that nothing waits for the
// host.
#include "llmc/global_norm.h"

#include "llmc/cuda_views.cuh"

namespace {

// This thread's part of the sum of squares over `rows` rows, row r beginning at element first[r]: of all pieces of W
// columns, row by row, every view_threads-th. The next piece's place is found by additions: a division for each would
// take longer than its 16 bytes take to arrive. second: the other part of a tied gradient, or null.
template <int W, bool tied, class T>
__device__ float sum_squares(const T* grad, const float* second, const int64_t* first, unsigned rows, unsigned pieces) {
  constexpr int batch = tied ? 4 : 8;  // pieces in flight
  const unsigned total = rows * pieces, rows_a_step = view_threads / pieces, pieces_a_step = view_threads % pieces;
  unsigned row = threadIdx.x / pieces, piece = threadIdx.x % pieces;
  float sum = 0;
  for (unsigned i0 = threadIdx.x; i0 < total; i0 += batch * view_threads) {
    PieceOf<T, W> g[batch] = {};
    PieceOf<float, W> other[tied ? batch : 1] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (i0 + b * view_threads < total) {
        const int64_t at = first[row] + int64_t(piece) * W;
        g[b] = load_piece<W>(grad + at);
        if constexpr (tied) other[b] = load_piece<W>(second + at);
      }
      row += rows_a_step, piece += pieces_a_step;
      if (piece >= pieces) piece -= pieces, ++row;
    }
#pragma unroll
    for (int b = 0; b < batch; ++b)
#pragma unroll
      for (int i = 0; i < W; ++i) {
        float value = to_float(g[b].v[i]);
        if constexpr (tied) value += other[b].v[i];
        sum += value * value;
      }
  }
  return sum;
}
template <class T>
__device__ float sum_squares(const T* grad, const float* second, const int64_t* first, int rows, int64_t cols) {
  constexpr int W = Pack<T>::n;
  if (cols % W)
    return second ? sum_squares<1, true>(grad, second, first, unsigned(rows), unsigned(cols))
                  : sum_squares<1, false>(grad, second, first, unsigned(rows), unsigned(cols));
  return second ? sum_squares<W, true>(grad, second, first, unsigned(rows), unsigned(cols / W))
                : sum_squares<W, false>(grad, second, first, unsigned(rows), unsigned(cols / W));
}

template <class Device>
__global__ void __launch_bounds__(view_threads, 4)  // 64 registers, which the batch needs
    norm_partials(float* partials, const ParameterView<Device>* views, int64_t n_views) {
  __shared__ int64_t first[norm_block_rows];  // the first element of each row
  int64_t blocks = view_blocks(views, n_views);
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    const ParameterView<Device> p = views[view_of_block(views, n_views, b)];
    const int64_t block = b - p.first_block, row0 = block * norm_block_rows;
    const int rows = int(min(p.rows - row0, norm_block_rows));
    if (int(threadIdx.x) < rows) first[threadIdx.x] = p.map(row0 + threadIdx.x) * p.cols;
    __syncthreads();
    const float* second = static_cast<const float*>(p.second_grad.data);
    float sum = p.grad.wide
                    ? sum_squares(static_cast<const float*>(p.grad.data), second, first, rows, p.cols)
                    : sum_squares(static_cast<const typename Device::Real*>(p.grad.data), second, first, rows, p.cols);
    sum = block_sum(sum);  // its barriers also part this round's reads of `first` from the next's writes
    if (threadIdx.x == 0) partials[p.first_partial + block] = sum;
  }
}

__global__ void __launch_bounds__(1024) decide(StepStats* stats, OutlierState* outliers, const float* partials,
                                               const int64_t* first_partials, int64_t n_tensors, UpdateRules rules) {
  __shared__ int bad;
  if (threadIdx.x == 0) bad = INT_MAX;
  __syncthreads();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double sum = 0;
  for (int64_t i = warp; i < n_tensors; i += 32) {  // a warp a tensor
    double tensor = 0;
    for (int64_t j = first_partials[i] + lane; j < first_partials[i + 1]; j += 32) tensor += double(partials[j]);
    tensor = warp_sum(tensor);
    if (lane > 0) continue;
    if (!isfinite(tensor)) atomicMin(&bad, int(i));
    sum += tensor;
  }
  sum = block_sum(sum);
  if (threadIdx.x > 0) return;
  if (bad != INT_MAX && stats->bad_tensor == -1) stats->bad_tensor = bad;
  decide_update(stats, outliers, sum, rules);
}

}  // namespace

template <class Device>
void global_norm_partials(Device& dev, typename Device::Acc* partials, const ParameterView<Device>* views,
                          int64_t n_views) {
  // Several times what fits on the GPU: row blocks differ in size, and a block that waits takes the place of one that
  // is done.
  launch(dev, norm_partials<Device>, dim3(unsigned(dev.multiprocessors * 32)), view_threads, 0, partials, views,
         n_views);
}

template <class Device>
void update_decision(Device& dev, StepStats* stats, OutlierState* outliers, const typename Device::Acc* partials,
                     const int64_t* first_partials, int64_t n_tensors, UpdateRules rules) {
  launch(dev, decide, 1, 1024, 0, stats, outliers, partials, first_partials, n_tensors, rules);
}

#define INSTANTIATE(Real)                                                                                     \
  template void global_norm_partials(Gpu<Real>&, float*, const ParameterView<Gpu<Real>>*, int64_t);           \
  template void update_decision(Gpu<Real>&, StepStats*, OutlierState*, const float*, const int64_t*, int64_t, \
                                UpdateRules);
INSTANTIATE(float)
INSTANTIATE(bf16)
