// Attention backward in bf16 for Hopper, with the same bits every time.
//
// As in llmc/attention_backward.cu a block owns 128 keys of one key/value head and walks over the tiles of 64 queries
// that see them, head by head of the group; each of two consumer warpgroups owns 64 of the keys:
//
//   S^T = K Q^T, dP^T = V dO^T      from shared memory; keys down, queries across
//   P^T = exp(S^T - lse)            in registers, and from there an A operand:  dV += P^T dO
//   dS^T = P^T (dP^T - D) scale     likewise:                                  dK += dS^T Q
//   dQ = dS K                       over the keys of both consumers: dS^T goes through shared memory, where an A
//                                   operand may lie either way
//
// The share of dQ that a step gives is summed in fp32 in global memory, block after block: the one on the diagonal
// stores, the next ones add (llmc/attention_backward.cu says why that order costs little waiting and cannot lock up).
// Nobody who multiplies waits for that: the consumers leave their share in shared memory, and one thread of the first
// warpgroup waits for the block's turn and has TMA add it (cp.reduce.async.bulk, 64 x HD floats in an order
// of our own). Within one such addition every element is touched once, so only the order of blocks matters, and that
// the turns fix. A last kernel rounds the sums.
//
// The alternative, a second kernel over tiles of queries that forms dQ from S and dP computed again, needs seven
// products where this needs five, and twice the exponentials; the turns cost one addition of 4 bytes for 128 keys and
// one pass of 6 bytes over dQ.
#include "llmc/attention_backward.cuh"
#include "llmc/attention_hopper.cuh"

namespace attention_hopper {
using attention_tile::BackwardScratch;
using attention_tile::read_turn;
using attention_tile::row_padding;
using attention_tile::write_turn;

template <int HD_>
struct BackwardShape {
  static constexpr int HD = HD_, panels = HD / 64, keys = 128, queries = 64, consumers = 2, stages = 2;
  static constexpr int threads = (1 + consumers) * warpgroup;
  static constexpr int producer_registers = 24, consumer_registers = 240;
  // dQ of a step is shared out by columns where there are two panels of them; else the consumers take turns.
  static constexpr bool both = panels == 2;
  // K and V of a consumer as A operands in registers, where 2 * 16 are left: half the reads of shared memory for S, dP.
  static constexpr bool keep = HD == 64;
  static constexpr int k_bytes = keys * HD * 2, q_bytes = queries * HD * 2, ds_bytes = keys * queries * 2;
  static constexpr int row_bytes = queries * 4, dq_bytes = queries * 64 * 4;  // dq: of a panel
  static constexpr int at_v = k_bytes, at_q = 2 * k_bytes, at_do = at_q + stages * q_bytes;
  static constexpr int at_ds = at_do + stages * q_bytes, at_dq = at_ds + 2 * ds_bytes;
  static constexpr int at_lse = at_dq + panels * dq_bytes, at_d = at_lse + stages * row_bytes;
  static constexpr int at_barriers = at_d + stages * row_bytes;
  static constexpr int barriers = 1 + 3 * stages + 2 * panels;
  static constexpr int shared = at_barriers + barriers * 8 + 8;
  static_assert(shared <= shared_bytes);
};

struct BackwardArguments {
  TensorMap q, dout, kv, v, dkv;  // boxes of 64 x 64: qk, dout, qk, qkv, dqkv
  BackwardScratch scratch;
  Sizes size;
  int padded_T;
  float scale;
};

// Sums of dQ, rounded. A panel of 64 queries x 64 columns lies as the consumer's 128 threads held it: float4 number
// j * 128 + thread holds rows g and g + 8 of the thread's warp, columns 8j + 2t and the next. A thread here takes the
// four of one g: two chunks of 16 bytes.
template <int HD>
__global__ void round_dq_kernel(bf16* dqkv, const float* dq, Sizes size, int tiles) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;  // (BH, tiles, warp, g, panel, j)
  const int j = int(i % 8), panel = int(i / 8 % (HD / 64));
  i /= HD / 8;
  const int g = int(i % 8), warp = int(i / 8 % 4), tile = int(i / 32 % tiles);
  const int64_t bh = i / 32 / tiles;
  if (bh >= int64_t(size.B) * size.NH) return;
  const float4* from = reinterpret_cast<const float4*>(dq + ((bh * tiles + tile) * (HD / 64) + panel) * 4096) +
                       j * 128 + warp * 32 + g * 4;
  uint4 low, high;
  uint32_t *l = &low.x, *h = &high.x;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 x = from[t];
    l[t] = pack_bf16(x.x, x.y), h[t] = pack_bf16(x.z, x.w);
  }
  const int query = tile * 64 + warp * 16 + g;
  bf16* to = dqkv + (bh / size.NH * size.T + query) * size.qkv_stride + bh % size.NH * HD + panel * 64 + j * 8;
  if (query < size.T) *reinterpret_cast<uint4*>(to) = low;
  if (query + 8 < size.T) *reinterpret_cast<uint4*>(to + 8 * size.qkv_stride) = high;
}

