// The second half of every gradient of a norm's weight: sums of partial rows, in a fixed order.
#pragma once
#include "llmc/cuda_common.cuh"

// gradient (C) += the sum of partial (blocks,C) over its rows: 8 threads a column take every eighth row, and their sums
// are added in order.
template <class Real>
__global__ void __launch_bounds__(256)
    sum_partial_rows(void* gradient, bool wide, const float* partial, int64_t blocks, int64_t C, int64_t stride) {
  __shared__ float sums[8][33];
  int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  int64_t c = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (c < C)
    for (int64_t b = part; b < blocks; b += 8) sum += partial[b * stride + c];
  sums[part][lane] = sum;
  __syncthreads();
  if (part > 0 || c >= C) return;
  for (int i = 1; i < 8; ++i) sum += sums[i][lane];
  add_to_gradient<Real>(gradient, wide, c, sum);
}
template <class Device>
void add_partial_rows(Device& dev, Grad<Device> gradient, const float* partial, int64_t blocks, int64_t C,
                      int64_t stride) {
  launch(dev, sum_partial_rows<typename Device::Real>, dim3(unsigned(ceil_div(C, 32))), 256, 0, gradient.data,
         gradient.wide, partial, blocks, C, stride);
}
