// Attention backward in bf16 for Hopper, with the same bits every time.
//
// As in llmc/attention_backward.cu a block owns 128 keys of one key/value head and walks over the tiles of 64 queries
// that see them, head by head of the group; each of two consumer warpgroups owns 64 of the keys:
//
//   S^T = K Q^T, dP^T = V dO^T      from shared memory; keys down, queries across
//   P^T = exp(S^T - lse)            in registers, and from there an A operand:  dV += P^T dO
//   dS^T = P^T (dP^T - D)           likewise:                                  dK += dS^T Q
//   dQ = dS K                       over the keys of both consumers: dS^T goes through shared memory, where an A
//                                   operand may lie either way
//
// dK and dQ are scaled at the end. At head size 64 dQ of a step is multiplied during the exponentials of the two steps
// after it (late_dq): the tensor cores have 1280 clocks of work a step, the exponentials take 512 and as many
// instructions again, and in one chain they would add up.
//
// The share of dQ that a step gives is summed in fp32 in global memory, block after block: the one on the diagonal
// stores, the next ones add (llmc/attention_backward.cu says why that order costs little waiting and cannot lock up).
// Nobody who multiplies waits for that: the consumers leave their share in shared memory, and a thread of the first
// warpgroup waits for the block's turn and has TMA add it (cp.reduce.async.bulk, 64 x HD floats in an order of ours).
// Two or three such threads share out the steps, since turn, addition and passing the turn on are a chain of trips to
// the L2 cache. Within one such addition every element is touched once, so only the order of blocks matters, and that
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
  static constexpr int HD = HD_, panels = HD / 64, keys = 128, queries = 64, consumers = 2;
  // late_dq: dQ of a step is asked for in the two steps after it, half of the keys in each, so that it is multiplied
  // during exponentials, and who needs dS of the other consumer has a step to spare. This takes 32 accumulators more,
  // which head size 128 has not; Q and dO stay for a step longer, dS for three. Without: dQ at the end of its step,
  // behind a barrier of both consumers.
  static constexpr bool late_dq = HD == 64;
  static constexpr int stages = late_dq ? 4 : 2, ds_stages = late_dq ? 4 : 2;
  // Slots of dQ in shared memory, each with a thread that adds it: to wait for a turn, add, and pass the turn on takes
  // more than a step, most of it latency.
  static constexpr int adders = HD == 64 ? 3 : 2;
  static constexpr int threads = (1 + consumers) * warpgroup;
  static constexpr int producer_registers = 24, consumer_registers = 240;
  // dQ of a step is shared out by columns where there are two panels of them; else the consumers take turns.
  static constexpr bool both = panels == 2;
  // K and V of a consumer as A operands in registers, where 16 are left for each: half the reads of shared memory for S
  // and dP.
  static constexpr bool keep_k = HD == 64, keep_v = HD == 64 && !late_dq;
  static constexpr int k_bytes = keys * HD * 2, q_bytes = queries * HD * 2, ds_bytes = keys * queries * 2;
  static constexpr int row_bytes = queries * 4, dq_bytes = queries * HD * 4;
  static constexpr int at_v = k_bytes, at_q = 2 * k_bytes, at_do = at_q + stages * q_bytes;
  static constexpr int at_ds = at_do + stages * q_bytes, at_dq = at_ds + ds_stages * ds_bytes;
  static constexpr int at_lse = at_dq + adders * dq_bytes, at_d = at_lse + stages * row_bytes;
  static constexpr int at_barriers = at_d + stages * row_bytes;
  static constexpr int barriers = 1 + 2 * stages + consumers * ds_stages + 2 * adders;
  static constexpr int shared = at_barriers + barriers * 8 + 8;
  static_assert(shared <= shared_bytes && adders <= 3);
  // With a single slot a consumer could be a whole use ahead of the other, and take the wrong phase for its own.
  static_assert(!late_dq || adders >= 2);
};

struct BackwardArguments {
  TensorMap q, dout, kv, v, dkv;  // boxes of 64 x 64: qk, dout, qk, qkv, dqkv
  BackwardScratch scratch;
  Sizes size;
  int padded_T;
  float scale;
};