template <class Shape>
struct Backward {
  static constexpr int HD = Shape::HD, panels = Shape::panels, keys = Shape::keys, queries = Shape::queries;
  static constexpr int stages = Shape::stages;
  using At = Fill<stages>;
  const BackwardArguments& args;
  uint32_t memory, kv_full, full, empty, rows_empty, dq_full, dq_empty;
  int block, b, kv, group, first_tile, tiles;

  __device__ __forceinline__ Backward(const BackwardArguments& a, unsigned char* shared)
      : args(a), memory(shared_address(shared)) {
    kv_full = memory + Shape::at_barriers, full = kv_full + 8, empty = full + stages * 8;
    rows_empty = empty + stages * 8;
    dq_full = rows_empty + stages * 8, dq_empty = dq_full + panels * 8;
    volatile int* drawn = reinterpret_cast<volatile int*>(shared + Shape::at_barriers + Shape::barriers * 8);
    if (threadIdx.x == 0) {
      init_barrier(kv_full, 1);
      for (int s = 0; s < stages; ++s)
        init_barrier(full + s * 8, 1), init_barrier(empty + s * 8, 8), init_barrier(rows_empty + s * 8, 2 * warpgroup);
      for (int p = 0; p < panels; ++p) init_barrier(dq_full + p * 8, warpgroup), init_barrier(dq_empty + p * 8, 1);
      fence_barriers();
      *drawn = atomicAdd(a.scratch.ticket, 1);
    }
    __syncthreads();
    const int number = *drawn, key_blocks = (a.size.T + keys - 1) / keys;
    block = key_blocks - 1 - number % key_blocks;  // of keys: the last ones first
    b = number / key_blocks / a.size.NKV, kv = number / key_blocks % a.size.NKV, group = a.size.NH / a.size.NKV;
    first_tile = block * keys / queries, tiles = (a.size.T + queries - 1) / queries;
  }

  // Calls f(n, head, tile) for each step.
  template <class F>
  __device__ __forceinline__ void each_step(F f) const {
    uint32_t n = 0;
#pragma unroll 1
    for (int h = kv * group; h < (kv + 1) * group; ++h)
#pragma unroll 1
      for (int tile = first_tile; tile < tiles; ++tile, ++n) f(n, h, tile);
  }

  // ---- the first warpgroup: a thread that loads, a thread that adds dQ ----

