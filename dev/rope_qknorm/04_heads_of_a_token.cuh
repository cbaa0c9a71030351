// Rung 4, beyond production: what the heads of a token share is loaded once. As in production a group of HD/16 lanes
// takes a head, 16 bytes a lane of each half. But here a group takes several heads of one token, and keeps in registers
// the cosines, sines and weights that are the same for all of them: queries and keys apart, so that there is one
// weight.
//
// Predicted: 2M bytes forward and 3M backward with QK-norm, 2M without (M = 2N(NH+NKV)HD), as production. What changes
// is the traffic inside a multiprocessor. A head is 2HD bytes in and 2HD out; production fetches 4HD bytes of table and
// 2HD of weights for it, in loads of a value at a time: 32 of them a lane beside 4 loads and stores of data. Here a
// load is 16 bytes, and one set of them does for four heads, or backward for all heads of a kind. What binds then
// should be memory.
//   backward: as many blocks as an H100 holds at a time, 396, each with its range of tokens. So the weights' gradients
// are 396 rows of partial sums instead of N/32, and the kernel that adds these up, of few blocks and long loops, is
// short. The order of all sums is fixed: the same bits every time.
//
// Sizes: HD/16 a power of two, at most 32.
#pragma once
#include <algorithm>

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_reduce.cuh"
#include "llmc/rope.h"

