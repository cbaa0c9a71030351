// A grouped matrix product for Hopper: the pipeline that the six expert products share there. experts_epilogue.cuh says
// what they read and how each finishes a tile; tiles and windows are those of experts_tiles.cuh.
//
// A block has three warpgroups and a multiprocessor to itself. The first copies, the other two multiply and finish:
//
//   producer   for each tile of this block, for each step of 64 along the reduction:
//                wait until the stage of the ring is empty
//                ask TMA for the operand that lies in rows as it is wanted (one thread)
//                copy the gathered operand by cp.async, 16 bytes at a time (all 128 threads)
//                either way the bytes arrive at the stage's `full` barrier by themselves
//   consumers  for each tile:
//                for each step: wait until the stage is full, multiply, and call the stage before it empty
//                finish the tile: activation, rounding, stores
//
// While a tile is finished the tensor cores should work on another. Two ways to share a block's tiles:
//   ping-pong    each consumer has tiles of its own, in turn: one multiplies while the other finishes
//   cooperative  each consumer has half the rows of every tile: larger tiles, which read less per multiplication, but
//                nobody multiplies while both finish. For long reductions.
//
// What limits a pipeline like this is how fast the L2 cache feeds the multiprocessors: about 41 bytes a cycle each, while
// the tensor cores use up 48 at 128 x 256 and 64 at 128 x 128. Two blocks in a cluster therefore take neighbouring
// tiles and read the operand that these share, which is not the gathered one, only once: each asks TMA for
// half of it, to be delivered to both. A stage is empty when the consumers of both blocks say so.
#pragma once
#include "moe/experts_hopper_kernels.h"
#include "moe/experts.h"
#include "moe/experts_staged.cuh"

namespace hopper {

enum class Consumers { ping_pong, cooperative };

template <int BM_, int BN_, Consumers consumers_, int cluster_>
struct TileShape {
  static constexpr int BM = BM_, BN = BN_, cluster = cluster_;
  static constexpr Consumers consumers = consumers_;
  static constexpr bool ping_pong = consumers == Consumers::ping_pong;
  static constexpr int rows = ping_pong ? BM : BM / 2;  // of a tile that a consumer multiplies
  static constexpr int stage_bytes = (BM + BN) * BK * 2;
  static constexpr int threads = 3 * warpgroup;
  static_assert(rows % 64 == 0 && BN % 64 == 0 && BM <= 256 && BN <= 256);
  static_assert(BK / cluster % 8 == 0 && BM / cluster % 8 == 0 && BN / cluster % 8 == 0,
                "parts begin where swizzles do");
};
// The tiles that there are, in the order of tile_names (experts_hopper_kernels.h).
using Narrow = TileShape<128, 128, Consumers::ping_pong, 2>;
using Medium = TileShape<128, 192, Consumers::ping_pong, 2>;
using Wide = TileShape<128, 256, Consumers::cooperative, 2>;
using Tall = TileShape<256, 128, Consumers::cooperative, 2>;
// Whether so many columns may be cut into 192 where 256 is the other choice. Ping-pong with the smaller tile gains about a
// twentieth; so not where its last tile reaches further beyond the columns than that.
inline bool suits_medium(int64_t columns) {
  const int64_t by_192 = ceil_div(columns, 192) * 192, by_256 = ceil_div(columns, 256) * 256;
  return by_192 - by_256 < by_256 / 20;
}
// Of y = a W2^T, and of dx_rows = dh W13.
inline Tile down_tile(const ExpertShape& s) { return s.F > 2048 ? wide : medium; }
inline Tile up_input_tile(const ExpertShape& s) { return s.F > 2048 || !suits_medium(s.C) ? wide : medium; }

constexpr int max_experts = 512;

template <class Product>
struct Arguments {
  Product product;
  TensorMap a, b;       // of the operands that are not gathered
  TensorMap staged[3];  // of what is finished by way of shared memory (experts_staged.cuh)
};

// Stages are filled and emptied in the same order for ever. Position n of that order is use n / stages of stage
// n % stages.
template <int stages>
struct Position {
  uint32_t stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  __device__ void advance(uint32_t n) {
    stage += n % stages, parity ^= n / stages & 1;
    if (stage >= stages) stage -= stages, parity ^= 1;
  }
};

template <class Product>
class Pipeline {
  using Shape = typename Product::Shape;
  static constexpr int consumer_warps = 8;
  static constexpr int staging_bytes = consumer_warps * Product::warp_bytes;
  static constexpr int other_bytes = 3072;  // barriers, and the starts of TileWalk
  static constexpr int stages = (shared_bytes - other_bytes - staging_bytes) / Shape::stage_bytes;
  static_assert(stages >= 3);
  static_assert(stages * 16 + consumer_warps * Product::warp_slots * 8 + (max_experts + 1) * 4 <= other_bytes);
  static constexpr Access a_access = Product::a_access, b_access = Product::b_access;
  static constexpr bool gathers = a_access.gathered || b_access.gathered;
  static constexpr int a_bytes = Shape::BM * BK * 2;
  static constexpr int filling_threads = gathers ? warpgroup : 0;  // that arrive when their copies have landed
  static constexpr int cluster = Shape::cluster;
  static constexpr int emptying_warps = (Shape::ping_pong ? 4 : 8) * cluster;
  static constexpr bool share_b = !b_access.gathered;