  __device__ __forceinline__ void load() const {
    arrive_expecting(kv_full, 2 * Shape::k_bytes);
#pragma unroll
    for (int i = 0; i < 2 * panels; ++i) {
      const int column = i % panels * 64, row = block * keys + i / panels * 64;
      load_box(memory + i * panel_64, &args.kv, (args.size.NH + kv) * HD + column, row, b, kv_full);
      load_box(memory + Shape::at_v + i * panel_64, &args.v, (args.size.NH + args.size.NKV + kv) * HD + column, row, b,
               kv_full);
    }
    each_step([&](uint32_t n, int h, int tile) {
      const At at{n};
      const uint32_t arrived = full + at.stage() * 8, q = memory + Shape::at_q + at.stage() * Shape::q_bytes;
      wait(empty + at.stage() * 8, at.parity() ^ 1);
      wait(rows_empty + at.stage() * 8, at.parity() ^ 1);
      arrive_expecting(arrived, 2 * Shape::q_bytes + 2 * Shape::row_bytes);
#pragma unroll
      for (int p = 0; p < panels; ++p) {
        load_box(q + p * panel_64, &args.q, h * HD + p * 64, tile * queries, b, arrived);
        load_box(q + Shape::at_do - Shape::at_q + p * panel_64, &args.dout, h * HD + p * 64, tile * queries, b,
                 arrived);
      }
      const int64_t row = int64_t(b * args.size.NH + h) * args.padded_T + tile * queries;
      load_bytes(memory + Shape::at_lse + at.stage() * Shape::row_bytes, args.scratch.lse2 + row, Shape::row_bytes,
                 arrived);
      load_bytes(memory + Shape::at_d + at.stage() * Shape::row_bytes, args.scratch.D + row, Shape::row_bytes, arrived);
    });
  }

  // Passes a step's turn on one step later, when TMA is done adding: the next block is two steps behind.
  __device__ __forceinline__ void add_dq() const {
    const int64_t turn_stride = args.padded_T / queries;
    int* last_turn = nullptr;
    int last_shares = 0;
    each_step([&](uint32_t n, int h, int tile) {
      const int64_t at = int64_t(b * args.size.NH + h) * turn_stride + tile;
      int* turn = args.scratch.turns + at;
      const int shares = tile * queries / keys - block;  // that come before
      float* to = args.scratch.dq + at * queries * HD;
      if (shares > 0) {
        while (read_turn(turn) != shares)
          ;
        fence_async_everywhere();
      }
#pragma unroll
      for (int p = 0; p < panels; ++p) {
        wait(dq_full + p * 8, n & 1);
        const uint32_t from = memory + Shape::at_dq + p * Shape::dq_bytes;
        if (shares > 0)
          add_floats(to + p * (Shape::dq_bytes / 4), from, Shape::dq_bytes);
        else
          store_bytes(to + p * (Shape::dq_bytes / 4), from, Shape::dq_bytes);
      }
      commit_stores();
      wait_stores_read<0>();
#pragma unroll
      for (int p = 0; p < panels; ++p) arrive(dq_empty + p * 8);
      wait_stores<1>();
      if (last_turn && block > 0) {
        fence_async_everywhere();
        write_turn(last_turn, last_shares);
      }
      last_turn = turn, last_shares = shares + 1;
    });
    wait_stores<0>();
    if (last_turn && block > 0) {
      fence_async_everywhere();
      write_turn(last_turn, last_shares);
    }
  }

  // ---- a consumer ----

