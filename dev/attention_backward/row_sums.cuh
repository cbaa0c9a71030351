// D = rowsum(dO * O), which the gradient of a softmax subtracts: what every rung begins with.
#pragma once
#include "llmc/attention_tile.cuh"

namespace row_sums {

// D (N, NH), like lse. A warp a row of a head; HD is 64 or 128.
__global__ void row_sums_kernel(float* D, const bf16* dout, const bf16* o, int64_t rows, int HD) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;  // (N, NH)
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float sum = 0;
  for (int c = 2 * lane; c < HD; c += 64) {
    const float2 x = unpack_bf16(*reinterpret_cast<const uint32_t*>(dout + row * HD + c));
    const float2 y = unpack_bf16(*reinterpret_cast<const uint32_t*>(o + row * HD + c));
    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
  }
  sum = warp_sum(sum);
  if (lane == 0) D[row] = sum;
}

inline void row_sums(GpuBase& dev, float* D, const bf16* dout, const bf16* o, int64_t N, HeadShape heads) {
  const int64_t rows = N * heads.n_head;
  launch(dev, row_sums_kernel, dim3(unsigned(ceil_div(rows, 8))), 256, 0, D, dout, o, rows, int(heads.head_dim));
}

}  // namespace row_sums
