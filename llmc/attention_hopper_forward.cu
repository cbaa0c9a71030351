// Attention forward in bf16 for Hopper.
//
// A block has a multiprocessor to itself: one warpgroup copies, the others (the consumers) each own 64 queries of the
// block's tile, and walk over the keys that they may see from the diagonal to key 0, 128 at a time:
//
//   S = Q K^T                    both from shared memory; 64 x 128 scores, in registers
//   m' = max(m, rowmax S), P = exp(S - m'), sum = sum * exp(m - m') + rowsum P
//   O = O * exp(m - m') + P V    P goes from accumulator to A operand in registers
//
// Two overlaps keep the tensor cores busy while exponentials are computed, of which a multiprocessor does 16 a cycle:
// 512 cycles for a tile of 64 x 128, whose two products take 512 (head size 64) or 1024 (128).
//   within a consumer   S of the next tile is asked for before P V of this one; the softmax of the next tile runs
//                       while P V is still being multiplied
//   among consumers     they take turns asking for products (named barriers), so that one is in its softmax while
//                       another's products run
//
// Blocks are persistent and draw tiles of queries from a counter, longest first within a section of heads whose keys
// and values fit in the L2 cache. The producer draws ahead, and copies the next tile's first keys while the consumers
// finish. A result depends on its tile alone, not on who computed it.
//
// Ends: rows past T are loaded as zeros and never stored; keys past T come after every query that is stored, so the
// causal mask covers them. The tile on the diagonal is the only one that is masked: 64 queries from a multiple of 64
// lie in one tile of 128 keys.
#include "llmc/attention_hopper.cuh"

namespace attention_hopper {
using attention_tile::ln_2;

template <int HD_>
struct ForwardShape {
  static constexpr int HD = HD_, panels = HD / 64;
  static constexpr int consumers = HD == 64 ? 3 : 2, queries = 64 * consumers, keys = 128;
  static constexpr int threads = (1 + consumers) * warpgroup;
  static constexpr int stages = HD == 64 ? 4 : 2;
  // Of a thread: 65536 in all for four warpgroups, 64512 for three.
  static constexpr int producer_registers = consumers == 3 ? 32 : 40;
  static constexpr int consumer_registers = consumers == 3 ? 160 : 232;
  static constexpr int q_bytes = queries * HD * 2, k_bytes = keys * HD * 2, o_bytes = 64 * HD * 2;  // o: of a consumer
  static constexpr int at_k = q_bytes, at_v = at_k + stages * k_bytes, at_o = at_v + stages * k_bytes;
  static constexpr int at_barriers = at_o + consumers * o_bytes;
  static constexpr int shared = at_barriers + (4 * stages + 2) * 8 + 16 * 4;
  static_assert(shared <= shared_bytes);
};

struct ForwardArguments {
  TensorMap q, k, v, o;
  float* lse;
  int* ticket;  // 0 before the kernel starts
  Sizes size;
  int section, jobs;
  float scale_log2;
};

// A tile of queries of a head.
template <class Shape>
struct Job {
  int q0, b, h, tiles;  // tiles of keys
  __device__ __forceinline__ Job(int job, const ForwardArguments& a) {
    const int q_blocks = (a.size.T + Shape::queries - 1) / Shape::queries;
    const int first_head = job / (a.section * q_blocks) * a.section, index = job - first_head * q_blocks;
    const int heads = min(a.section, a.size.B * a.size.NH - first_head), bh = first_head + index % heads;
    q0 = (q_blocks - 1 - index / heads) * Shape::queries;
    b = bh / a.size.NH, h = bh % a.size.NH;
    tiles = (min(q0 + Shape::queries, a.size.T) + Shape::keys - 1) / Shape::keys;
  }
};

template <class Shape>
struct Forward {
  static constexpr int HD = Shape::HD, keys = Shape::keys, stages = Shape::stages, panels = Shape::panels;
  using At = Fill<stages>;
  const ForwardArguments& args;
  uint32_t memory, k_full, k_empty, v_full, v_empty, q_full, q_empty;
  volatile int* job_slot;  // of the tile whose Q is in shared memory, -1: no more; then what each warp is at

  __device__ __forceinline__ Forward(const ForwardArguments& a, unsigned char* shared)
      : args(a), memory(shared_address(shared)) {
    k_full = memory + Shape::at_barriers, k_empty = k_full + stages * 8;
    v_full = k_empty + stages * 8, v_empty = v_full + stages * 8;
    q_full = v_empty + stages * 8, q_empty = q_full + 8;
    job_slot = reinterpret_cast<volatile int*>(shared + Shape::at_barriers + (4 * stages + 2) * 8);
    if (threadIdx.x == 0) {
      constexpr int emptying = 4 * Shape::consumers;  // warps
      for (int s = 0; s < stages; ++s) {
        init_barrier(k_full + s * 8, 1), init_barrier(k_empty + s * 8, emptying);
        init_barrier(v_full + s * 8, 1), init_barrier(v_empty + s * 8, emptying);
      }
      init_barrier(q_full, 1), init_barrier(q_empty, emptying);
      fence_barriers();
      prefetch_map(&a.q), prefetch_map(&a.k), prefetch_map(&a.v), prefetch_map(&a.o);
    }
    __syncthreads();
  }