namespace heads_of_a_token {

constexpr int threads = 128;
constexpr int resident = 3, most_blocks = 132 * resident;  // backward: blocks of a multiprocessor, and of an H100
constexpr int forward_batch = 4, backward_batch = 2;       // heads whose loads are on their way together
using Chunk = Pack<bf16>;

// Eight neighbouring values.
struct Eight {
  float v[8];
  __device__ __forceinline__ void load(const float* p) {
    const float4 low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }
};
__device__ __forceinline__ Chunk chunk_at(const bf16* p) { return *reinterpret_cast<const Chunk*>(p); }

__device__ __forceinline__ float group_sum(float v, int lanes) {
  for (int step = lanes / 2; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// A block: 128/lanes tokens, up to four heads of each, all queries or all keys.
template <bool norm>
__global__ void __launch_bounds__(threads)
    norm_rotate(bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight, const bf16* k_weight, const float* angles,
                const int32_t* positions, int64_t N, HeadShape s, float eps, int lanes) {
  const int HD = int(s.head_dim), half = HD / 2, H = int(s.n_head + s.n_kv_head), c = int(threadIdx.x) % lanes * 8;
  const unsigned q_batches = unsigned(ceil_div(s.n_head, forward_batch)),
                 batches = q_batches + unsigned(ceil_div(s.n_kv_head, forward_batch)), batch = blockIdx.x % batches;
  const bool query = batch < q_batches;
  const int first = query ? int(batch) * forward_batch : int(s.n_head) + int(batch - q_batches) * forward_batch,
            heads = min(forward_batch, (query ? int(s.n_head) : H) - first);
  const int64_t n = int64_t(blockIdx.x / batches) * (threads / lanes) + threadIdx.x / lanes;
  const bool live = n < N;  // no early return: the lanes of a warp sum together

  Chunk low[forward_batch] = {}, high[forward_batch] = {};
  Eight cosine = {}, sine = {};
  if (live) {
    const bf16* x = qkv + n * s.qkv_width() + first * HD + c;
#pragma unroll
    for (int i = 0; i < forward_batch; ++i)
      if (i < heads) low[i] = chunk_at(x + i * HD), high[i] = chunk_at(x + i * HD + half);
    const float* row = angles + int64_t(positions[n]) * HD;
    cosine.load(row + c), sine.load(row + half + c);
  }
  Chunk low_weight, high_weight;
  if constexpr (norm) {
    const bf16* w = query ? q_weight : k_weight;
    low_weight = chunk_at(w + c), high_weight = chunk_at(w + half + c);
  }
  bf16* y = qk + n * s.qk_width() + first * HD + c;
#pragma unroll
  for (int i = 0; i < forward_batch; ++i) {
    if (i >= heads) break;
    float r = 1;
    if constexpr (norm) {
      float squares = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) squares += low[i][j] * low[i][j] + high[i][j] * high[i][j];
      r = 1.0f / sqrtf(group_sum(squares, lanes) / float(HD) + eps);
      if (live && c == 0) rstd[n * H + first + i] = r;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float a = low[i][j], b = high[i][j];
      if constexpr (norm) a *= r * low_weight[j], b *= r * high_weight[j];
      low[i].set(j, a * cosine.v[j] - b * sine.v[j]), high[i].set(j, b * cosine.v[j] + a * sine.v[j]);
    }
    if (live) {
      *reinterpret_cast<Chunk*>(y + i * HD) = low[i];
      *reinterpret_cast<Chunk*>(y + i * HD + half) = high[i];
    }
  }
}

// A block: a range of tokens, first their queries, then their keys, a token a group at a time. partial (2, blocks, HD):
// the gradients of both weights over the tokens of a block.
template <bool norm>
__global__ void __launch_bounds__(threads, resident)
    norm_rotate_backward(bf16* dqkv, float* partial, const bf16* qkv, const float* rstd, const bf16* q_weight,
                         const bf16* k_weight, const float* angles, const int32_t* positions, int64_t N, HeadShape s,
                         int64_t tokens, int lanes) {
  __shared__ float sums[threads * 16];  // (groups, HD)
  const int HD = int(s.head_dim), half = HD / 2, H = int(s.n_head + s.n_kv_head), c = int(threadIdx.x) % lanes * 8;
  const int groups = threads / lanes, group = int(threadIdx.x) / lanes;
  const int64_t begin = blockIdx.x * tokens, end = min(begin + tokens, N);
  for (int kind = 0; kind < 2; ++kind) {
    const int first_head = kind ? int(s.n_head) : 0, end_head = kind ? H : int(s.n_head);
    Chunk low_weight = {}, high_weight = {};
    float low_sum[8] = {}, high_sum[8] = {};  // of the weight's gradient
    if constexpr (norm) {
      const bf16* w = kind ? k_weight : q_weight;
      low_weight = chunk_at(w + c), high_weight = chunk_at(w + half + c);
    }
    for (int64_t n0 = begin; n0 < end; n0 += groups) {
      const int64_t n = n0 + group;
      const bool live = n < end;
      Eight cosine = {}, sine = {};
      if (live) {
        const float* row = angles + int64_t(positions[n]) * HD;
        cosine.load(row + c), sine.load(row + half + c);
      }
      for (int h = first_head; h < end_head; h += backward_batch) {
        const int64_t at = n * s.qkv_width() + h * HD + c;
        Chunk low[backward_batch] = {}, high[backward_batch] = {};  // of the gradient
        Chunk low_x[backward_batch] = {}, high_x[backward_batch] = {};
        float r[backward_batch] = {};
#pragma unroll
        for (int i = 0; i < backward_batch; ++i) {
          if (!live || h + i >= end_head) continue;
          low[i] = chunk_at(dqkv + at + i * HD), high[i] = chunk_at(dqkv + at + i * HD + half);
          if constexpr (norm) {
            low_x[i] = chunk_at(qkv + at + i * HD), high_x[i] = chunk_at(qkv + at + i * HD + half);
            r[i] = rstd[n * H + h + i];
          }
        }
#pragma unroll
        for (int i = 0; i < backward_batch; ++i) {
          float da[8], db[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) {  // the inverse rotation
            da[j] = low[i][j] * cosine.v[j] + high[i][j] * sine.v[j];
            db[j] = high[i][j] * cosine.v[j] - low[i][j] * sine.v[j];
          }
          if constexpr (norm) {
            float dot = 0;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              const float a = low_x[i][j] * r[i], b = high_x[i][j] * r[i];
              low_sum[j] += da[j] * a, high_sum[j] += db[j] * b;
              da[j] *= low_weight[j], db[j] *= high_weight[j];
              dot += da[j] * a + db[j] * b;
            }
            const float mean = group_sum(dot, lanes) / float(HD);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              da[j] = r[i] * (da[j] - low_x[i][j] * r[i] * mean);
              db[j] = r[i] * (db[j] - high_x[i][j] * r[i] * mean);
            }
          }
          if (!live || h + i >= end_head) continue;
#pragma unroll
          for (int j = 0; j < 8; ++j) low[i].set(j, da[j]), high[i].set(j, db[j]);
          *reinterpret_cast<Chunk*>(dqkv + at + i * HD) = low[i];
          *reinterpret_cast<Chunk*>(dqkv + at + i * HD + half) = high[i];
        }
      }
    }
    if constexpr (norm) {
      __syncthreads();  // the sums of the queries have been read
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[group * HD + c + j] = low_sum[j];
        sums[group * HD + half + c + j] = high_sum[j];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < HD; i += threads) {
        float sum = 0;
        for (int g = 0; g < groups; ++g) sum += sums[g * HD + i];
        partial[(int64_t(kind) * gridDim.x + blockIdx.x) * HD + i] = sum;
      }
    }
  }
}

