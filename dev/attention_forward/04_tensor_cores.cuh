// Rung 4: the same tiles on tensor cores (Dao 2023). A block owns 64 queries, each of its 4 warps 16 of them; mma.sync
// multiplies, ldmatrix brings the operands from shared memory, in bf16 as they came. Scores are the C of one product,
// and two neighbouring C, rounded to bf16, have exactly the layout of an A of the next: P never leaves the registers.
// One stage: K and V of a tile are asked for, waited for, and multiplied.
//
// Predicted: 2 operations for each of B*NH*T*T*HD on tensor cores. Every operand of K and V that a warp reads from
// shared memory serves 16 queries: 8 multiply-adds a byte, 128 bytes a clock, so at most 1024 multiply-adds a clock of
// the 2048 that Hopper's tensor cores can do. And an exponential is due for each 2*HD of them, 16 a clock: at HD 64 as
// long as the products at full rate. Within a block nothing overlaps, only blocks do that share a multiprocessor. A
// quarter of the matrix product's rate, a little more at HD 128.
#pragma once
#include "llmc/attention_tile.cuh"

namespace tensor_cores {
using namespace attention_tile;

constexpr int queries = 64, keys = 64, threads = 128;

template <int HD>
constexpr int tile_bytes = 64 * HD * 2;

template <int HD>
__global__ void __launch_bounds__(threads, 3)
    forward_kernel(bf16* o, float* lse, const bf16* qk, const bf16* qkv, Sizes size, float scale_log2) {
  using T = Tile<HD>;
  extern __shared__ uint4 shared_memory[];
  unsigned char* q_tile = reinterpret_cast<unsigned char*>(shared_memory);
  const uint32_t Q = shared_address(q_tile), K = Q + tile_bytes<HD>, V = K + tile_bytes<HD>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row0 = threadIdx.x / 32 * 16;                                             // the warp's first query
  const int last = gridDim.x - 1 - blockIdx.x, q0 = last * queries, bh = blockIdx.y;  // blocks with most keys begin
  const int h = bh % size.NH, kv = h / (size.NH / size.NKV);
  const int64_t n0 = int64_t(bh / size.NH) * size.T;
  const bf16* k = qk + n0 * size.qk_stride + (size.NH + kv) * HD;
  const bf16* v = qkv + n0 * size.qkv_stride + (size.NH + size.NKV + kv) * HD;

  T::template load<queries, threads>(Q, qk + (n0 + q0) * size.qk_stride + h * HD, int(size.qk_stride), size.T - q0,
                                     threadIdx.x);

  // Of its rows g and g + 8 a lane has the columns 2*t and 2*t + 1 of every 8; the four lanes of a row agree on the
  // maximum, and each sums its own columns until the end.
  float out[1][HD / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int step = 0; step <= last; ++step) {
    const int k0 = step * keys;
    __syncthreads();  // the tile before has been read
    T::template load<keys, threads>(K, k + k0 * size.qk_stride, int(size.qk_stride), size.T - k0, threadIdx.x);
    T::template load<keys, threads>(V, v + k0 * size.qkv_stride, int(size.qkv_stride), size.T - k0, threadIdx.x);
    wait_copies();
    __syncthreads();

    float s[keys / 8][4] = {};
    const LaneView<HD, true> q_view(Q + row0 * T::row_bytes, lane);
    const LaneView<HD, false> k_view(K, lane);
#pragma unroll
    for (int d = 0; d < HD / 16; ++d) {
      uint32_t q[4];
      load_matrices<false>(q, q_view.at(0, 2 * d));
#pragma unroll
      for (int n = 0; n < keys / 16; ++n) {
        uint32_t kk[4];
        load_matrices<false>(kk, k_view.at(16 * n, 2 * d));
        multiply_add(s[2 * n], q, kk[0], kk[1]);
        multiply_add(s[2 * n + 1], q, kk[2], kk[3]);
      }
    }
    if (step == last)  // the diagonal's tile
#pragma unroll
      for (int n = 0; n < keys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (8 * n + 2 * t + e % 2 > row0 + 8 * (e / 2) + g) s[n][e] = -INFINITY;

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < keys / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      largest = fmaxf(maximum[r], largest * scale_log2);  // key 0 is visible to all: finite
      const float correction = exp2_of(maximum[r] - largest);
      maximum[r] = largest, sum[r] *= correction;
#pragma unroll
      for (int n = 0; n < keys / 8; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[n][e] = exp2_of(fmaf(s[n][e], scale_log2, -largest));
          sum[r] += s[n][e];
        }
#pragma unroll
      for (int n = 0; n < HD / 8; ++n) out[0][n][2 * r] *= correction, out[0][n][2 * r + 1] *= correction;
    }

    const LaneView<HD, true> v_view(V, lane);
#pragma unroll
    for (int n = 0; n < keys / 16; ++n) {
      uint32_t p[4];
      as_operand(p, s[2 * n], s[2 * n + 1]);
#pragma unroll
      for (int d = 0; d < HD / 16; ++d) {
        uint32_t vv[4];
        load_matrices<true>(vv, v_view.at(16 * n, 2 * d));
        multiply_add(out[0][2 * d], p, vv[0], vv[1]);
        multiply_add(out[0][2 * d + 1], p, vv[2], vv[3]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const float inverse = 1 / sum[r];
#pragma unroll
    for (int n = 0; n < HD / 8; ++n) out[0][n][2 * r] *= inverse, out[0][n][2 * r + 1] *= inverse;
    const int query = q0 + row0 + 8 * r + g;
    if (t == 0 && query < size.T) lse[(n0 + query) * size.NH + h] = (maximum[r] + log2f(sum[r])) * ln_2;
  }
  // Only this warp reads its rows of Q: they make room for its rows of O.
  store_rows<HD, 1>(o + (n0 + q0 + row0) * size.o_stride + h * HD, size.o_stride, size.T - q0 - row0, out, q_tile, row0,
                    lane);
}

// HD is 64 or 128.
inline void attention_forward(Gpu<bf16>& dev, bf16* o, float* lse, void*, const bf16* qk, const bf16* qkv, int64_t B,
                              int64_t T, HeadShape heads) {
  const bool narrow = heads.head_dim == 64;
  launch(dev, narrow ? forward_kernel<64> : forward_kernel<128>,
         dim3(unsigned(ceil_div(T, queries)), unsigned(B * heads.n_head)), threads,
         3 * (narrow ? tile_bytes<64> : tile_bytes<128>), o, lse, qk, qkv, Sizes(B, T, heads),
         float(log2_e / std::sqrt(double(heads.head_dim))));
}

}  // namespace tensor_cores
