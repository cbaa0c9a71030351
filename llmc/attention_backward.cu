// Attention backward in bf16 on tensor cores, for every GPU since Ampere, with the same bits every time (Hopper has its
// own: attention_hopper_backward.cu).
//
// With P = exp(S - lse) and dP = dO V^T, the gradients are
//   dV = P^T dO,   dS = P * (dP - D) * scale with D = rowsum(dO * O),   dK = dS^T Q,   dQ = dS K
// A block owns a tile of keys of one key/value head and walks over the tiles of queries that see it, head by head of
// the group. Each warp owns 16 keys and computes S^T and dP^T for them (C: keys down, queries across), so that P^T and
// dS^T are at once A operands of the sums dV and dK, which stay in its registers. dQ sums over keys, hence over warps
// and blocks: dS goes through shared memory, where all warps share out dQ of the tile, and the blocks add their shares
// one after another.
//
// The order of these additions is fixed: for a tile of queries, the block on the diagonal stores its share, the block
// with the keys before adds its own, and so on; the block with the first keys rounds the sum and writes the gradient. A
// counter for each tile of queries says how many shares are in; a block waits for its turn. As each block visits the
// queries from its diagonal on, the block with the later keys is ahead from the start, and waits are short. They always
// end: blocks draw their work from a counter that hands out later keys first, so that whoever is waited for already
// runs, and its own waits are for still later keys.
#include "llmc/attention_backward.cuh"
#include "llmc/attention_hopper.h"