  const Arguments<Product>& args_;
  const Product& p_;
  uint32_t ring_, staging_, full_, empty_, arrived_;
  const int* starts_;

 public:
  // Of a thread; together 64512 of the multiprocessor's 65536. Gathering needs some, and accumulators come first.
  static constexpr int producer_registers = !gathers ? 40 : Shape::rows * Shape::BN > 128 * 128 ? 40 : 56;
  static constexpr int consumer_registers = (64512 / warpgroup - producer_registers) / 2;
  static constexpr int tiles_bytes = stages * Shape::stage_bytes + staging_bytes;
  static constexpr int shared = tiles_bytes + other_bytes;

  __device__ Pipeline(const Arguments<Product>& args, unsigned char* shared)
      : args_(args),
        p_(args.product),
        ring_(shared_address(shared)),
        staging_(ring_ + stages * Shape::stage_bytes),
        full_(ring_ + tiles_bytes),
        empty_(full_ + stages * 8),
        arrived_(empty_ + stages * 8) {
    int* starts = reinterpret_cast<int*>(shared + tiles_bytes + stages * 16 + consumer_warps * Product::warp_slots * 8);
    starts_ = starts;
    if (threadIdx.x == 0) {
      for (int s = 0; s < stages; ++s)
        init_barrier(full_ + s * 8, 1 + filling_threads), init_barrier(empty_ + s * 8, emptying_warps);
      for (int s = 0; s < consumer_warps * Product::warp_slots; ++s) init_barrier(arrived_ + s * 8, 1);
      fence_barriers();
      if (!a_access.gathered) prefetch_map(&args.a);
      if (!b_access.gathered) prefetch_map(&args.b);
    }
    TileWalk<Product>::count(starts, p_);  // and a barrier
    if constexpr (cluster > 1) sync_cluster();
  }