  // ---- the producer: one thread ----

  __device__ __forceinline__ void load_k(At& at, const Job<Shape>& job, int kv, int tile) const {
    const uint32_t full = k_full + at.stage() * 8, to = memory + Shape::at_k + at.stage() * Shape::k_bytes;
    wait(k_empty + at.stage() * 8, at.parity() ^ 1);
    arrive_expecting(full, Shape::k_bytes);
#pragma unroll
    for (int p = 0; p < panels; ++p)
      load_box(to + p * keys * 128, &args.k, (args.size.NH + kv) * HD + 64 * p, tile * keys, job.b, full);
    ++at.n;
  }
  // In halves of 64 keys, each `panels` panels.
  __device__ __forceinline__ void load_v(At& at, const Job<Shape>& job, int kv, int tile) const {
    const uint32_t full = v_full + at.stage() * 8, to = memory + Shape::at_v + at.stage() * Shape::k_bytes;
    wait(v_empty + at.stage() * 8, at.parity() ^ 1);
    arrive_expecting(full, Shape::k_bytes);
#pragma unroll
    for (int i = 0; i < keys / 64 * panels; ++i)
      load_box(to + i * panel_64, &args.v, (args.size.NH + args.size.NKV + kv) * HD + i % panels * 64,
               tile * keys + i / panels * 64, job.b, full);
    ++at.n;
  }
  __device__ __forceinline__ void produce() const {
    At k, v;
    uint32_t q_parity = 1;  // of the phase before the first: over
    int number = blockIdx.x;
    while (number < args.jobs) {
      const int next = int(gridDim.x) + atomicAdd(args.ticket, 1);  // looked at in the next round
      const Job<Shape> job(number, args);
      const int kv = job.h / (args.size.NH / args.size.NKV);
      load_k(k, job, kv, job.tiles - 1);
      wait(q_empty, q_parity);
      q_parity ^= 1;
      *job_slot = number;
      arrive_expecting(q_full, Shape::q_bytes);
#pragma unroll
      for (int p = 0; p < panels; ++p)
        load_box(memory + p * Shape::queries * 128, &args.q, job.h * HD + 64 * p, job.q0, job.b, q_full);
        // In the order in which they are wanted.
#pragma unroll 1
      for (int tile = job.tiles - 2; tile >= 0; --tile) {
        load_k(k, job, kv, tile);
        load_v(v, job, kv, tile + 1);
      }
      load_v(v, job, kv, 0);
      number = next;
    }
    wait(q_empty, q_parity);
    *job_slot = -1;
    arrive(q_full);
  }

  // ---- a consumer ----

  static __device__ __forceinline__ void release(uint32_t barrier) {
    if (threadIdx.x % 32 == 0) arrive(barrier);
  }
  // Turns go round the consumers. Barriers 1, 2, 3: it is this consumer's turn.
  static __device__ __forceinline__ void take_turn(int consumer) { sync_threads(1 + consumer, 2 * warpgroup); }
  static __device__ __forceinline__ void pass_turn(int consumer) {
    arrive_threads(consumer + 1 == Shape::consumers ? 1 : 2 + consumer, 2 * warpgroup);
  }

  __device__ __forceinline__ void ask_scores(float (&s)[keys / 8][4], uint64_t q, uint32_t stage) const {
    const uint64_t k0 = descriptor(memory + Shape::at_k) + stage * (Shape::k_bytes / 16);
#pragma unroll
    for (int d = 0; d < HD / 16; ++d)
      multiply<false, false>(s, q + d / 4 * (Shape::queries * 128 / 16) + d % 4 * step_k<false>(),
                             k0 + d / 4 * (keys * 128 / 16) + d % 4 * step_k<false>(), d > 0);
    commit_products();
  }
  __device__ __forceinline__ void ask_outputs(float (&o)[HD / 8][4], const uint32_t (&p)[keys / 16][4],
                                              uint32_t stage) const {
    const uint64_t v0 = descriptor(memory + Shape::at_v) + stage * (Shape::k_bytes / 16);
#pragma unroll
    for (int k = 0; k < keys / 16; ++k)
      multiply<true>(o, p[k], v0 + k / 4 * (panels * panel_64 / 16) + k % 4 * step_k<true>(), 1);
    commit_products();
  }

