// Rung 3: a warp a row, 16 bytes at a time; and a weight gradient without atomics.
//
// Predicted, forward: no barriers, and a lane asks for 16 bytes with one instruction instead of 2. The second walk
// comes from the L1 cache: 4NC bytes of global memory, and now near the floor. But only as long as the rows in work fit
// into that cache: 64 warps of a multiprocessor have 128C bytes, 96 KB at C = 768 and all of it at C = 2048, where
// memory is read again: 6NC.
//
// Backward, in three kernels: dx, a warp a row (6NC bytes); then partial sums of the weight's gradient over 64 rows, a
// thread a column (it reads x and dout again: 4NC more); then the sum of the partial rows in their order. No addition
// depends on who comes first, so the same bits come every time. It costs reading both tensors twice: 10NC bytes against
// the 6NC of the floor, unless the L2 cache still holds them; 14NC where the second walk of dx misses the L1 cache.
//
// Sizes: C a multiple of 8.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/cuda_reduce.cuh"

namespace warp_a_row {

constexpr int warps = 8, width = 8, partial_rows = 64;
using Chunk = Pack<bf16>;

__device__ __forceinline__ Chunk load(const bf16* p) { return *reinterpret_cast<const Chunk*>(p); }

__global__ void __launch_bounds__(warps * 32)
    norm(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t N, int64_t C, float eps) {
  const int64_t n = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (n >= N) return;
  const int lane = threadIdx.x % 32;
  float squares = 0;
  for (int64_t c = lane * width; c < C; c += 32 * width) {
    const Chunk v = load(x + n * C + c);
#pragma unroll
    for (int j = 0; j < width; ++j) squares += v[j] * v[j];
  }
  const float r = rsqrtf(warp_sum(squares) / float(C) + eps);
  for (int64_t c = lane * width; c < C; c += 32 * width) {
    Chunk v = load(x + n * C + c);
    const Chunk w = load(weight + c);
#pragma unroll
    for (int j = 0; j < width; ++j) v.set(j, v[j] * r * w[j]);
    *reinterpret_cast<Chunk*>(out + n * C + c) = v;
  }
  if (lane == 0) rstd[n] = r;
}

__global__ void __launch_bounds__(warps * 32)
    norm_gradient(bf16* dx, const bf16* dout, const bf16* x, const bf16* weight, const float* rstd, int64_t N,
                  int64_t C) {
  const int64_t n = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (n >= N) return;
  const int lane = threadIdx.x % 32;
  const float r = rstd[n];
  float dot = 0;
  for (int64_t c = lane * width; c < C; c += 32 * width) {
    const Chunk d = load(dout + n * C + c), v = load(x + n * C + c), w = load(weight + c);
#pragma unroll
    for (int j = 0; j < width; ++j) dot += d[j] * w[j] * v[j];
  }
  const float mean = warp_sum(dot) * r / float(C);
  for (int64_t c = lane * width; c < C; c += 32 * width) {
    const Chunk d = load(dout + n * C + c), v = load(x + n * C + c), w = load(weight + c);
    Chunk result;
#pragma unroll
    for (int j = 0; j < width; ++j) result.set(j, r * (d[j] * w[j] - v[j] * r * mean));
    *reinterpret_cast<Chunk*>(dx + n * C + c) = result;
  }
}

// partial (blocks,C): the weight's gradient of partial_rows rows.
__global__ void __launch_bounds__(256)
    weight_partials(float* partial, const bf16* dout, const bf16* x, const float* rstd, int64_t N, int64_t C) {
  const int64_t c = int64_t(blockIdx.y) * 256 + threadIdx.x, first = int64_t(blockIdx.x) * partial_rows;
  if (c >= C) return;
  const int64_t end = min(N, first + partial_rows);
  float sum = 0;
#pragma unroll 8
  for (int64_t n = first; n < end; ++n) sum += to_float(dout[n * C + c]) * to_float(x[n * C + c]) * rstd[n];
  partial[int64_t(blockIdx.x) * C + c] = sum;
}

inline int64_t partials(int64_t N) { return ceil_div(N, partial_rows); }  // rows of C floats

inline void forward(GpuBase& dev, bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t N, int64_t C,
                    double eps) {
  if (C % width) fail("rmsnorm 03_warp_a_row: C must be a multiple of 8, not ", C);
  launch(dev, norm, unsigned(ceil_div(N, warps)), warps * 32, 0, out, rstd, x, weight, N, C, float(eps));
}
inline void backward(Gpu<bf16>& dev, bf16* dx, float* dweight, float* partial, const bf16* dout, const bf16* x,
                     const bf16* weight, const float* rstd, int64_t N, int64_t C) {
  if (C % width) fail("rmsnorm 03_warp_a_row: C must be a multiple of 8, not ", C);
  launch(dev, norm_gradient, unsigned(ceil_div(N, warps)), warps * 32, 0, dx, dout, x, weight, rstd, N, C);
  launch(dev, weight_partials, dim3(unsigned(partials(N)), unsigned(ceil_div(C, 256))), 256, 0, partial, dout, x, rstd,
         N, C);
  add_partial_rows(dev, Grad<Gpu<bf16>>{dweight, true}, partial, partials(N), C, C);
}

}  // namespace warp_a_row