  __device__ void produce() const {
    if (!gathers && threadIdx.x > 0) return;
    Window<Shape::BM, a_access, warpgroup> a;
    Window<Shape::BN, b_access, warpgroup> b;
    const int a_width = (a_access.down ? p_.M : p_.depth) / 8, b_width = (b_access.down ? p_.N : p_.depth) / 8;
    const uint32_t place = a.place();
    TileWalk<Product> walk(starts_);
    Position<stages> at;
    WorkTile t, next;
    bool more = walk.next(next, p_);
    auto look_up = [&](int first_row, int row_end) {
      a.look_up(first_row, row_end, p_), b.look_up(first_row, row_end, p_);
    };
    auto settle = [&] { a.settle(a_width, p_), b.settle(b_width, p_); };
    if (more) look_up(next.first_row, next.row_end);
    while (more) {
      t = next;
      more = walk.next(next, p_);
      const int rows = t.row_end - t.first_row;
      // TMA knows where a tensor ends, not where an expert does. Where both operands go over an expert's
      // rows, the last window therefore begins early enough to end with the expert, and the rows that it repeats are
      // zeros in the gathered operand; an expert of fewer rows than a window is copied by threads.
      const bool short_expert = Product::sums_rows && rows < BK;
      auto window_start = [&](int step) {
        return Product::sums_rows && !short_expert ? min(step * BK, rows - BK) : step * BK;
      };
      // Where rows are looked up ahead: of the next tile, or of the step after the next where each has its own.
      auto look_ahead = [&](int step) {
        if (Product::sums_rows && step + 1 < t.steps)
          look_up(t.first_row + window_start(step + 1), t.row_end);
        else if (more)
          look_up(next.first_row, next.row_end);
      };
      if constexpr (a_access.gathered) a.enter(p_.a, a_width, 0, rows, a_access.down ? t.m0 / 8 : 0);
      if constexpr (b_access.gathered) b.enter(p_.b, b_width, 0, rows, t.n0 / 8);
      settle(), look_ahead(0);
      for (int step = 0; step < t.steps; ++step, at.advance()) {
        const uint32_t to = ring_ + at.stage * Shape::stage_bytes, full = full_ + at.stage * 8;
        wait(empty_ + at.stage * 8, at.parity ^ 1);
        if (threadIdx.x == 0) {
          constexpr int bytes =
              (a_access.gathered ? 0 : a_bytes) + (b_access.gathered ? 0 : Shape::stage_bytes - a_bytes);
          arrive_expecting(full, short_expert ? 0 : bytes);
        }
        if (threadIdx.x % 32 == 0 && !short_expert) load_boxes(t, window_start(step), to, full);
        if constexpr (Product::sums_rows) {
          if (short_expert) copy_short(t, to + place);
          if (const int by = step * BK - window_start(step); by > 0) {
            if constexpr (a_access.gathered) a.shift(by);
            if constexpr (b_access.gathered) b.shift(by);
          }
        }
        if constexpr (a_access.gathered) fill(a, to + place, a_width, rows, step, a_access.down ? t.m0 : 0);
        if constexpr (b_access.gathered) fill(b, to + a_bytes + place, b_width, rows, step, t.n0);
        if constexpr (gathers) arrive_after_copies(full);
        if (Product::sums_rows && step + 1 < t.steps) settle(), look_ahead(step + 1);
      }
    }
  }

  __device__ void consume(int consumer) const {
    TileWalk<Product> walk(starts_);
    Position<stages> at;
    const int part_row = Shape::ping_pong ? 0 : consumer * Shape::rows, warp = threadIdx.x / 32 - 4;
    const uint32_t slot = staging_ + warp * Product::warp_bytes;
    float acc[Shape::rows / 64][Shape::BN / 8][4];
    WorkTile t;
    bool more = walk.next(t, p_);
    if (Shape::ping_pong && consumer == 1 && more) at.advance(t.steps), more = walk.next(t, p_);
    if constexpr (Product::looks_ahead) {
      typename Product::Finish finish(p_, args_.staged, slot, part_row, arrived_ + warp * Product::warp_slots * 8);
      if (more) finish.start(t);
      while (more) {
        WorkTile next;
        more = (!Shape::ping_pong || walk.next(next, p_)) && walk.next(next, p_);  // skips the other consumer's
        finish.begin(t);
        multiply_tile(acc, t, at, consumer);
        finish(acc, t, next, more);
        if (Shape::ping_pong) at.advance(t.steps);  // all tiles have as many
        t = next;
      }
    } else {
      typename Product::Finish finish{p_, args_.staged, slot, part_row};
      while (more) {
        multiply_tile(acc, t, at, consumer);
        finish(acc, t);
        more = walk.next(t, p_);
        if (Shape::ping_pong && more) at.advance(t.steps), more = walk.next(t, p_);
      }
    }
    if (Product::warp_bytes > 0 && first_lane())
      wait_stores_read<0>();  // shared memory outlives the stores that read it
  }

