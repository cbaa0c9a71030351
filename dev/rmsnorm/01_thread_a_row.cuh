// Rung 1: a thread a row. It walks along its row twice, once for the sum of squares and once for the result; the
// backward pass likewise, once for the dot product and once for dx.
//
// Predicted: the 32 threads of a warp are in 32 rows, 2C bytes apart. Each load of 2 bytes touches 32 lines of 128
// bytes, which the L1 cache takes one a clock: NC / 132 clocks for each walk along a tensor on 132 multiprocessors,
// three times the floor of the whole op. Once N rows are more than the L2 cache holds, the second walk finds nothing in
// it: forward moves 6NC bytes instead of 4NC, backward 10NC instead of 6NC. Stores of 2 bytes to 32 lines write each
// sector of 32 bytes in 16 pieces. No number here says what it costs that there are few threads, N / 132 a
// multiprocessor, and that each waits for its own loads: several times slower than the bytes.
//
// The weight's gradient is a sum over all rows. A warp sums its 32 rows' parts and adds them by an atomic addition,
// N/32 to each of C places, in whatever order they come: this rung does not repeat its bits.
#pragma once
#include "llmc/cuda_common.cuh"

namespace thread_a_row {

constexpr int threads = 128;

__global__ void __launch_bounds__(threads)
    norm(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t N, int64_t C, float eps) {
  const int64_t n = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (n >= N) return;
  const bf16* row = x + n * C;
  float squares = 0;
  for (int64_t c = 0; c < C; ++c) squares += to_float(row[c]) * to_float(row[c]);
  const float r = rsqrtf(squares / float(C) + eps);
  for (int64_t c = 0; c < C; ++c) out[n * C + c] = from_float<bf16>(to_float(row[c]) * r * to_float(weight[c]));
  rstd[n] = r;
}

__global__ void __launch_bounds__(threads) norm_gradient(bf16* dx, float* dweight, const bf16* dout, const bf16* x,
                                                         const bf16* weight, const float* rstd, int64_t N, int64_t C) {
  const int64_t n = int64_t(blockIdx.x) * threads + threadIdx.x, row = min(n, N - 1) * C;
  const bool live = n < N;  // the others only take part in the warp's sums, with zeros
  const float r = live ? rstd[n] : 0;
  float dot = 0;
  for (int64_t c = 0; c < C; ++c) dot += to_float(dout[row + c]) * to_float(weight[c]) * to_float(x[row + c]) * r;
  const float mean = dot / float(C);
  for (int64_t c = 0; c < C; ++c) {
    const float d = to_float(dout[row + c]), xhat = to_float(x[row + c]) * r;
    if (live) dx[row + c] = from_float<bf16>(r * (d * to_float(weight[c]) - xhat * mean));
    const float dw = warp_sum(live ? d * xhat : 0.0f);
    if (threadIdx.x % 32 == 0) atomicAdd(dweight + c, dw);
  }
}

inline void forward(GpuBase& dev, bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t N, int64_t C,
                    double eps) {
  launch(dev, norm, unsigned(ceil_div(N, threads)), threads, 0, out, rstd, x, weight, N, C, float(eps));
}
inline void backward(GpuBase& dev, bf16* dx, float* dweight, const bf16* dout, const bf16* x, const bf16* weight,
                     const float* rstd, int64_t N, int64_t C) {
  launch(dev, norm_gradient, unsigned(ceil_div(N, threads)), threads, 0, dx, dweight, dout, x, weight, rstd, N, C);
}

}  // namespace thread_a_row
