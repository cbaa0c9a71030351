// Rung 1: the gradients as they are derived, with P = exp(S - lse) and dS = P * (dO V^T - D) / sqrt(HD) as matrices
// (B*NH, T, T) in global memory, in fp32. One kernel writes both, then dQ = dS K, and dK = dS^T Q with dV = P^T dO, each
// sum by a thread of its own: no two threads add to the same number, and the bits are the same every time.
//
// Predicted: both matrices are written, dS is read twice and P once: 5 * 4 bytes of B*NH*T*T/2 elements, 500 MB at B 4,
// NH 12, T 1024, of 400 MB in memory. The products are those that everybody writes first, and slower than that traffic.
// Of the matrices, a thread an element: 32 neighbours load 16 bytes of 32 different rows of K, then of V, 8 multiply-adds
// a clock and multiprocessor of 128. Of the gradients, two loads a multiply-add, 16 a clock. About 5 TFLOP/s.
#pragma once
#include "dev/attention_backward/row_sums.cuh"

namespace scores_matrix {
using attention_tile::Sizes;

__device__ __forceinline__ float dot(const bf16* x, const bf16* y, int HD) {
  float sum = 0;
  for (int c = 0; c < HD; c += 8) {
    const Pack<bf16> u = *reinterpret_cast<const Pack<bf16>*>(x + c), v = *reinterpret_cast<const Pack<bf16>*>(y + c);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(u[i], v[i], sum);
  }
  return sum;
}

// P, dS (B*NH, T, T), on and below the diagonal. A block: 8 queries, 32 keys.
__global__ void matrices_kernel(float* P, float* dS, const float* D, const bf16* dout, const float* lse, const bf16* qk,
                                const bf16* qkv, Sizes size, int HD, float scale) {
  const int key = blockIdx.x * 32 + threadIdx.x, query = blockIdx.y * 8 + threadIdx.y, bh = blockIdx.z;
  const int h = bh % size.NH, kv = h / (size.NH / size.NKV);
  if (query >= size.T || key > query) return;
  const int64_t n0 = int64_t(bh / size.NH) * size.T, n = n0 + query, at = (int64_t(bh) * size.T + query) * size.T + key;
  const float s = dot(qk + n * size.qk_stride + h * HD, qk + (n0 + key) * size.qk_stride + (size.NH + kv) * HD, HD);
  const float dp =
      dot(dout + n * size.o_stride + h * HD, qkv + (n0 + key) * size.qkv_stride + (size.NH + size.NKV + kv) * HD, HD);
  const float p = __expf(s * scale - lse[n * size.NH + h]);
  P[at] = p, dS[at] = p * (dp - D[n * size.NH + h]) * scale;
}

// A block: 8 queries, a thread for each column.
__global__ void __launch_bounds__(1024) dq_kernel(bf16* dqkv, const float* dS, const bf16* qk, Sizes size, int HD) {
  const int query = blockIdx.x * 8 + threadIdx.y, c = threadIdx.x, bh = blockIdx.y;
  const int h = bh % size.NH, kv = h / (size.NH / size.NKV);
  if (query >= size.T) return;
  const int64_t n0 = int64_t(bh / size.NH) * size.T;
  const float* ds = dS + (int64_t(bh) * size.T + query) * size.T;
  const bf16* k = qk + n0 * size.qk_stride + (size.NH + kv) * HD + c;
  float sum = 0;
#pragma unroll 8
  for (int key = 0; key <= query; ++key) sum = fmaf(ds[key], to_float(k[key * size.qk_stride]), sum);
  dqkv[(n0 + query) * size.qkv_stride + h * HD + c] = from_float<bf16>(sum);
}

// A block: 8 keys of a key/value head, a thread for each column; over all query heads of the group.
__global__ void __launch_bounds__(1024)
    dkv_kernel(bf16* dqkv, const float* P, const float* dS, const bf16* dout, const bf16* qk, Sizes size, int HD) {
  const int key = blockIdx.x * 8 + threadIdx.y, c = threadIdx.x, group = size.NH / size.NKV;
  const int b = blockIdx.y / size.NKV, kv = blockIdx.y % size.NKV;
  if (key >= size.T) return;
  const int64_t n0 = int64_t(b) * size.T;
  float dk = 0, dv = 0;
  for (int h = kv * group; h < (kv + 1) * group; ++h) {
    const int64_t matrix = int64_t(b * size.NH + h) * size.T * size.T + key;
    const bf16 *q = qk + n0 * size.qk_stride + h * HD + c, *d_o = dout + n0 * size.o_stride + h * HD + c;
#pragma unroll 4
    for (int query = key; query < size.T; ++query) {
      const int64_t at = matrix + int64_t(query) * size.T;
      dk = fmaf(dS[at], to_float(q[query * size.qk_stride]), dk);
      dv = fmaf(P[at], to_float(d_o[query * size.o_stride]), dv);
    }
  }
  bf16* to = dqkv + (n0 + key) * size.qkv_stride + (size.NH + kv) * HD + c;
  to[0] = from_float<bf16>(dk), to[size.NKV * HD] = from_float<bf16>(dv);
}

inline size_t scratch_bytes(int64_t B, int64_t T, HeadShape heads) {
  return size_t(B * heads.n_head * T * (2 * T + 1)) * sizeof(float);
}
// HD is 64 or 128.
inline void attention_backward(Gpu<bf16>& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o,
                               const float* lse, const bf16* qk, const bf16* qkv, int64_t B, int64_t T,
                               HeadShape heads) {
  const Sizes size(B, T, heads);
  const int HD = int(heads.head_dim);
  const int64_t matrix = B * heads.n_head * T * T;
  float *P = static_cast<float*>(scratch), *dS = P + matrix, *D = dS + matrix;
  const unsigned BNH = unsigned(B * heads.n_head), eighths = unsigned(ceil_div(T, 8));
  row_sums::row_sums(dev, D, dout, o, B * T, heads);
  launch(dev, matrices_kernel, dim3(unsigned(ceil_div(T, 32)), eighths, BNH), dim3(32, 8), 0, P, dS, D, dout, lse, qk,
         qkv, size, HD, float(1 / std::sqrt(double(HD))));
  launch(dev, dq_kernel, dim3(eighths, BNH), dim3(unsigned(HD), 8), 0, dqkv, dS, qk, size, HD);
  launch(dev, dkv_kernel, dim3(eighths, unsigned(B * heads.n_kv_head)), dim3(unsigned(HD), 8), 0, dqkv, P, dS, dout, qk,
         size, HD);
}

}  // namespace scores_matrix
