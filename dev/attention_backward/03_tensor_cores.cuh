// Rung 3: tensor cores, and no atomics. Two kernels: one owns keys and walks over queries for dK and dV, the other owns
// queries and walks over keys for dQ. Every sum stays in the registers of one warp from beginning to end, in a fixed
// order: the same bits every time. The price is S and dP twice: seven products instead of five.
//
// In each kernel a warp has 16 of the rows that its block owns, and the other side comes in tiles: of 32 queries or of
// 64 keys, as dK and dV together take twice the registers of dQ. The first kernel computes S^T and dP^T, keys down and
// queries across, so that P^T and dS^T are, rounded to bf16, at once the A operands of P^T dO and dS^T Q; the second
// computes S and dP, and dS is the A operand of dS K.
// One stage: a tile is asked for, waited for, and multiplied.
//
// Predicted: 7 * B*NH*T*T*HD operations on tensor cores. As in the forward rung, an operand that a warp reads from shared
// memory serves 16 rows, which gives at most 1024 multiply-adds a clock of 2048, and nothing overlaps within a block: a
// quarter to a third of a matrix product's rate, of which two sevenths are work done twice.
#pragma once
#include "dev/attention_backward/row_sums.cuh"

namespace tensor_cores {
using namespace attention_tile;

constexpr int owned = 64, threads = 128;  // rows of a block, 16 a warp

// c (16, across) += 16 rows of tile a, from `row` on, times the rows of tile b, transposed
template <int HD, int across>
__device__ __forceinline__ void multiply_rows(float (&c)[across / 8][4], uint32_t a, int row, uint32_t b, int lane) {
  const LaneView<HD, true> a_view(a + row * Tile<HD>::row_bytes, lane);
  const LaneView<HD, false> b_view(b, lane);
#pragma unroll
  for (int d = 0; d < HD / 16; ++d) {
    uint32_t x[4];
    load_matrices<false>(x, a_view.at(0, 2 * d));
#pragma unroll
    for (int n = 0; n < across / 16; ++n) {
      uint32_t y[4];
      load_matrices<false>(y, b_view.at(16 * n, 2 * d));
      multiply_add(c[2 * n], x, y[0], y[1]);
      multiply_add(c[2 * n + 1], x, y[2], y[3]);
    }
  }
}
// c (16, HD) += a (16, across), a result rounded to bf16, times the rows of tile b
template <int HD, int across>
__device__ __forceinline__ void multiply_columns(float (&c)[HD / 8][4], const float (&a)[across / 8][4], uint32_t b,
                                                 int lane) {
  const LaneView<HD, true> b_view(b, lane);
#pragma unroll
  for (int n = 0; n < across / 16; ++n) {
    uint32_t x[4];
    as_operand(x, a[2 * n], a[2 * n + 1]);
#pragma unroll
    for (int d = 0; d < HD / 16; ++d) {
      uint32_t y[4];
      load_matrices<true>(y, b_view.at(16 * n, 2 * d));
      multiply_add(c[2 * d], x, y[0], y[1]);
      multiply_add(c[2 * d + 1], x, y[2], y[3]);
    }
  }
}

// ---- dK and dV: a block owns 64 keys of a key/value head ----

template <int HD>
struct KeyShape {
  static constexpr int queries = 32;
  static constexpr int k_bytes = owned * HD * 2, q_bytes = queries * HD * 2;
  static constexpr int shared_bytes = 2 * k_bytes + 2 * q_bytes + 2 * queries * 4;  // K, V, Q, dO, lse, D
};

template <int HD>
__global__ void __launch_bounds__(threads, HD == 64 ? 3 : 2)
    dkv_kernel(bf16* dqkv, const float* D, const bf16* dout, const float* lse, const bf16* qk, const bf16* qkv,
               Sizes size, float scale) {
  using T = Tile<HD>;
  using Shape = KeyShape<HD>;
  constexpr int queries = Shape::queries;
  extern __shared__ uint4 shared_memory[];
  unsigned char* memory = reinterpret_cast<unsigned char*>(shared_memory);
  const uint32_t K = shared_address(memory), V = K + Shape::k_bytes, Q = V + Shape::k_bytes, dO = Q + Shape::q_bytes;
  float* lse2_row = reinterpret_cast<float*>(memory + 2 * (Shape::k_bytes + Shape::q_bytes));  // in units of log2
  float* D_row = lse2_row + queries;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, key0 = threadIdx.x / 32 * 16;  // the warp's first key
  const int k0 = blockIdx.x * owned, b = blockIdx.y / size.NKV, kv = blockIdx.y % size.NKV, group = size.NH / size.NKV;
  const int64_t n0 = int64_t(b) * size.T;
  T::template load<owned, threads>(K, qk + (n0 + k0) * size.qk_stride + (size.NH + kv) * HD, int(size.qk_stride),
                                   size.T - k0, threadIdx.x);
  T::template load<owned, threads>(V, qkv + (n0 + k0) * size.qkv_stride + (size.NH + size.NKV + kv) * HD,
                                   int(size.qkv_stride), size.T - k0, threadIdx.x);

  float dk[1][HD / 8][4] = {}, dv[1][HD / 8][4] = {};
  for (int h = kv * group; h < (kv + 1) * group; ++h)
    for (int q0 = k0; q0 < size.T; q0 += queries) {
      __syncthreads();  // the tiles of the step before have been read
      const int64_t n = n0 + q0;
      T::template load<queries, threads>(Q, qk + n * size.qk_stride + h * HD, int(size.qk_stride), size.T - q0,
                                         threadIdx.x);
      T::template load<queries, threads>(dO, dout + n * size.o_stride + h * HD, int(size.o_stride), size.T - q0,
                                         threadIdx.x);
      if (threadIdx.x < queries) {  // past the end lse is infinite: P and dS are 0
        const bool inside = q0 + int(threadIdx.x) < size.T;
        const int64_t at = (n + threadIdx.x) * size.NH + h;
        lse2_row[threadIdx.x] = inside ? lse[at] * log2_e : INFINITY;
        D_row[threadIdx.x] = inside ? D[at] : 0;
      }
      wait_copies();
      __syncthreads();
      if (q0 + queries <= k0 + key0) continue;  // all of these queries come before the warp's keys

      float p[queries / 8][4] = {}, ds[queries / 8][4] = {};
      multiply_rows<HD, queries>(p, K, key0, Q, lane);
      multiply_rows<HD, queries>(ds, V, key0, dO, lane);  // dP so far
      const bool diagonal = q0 < k0 + owned;
#pragma unroll
      for (int i = 0; i < queries / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int query = 8 * i + 2 * t + e % 2, key = key0 + 8 * (e / 2) + g;
          p[i][e] = exp2_of(fmaf(p[i][e], scale * log2_e, -lse2_row[query]));
          if (diagonal && k0 + key > q0 + query) p[i][e] = 0;
          ds[i][e] = p[i][e] * (ds[i][e] - D_row[query]) * scale;
        }
      multiply_columns<HD, queries>(dv[0], p, dO, lane);
      multiply_columns<HD, queries>(dk[0], ds, Q, lane);
    }
  // Only this warp reads its rows of K and V: they make room for its rows of dK and dV.
  bf16* to = dqkv + (n0 + k0 + key0) * size.qkv_stride + (size.NH + kv) * HD;
  store_rows<HD, 1>(to, size.qkv_stride, size.T - k0 - key0, dk, memory, key0, lane);
  store_rows<HD, 1>(to + size.NKV * HD, size.qkv_stride, size.T - k0 - key0, dv, memory + Shape::k_bytes, key0, lane);
}

// ---- dQ: a block owns 64 queries of a head ----

template <int HD>
struct QueryShape {
  static constexpr int keys = 64;
  static constexpr int q_bytes = owned * HD * 2, k_bytes = keys * HD * 2;
  static constexpr int shared_bytes = 2 * q_bytes + 2 * k_bytes;  // Q, dO, K, V
};

template <int HD>
__global__ void __launch_bounds__(threads, HD == 64 ? 3 : 2)
    dq_kernel(bf16* dqkv, const float* D, const bf16* dout, const float* lse, const bf16* qk, const bf16* qkv,
              Sizes size, float scale) {
  using T = Tile<HD>;
  using Shape = QueryShape<HD>;
  constexpr int keys = Shape::keys;
  static_assert(keys == owned);  // the last tile is the diagonal's
  extern __shared__ uint4 shared_memory[];
  unsigned char* memory = reinterpret_cast<unsigned char*>(shared_memory);
  const uint32_t Q = shared_address(memory), dO = Q + Shape::q_bytes, K = dO + Shape::q_bytes, V = K + Shape::k_bytes;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4,
            row0 = threadIdx.x / 32 * 16;                                           // the warp's first query
  const int last = gridDim.x - 1 - blockIdx.x, q0 = last * owned, bh = blockIdx.y;  // blocks with most keys begin
  const int h = bh % size.NH, kv = h / (size.NH / size.NKV);
  const int64_t n0 = int64_t(bh / size.NH) * size.T;
  const bf16* k = qk + n0 * size.qk_stride + (size.NH + kv) * HD;
  const bf16* v = qkv + n0 * size.qkv_stride + (size.NH + size.NKV + kv) * HD;
  T::template load<owned, threads>(Q, qk + (n0 + q0) * size.qk_stride + h * HD, int(size.qk_stride), size.T - q0,
                                   threadIdx.x);
  T::template load<owned, threads>(dO, dout + (n0 + q0) * size.o_stride + h * HD, int(size.o_stride), size.T - q0,
                                   threadIdx.x);
  float lse2[2], row_D[2];  // of the lane's rows
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = q0 + row0 + 8 * r + g;
    const int64_t at = (n0 + query) * size.NH + h;
    lse2[r] = query < size.T ? lse[at] * log2_e : INFINITY, row_D[r] = query < size.T ? D[at] : 0;
  }