  // Scores become probabilities. A lane holds rows g and g + 8 of its warp's 16, and a quarter of their columns; the
  // four lanes of a row agree on the maximum and sum their own columns only until the end. The maximum is kept in
  // units of log2.
  __device__ __forceinline__ void soften(float (&s)[keys / 8][4], float (&maximum)[2], float (&sum)[2],
                                         float (&correction)[2]) const {
    const float scale = args.scale_log2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = fmaxf(s[0][2 * r], s[1][2 * r]), b = fmaxf(s[0][2 * r + 1], s[1][2 * r + 1]);
#pragma unroll
      for (int n = 2; n < keys / 8; ++n) a = fmaxf(a, s[n][2 * r]), b = fmaxf(b, s[n][2 * r + 1]);
      float largest = fmaxf(a, b);
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const float before = maximum[r], now = fmaxf(before, largest * scale);
      correction[r] = exp2_of(before - now);  // 0 at the first tile
      maximum[r] = now;
      float total[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < keys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p = exp2_of(fmaf(s[n][2 * r + e], scale, -now));
          s[n][2 * r + e] = p;
          total[e] += p;
        }
      sum[r] = fmaf(sum[r], correction[r], total[0] + total[1]);
    }
  }
  static __device__ __forceinline__ void round(uint32_t (&p)[keys / 16][4], const float (&s)[keys / 8][4]) {
#pragma unroll
    for (int k = 0; k < keys / 16; ++k) attention_tile::as_operand(p[k], s[2 * k], s[2 * k + 1]);
  }