 private:
  __device__ __forceinline__ void multiply_tile(float (&acc)[Shape::rows / 64][Shape::BN / 8][4], const WorkTile& t,
                                                Position<stages>& at, int consumer) const {
    const int first_row = Shape::ping_pong ? 0 : consumer * Shape::rows;
    const uint64_t a0 = descriptor(ring_ + first_row * 128), b0 = descriptor(ring_ + a_bytes);
    // In turn, for another reason too: nobody may wait for a stage two uses ahead.
    if constexpr (Shape::ping_pong) sync_threads(1 + consumer, 2 * warpgroup);
    uint32_t before = at.stage;
    for (int step = 0; step < t.steps; ++step, at.advance()) {
      wait(full_ + at.stage * 8, at.parity);
      if constexpr (gathers) fence_async_proxy();
      const uint64_t stage = uint64_t(at.stage * (Shape::stage_bytes / 16));
      fence_products();
#pragma unroll
      for (int k = 0; k < BK / 16; ++k)
#pragma unroll
        for (int i = 0; i < Shape::rows / 64; ++i)
          multiply<a_access.down, b_access.down>(acc[i],
                                                 a0 + stage + i * (panel_bytes / 16) + k * step_k<a_access.down>(),
                                                 b0 + stage + k * step_k<b_access.down>(), step > 0 || k > 0);
      commit_products();
      wait_products<1>();
      if (step > 0) release(before);
      before = at.stage;
      if constexpr (Product::has_prefetch)
        if (step == max(0, t.steps - prefetch_steps))
          p_.template prefetch<Shape::rows, Shape::BN, warpgroup>(t, t.m0 + first_row, threadIdx.x % warpgroup);
    }
    if constexpr (Shape::ping_pong) arrive_threads(2 - consumer, 2 * warpgroup);
    wait_products<0>();
#pragma unroll
    for (auto& strip : acc) hold(strip);
    release(before);
  }
  // Windows that TMA brings, k elements along the reduction. Of the shared operand each block of a cluster
  // asks for its part, half of the rows that lie in shared memory, for all blocks. The warps that are there share the
  // panels among them.
  __device__ void load_boxes(const WorkTile& t, int k, uint32_t to, uint32_t full) const {
    if constexpr (!a_access.gathered) {
      if constexpr (a_access.down)
        load_panels<Shape::BM, !share_b>(to, &args_.a, t.m0, t.first_row + k, 0, full);
      else
        load_rows<Shape::BM, !share_b>(to, &args_.a, k, t.first_row, 0, full);
    }
    if constexpr (!b_access.gathered) {
      if constexpr (Product::sums_rows)
        load_panels<Shape::BN, share_b>(to + a_bytes, &args_.b, t.n0, t.first_row + k, 0, full);
      else if constexpr (b_access.down)
        load_panels<Shape::BN, share_b>(to + a_bytes, &args_.b, t.n0, k, t.expert, full);
      else
        load_rows<Shape::BN, share_b>(to + a_bytes, &args_.b, k, t.n0, t.expert, full);
    }
  }
  template <int extent, bool shared_operand>
  __device__ void load_rows(uint32_t to, const TensorMap* map, int column, int row, int batch, uint32_t full) const {
    if (threadIdx.x == 0) load_part<extent, shared_operand>(to, map, column, row, batch, full);
  }
  template <int extent, bool shared_operand>
  __device__ void load_panels(uint32_t to, const TensorMap* map, int column, int row, int batch, uint32_t full) const {
    constexpr int warps = gathers ? warpgroup / 32 : 1;
#pragma unroll 1
    for (int panel = threadIdx.x / 32; panel < extent / 64; panel += warps)
      load_part<BK, shared_operand>(to + panel * panel_bytes, map, column + panel * 64, row, batch, full);
  }
  template <int rows, bool shared_operand>
  __device__ void load_part(uint32_t to, const TensorMap* map, int column, int row, int batch, uint32_t full) const {
    if constexpr (shared_operand && cluster > 1) {
      const int part = cluster_rank() * (rows / cluster);
      load_box_multicast(to + part * 128, map, column, row + part, batch, full, (1 << cluster) - 1);
    } else {
      load_box(to, map, column, row, batch, full);
    }
  }
  // The only step of a weight gradient over fewer rows than a window, of the operand that is not gathered.
  __device__ void copy_short(const WorkTile& t, uint32_t to) const {
    constexpr int extent = a_access.gathered ? Shape::BN : Shape::BM;
    Window<extent, Access{.down = true, .gathered = false}, warpgroup> window;
    const int width = (a_access.gathered ? p_.N : p_.M) / 8;
    window.enter(a_access.gathered ? p_.b : p_.a, width, t.first_row, t.row_end - t.first_row,
                 (a_access.gathered ? t.n0 : t.m0) / 8);
    if (a_access.gathered) to += a_bytes;
#pragma unroll 4
    for (int i = 0; i < window.copies; ++i) window.copy(i, to, width);
  }
  template <class GatherWindow>
  __device__ void fill(GatherWindow& window, uint32_t to, int width, int rows, int step, int first_column) const {
    const bool along = !Product::sums_rows;  // which way the window moves
    if (window.is_whole(along ? rows : rows - step * BK, width - (along ? step * BK : first_column) / 8)) {
#pragma unroll
      for (int i = 0; i < window.copies; ++i) window.template copy<true>(i, to, width);
    } else {
#pragma unroll
      for (int i = 0; i < window.copies; ++i) window.copy(i, to, width);
    }
    window.advance(width);
  }
  __device__ void release(uint32_t stage) const {
    if constexpr (cluster > 1) {
      if (threadIdx.x % 32 < cluster) arrive_at(empty_ + stage * 8, threadIdx.x % 32);
    } else {
      if (threadIdx.x % 32 == 0) arrive(empty_ + stage * 8);
    }
  }
};

template <class Product>
__global__ void __launch_bounds__(Product::Shape::threads, 1)
    grouped_product(const __grid_constant__ Arguments<Product> args) {
#if HOPPER_CODE
  extern __shared__ __align__(1024) unsigned char shared[];
  const Pipeline<Product> pipeline(args, shared);
  const int role = threadIdx.x / warpgroup;
  if (role == 0) {
    give_registers<Pipeline<Product>::producer_registers>();
    pipeline.produce();
    if constexpr (Product::sums_rows)  // while the others finish
      args.product.write_empty(int64_t(blockIdx.x) * warpgroup + threadIdx.x, int64_t(gridDim.x) * warpgroup);
  } else {
    take_registers<Pipeline<Product>::consumer_registers>();
    if (Product::Shape::ping_pong && role == 2) arrive_threads(1, 2 * warpgroup);  // the first turn
    pipeline.consume(role - 1);
  }
  if constexpr (Product::Shape::cluster > 1) sync_cluster();  // the other block may still arrive at our barriers
#endif
}

// The operands of `product` are matrices of s.R rows, or of s.E experts, which follow one another, or, where it is not 0,
// b_stride elements apart (b a part of each expert's weight).
template <class Product>
void run(GpuBase& dev, const Product& p, const ExpertShape& s, int64_t b_stride = 0) {
  using Shape = typename Product::Shape;
  if (s.R == 0) return;
  if (s.E > max_experts) fail("experts: ", s.E, " experts, and Hopper's kernels take at most ", max_experts);
  constexpr Access a = Product::a_access, b = Product::b_access;
  Arguments<Product> args{p, {}, {}, {}};
  if constexpr (!a.gathered) {
    const int64_t width = a.down ? p.M : p.depth;
    args.a = tensor_map(p.a, 1, s.R, width, s.R * width, (a.down ? BK : Shape::BM) / (b.gathered ? Shape::cluster : 1));
  }
  if constexpr (!b.gathered) {
    const int64_t width = b.down ? p.N : p.depth;
    const int64_t batches = Product::sums_rows ? 1 : s.E, rows = Product::sums_rows ? s.R : b.down ? p.depth : p.N;
    args.b = tensor_map(p.b, batches, rows, width, b_stride ? b_stride : rows * width,
                        (b.down ? BK : Shape::BN) / Shape::cluster);
  }
  Product::describe(args.staged, p, s);
  launch_clusters(dev, grouped_product<Product>, Shape::cluster,
                  dim3(unsigned(dev.multiprocessors / Shape::cluster * Shape::cluster)), dim3(Shape::threads),
                  size_t(Pipeline<Product>::shared), args);
}

}  // namespace hopper