namespace {
using namespace attention_tile;

template <int HD_, int queries_, int warps_>
struct BackwardShape {
  static constexpr int HD = HD_, queries = queries_, warps = warps_, keys = 16 * warps;
  static constexpr int threads = 32 * warps;
  static constexpr int blocks_per_sm = warps <= 4 ? 2 : 1;
  static_assert(keys % queries == 0 && row_padding % queries == 0);  // a tile of queries meets one diagonal block
  // How the warps share out dQ (queries x HD): dq_across warps side by side, each 16 columns or more, and dq_down above
  // each other, each with 16 * m_blocks queries. Head size 16 leaves warps idle.
  static constexpr int dq_across = HD % 64 == 0 && warps > 4 ? 4 : HD % 32 == 0 ? 2 : 1;
  static constexpr int dq_down = warps / dq_across < queries / 16 ? warps / dq_across : queries / 16;
  static constexpr int dq_workers = 32 * dq_across * dq_down;
  static constexpr int m_blocks = queries / 16 / dq_down, n_blocks = HD / dq_across / 8;
  // Operands of K and V that a warp needs for S and dP are read once where registers allow it.
  static constexpr bool keep_operands = HD <= 64;
  // Shared memory: K, V; two stages of Q, dO, lse, D; two stages of dS^T (keys x queries).
  static constexpr int k_bytes = keys * HD * 2, q_bytes = queries * HD * 2, ds_bytes = keys * queries * 2;
  static constexpr int row_bytes = queries * 4;
  static constexpr int shared_bytes = 2 * k_bytes + 4 * q_bytes + 2 * ds_bytes + 4 * row_bytes;
};

template <class Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_sm)
    attention_backward_kernel(bf16* dqkv, BackwardScratch scratch, const bf16* dout, const bf16* qk, const bf16* qkv,
                              Sizes size, int padded_T, float scale) {
  constexpr int HD = Shape::HD, queries = Shape::queries, keys = Shape::keys;
  using T = Tile<HD>;
  using TS = Tile<queries>;  // of dS^T
  extern __shared__ uint4 shared_memory[];
  unsigned char* memory = reinterpret_cast<unsigned char*>(shared_memory);
  constexpr int at_V = Shape::k_bytes, at_Q = 2 * Shape::k_bytes, at_dO = at_Q + 2 * Shape::q_bytes;
  constexpr int at_dS = at_dO + 2 * Shape::q_bytes, at_lse = at_dS + 2 * Shape::ds_bytes;
  constexpr int at_D = at_lse + 2 * Shape::row_bytes;
  const uint32_t base = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  __shared__ int drawn;
  if (threadIdx.x == 0) drawn = atomicAdd(scratch.ticket, 1);
  __syncthreads();
  const int key_blocks = (size.T + keys - 1) / keys, tiles = (size.T + queries - 1) / queries;
  const int block = key_blocks - 1 - drawn % key_blocks;  // of keys: the last ones first
  const int b = drawn / key_blocks / size.NKV, kv = drawn / key_blocks % size.NKV, group = size.NH / size.NKV;
  const int k0 = block * keys, first_tile = k0 / queries, steps = group * (tiles - first_tile);
  const int64_t n0 = int64_t(b) * size.T, turn_stride = padded_T / queries;

  // A step of the block is a head of the group and a tile of its queries.
  struct Step {
    int h, tile;
  };
  auto after = [&](Step s) { return s.tile + 1 < tiles ? Step{s.h, s.tile + 1} : Step{s.h + 1, first_tile}; };
  auto before = [&](Step s) { return s.tile > first_tile ? Step{s.h, s.tile - 1} : Step{s.h - 1, tiles - 1}; };
  // Shares of dQ that come before this block's: those of the blocks from the diagonal down to the next one.
  auto shares_before = [&](int tile) { return tile * queries / keys - block; };

  auto load_queries = [&](Step step, int stage) {
    const int h = step.h, q0 = step.tile * queries, valid = size.T - q0;
    T::template load<queries, Shape::threads>(base + at_Q + stage * Shape::q_bytes,
                                              qk + (n0 + q0) * size.qk_stride + h * HD, int(size.qk_stride), valid,
                                              threadIdx.x);
    T::template load<queries, Shape::threads>(base + at_dO + stage * Shape::q_bytes,
                                              dout + (n0 + q0) * size.o_stride + h * HD, int(size.o_stride), valid,
                                              threadIdx.x);
    constexpr int chunks = queries / 4;  // of 16 bytes, of each of lse2 and D
    if (threadIdx.x < 2 * chunks) {
      const int which = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
      copy_async(base + (which ? at_D : at_lse) + stage * Shape::row_bytes + chunk * 16,
                 (which ? scratch.D : scratch.lse2) + int64_t(b * size.NH + h) * padded_T + q0 + chunk * 4);
    }
  };
  auto turn_of = [&](Step step) { return scratch.turns + int64_t(b * size.NH + step.h) * turn_stride + step.tile; };
  // After a barrier behind the stores of a step's dQ: a release covers what other threads wrote before the barrier.
  auto pass_turn = [&](Step step) {
    if (threadIdx.x == 32 * (Shape::warps - 1) && block > 0) write_turn(turn_of(step), shares_before(step.tile) + 1);
  };
  const bool waits_for_turn = threadIdx.x == 32 * (Shape::warps - 2);

  const int g = lane / 4, t = lane % 4;
  T::template load<keys, Shape::threads>(base, qk + (n0 + k0) * size.qk_stride + (size.NH + kv) * HD,
                                         int(size.qk_stride), size.T - k0, threadIdx.x);
  T::template load<keys, Shape::threads>(base + at_V,
                                         qkv + (n0 + k0) * size.qkv_stride + (size.NH + size.NKV + kv) * HD,
                                         int(size.qkv_stride), size.T - k0, threadIdx.x);
  Step step{kv * group, first_tile};
  load_queries(step, 0);
  wait_copies();
  __syncthreads();

  const float scale_log2 = scale * log2_e;
  const int key0 = 16 * warp;  // the warp's first key in the tile
  uint32_t kept_k[Shape::keep_operands ? HD / 16 : 1][4], kept_v[Shape::keep_operands ? HD / 16 : 1][4];
  if constexpr (Shape::keep_operands) {
    const LaneView<HD, true> view(base + key0 * T::row_bytes, lane);
#pragma unroll
    for (int d = 0; d < HD / 16; ++d) {
      load_matrices<false>(kept_k[d], view.at(0, 2 * d));
      load_matrices<false>(kept_v[d], view.at(0, 2 * d) + at_V);
    }
  }

  // C = A B^T summed over the head size: S^T from K and Q, dP^T from V and dO.
  auto scores = [&](float(&c)[queries / 8][4], const uint32_t(&kept)[Shape::keep_operands ? HD / 16 : 1][4],
                    uint32_t a_tile, uint32_t b_tile) {
    const LaneView<HD, true> a_view(a_tile + key0 * T::row_bytes, lane);
    const LaneView<HD, false> b_view(b_tile, lane);
#pragma unroll
    for (int d = 0; d < HD / 16; ++d) {
      uint32_t a[4];
      if constexpr (Shape::keep_operands)
        for (int i = 0; i < 4; ++i) a[i] = kept[d][i];
      else
        load_matrices<false>(a, a_view.at(0, 2 * d));
#pragma unroll
      for (int n = 0; n < queries / 16; ++n) {
        uint32_t bb[4];
        load_matrices<false>(bb, b_view.at(16 * n, 2 * d));
        multiply_add(c[2 * n], a, bb[0], bb[1]);
        multiply_add(c[2 * n + 1], a, bb[2], bb[3]);
      }
    }
  };
  // One step (16 queries from row q) of C += A B: dV from P^T and dO, dK from dS^T and Q.
  auto accumulate = [&](float(&c)[HD / 8][4], const uint32_t(&a)[4], const LaneView<HD, true>& b_view, int q) {
#pragma unroll
    for (int d = 0; d < HD / 16; ++d) {
      uint32_t bb[4];
      load_matrices<true>(bb, b_view.at(q, 2 * d));
      multiply_add(c[2 * d], a, bb[0], bb[1]);
      multiply_add(c[2 * d + 1], a, bb[2], bb[3]);
    }
  };

  // Adds this block's share of dQ of a step.
  auto add_dq = [&](Step step, int stage) {
    if (Shape::dq_workers < Shape::threads && threadIdx.x >= Shape::dq_workers) return;
    const int h = step.h, tile = step.tile, row0 = warp / Shape::dq_across * 16 * Shape::m_blocks;
    const int column0 = warp % Shape::dq_across * 8 * Shape::n_blocks;
    const bool first = shares_before(tile) == 0, last = block == 0;
    float4* partial =
        reinterpret_cast<float4*>(scratch.dq + (int64_t(b * size.NH + h) * padded_T + tile * queries) * HD) +
        threadIdx.x;
    // What the blocks before have summed arrives while this share is computed. It is read from the L2 cache: the L1
    // cache of this multiprocessor does not see what others write.
    float4 sum[Shape::m_blocks][Shape::n_blocks];
#pragma unroll
    for (int m = 0; m < Shape::m_blocks; ++m)
#pragma unroll
      for (int n = 0; n < Shape::n_blocks; ++n)
        sum[m][n] = first ? float4{0, 0, 0, 0} : __ldcg(partial + (m * Shape::n_blocks + n) * Shape::dq_workers);
    float c[Shape::m_blocks][Shape::n_blocks][4] = {};
    const LaneView<queries, false> a_view(base + at_dS + stage * Shape::ds_bytes, lane);
    const LaneView<HD, true> b_view(base, lane);
#pragma unroll
    for (int k = 0; k < keys / 16; ++k) {
      uint32_t a[Shape::m_blocks][4];
#pragma unroll
      for (int m = 0; m < Shape::m_blocks; ++m) load_matrices<true>(a[m], a_view.at(16 * k, row0 / 8 + 2 * m));
#pragma unroll
      for (int n = 0; n < Shape::n_blocks / 2; ++n) {
        uint32_t bb[4];
        load_matrices<true>(bb, b_view.at(16 * k, column0 / 8 + 2 * n));
#pragma unroll
        for (int m = 0; m < Shape::m_blocks; ++m) {
          multiply_add(c[m][2 * n], a[m], bb[0], bb[1]);
          multiply_add(c[m][2 * n + 1], a[m], bb[2], bb[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Shape::m_blocks; ++m)
#pragma unroll
      for (int n = 0; n < Shape::n_blocks; ++n) {
        float4 v = sum[m][n];
        v.x += c[m][n][0], v.y += c[m][n][1], v.z += c[m][n][2], v.w += c[m][n][3];
        if (!last) {
          __stcg(partial + (m * Shape::n_blocks + n) * Shape::dq_workers, v);
        } else {
          const int query = tile * queries + row0 + 16 * m + g;
          bf16* to = dqkv + (n0 + query) * size.qkv_stride + h * HD + column0 + 8 * n + 2 * t;
          if (query < size.T) *reinterpret_cast<uint32_t*>(to) = pack_bf16(v.x, v.y);
          if (query + 8 < size.T) *reinterpret_cast<uint32_t*>(to + 8 * size.qkv_stride) = pack_bf16(v.z, v.w);
        }
      }
  };

  float dk[1][HD / 8][4] = {}, dv[1][HD / 8][4] = {};
  // Phases are separated by barriers. Phase s computes dQ of step s - 1, whose dS all warps wrote in phase s - 1, then
  // everything else of step s; stages of Q, dO and dS alternate, so that what is written in a phase was last read in
  // the phase before. At the end of phase s the block has the turn for dQ of step s; in phase s + 2 it passes it on.
  for (int s = 0; s < steps; ++s, step = after(step)) {
    const int stage = s % 2, q0 = step.tile * queries, shares = shares_before(step.tile);
    wait_copies();
    __syncthreads();
    if (s >= 2) pass_turn(before(before(step)));
    bool my_turn = !waits_for_turn || shares == 0 || read_turn(turn_of(step)) == shares;
    if (s + 1 < steps) load_queries(after(step), 1 - stage);
    __syncwarp();
    if (s > 0) add_dq(before(step), 1 - stage);

    const uint32_t Q = base + at_Q + stage * Shape::q_bytes, dO = base + at_dO + stage * Shape::q_bytes;
    uint32_t ds[queries / 8][2] = {};     // dS^T as operands: [8 queries][keys g, keys g + 8]
    if (k0 + key0 <= q0 + queries - 1) {  // else all queries come before the warp's keys
      float p[queries / 8][4] = {}, dp[queries / 8][4] = {};
      scores(p, kept_k, base, Q);
      const float* lse2 = reinterpret_cast<const float*>(memory + at_lse + stage * Shape::row_bytes);
      const float* D = reinterpret_cast<const float*>(memory + at_D + stage * Shape::row_bytes);
#pragma unroll
      for (int n = 0; n < queries / 8; ++n) {
        const float2 l = *reinterpret_cast<const float2*>(lse2 + 8 * n + 2 * t);
#pragma unroll
        for (int e = 0; e < 4; ++e) p[n][e] = exp2_of(fmaf(p[n][e], scale_log2, e % 2 ? -l.y : -l.x));
      }
      if (q0 < k0 + key0 + 15) {  // the diagonal crosses the warp's scores
#pragma unroll
        for (int n = 0; n < queries / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (k0 + key0 + 8 * (e / 2) + g > q0 + 8 * n + 2 * t + e % 2) p[n][e] = 0;
      }
      scores(dp, kept_v, base + at_V, dO);
      const LaneView<HD, true> do_view(dO, lane);
#pragma unroll
      for (int n = 0; n < queries / 16; ++n) {
        uint32_t a[4];
        as_operand(a, p[2 * n], p[2 * n + 1]);
        accumulate(dv[0], a, do_view, 16 * n);
      }
#pragma unroll
      for (int n = 0; n < queries / 8; ++n) {
        const float2 d = *reinterpret_cast<const float2*>(D + 8 * n + 2 * t);
        ds[n][0] = pack_bf16(p[n][0] * (dp[n][0] - d.x) * scale, p[n][1] * (dp[n][1] - d.y) * scale);
        ds[n][1] = pack_bf16(p[n][2] * (dp[n][2] - d.x) * scale, p[n][3] * (dp[n][3] - d.y) * scale);
      }
    }
    unsigned char* ds_tile = memory + at_dS + stage * Shape::ds_bytes;
#pragma unroll
    for (int n = 0; n < queries / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(ds_tile + TS::offset(key0 + 8 * half + g, n) + 4 * t) = ds[n][half];
    if (k0 + key0 <= q0 + queries - 1) {
      const LaneView<HD, true> q_view(Q, lane);
#pragma unroll
      for (int n = 0; n < queries / 16; ++n) {
        const uint32_t a[4] = {ds[2 * n][0], ds[2 * n][1], ds[2 * n + 1][0], ds[2 * n + 1][1]};
        accumulate(dk[0], a, q_view, 16 * n);
      }
    }
    while (!my_turn) my_turn = read_turn(turn_of(step)) == shares;
    __syncwarp();
  }
  __syncthreads();
  const Step last = before(step);
  if (steps >= 2) pass_turn(before(last));
  __syncwarp();
  add_dq(last, (steps - 1) % 2);
  __syncthreads();
  pass_turn(last);

  // Nobody reads K and V any more: their tiles pass dK and dV on to 16-byte stores.
  bf16* to = dqkv + (n0 + k0 + key0) * size.qkv_stride;
  const int valid = size.T - k0 - key0;
  store_rows<HD, 1>(to + (size.NH + kv) * HD, size.qkv_stride, valid, dk, memory, key0, lane);
  store_rows<HD, 1>(to + (size.NH + size.NKV + kv) * HD, size.qkv_stride, valid, dv, memory + at_V, key0, lane);
}

template <class Shape>
void run_backward(Gpu<bf16>& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o, const float* lse,
                  const bf16* qk, const bf16* qkv, int64_t B, int64_t T, HeadShape heads) {
  BackwardScratch parts(scratch, B, T, heads, Shape::queries);
  Sizes size(B, T, heads);
  int64_t padded_T = ceil_div(T, row_padding) * row_padding;
  prepare_backward<Shape::HD>(dev, parts, dout, o, lse, B, T, heads);
  launch(dev, attention_backward_kernel<Shape>, dim3(unsigned(ceil_div(T, Shape::keys) * B * heads.n_kv_head)),
         Shape::threads, Shape::shared_bytes, dqkv, parts, dout, qk, qkv, size, int(padded_T),
         float(1 / std::sqrt(double(Shape::HD))));
}
}  // namespace

template <>
void attention_backward(Gpu<bf16>& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o, const float* lse,
                        const bf16* qk, const bf16* qkv, int64_t B, int64_t T, HeadShape heads) {
  if (attention_hopper::usable(dev, heads))
    return attention_hopper::backward(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads);
  with_head_dim(heads.head_dim, [&](auto head_dim) {
    constexpr int HD = decltype(head_dim)::value;
    using Large = BackwardShape<HD, 64, 8>;
    using Small = BackwardShape<HD, 32, 4>;
    // A block may have 160 KiB of shared memory or more on data-centre GPUs, 99 KiB on others.
    if constexpr (HD > 64)
      if (dev.portable || dev.shared_bytes_per_block < Large::shared_bytes + 1024)
        return run_backward<Small>(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads);
    run_backward<Large>(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads);
  });
}

template <>
size_t attention_scratch_bytes<Gpu<bf16>>(int64_t B, int64_t T, HeadShape heads) {
  return BackwardScratch(nullptr, B, T, heads, 32).bytes;  // tiles of 32 queries need the most counters
}