// Sums of dQ, times `scale`, rounded. A panel of 64 queries x 64 columns lies as the consumer's 128 threads held it:
// float4 number j * 128 + thread holds rows g and g + 8 of the thread's warp, columns 8j + 2t and the next. A thread
// here takes the four of one g: two chunks of 16 bytes.
template <int HD>
__global__ void round_dq_kernel(bf16* dqkv, const float* dq, Sizes size, int tiles, float scale) {
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
    l[t] = pack_bf16(x.x * scale, x.y * scale), h[t] = pack_bf16(x.z * scale, x.w * scale);
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
  static constexpr int ds_stages = Shape::ds_stages, adders = Shape::adders;
  using At = Fill<stages>;
  using DsAt = Fill<ds_stages>;
  const BackwardArguments& args;
  uint32_t memory, kv_full, full, empty, ds_full, dq_full, dq_empty;
  int block, b, kv, group, first_tile, tiles;

  __device__ __forceinline__ Backward(const BackwardArguments& a, unsigned char* shared)
      : args(a), memory(shared_address(shared)) {
    kv_full = memory + Shape::at_barriers, full = kv_full + 8, empty = full + stages * 8;
    ds_full = empty + stages * 8, dq_full = ds_full + 2 * ds_stages * 8, dq_empty = dq_full + adders * 8;
    volatile int* drawn = reinterpret_cast<volatile int*>(shared + Shape::at_barriers + Shape::barriers * 8);
    if (threadIdx.x == 0) {
      *drawn = atomicAdd(a.scratch.ticket, 1);
      init_barrier(kv_full, 1);
      // (`empty`: each thread that has read lse and D arrives for itself; racecheck sees no other order.)
      for (int s = 0; s < stages; ++s) init_barrier(full + s * 8, 1), init_barrier(empty + s * 8, 2 * warpgroup);
      for (int s = 0; s < 2 * ds_stages; ++s) init_barrier(ds_full + s * 8, 4);
      for (int s = 0; s < adders; ++s)
        init_barrier(dq_full + s * 8, Shape::both ? 2 * warpgroup : warpgroup), init_barrier(dq_empty + s * 8, 1);
      fence_barriers();
    } else if (threadIdx.x == 32) {
      prefetch_map(&a.q), prefetch_map(&a.dout), prefetch_map(&a.kv), prefetch_map(&a.v), prefetch_map(&a.dkv);
    }
    __syncthreads();
    const int number = __shfl_sync(~0u, *drawn, 0), key_blocks = (a.size.T + keys - 1) / keys;
    block = key_blocks - 1 - number % key_blocks;  // of keys: the last ones first
    b = number / key_blocks / a.size.NKV, kv = number / key_blocks % a.size.NKV, group = a.size.NH / a.size.NKV;
    first_tile = block * keys / queries, tiles = (a.size.T + queries - 1) / queries;
  }

  // Calls f(n, head, tile) for each step.
  template <class F>
  __device__ __forceinline__ void each_step(F f) const {
    const uint32_t steps = this->steps();
    int h = kv * group, tile = first_tile;
#pragma unroll 1
    for (uint32_t n = 0; n < steps; ++n) {
      f(n, h, tile);
      if (++tile == tiles) tile = first_tile, ++h;
    }
  }
  __device__ __forceinline__ uint32_t steps() const { return uint32_t(group * (tiles - first_tile)); }

  // ---- the first warpgroup: a thread that loads, the threads that add dQ ----

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

  // Every adders-th step. A tile's turn is passed on when TMA is done adding; the next block, which waits for it, is
  // two steps behind from the start.
  __device__ __forceinline__ void add_dq(uint32_t adder) const {
    const int64_t turn_stride = args.padded_T / queries;
    each_step([&](uint32_t n, int h, int tile) {
      if (n % adders != adder) return;
      const int64_t at = int64_t(b * args.size.NH + h) * turn_stride + tile;
      int* turn = args.scratch.turns + at;
      const int shares = tile * queries / keys - block;  // that come before
      float* to = args.scratch.dq + at * queries * HD;
      const uint32_t from = memory + Shape::at_dq + adder * Shape::dq_bytes;
      if (shares > 0) {
        while (read_turn(turn) != shares)
          ;
        fence_async_global();
      }
      wait(dq_full + adder * 8, n / adders & 1);
      if (shares > 0)
        add_floats(to, from, Shape::dq_bytes);
      else
        store_bytes(to, from, Shape::dq_bytes);
      commit_stores();
      wait_stores_read<0>();
      arrive(dq_empty + adder * 8);
      if (block > 0) {
        wait_stores<0>();
        fence_async_global();
        write_turn(turn, shares + 1);
      }
    });
    wait_stores<0>();
  }

  // ---- a consumer ----

  __device__ __forceinline__ void consume(int consumer) const {
    const int thread = threadIdx.x % warpgroup, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int key0 = block * keys + 64 * consumer;  // first of this consumer
    const float scale_log2 = args.scale * log2_e;
    const uint32_t own_ds = ds_full + consumer * 8, other_ds = ds_full + (1 - consumer) * 8;  // barriers of dS
    const uint64_t k_all = descriptor(memory), k_own = k_all + consumer * (panels * panel_64 / 16);
    const uint64_t v_own = k_own + Shape::at_v / 16;
    float dk[HD / 8][4], dv[HD / 8][4];
#pragma unroll
    for (int i = 0; i < HD / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[i][e] = 0, dv[i][e] = 0;

    // C (keys x queries) = A B^T, summed over the head size.
    uint32_t kept_k[Shape::keep_k ? HD / 16 : 1][4], kept_v[Shape::keep_v ? HD / 16 : 1][4];
    auto ask_transposed = [&](float(&c)[queries / 8][4], const auto& kept, uint64_t a, uint64_t bb) {
#pragma unroll
      for (int d = 0; d < HD / 16; ++d) {
        const uint64_t step = d / 4 * (panel_64 / 16) + d % 4 * step_k<false>();
        if constexpr (sizeof(kept) == HD / 16 * sizeof(kept[0]))
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
    // dQ of step n, 64 columns of it: over the 64 keys of a consumer.
    const int panel = Shape::both ? consumer : 0;
    auto is_mine = [&](uint32_t n) { return Shape::both || int(n & 1) == consumer; };
    auto ask_dq = [&](float(&c)[8][4], uint32_t n, int whose, int accumulate) {
      const uint64_t ds = descriptor(memory + Shape::at_ds + n % ds_stages * Shape::ds_bytes + whose * panel_64);
      const uint64_t k0 = k_all + (whose * panels + panel) * (panel_64 / 16);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        multiply<true, true>(c, ds + k * step_k<true>(), k0 + k * step_k<true>(), k > 0 ? 1 : accumulate);
    };
    // Until a consumer has written its part of dS of step n; -1, before the first step, is over.
    auto wait_ds = [&](uint32_t of_consumer, uint32_t n) {
      wait(of_consumer + DsAt{n}.stage() * 16, DsAt{n}.parity());
    };
    // late_dq, in step n: dQ of every other step is a consumer's; first come its own keys, then those of the other. In
    // the first two steps there is nothing to ask for yet, but a product that nobody looks at costs less than a branch,
    // across which ptxas lets no product run (C7520).
    auto ask_late_dq = [&](float(&c)[8][4], uint32_t n) {
      const bool first = is_mine(n - 1);
      fence_products();
      ask_dq(c, first ? n - 1 : n - 2, first ? consumer : 1 - consumer, !first);
      commit_products();
    };
    // It is left to the thread that adds it.
    auto leave_dq = [&](const float(&c)[8][4], uint32_t n) {
      const uint32_t slot = n % adders, use = n / adders;
      wait(dq_empty + slot * 8, (use & 1) ^ 1);
      const uint32_t to = memory + Shape::at_dq + slot * Shape::dq_bytes + panel * (queries * 64 * 4) + thread * 16;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + j * 2048), "f"(c[j][0]), "f"(c[j][1]),
                     "f"(c[j][2]), "f"(c[j][3])
                     : "memory");
      fence_async_proxy();
      arrive(dq_full + slot * 8);
    };

    wait(kv_full, 0);
    if constexpr (Shape::keep_k || Shape::keep_v) {  // Tile<64> is the 128-byte swizzle
      const attention_tile::LaneView<64, true> view(memory + consumer * panel_64 + warp * (16 * 128), lane);
#pragma unroll
      for (int d = 0; d < HD / 16; ++d) {
        if constexpr (Shape::keep_k) load_matrices<false>(kept_k[d], view.at(0, 2 * d));
        if constexpr (Shape::keep_v) load_matrices<false>(kept_v[d], view.at(0, 2 * d) + Shape::at_v);
      }
    }
    float dq[8][4];
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[i][e] = 0;
    each_step([&](uint32_t n, int, int tile) {
      const At at{n};
      const int q0 = tile * queries;
      const uint32_t q_at = memory + Shape::at_q + at.stage() * Shape::q_bytes;
      const uint64_t q = descriptor(q_at), dout = q + (Shape::at_do - Shape::at_q) / 16;
      float s[queries / 8][4], dp[queries / 8][4];
      uint32_t p16[queries / 16][4], ds16[queries / 16][4];
      wait(full + at.stage() * 8, at.parity());
      fence_products();
      ask_transposed(s, kept_k, k_own, q);
      ask_transposed(dp, kept_v, v_own, dout);
      if constexpr (Shape::late_dq) {
        wait_ds(own_ds, n - 1);
        ask_late_dq(dq, n);
        wait_products<2>();  // S, and with it dV and dK of the step before
        if (n > 0) arrive(empty + at.before().stage() * 8);
      } else {
        wait_products<1>();
      }
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
      wait_products<Shape::late_dq ? 2 : 1>();  // dP; dV goes on, and dQ
      hold(dp);
#pragma unroll
      for (int i = 0; i < queries / 8; ++i) {
        const float2 d = pair(row + (Shape::at_d - Shape::at_lse) + 32 * i);
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[i][e] = s[i][e] * (dp[i][e] - (e % 2 ? d.y : d.x));
      }
#pragma unroll
      for (int i = 0; i < queries / 16; ++i) attention_tile::as_operand(ds16[i], dp[2 * i], dp[2 * i + 1]);
      // dS^T: a panel of this consumer's 64 keys down and 64 queries across. It overwrites what others have read: with
      // late_dq dS of four steps before, whose products the other consumer waited for before it wrote dS of the last
      // step; without, of two steps before, whose reader waited for its products before the last barrier.
      if constexpr (Shape::late_dq) wait_ds(other_ds, n - 1);
      {
        const int r = 16 * warp + lane % 16;
        const uint32_t to = memory + Shape::at_ds + n % ds_stages * Shape::ds_bytes + consumer * panel_64 + r * 128;
#pragma unroll
        for (int i = 0; i < queries / 16; ++i) store_matrices(to + (((2 * i + lane / 16) ^ (r & 7)) << 4), ds16[i]);
      }
      fence_async_proxy();
      if constexpr (Shape::late_dq) {
        __syncwarp();
        if (lane == 0) arrive(own_ds + DsAt{n}.stage() * 16);
      }
      hold(ds16);
      fence_products();
      ask_sum(dk, ds16, q);
      if constexpr (Shape::late_dq) {
        wait_products<2>();  // dQ
        hold(dq);
        if (n > 1 && is_mine(n)) leave_dq(dq, n - 2);
      } else {
        sync_threads(1, 2 * warpgroup);
        if (is_mine(n)) {
          fence_products();
          ask_dq(dq, n, 0, 0);
          ask_dq(dq, n, 1, 1);
          commit_products();
          wait_products<0>();
          hold(dq);
          arrive(empty + at.stage() * 8);
          leave_dq(dq, n);
        } else {
          wait_products<0>();
          arrive(empty + at.stage() * 8);
        }
      }
    });
    if constexpr (Shape::late_dq) {
      wait_products<0>();  // here, or ptxas lets no product run on beyond its step (C7518)
      hold(dk), hold(dv), hold(dq);
      const uint32_t steps = this->steps();
      wait_ds(own_ds, steps - 1);
      wait_ds(other_ds, steps - 1);
#pragma unroll 1
      for (uint32_t n = steps; n < steps + 2; ++n) {
        ask_late_dq(dq, n);
        wait_products<0>();
        hold(dq);
        if (n > 1 && is_mine(n)) leave_dq(dq, n - 2);
      }
    }

    // Nobody multiplies by K any more after this: dK leaves through K's panels, dV through V's.
    hold(dk), hold(dv);
#pragma unroll
    for (int i = 0; i < HD / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[i][e] *= args.scale;
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
  const int role = __shfl_sync(~0u, threadIdx.x / warpgroup, 0);
  if (role == 0) {
    give_registers<Shape::producer_registers>();
    if (threadIdx.x == 0) backward.load();
    if (threadIdx.x >= 32 && threadIdx.x % 32 == 0 && threadIdx.x / 32 <= Shape::adders)
      backward.add_dq(threadIdx.x / 32 - 1);
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
         int(padded_T / 64), args.scale);
}
void backward(GpuBase& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o, const float* lse,
              const bf16* qk, const bf16* qkv, int64_t B, int64_t T, HeadShape heads) {
  if (heads.head_dim == 64)
    run_backward<64>(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads);
  else
    run_backward<128>(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads);
}

}  // namespace attention_hopper