  float dq[1][HD / 8][4] = {};
  for (int step = 0; step <= last; ++step) {
    const int k0 = step * keys;
    __syncthreads();  // the tiles of the step before have been read
    T::template load<keys, threads>(K, k + k0 * size.qk_stride, int(size.qk_stride), size.T - k0, threadIdx.x);
    T::template load<keys, threads>(V, v + k0 * size.qkv_stride, int(size.qkv_stride), size.T - k0, threadIdx.x);
    wait_copies();
    __syncthreads();
    float p[keys / 8][4] = {}, ds[keys / 8][4] = {};
    multiply_rows<HD, keys>(p, Q, row0, K, lane);
    multiply_rows<HD, keys>(ds, dO, row0, V, lane);  // dP so far
#pragma unroll
    for (int i = 0; i < keys / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float value = exp2_of(fmaf(p[i][e], scale * log2_e, -lse2[e / 2]));
        const bool hidden = step == last && 8 * i + 2 * t + e % 2 > row0 + 8 * (e / 2) + g;
        ds[i][e] = hidden ? 0 : value * (ds[i][e] - row_D[e / 2]) * scale;
      }
    multiply_columns<HD, keys>(dq[0], ds, K, lane);
  }
  // Only this warp reads its rows of Q: they make room for its rows of dQ.
  store_rows<HD, 1>(dqkv + (n0 + q0 + row0) * size.qkv_stride + h * HD, size.qkv_stride, size.T - q0 - row0, dq, memory,
                    row0, lane);
}

