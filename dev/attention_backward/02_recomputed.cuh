// Rung 2: no matrix. lse, one number a query, is enough to compute P again where it is needed. A block owns 64 keys of a
// key/value head and walks over the queries that see them, 64 at a time: S and dP of the tile from shared memory, P and
// dS back into it, dV += P^T dO and dK += dS^T Q in registers. dQ sums over keys, hence over blocks: they add their
// shares with atomics, in fp32, in whatever order they come. The bits differ from run to run.
//
// Predicted: five products instead of the forward pass's two, 5 * B*NH*T*T*HD operations, 60 TFLOP/s on the CUDA cores.
// Before them comes shared memory: with 4 x 4 results a thread, 8 loads of 16 bytes for 64 multiply-adds, 32 clocks of
// the load unit to 16 of the FMA units: at best half, and 15 to 20 TFLOP/s with what does not overlap. Atomics, one for
// each 64 multiply-adds of dQ, are too few to matter here; the buffer of dQ is zeroed and read, 8*N*NH*HD bytes more.
#pragma once
#include "dev/attention_backward/row_sums.cuh"

namespace recomputed {
using namespace attention_tile;

constexpr int rows = 64, threads = 256;  // rows of every tile, queries or keys

// Padding of 4 floats: eight threads that read 16 bytes each of eight rows hit all 32 banks once.
template <int HD>
struct Tiles {
  float q[rows][HD + 4], d_o[rows][HD + 4], k[rows][HD + 4], v[rows][HD + 4];
  float p[rows][rows + 4], ds[rows][rows + 4];  // queries down, keys across
  float lse2[rows], D[rows];                    // lse in units of log2
};

__device__ __forceinline__ void read_four(float (&v)[4], const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

// 64 rows, `stride` elements apart; zeros from row `valid` on.
template <int HD>
__device__ __forceinline__ void fill(float (&tile)[rows][HD + 4], const bf16* from, int64_t stride, int valid) {
#pragma unroll 1  // registers are short
  for (int i = threadIdx.x; i < rows * HD / 8; i += threads) {
    const int row = i / (HD / 8), c = i % (HD / 8) * 8;
    Pack<bf16> x = {};
    if (row < valid) x = *reinterpret_cast<const Pack<bf16>*>(from + row * stride + c);
    float4* to = reinterpret_cast<float4*>(&tile[row][c]);
    to[0] = {x[0], x[1], x[2], x[3]};
    to[1] = {x[4], x[5], x[6], x[7]};
  }
}

// c += rows y + 16*i of a times rows x + 16*j of b
template <int HD>
__device__ __forceinline__ void multiply_rows(float (&c)[4][4], const float (&a)[rows][HD + 4],
                                              const float (&b)[rows][HD + 4], int y, int x) {
#pragma unroll 2
  for (int d = 0; d < HD; d += 4) {
    float u[4][4], v[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) read_four(u[i], &a[y + 16 * i][d]), read_four(v[i], &b[x + 16 * i][d]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[i][j] = fmaf(u[i][e], v[j][e], c[i][j]);
  }
}

// c (4, HD/16) += four weights times columns 64*j + 4*x + 0 ... 3 of a row
template <int HD>
__device__ __forceinline__ void add_row(float (&c)[4][HD / 16], const float (&weights)[4], const float* row, int x) {
#pragma unroll
  for (int j = 0; j < HD / 64; ++j) {
    float v[4];
    read_four(v, row + 64 * j + 4 * x);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][4 * j + e] = fmaf(weights[i], v[e], c[i][4 * j + e]);
  }
}

// dq (N, NH*HD) += ; the rest of dqkv is written. Thread (y, x) of 16 x 16 has of S, dP and dQ the queries y + 16*i, of dK
// and dV the keys 4*y + i; of S and dP the keys x + 16*j, of the gradients the columns 64*j + 4*x + 0 ... 3.
template <int HD>
__global__ void __launch_bounds__(threads, HD == 64 ? 2 : 1)
    backward_kernel(bf16* dqkv, float* dq_sum, const float* D, const bf16* dout, const float* lse, const bf16* qk,
                    const bf16* qkv, Sizes size, float scale) {
  extern __shared__ uint4 shared_memory[];
  Tiles<HD>& tile = *reinterpret_cast<Tiles<HD>*>(shared_memory);
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int k0 = blockIdx.x * rows, b = blockIdx.y / size.NKV, kv = blockIdx.y % size.NKV, group = size.NH / size.NKV;
  const int64_t n0 = int64_t(b) * size.T;
  fill<HD>(tile.k, qk + (n0 + k0) * size.qk_stride + (size.NH + kv) * HD, size.qk_stride, size.T - k0);
  fill<HD>(tile.v, qkv + (n0 + k0) * size.qkv_stride + (size.NH + size.NKV + kv) * HD, size.qkv_stride, size.T - k0);

  float dk[4][HD / 16] = {}, dv[4][HD / 16] = {};
  for (int h = kv * group; h < (kv + 1) * group; ++h)
    for (int q0 = k0; q0 < size.T; q0 += rows) {
      __syncthreads();  // the tiles of the step before have been read
      const int64_t n = n0 + q0;
      fill<HD>(tile.q, qk + n * size.qk_stride + h * HD, size.qk_stride, size.T - q0);
      fill<HD>(tile.d_o, dout + n * size.o_stride + h * HD, size.o_stride, size.T - q0);
      if (threadIdx.x < rows) {  // past the end lse is infinite: P and dS are 0
        const bool inside = q0 + int(threadIdx.x) < size.T;
        const int64_t at = (n + threadIdx.x) * size.NH + h;
        tile.lse2[threadIdx.x] = inside ? lse[at] * log2_e : INFINITY;
        tile.D[threadIdx.x] = inside ? D[at] : 0;
      }
      __syncthreads();
      float s[4][4] = {}, dp[4][4] = {};
      multiply_rows<HD>(s, tile.q, tile.k, y, x);
      multiply_rows<HD>(dp, tile.d_o, tile.v, y, x);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int query = y + 16 * i, key = x + 16 * j;
          const bool visible = k0 + key <= q0 + query;
          const float p = visible ? exp2_of(fmaf(s[i][j], scale * log2_e, -tile.lse2[query])) : 0;
          tile.p[query][key] = p, tile.ds[query][key] = p * (dp[i][j] - tile.D[query]) * scale;
        }
      __syncthreads();
#pragma unroll 2
      for (int query = 0; query < rows; ++query) {
        float p[4], ds[4];
        read_four(p, &tile.p[query][4 * y]), read_four(ds, &tile.ds[query][4 * y]);
        add_row<HD>(dv, p, tile.d_o[query], x), add_row<HD>(dk, ds, tile.q[query], x);
      }
      float dq[4][HD / 16] = {};
#pragma unroll 2
      for (int key = 0; key < rows; key += 4) {
        float ds[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) read_four(ds[i], &tile.ds[y + 16 * i][key]);
#pragma unroll
        for (int e = 0; e < 4; ++e) add_row<HD>(dq, {ds[0][e], ds[1][e], ds[2][e], ds[3][e]}, tile.k[key + e], x);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = q0 + y + 16 * i;
        float* to = dq_sum + (n0 + query) * size.o_stride + h * HD + 4 * x;
        if (query < size.T)
#pragma unroll
          for (int c = 0; c < HD / 16; ++c) atomicAdd(to + c / 4 * 64 + c % 4, dq[i][c]);
      }
    }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = k0 + 4 * y + i;
    bf16* to = dqkv + (n0 + key) * size.qkv_stride + (size.NH + kv) * HD + 4 * x;
    if (key < size.T)
#pragma unroll
      for (int j = 0; j < HD / 64; ++j) {
        const float *a = &dk[i][4 * j], *c = &dv[i][4 * j];
        *reinterpret_cast<uint2*>(to + 64 * j) = {pack_bf16(a[0], a[1]), pack_bf16(a[2], a[3])};
        *reinterpret_cast<uint2*>(to + size.NKV * HD + 64 * j) = {pack_bf16(c[0], c[1]), pack_bf16(c[2], c[3])};
      }
  }
}