  __device__ __forceinline__ void consume(int consumer) const {
    const int thread = threadIdx.x % warpgroup, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int key0 = block * keys + 64 * consumer;  // first of this consumer
    const float scale_log2 = args.scale * log2_e;
    const uint64_t k_all = descriptor(memory), k_own = k_all + consumer * (panels * panel_64 / 16);
    const uint64_t v_own = k_own + Shape::at_v / 16;
    float dk[HD / 8][4], dv[HD / 8][4];
#pragma unroll
    for (int i = 0; i < HD / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[i][e] = 0, dv[i][e] = 0;

    // C (keys x queries) = A B^T, summed over the head size.
    using Kept = uint32_t[Shape::keep ? HD / 16 : 1][4];
    auto ask_transposed = [&](float(&c)[queries / 8][4], const Kept& kept, uint64_t a, uint64_t bb) {
#pragma unroll
      for (int d = 0; d < HD / 16; ++d) {
        const uint64_t step = d / 4 * (panel_64 / 16) + d % 4 * step_k<false>();
        if constexpr (Shape::keep)
          multiply<false>(c, kept[d], bb + step, d > 0);
        else
          multiply<false, false>(c, a + step, bb + step, d > 0);
      }
      commit_products();
    };
    // C (keys x HD) += A B, summed over queries.
    auto ask_sum = [&](float(&c)[HD / 8][4], const uint32_t(&a)[queries / 16][4], uint64_t bb) {
#pragma unroll
      for (int q = 0; q < queries / 16; ++q) multiply<true>(c, a[q], bb + q * step_k<true>(), 1);
      commit_products();
    };

    wait(kv_full, 0);
    Kept kept_k, kept_v;
    if constexpr (Shape::keep) {  // Tile<64> is the 128-byte swizzle
      const attention_tile::LaneView<64, true> view(memory + consumer * panel_64 + warp * (16 * 128), lane);
#pragma unroll
      for (int d = 0; d < HD / 16; ++d) {
        load_matrices<false>(kept_k[d], view.at(0, 2 * d));
        load_matrices<false>(kept_v[d], view.at(0, 2 * d) + Shape::at_v);
      }
    }
    each_step([&](uint32_t n, int, int tile) {
      const At at{n};
      const int q0 = tile * queries;
      const uint32_t q_at = memory + Shape::at_q + at.stage() * Shape::q_bytes;
      const uint64_t q = descriptor(q_at), dout = q + (Shape::at_do - Shape::at_q) / 16;
      const uint32_t ds_at = memory + Shape::at_ds + (n & 1) * Shape::ds_bytes;
      float s[queries / 8][4], dp[queries / 8][4];
      uint32_t p16[queries / 16][4], ds16[queries / 16][4];
      wait(full + at.stage() * 8, at.parity());
      fence_products();
      ask_transposed(s, kept_k, k_own, q);
      ask_transposed(dp, kept_v, v_own, dout);
      wait_products<1>();
      hold(s);
      const uint32_t row = memory + Shape::at_lse + at.stage() * Shape::row_bytes + 8 * t;  // lse; D further on
      auto pair = [&](uint32_t address) {
        float2 v;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
        return v;
      };
#pragma unroll
      for (int i = 0; i < queries / 8; ++i) {
        const float2 l = pair(row + 32 * i);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][e] = exp2_of(fmaf(s[i][e], scale_log2, e % 2 ? -l.y : -l.x));
      }
      if (q0 <= key0) {  // on the diagonal, or (the second consumer's first tile) wholly in the past of the keys
        const int past = key0 + 16 * warp + g - q0 - 2 * t;  // key less query
#pragma unroll
        for (int i = 0; i < queries / 8; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (past + 8 * (e / 2) - 8 * i - e % 2 > 0) s[i][e] = 0;
      }
#pragma unroll
      for (int i = 0; i < queries / 16; ++i) attention_tile::as_operand(p16[i], s[2 * i], s[2 * i + 1]);
      hold(p16);
      fence_products();
      ask_sum(dv, p16, dout);
      wait_products<1>();  // dP; dV goes on
      hold(dp);
#pragma unroll
      for (int i = 0; i < queries / 8; ++i) {
        const float2 d = pair(row + (Shape::at_d - Shape::at_lse) + 32 * i);
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[i][e] = s[i][e] * (dp[i][e] - (e % 2 ? d.y : d.x)) * args.scale;
      }
      arrive(rows_empty + at.stage() * 8);  // lse and D are read; by each thread for itself
#pragma unroll
      for (int i = 0; i < queries / 16; ++i) attention_tile::as_operand(ds16[i], dp[2 * i], dp[2 * i + 1]);
      // dS^T: a panel of this consumer's 64 keys down and 64 queries across. Who reads this stage last waited for its
      // products before the barrier of the step before.
      {
        const int r = 16 * warp + lane % 16;
        const uint32_t to = ds_at + consumer * panel_64 + r * 128;
#pragma unroll
        for (int i = 0; i < queries / 16; ++i) store_matrices(to + (((2 * i + lane / 16) ^ (r & 7)) << 4), ds16[i]);
      }
      fence_async_proxy();
      hold(ds16);
      fence_products();
      ask_sum(dk, ds16, q);
      sync_threads(1, 2 * warpgroup);

      const bool mine = Shape::both || int(n & 1) == consumer;
      if (mine) {
        const int panel = Shape::both ? consumer : 0;
        float dq[8][4];
        const uint64_t ds = descriptor(ds_at);
        fence_products();
#pragma unroll
        for (int k = 0; k < keys / 16; ++k)
          multiply<true, true>(dq, ds + k / 4 * (panel_64 / 16) + k % 4 * step_k<true>(),
                               k_all + (k / 4 * panels + panel) * (panel_64 / 16) + k % 4 * step_k<true>(), k > 0);
        commit_products();
        wait_products<0>();
        hold(dq);
        if (lane == 0) arrive(empty + at.stage() * 8);
        wait(dq_empty + panel * 8, (n & 1) ^ 1);
        const uint32_t to = memory + Shape::at_dq + panel * Shape::dq_bytes + thread * 16;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + j * 2048), "f"(dq[j][0]), "f"(dq[j][1]),
                       "f"(dq[j][2]), "f"(dq[j][3])
                       : "memory");
        fence_async_proxy();
        arrive(dq_full + panel * 8);
      } else {
        wait_products<0>();
        if (lane == 0) arrive(empty + at.stage() * 8);
      }
    });