inline size_t scratch_bytes(int64_t B, int64_t T, HeadShape heads) {
  return size_t(B * T * heads.n_head) * sizeof(float);
}
// HD is 64 or 128.
inline void attention_backward(Gpu<bf16>& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o,
                               const float* lse, const bf16* qk, const bf16* qkv, int64_t B, int64_t T,
                               HeadShape heads) {
  const bool narrow = heads.head_dim == 64;
  const Sizes size(B, T, heads);
  const float scale = float(1 / std::sqrt(double(heads.head_dim)));
  const unsigned blocks = unsigned(ceil_div(T, owned));
  float* D = static_cast<float*>(scratch);
  row_sums::row_sums(dev, D, dout, o, B * T, heads);
  launch(dev, narrow ? dkv_kernel<64> : dkv_kernel<128>, dim3(blocks, unsigned(B * heads.n_kv_head)), threads,
         narrow ? KeyShape<64>::shared_bytes : KeyShape<128>::shared_bytes, dqkv, D, dout, lse, qk, qkv, size, scale);
  launch(dev, narrow ? dq_kernel<64> : dq_kernel<128>, dim3(blocks, unsigned(B * heads.n_head)), threads,
         narrow ? QueryShape<64>::shared_bytes : QueryShape<128>::shared_bytes, dqkv, D, dout, lse, qk, qkv, size,
         scale);
}

}  // namespace tensor_cores
