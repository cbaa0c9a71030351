// Rung 3: tiles in shared memory. A block owns 64 queries of a head and takes the keys 64 at a time: K and V are copied
// into shared memory once, as fp32, and serve all 64 queries. A tile's scores are a small matrix product, its softmax
// corrects the running maximum, sum and output once for 64 keys instead of once for each, and P V is another product.
//
// Predicted: a key is read from global memory once for 64 queries instead of once for each. The limit moves to the FMA
// units: 2 operations for each of B*NH*T*T*HD (half of two products), 60 TFLOP/s on the whole chip. Before it comes
// shared memory: a thread has 8 queries by 4 keys, and 12 loads of 16 bytes for 128 multiply-adds, 48 clocks of the load unit
// to 32 clocks of the FMA units: at best two thirds. With copies, softmax and barriers, 25 to 30 TFLOP/s.
//
// Rows of K and P have 4 floats of padding: eight threads that read 16 bytes each of eight rows hit all 32 banks once.
#pragma once
#include "llmc/attention_tile.cuh"

namespace shared_tiles {
using namespace attention_tile;

constexpr int rows = 64, threads = 128;  // rows of every tile, queries or keys

template <int HD>
struct Tiles {
  float q[rows][HD];
  union {
    float k[rows][HD + 4];
    float p[rows][rows + 4];  // probabilities, once all scores of the tile are computed
  };
  float v[rows][HD];
};

__device__ __forceinline__ void read_four(float (&v)[4], const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

// 64 rows, `stride` elements apart, times `factor`; zeros from row `valid` on.
template <int HD, int pitch>
__device__ __forceinline__ void fill(float (&tile)[rows][pitch], const bf16* from, int64_t stride, int valid,
                                     float factor) {
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * HD / 8; i += threads) {
    const int row = i / (HD / 8), c = i % (HD / 8) * 8;
    Pack<bf16> x = {};
    if (row < valid) x = *reinterpret_cast<const Pack<bf16>*>(from + row * stride + c);
    float4* to = reinterpret_cast<float4*>(&tile[row][c]);
    to[0] = {x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor};
    to[1] = {x[4] * factor, x[5] * factor, x[6] * factor, x[7] * factor};
  }
}

// Thread (y, x) of 8 x 16 has queries y + 8*i, of the scores keys x + 16*j, of the output columns 64*c + 4*x + 0 ... 3.
template <int HD>
__global__ void __launch_bounds__(threads, HD == 64 ? 3 : 2)
    forward_kernel(bf16* o, float* lse, const bf16* qk, const bf16* qkv, Sizes size, float scale_log2) {
  extern __shared__ uint4 shared_memory[];
  Tiles<HD>& tile = *reinterpret_cast<Tiles<HD>*>(shared_memory);
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int last = gridDim.x - 1 - blockIdx.x, q0 = last * rows, bh = blockIdx.y;  // blocks with most keys begin
  const int h = bh % size.NH, kv = h / (size.NH / size.NKV);
  const int64_t n0 = int64_t(bh / size.NH) * size.T;
  const bf16* k = qk + n0 * size.qk_stride + (size.NH + kv) * HD;
  const bf16* v = qkv + n0 * size.qkv_stride + (size.NH + size.NKV + kv) * HD;
  fill<HD>(tile.q, qk + (n0 + q0) * size.qk_stride + h * HD, size.qk_stride, size.T - q0, scale_log2);

  float out[8][HD / 16] = {}, maximum[8], sum[8] = {};  // the maximum in units of log2; of the sum the thread's keys
#pragma unroll
  for (int i = 0; i < 8; ++i) maximum[i] = -INFINITY;
  for (int step = 0; step <= last; ++step) {
    const int k0 = step * rows;
    __syncthreads();  // P and V of the step before have been read
    fill<HD>(tile.k, k + k0 * size.qk_stride, size.qk_stride, size.T - k0, 1);
    fill<HD>(tile.v, v + k0 * size.qkv_stride, size.qkv_stride, size.T - k0, 1);
    __syncthreads();

    float s[8][4] = {};
#pragma unroll 4
    for (int d = 0; d < HD; d += 4) {
      float b[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) read_four(b[j], &tile.k[x + 16 * j][d]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float a[4];
        read_four(a, &tile.q[y + 8 * i][d]);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][j] = fmaf(a[e], b[j][e], s[i][j]);
      }
    }
    __syncthreads();  // K has been read: P takes its place
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float largest = maximum[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (step == last && x + 16 * j > y + 8 * i) s[i][j] = -INFINITY;  // the diagonal's tile
        largest = fmaxf(largest, s[i][j]);
      }
#pragma unroll
      for (int lanes = 8; lanes; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
      const float correction = exp2_of(maximum[i] - largest);  // key 0 is visible to all: `largest` is finite
      maximum[i] = largest, sum[i] *= correction;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float p = exp2_of(s[i][j] - largest);
        sum[i] += p, tile.p[y + 8 * i][x + 16 * j] = p;
      }
#pragma unroll
      for (int c = 0; c < HD / 16; ++c) out[i][c] *= correction;
    }
    __syncwarp();  // the 16 threads of a row of P are of one warp
#pragma unroll 2
    for (int j = 0; j < rows; j += 4) {
      float a[8][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) read_four(a[i], &tile.p[y + 8 * i][j]);
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int c = 0; c < HD / 64; ++c) {
          float b[4];
          read_four(b, &tile.v[j + e][64 * c + 4 * x]);
#pragma unroll
          for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int f = 0; f < 4; ++f) out[i][4 * c + f] = fmaf(a[i][e], b[f], out[i][4 * c + f]);
        }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int lanes = 8; lanes; lanes /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], lanes);
    const int query = q0 + y + 8 * i;
    if (query >= size.T) continue;
    const float inverse = 1 / sum[i];
    bf16* to = o + (n0 + query) * size.o_stride + h * HD + 4 * x;
#pragma unroll
    for (int c = 0; c < HD / 64; ++c) {
      const float* r = &out[i][4 * c];
      *reinterpret_cast<uint2*>(to + 64 * c) = {pack_bf16(r[0] * inverse, r[1] * inverse),
                                                pack_bf16(r[2] * inverse, r[3] * inverse)};
    }
    if (x == 0) lse[(n0 + query) * size.NH + h] = (maximum[i] + log2f(sum[i])) * ln_2;
  }
}

// HD is 64 or 128.
inline void attention_forward(Gpu<bf16>& dev, bf16* o, float* lse, void*, const bf16* qk, const bf16* qkv, int64_t B,
                              int64_t T, HeadShape heads) {
  const bool narrow = heads.head_dim == 64;
  launch(dev, narrow ? forward_kernel<64> : forward_kernel<128>,
         dim3(unsigned(ceil_div(T, rows)), unsigned(B * heads.n_head)), threads,
         narrow ? sizeof(Tiles<64>) : sizeof(Tiles<128>), o, lse, qk, qkv, Sizes(B, T, heads),
         float(log2_e / std::sqrt(double(heads.head_dim))));
}

}  // namespace shared_tiles