// The first part of dqkv's rows from dq (N, width), four columns a thread.
__global__ void round_kernel(bf16* dqkv, const float* dq, int64_t N, int width, int64_t qkv_stride) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i >= N * width) return;
  const float4 v = *reinterpret_cast<const float4*>(dq + i);
  *reinterpret_cast<uint2*>(dqkv + i / width * qkv_stride + i % width) = {pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)};
}

// Of shared memory, for a block.
inline size_t shared_bytes(int64_t HD) { return HD == 64 ? sizeof(Tiles<64>) : sizeof(Tiles<128>); }
inline size_t scratch_bytes(int64_t B, int64_t T, HeadShape heads) {
  return size_t(B * T * (heads.q_width() + heads.n_head)) * sizeof(float);
}
// HD is 64 or 128.
inline void attention_backward(Gpu<bf16>& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o,
                               const float* lse, const bf16* qk, const bf16* qkv, int64_t B, int64_t T,
                               HeadShape heads) {
  const int64_t N = B * T, HD = heads.head_dim;
  float *dq = static_cast<float*>(scratch), *D = dq + N * heads.q_width();
  dev.zero(dq, size_t(N * heads.q_width()) * sizeof(float));
  row_sums::row_sums(dev, D, dout, o, N, heads);
  launch(dev, HD == 64 ? backward_kernel<64> : backward_kernel<128>,
         dim3(unsigned(ceil_div(T, rows)), unsigned(B * heads.n_kv_head)), threads, shared_bytes(HD), dqkv, dq, D, dout,
         lse, qk, qkv, Sizes(B, T, heads), float(1 / std::sqrt(double(HD))));
  launch(dev, round_kernel, dim3(unsigned(ceil_div(N * heads.q_width(), 4 * 256))), 256, 0, dqkv, dq, N,
         int(heads.q_width()), heads.qkv_width());
}

}  // namespace recomputed