  __device__ __forceinline__ void consume(int consumer) const {
    const int thread = threadIdx.x % warpgroup, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const uint64_t q = descriptor(memory + consumer * panel_64);
    At at;  // the next tile: of K, and later of V
    uint32_t q_parity = 0;
    for (;; q_parity ^= 1) {
      wait(q_full, q_parity);
      const int number = __shfl_sync(~0u, lane == 0 ? *job_slot : 0, 0);  // read by the thread that will release it
      if (number < 0) break;
      if (lane == 0) job_slot[threadIdx.x / 32] = number;  // for later: registers are short (warps of consumers: 4-15)
      int own, passes, past;  // tiles that these queries see, and pass; first score's key less query, at the diagonal
      {
        const Job<Shape> job(number, args);
        const int row0 = job.q0 + 64 * consumer;  // first query
        own = min(job.tiles, (row0 + 63) / keys + 1), passes = job.tiles - own;
        past = (own - 1) * keys + 2 * t - row0 - 16 * warp - g;
      }
      // Where the last tile is in the future of these queries, they pass: the stage goes back once it is full (never
      // before: its phases would be miscounted), and so does the turn.
#pragma unroll 1
      for (; passes > 0; --passes) {
        wait(k_full + at.stage() * 8, at.parity());
        release(k_empty + at.stage() * 8);
        take_turn(consumer);
        pass_turn(consumer);
        wait(v_full + at.stage() * 8, at.parity());
        release(v_empty + at.stage() * 8);
        ++at.n;
      }

      float s[keys / 8][4], o[HD / 8][4], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, correction[2];
      uint32_t p[keys / 16][4];
#pragma unroll
      for (int n = 0; n < HD / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][e] = 0;
      wait(k_full + at.stage() * 8, at.parity());
      fence_products();
      ask_scores(s, q, at.stage());
      wait_products<0>();
      hold(s);
      release(k_empty + at.stage() * 8);
      ++at.n;
      if (own == 1) release(q_empty);
#pragma unroll
      for (int n = 0; n < keys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (past + 8 * n + e % 2 - 8 * (e / 2) > 0) s[n][e] = -INFINITY;
      soften(s, maximum, sum, correction);
      round(p, s);

#pragma unroll 1
      for (int tile = own - 2; tile >= 0; --tile) {
        hold(p), hold(o);
        const At v = at.before();
        wait(k_full + at.stage() * 8, at.parity());
        take_turn(consumer);
        fence_products();
        ask_scores(s, q, at.stage());
        wait(v_full + v.stage() * 8, v.parity());
        fence_products();  // after the loop of that wait ptxas would put one itself (C7519)
        ask_outputs(o, p, v.stage());
        pass_turn(consumer);
        wait_products<1>();
        hold(s);
        release(k_empty + at.stage() * 8);
        if (tile == 0) release(q_empty);
        soften(s, maximum, sum, correction);
        // The exponentials belong here, while P V runs; but ptxas, free to order what depends on nothing, waits first.
        // A loop stops it: this one, for what has long arrived (and cannot be overwritten: the stage is still ours).
        hold(s);
        wait(v_full + v.stage() * 8, v.parity());
        wait_products<0>();
        hold(o);
        release(v_empty + v.stage() * 8);
        ++at.n;
#pragma unroll
        for (int n = 0; n < HD / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[n][e] *= correction[e / 2];
        round(p, s);
      }
      hold(p), hold(o);
      const At v = at.before();
      wait(v_full + v.stage() * 8, v.parity());
      fence_products();
      ask_outputs(o, p, v.stage());

      __syncwarp();
      const Job<Shape> job(job_slot[threadIdx.x / 32], args);
      const int row0 = job.q0 + 64 * consumer;
      float inverse[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = sum[r];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        inverse[r] = 1.0f / total;
        const int query = row0 + 16 * warp + 8 * r + g;
        if (t == 0 && query < args.size.T)
          args.lse[(int64_t(job.b) * args.size.T + query) * args.size.NH + job.h] = fmaf(maximum[r], ln_2, logf(total));
      }
      wait_products<0>();
      hold(o);
      release(v_empty + v.stage() * 8);
      store(o, inverse, job, row0, consumer);
    }
    if (thread == 0) wait_stores_read<0>();
  }

  // Through this consumer's panels in shared memory; the store leaves out rows past T.
  __device__ __forceinline__ void store(float (&o)[HD / 8][4], const float (&inverse)[2], const Job<Shape>& job,
                                        int row0, int consumer) const {
    const uint32_t to = memory + Shape::at_o + consumer * Shape::o_bytes;
    if (threadIdx.x % warpgroup == 0) wait_stores_read<0>();
    sync_threads(4 + consumer, warpgroup);
    auto four_of = [&](uint32_t(&four)[4], int n) {
      four[0] = pack_bf16(o[n][0] * inverse[0], o[n][1] * inverse[0]);
      four[1] = pack_bf16(o[n][2] * inverse[1], o[n][3] * inverse[1]);
      four[2] = pack_bf16(o[n + 1][0] * inverse[0], o[n + 1][1] * inverse[0]);
      four[3] = pack_bf16(o[n + 1][2] * inverse[1], o[n + 1][3] * inverse[1]);
    };
    store_panels<HD>(&args.o, to, four_of, job.h * HD, row0, job.b, args.size.T, 4 + consumer);
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::threads, 1) forward_kernel(const __grid_constant__ ForwardArguments args) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const Forward<Shape> forward(args, shared);
  const int role = threadIdx.x / warpgroup;
  if (role == 0) {
    give_registers<Shape::producer_registers>();
    if (threadIdx.x == 0) forward.produce();
  } else {
    take_registers<Shape::consumer_registers>();
    if (role == Shape::consumers) arrive_threads(1, 2 * warpgroup);  // the first turn
    forward.consume(role - 1);
  }
#endif
}

template <int HD>
void run_forward(GpuBase& dev, bf16* o, float* lse, void* scratch, const bf16* qk, const bf16* qkv, int64_t B,
                 int64_t T, HeadShape heads) {
  using Shape = ForwardShape<HD>;
  const int64_t jobs = ceil_div(T, Shape::queries) * B * heads.n_head;
  if (jobs == 0) return;
  ForwardArguments args{tensor_map(qk, B, T, heads.qk_width(), T * heads.qk_width(), Shape::queries),
                        tensor_map(qk, B, T, heads.qk_width(), T * heads.qk_width(), Shape::keys),
                        tensor_map(qkv, B, T, heads.qkv_width(), T * heads.qkv_width(), 64),
                        tensor_map(o, B, T, heads.q_width(), T * heads.q_width(), 64),
                        lse,
                        static_cast<int*>(scratch),
                        Sizes(B, T, heads),
                        int(attention_tile::head_section(B, T, heads)),
                        int(jobs),
                        float(log2_e / std::sqrt(double(HD)))};
  CUDA_CHECK(cudaMemsetAsync(scratch, 0, sizeof(int), dev.stream));
  launch(dev, forward_kernel<Shape>, dim3(unsigned(std::min<int64_t>(jobs, dev.multiprocessors))), Shape::threads,
         Shape::shared, args);
}
bool usable(const GpuBase& dev, HeadShape heads) {
  return !dev.portable && (heads.head_dim == 64 || heads.head_dim == 128) && hopper::usable(dev);
}

void forward(GpuBase& dev, bf16* o, float* lse, void* scratch, const bf16* qk, const bf16* qkv, int64_t B, int64_t T,
             HeadShape heads) {
  if (heads.head_dim == 64)
    run_forward<64>(dev, o, lse, scratch, qk, qkv, B, T, heads);
  else
    run_forward<128>(dev, o, lse, scratch, qk, qkv, B, T, heads);
}

}  // namespace attention_hopper
