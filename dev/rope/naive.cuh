// Variant 1: a block a head of a token, a thread a pair of values (i, i + HD/2); weight gradients by atomics.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/rope.h"

namespace naive {

// What a block works on: head h of token n.
struct Head {
  int64_t n, h, at;  // at: its first value in a row of qkv
  const float *cosine, *sine;
  const bf16* weight;  // of its norm, or null
};
__device__ inline Head head_of(const HeadShape& s, const bf16* q_weight, const bf16* k_weight, const float* table,
                               const int32_t* positions) {
  int64_t H = s.n_head + s.n_kv_head, n = blockIdx.x / H, h = blockIdx.x % H;
  const float* cosine = table + int64_t(positions[n]) * s.head_dim;
  return {
      n, h, n * s.qkv_width() + h * s.head_dim, cosine, cosine + s.head_dim / 2, h < s.n_head ? q_weight : k_weight};
}
// Sum over the threads of a block, whose number need not be a multiple of 32.
__device__ inline float sum_of_block(float v) {
  __shared__ float total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, v);
  __syncthreads();
  return total;
}

__global__ void forward(bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight, const bf16* k_weight,
                        const float* table, const int32_t* positions, HeadShape s, float eps) {
  Head head = head_of(s, q_weight, k_weight, table, positions);
  int64_t half = s.head_dim / 2, i = threadIdx.x;
  float a = to_float(qkv[head.at + i]), b = to_float(qkv[head.at + half + i]);
  if (head.weight) {
    float r = rsqrtf(sum_of_block(a * a + b * b) / float(s.head_dim) + eps);
    a *= r * to_float(head.weight[i]), b *= r * to_float(head.weight[half + i]);
    if (i == 0) rstd[blockIdx.x] = r;
  }
  bf16* y = qk + head.n * s.qk_width() + head.h * s.head_dim;
  y[i] = from_float<bf16>(a * head.cosine[i] - b * head.sine[i]);
  y[half + i] = from_float<bf16>(b * head.cosine[i] + a * head.sine[i]);
}

__global__ void backward(bf16* dqkv, float* dq_weight, float* dk_weight, const bf16* qkv, const float* rstd,
                         const bf16* q_weight, const bf16* k_weight, const float* table, const int32_t* positions,
                         HeadShape s) {
  Head head = head_of(s, q_weight, k_weight, table, positions);
  int64_t half = s.head_dim / 2, i = threadIdx.x;
  bf16 *first = dqkv + head.at + i, *second = first + half;
  float a = to_float(*first), b = to_float(*second);
  float da = a * head.cosine[i] + b * head.sine[i], db = b * head.cosine[i] - a * head.sine[i];
  if (head.weight) {
    float* dw = head.h < s.n_head ? dq_weight : dk_weight;
    float r = rstd[blockIdx.x], wa = to_float(head.weight[i]), wb = to_float(head.weight[half + i]);
    float xa = to_float(qkv[head.at + i]) * r, xb = to_float(qkv[head.at + half + i]) * r;
    atomicAdd(dw + i, da * xa), atomicAdd(dw + half + i, db * xb);
    float mean = sum_of_block(da * wa * xa + db * wb * xb) / float(s.head_dim);
    da = r * (da * wa - xa * mean), db = r * (db * wb - xb * mean);
  }
  *first = from_float<bf16>(da), *second = from_float<bf16>(db);
}

}  // namespace naive