    // Nobody multiplies by K any more after this: dK leaves through K's panels, dV through V's.
    hold(dk), hold(dv);
    sync_threads(1, 2 * warpgroup);
    const uint32_t to = memory + consumer * (panels * panel_64);
    store(dk, to, (args.size.NH + kv) * HD, key0, consumer);
    store(dv, to + Shape::at_v, (args.size.NH + args.size.NKV + kv) * HD, key0, consumer);
    if (thread == 0) wait_stores_read<0>();
  }

  __device__ __forceinline__ void store(const float (&c)[HD / 8][4], uint32_t to, int column, int key0,
                                        int consumer) const {
    auto four_of = [&](uint32_t(&four)[4], int n) { attention_tile::as_operand(four, c[n], c[n + 1]); };
    store_panels<HD>(&args.dkv, to, four_of, column, key0, b, args.size.T, 2 + consumer);
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::threads, 1) backward_kernel(const __grid_constant__ BackwardArguments args) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const Backward<Shape> backward(args, shared);
  const int role = threadIdx.x / warpgroup;
  if (role == 0) {
    give_registers<Shape::producer_registers>();
    if (threadIdx.x == 0) backward.load();
    if (threadIdx.x == 32) backward.add_dq();
  } else {
    take_registers<Shape::consumer_registers>();
    backward.consume(role - 1);
  }
#endif
}

template <int HD>
void run_backward(GpuBase& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o, const float* lse,
                  const bf16* qk, const bf16* qkv, int64_t B, int64_t T, HeadShape heads) {
  using Shape = BackwardShape<HD>;
  if (B == 0 || T == 0) return;
  const BackwardScratch parts(scratch, B, T, heads, Shape::queries);
  const Sizes size(B, T, heads);
  const int64_t padded_T = ceil_div(T, row_padding) * row_padding, qk_width = heads.qk_width(),
                qkv_width = heads.qkv_width();
  attention_tile::prepare_backward<HD>(dev, parts, dout, o, lse, B, T, heads);
  const TensorMap keys = tensor_map(qk, B, T, qk_width, T * qk_width, 64);
  const BackwardArguments args{keys,
                               tensor_map(dout, B, T, heads.q_width(), T * heads.q_width(), 64),
                               keys,
                               tensor_map(qkv, B, T, qkv_width, T * qkv_width, 64),
                               tensor_map(dqkv, B, T, qkv_width, T * qkv_width, 64),
                               parts,
                               size,
                               int(padded_T),
                               float(1 / std::sqrt(double(HD)))};
  launch(dev, backward_kernel<Shape>, dim3(unsigned(ceil_div(T, Shape::keys) * B * heads.n_kv_head)), Shape::threads,
         Shape::shared, args);
  const int64_t chunks = B * heads.n_head * padded_T * HD / 16;
  launch(dev, round_dq_kernel<HD>, dim3(unsigned(ceil_div(chunks, 256))), 256, 0, dqkv, parts.dq, size,
         int(padded_T / 64));
}
void backward(GpuBase& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o, const float* lse,
              const bf16* qk, const bf16* qkv, int64_t B, int64_t T, HeadShape heads) {
  if (heads.head_dim == 64)
    run_backward<64>(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads);
  else
    run_backward<128>(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads);
}

}  // namespace attention_hopper
