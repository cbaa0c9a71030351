// Rung 1: attention as it is defined. Three kernels with the matrix (B*NH, T, T) between them in global memory, in fp32:
// scores = Q K^T / sqrt(HD), P = softmax(scores) in place, O = P V. Only what lies on or below the diagonal is computed.
//
// Predicted: the matrix is written, read and written by the softmax, and read: 4 * 4 bytes of B*NH*T*T/2 elements where
// Q, K, V and O are 8*HD bytes a query of a head. That traffic grows with T*T, and so does the memory: 200 MB at B 4,
// NH 12, T 1024. The products are those that everybody writes first, and slower than the traffic. Of the scores, a
// thread an element: 32 neighbours load 16 bytes of 32 different rows of K, 32 clocks of the load unit for 256
// multiply-adds, 8 a clock of 128. Of the values, two loads a multiply-add, 16 a clock. About 5 TFLOP/s in all.
#pragma once
#include "llmc/attention_tile.cuh"

namespace scores_matrix {
using attention_tile::Sizes;

// scores (B*NH, T, T). A block: 8 queries, 32 keys.
__global__ void scores_kernel(float* scores, const bf16* qk, Sizes size, int HD, float scale) {
  const int key = blockIdx.x * 32 + threadIdx.x, query = blockIdx.y * 8 + threadIdx.y, bh = blockIdx.z;
  const int h = bh % size.NH, kv = h / (size.NH / size.NKV);
  if (query >= size.T || key > query) return;
  const int64_t n0 = int64_t(bh / size.NH) * size.T;  // first row of the sequence
  const bf16* q = qk + (n0 + query) * size.qk_stride + h * HD;
  const bf16* k = qk + (n0 + key) * size.qk_stride + (size.NH + kv) * HD;
  float sum = 0;
  for (int c = 0; c < HD; c += 8) {
    const Pack<bf16> x = *reinterpret_cast<const Pack<bf16>*>(q + c), y = *reinterpret_cast<const Pack<bf16>*>(k + c);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
  }
  scores[(int64_t(bh) * size.T + query) * size.T + key] = sum * scale;
}

// Scores become probabilities; lse (N, NH). A warp a row.
__global__ void softmax_kernel(float* scores, float* lse, Sizes size) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;  // (B*NH, T)
  const int lane = threadIdx.x % 32;
  if (row >= int64_t(size.B) * size.NH * size.T) return;
  const int query = int(row % size.T), bh = int(row / size.T);
  float *s = scores + row * size.T, maximum = -INFINITY, sum = 0;
  for (int key = lane; key <= query; key += 32) maximum = fmaxf(maximum, s[key]);
  maximum = warp_max(maximum);
  for (int key = lane; key <= query; key += 32) sum += __expf(s[key] - maximum);
  sum = warp_sum(sum);
  for (int key = lane; key <= query; key += 32) s[key] = __expf(s[key] - maximum) / sum;
  if (lane == 0) lse[(int64_t(bh / size.NH) * size.T + query) * size.NH + bh % size.NH] = maximum + logf(sum);
}

// o (N, NH*HD). A block: 8 queries, a thread for each column.
__global__ void __launch_bounds__(1024)
    values_kernel(bf16* o, const float* probabilities, const bf16* qkv, Sizes size, int HD) {
  const int query = blockIdx.x * 8 + threadIdx.y, c = threadIdx.x, bh = blockIdx.y;
  const int h = bh % size.NH, kv = h / (size.NH / size.NKV);
  if (query >= size.T) return;
  const int64_t n0 = int64_t(bh / size.NH) * size.T;
  const float* p = probabilities + (int64_t(bh) * size.T + query) * size.T;
  const bf16* v = qkv + n0 * size.qkv_stride + (size.NH + size.NKV + kv) * HD + c;
  float sum = 0;
#pragma unroll 8
  for (int key = 0; key <= query; ++key) sum = fmaf(p[key], to_float(v[key * size.qkv_stride]), sum);
  o[(n0 + query) * size.o_stride + h * HD + c] = from_float<bf16>(sum);
}

inline size_t scratch_bytes(int64_t B, int64_t T, HeadShape heads) {
  return size_t(B * heads.n_head * T * T) * sizeof(float);
}
// HD is a multiple of 32, 128 at most.
inline void attention_forward(Gpu<bf16>& dev, bf16* o, float* lse, void* scratch, const bf16* qk, const bf16* qkv,
                              int64_t B, int64_t T, HeadShape heads) {
  const Sizes size(B, T, heads);
  const int HD = int(heads.head_dim);
  const unsigned BNH = unsigned(B * heads.n_head), eighths = unsigned(ceil_div(T, 8));
  float* matrix = static_cast<float*>(scratch);
  launch(dev, scores_kernel, dim3(unsigned(ceil_div(T, 32)), eighths, BNH), dim3(32, 8), 0, matrix, qk, size, HD,
         float(1 / std::sqrt(double(HD))));
  launch(dev, softmax_kernel, dim3(unsigned(ceil_div(BNH * T, 8))), 256, 0, matrix, lse, size);
  launch(dev, values_kernel, dim3(eighths, BNH), dim3(unsigned(HD), 8), 0, o, matrix, qkv, size, HD);
}

}  // namespace scores_matrix
