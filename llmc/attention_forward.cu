// Attention forward in bf16 on tensor cores.
//
// A block owns 128 queries of one head and walks over the keys that they may see, 64 or 128 at a time:
//   S = Q K^T                    scores of a tile, in registers (C of the product)
//   m' = max(m, rowmax S), P = exp(S - m'), sum = sum * exp(m - m') + rowsum P, O = O * exp(m - m')
//   O += P V                     P goes from C to A in registers
// and divides by the sum at the end. The tile after the current one is being copied meanwhile. Only tiles on or below
// the diagonal are visited, and only those on the diagonal are masked.
#include "llmc/attention_hopper.h"
#include "llmc/attention_tile.cuh"

namespace {
using namespace attention_tile;

template <int HD_>
struct ForwardShape {
  static constexpr int HD = HD_;
  static constexpr int warps = 4, threads = 32 * warps;
  static constexpr int m_blocks = 2;  // a warp owns 32 queries: each operand of K and V read serves both halves
  static constexpr int queries = 16 * m_blocks * warps, keys = HD == 64 ? 128 : 64;  // measured, as the next line
  static constexpr int blocks_per_sm = HD < 64 ? 3 : 2;
  static constexpr int q_bytes = queries * HD * 2, k_bytes = keys * HD * 2;
  static constexpr int shared_bytes = q_bytes + 4 * k_bytes;  // Q; two stages of K and V
};

template <class Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_sm)
    attention_forward_kernel(bf16* o, float* lse, const bf16* qk, const bf16* qkv, Sizes size, int section,
                             float scale_log2) {
  constexpr int HD = Shape::HD, keys = Shape::keys, m_blocks = Shape::m_blocks;
  using T = Tile<HD>;
  extern __shared__ uint4 shared_memory[];
  unsigned char* q_tile = reinterpret_cast<unsigned char*>(shared_memory);
  const uint32_t Q = shared_address(q_tile), K = Q + Shape::q_bytes, V = K + 2 * Shape::k_bytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  // Which queries: the sections of heads one after another (the keys and values of a section fit in the L2 cache), in
  // each the last queries first, as they see most keys: short blocks at the end fill the gaps.
  const int q_blocks = (size.T + Shape::queries - 1) / Shape::queries;
  const int first_head = int(blockIdx.x) / (section * q_blocks) * section,
            index = int(blockIdx.x) - first_head * q_blocks;
  const int heads = min(section, size.B * size.NH - first_head);
  const int q0 = (q_blocks - 1 - index / heads) * Shape::queries, bh = first_head + index % heads;
  const int b = bh / size.NH, h = bh % size.NH, kv = h / (size.NH / size.NKV);
  const int64_t n0 = int64_t(b) * size.T;  // first row of the sequence
  const bf16* q = qk + (n0 + q0) * size.qk_stride + h * HD;
  const bf16* k = qk + n0 * size.qk_stride + (size.NH + kv) * HD;
  const bf16* v = qkv + n0 * size.qkv_stride + (size.NH + size.NKV + kv) * HD;

  const int tiles = (min(q0 + Shape::queries, size.T) + keys - 1) / keys;
  auto load_keys = [&](int tile) {
    int k0 = tile * keys, stage = tile % 2 * Shape::k_bytes;
    T::template load<keys, Shape::threads>(K + stage, k + k0 * size.qk_stride, int(size.qk_stride), size.T - k0,
                                           threadIdx.x);
    T::template load<keys, Shape::threads>(V + stage, v + k0 * size.qkv_stride, int(size.qkv_stride), size.T - k0,
                                           threadIdx.x);
  };
  T::template load<Shape::queries, Shape::threads>(Q, q, int(size.qk_stride), size.T - q0, threadIdx.x);
  load_keys(0);

  // A lane holds, for each of its 2 * m_blocks rows, a quarter of the columns; the four lanes of a row (equal g) agree
  // on the maximum, and sum their own columns only until the end. The maximum is kept in units of log2, rounded as it
  // is used, so that all exponentials of a row are relative to exactly the same number.
  float out[m_blocks][HD / 8][4] = {}, maximum[m_blocks][2], sum[m_blocks][2];
#pragma unroll
  for (int m = 0; m < m_blocks; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) maximum[m][r] = -INFINITY, sum[m][r] = 0;
  const int row0 = warp * 16 * m_blocks;  // the warp's first query in the tile

  for (int tile = 0; tile < tiles; ++tile) {
    // After the barrier this tile is there for all, and nobody reads the tile before any more.
    wait_copies();
    __syncthreads();
    if (tile + 1 < tiles) load_keys(tile + 1);
    const int k0 = tile * keys, stage = tile % 2 * Shape::k_bytes;
    if (k0 > q0 + row0 + 16 * m_blocks - 1) continue;  // wholly in the future of this warp's queries

    float s[m_blocks][keys / 8][4] = {};
    const LaneView<HD, true> q_view(Q + row0 * T::row_bytes, lane);
    const LaneView<HD, false> k_view(K + stage, lane);
#pragma unroll
    for (int d = 0; d < HD / 16; ++d) {
      uint32_t a[m_blocks][4];
#pragma unroll
      for (int m = 0; m < m_blocks; ++m) load_matrices<false>(a[m], q_view.at(16 * m, 2 * d));
#pragma unroll
      for (int n = 0; n < keys / 16; ++n) {
        uint32_t kk[4];
        load_matrices<false>(kk, k_view.at(16 * n, 2 * d));
#pragma unroll
        for (int m = 0; m < m_blocks; ++m) {
          multiply_add(s[m][2 * n], a[m], kk[0], kk[1]);
          multiply_add(s[m][2 * n + 1], a[m], kk[2], kk[3]);
        }
      }
    }

    if (k0 + keys - 1 > q0 + row0) {  // the diagonal crosses the warp's scores
#pragma unroll
      for (int m = 0; m < m_blocks; ++m)
#pragma unroll
        for (int n = 0; n < keys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int query = q0 + row0 + 16 * m + 8 * (e / 2) + g, key = k0 + 8 * n + 2 * t + e % 2;
            if (key > query) s[m][n][e] = -INFINITY;
          }
    }

    // Key 0 is visible to every query and is in the first tile: from there on the maximum is finite.
#pragma unroll
    for (int m = 0; m < m_blocks; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < keys / 8; ++n) largest = fmaxf(largest, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        float before = maximum[m][r], now = fmaxf(before, largest * scale_log2);
        float correction = exp2_of(before - now), total = 0;
        maximum[m][r] = now;
#pragma unroll
        for (int n = 0; n < keys / 8; ++n)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            s[m][n][e] = exp2_of(fmaf(s[m][n][e], scale_log2, -now));
            total += s[m][n][e];
          }
        sum[m][r] = fmaf(sum[m][r], correction, total);
#pragma unroll
        for (int n = 0; n < HD / 8; ++n) out[m][n][2 * r] *= correction, out[m][n][2 * r + 1] *= correction;
      }

    const LaneView<HD, true> v_view(V + stage, lane);
#pragma unroll
    for (int n = 0; n < keys / 16; ++n) {
      uint32_t p[m_blocks][4];
#pragma unroll
      for (int m = 0; m < m_blocks; ++m) as_operand(p[m], s[m][2 * n], s[m][2 * n + 1]);
#pragma unroll
      for (int d = 0; d < HD / 16; ++d) {
        uint32_t vv[4];
        load_matrices<true>(vv, v_view.at(16 * n, 2 * d));
#pragma unroll
        for (int m = 0; m < m_blocks; ++m) {
          multiply_add(out[m][2 * d], p[m], vv[0], vv[1]);
          multiply_add(out[m][2 * d + 1], p[m], vv[2], vv[3]);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < m_blocks; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[m][r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      float inverse = 1.0f / total;
#pragma unroll
      for (int n = 0; n < HD / 8; ++n) out[m][n][2 * r] *= inverse, out[m][n][2 * r + 1] *= inverse;
      int query = q0 + row0 + 16 * m + 8 * r + g;
      if (t == 0 && query < size.T) lse[(n0 + query) * size.NH + h] = fmaf(maximum[m][r], ln_2, logf(total));
    }
  // The warp's rows of Q are read by no other warp: they become the rows of O.
  store_rows<HD, m_blocks>(o + (n0 + q0 + row0) * size.o_stride + h * HD, size.o_stride, size.T - q0 - row0, out,
                           q_tile, row0, lane);
}
}  // namespace

template <>
void attention_forward(Gpu<bf16>& dev, bf16* o, float* lse, void* scratch, const bf16* qk, const bf16* qkv, int64_t B,
                       int64_t T, HeadShape heads) {
  if (attention_hopper::usable(dev, heads))
    return attention_hopper::forward(dev, o, lse, scratch, qk, qkv, B, T, heads);
  with_head_dim(heads.head_dim, [&](auto head_dim) {
    using Shape = ForwardShape<decltype(head_dim)::value>;
    int64_t section = head_section(B, T, heads);
    int64_t blocks = ceil_div(T, Shape::queries) * B * heads.n_head;
    launch(dev, attention_forward_kernel<Shape>, dim3(unsigned(blocks)), Shape::threads, Shape::shared_bytes, o, lse,
           qk, qkv, Sizes(B, T, heads), int(section), float(log2_e / std::sqrt(double(heads.head_dim))));
  });
}