inline int lanes_of(const HeadShape& s) {
  const int64_t lanes = s.head_dim / 16;
  if (s.head_dim % 16 || lanes > 32 || (lanes & (lanes - 1)))
    fail("rope_qknorm 04_heads_of_a_token: heads of ", s.head_dim, " values");
  return int(lanes);
}

inline void forward(GpuBase& dev, bf16* qk, float* rstd, const bf16* qkv, const bf16* q_weight, const bf16* k_weight,
                    const float* angles, const int32_t* positions, int64_t N, HeadShape s, double eps) {
  const int lanes = lanes_of(s);
  const int64_t batches = ceil_div(s.n_head, forward_batch) + ceil_div(s.n_kv_head, forward_batch);
  const auto blocks = unsigned(ceil_div(N, threads / lanes) * batches);
  launch(dev, q_weight ? norm_rotate<true> : norm_rotate<false>, blocks, threads, 0, qk, rstd, qkv, q_weight, k_weight,
         angles, positions, N, s, float(eps), lanes);
}

// Tokens of a block: at least two rounds of its groups.
inline int64_t tokens_of_block(int64_t N, const HeadShape& s) {
  return std::max<int64_t>(ceil_div(N, most_blocks), 2 * (threads / lanes_of(s)));
}
// Floats of `partial`.
inline int64_t scratch_size(int64_t N, const HeadShape& s) {
  return 2 * ceil_div(N, tokens_of_block(N, s)) * s.head_dim;
}
inline void backward(Gpu<bf16>& dev, bf16* dqkv, Grad<Gpu<bf16>> dq_weight, Grad<Gpu<bf16>> dk_weight, float* partial,
                     const bf16* qkv, const float* rstd, const bf16* q_weight, const bf16* k_weight,
                     const float* angles, const int32_t* positions, int64_t N, HeadShape s) {
  const int64_t tokens = tokens_of_block(N, s), blocks = ceil_div(N, tokens), HD = s.head_dim;
  launch(dev, q_weight ? norm_rotate_backward<true> : norm_rotate_backward<false>, unsigned(blocks), threads, 0, dqkv,
         partial, qkv, rstd, q_weight, k_weight, angles, positions, N, s, tokens, lanes_of(s));
  if (!q_weight) return;
  add_partial_rows(dev, dq_weight, partial, blocks, HD, HD);
  add_partial_rows(dev, dk_weight, partial + blocks * HD, blocks, HD, HD);
}

}  // namespace heads_of_a_token
