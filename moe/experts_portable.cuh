// A grouped matrix product on tensor cores, for every GPU since Ampere: the pipeline that the six expert products
// share. experts_epilogue.cuh says what they read and how each finishes a tile.
//
// Tiles and windows are those of experts_tiles.cuh. Each block walks over its tiles:
//
//   prefix sums over experts of their numbers of tiles           once a block
//   for tile = blockIdx.x, blockIdx.x + gridDim.x, ...:
//     for each step of BK = 64 along the reduction:              the same sequence of steps, twice:
//       copy a BM x BK tile of A and a BK x BN tile of B         ... `stages - 1` steps ahead, by cp.async
//       multiply them                                            ... by mma.sync, out of shared memory
//     finish the tile: activation, rounding, stores
//
// The copies do not stop where a tile ends: while a tile is being finished, the first steps of the next one arrive.
// Gathering costs no extra pass: a copy of 16 bytes can come from any address, so row r of the tile is read at token
// row_slot[r] / K.
#pragma once
#include "moe/experts_epilogue.cuh"

namespace portable {

using namespace grouped;

constexpr int WM = 64;  // a warp's part of a tile
constexpr int WN = 64;

// A tile of BM x BN, finished by warps of 64 x 64 each; `blocks` of them share a multiprocessor.
template <int BM_, int BN_, int blocks_>
struct TileShape {
  static constexpr int BM = BM_, BN = BN_, blocks = blocks_, cluster = 1;
  static constexpr int warps_n = BN / WN, threads = (BM / WM) * warps_n * 32;
  static constexpr int stage_bytes = (BM + BN) * BK * 2;
};

// ---- the leading half ----

// The leading half of the pipeline: fills stage after stage of the ring. A step is filled in parts, so that the copies
// are spread between the matrix instructions of the step that is being computed.
template <class Product>
class Producer {
  using Shape = typename Product::Shape;
  static constexpr int threads = Shape::threads;
  using A = Window<Shape::BM, Product::a_access, threads>;
  using B = Window<Shape::BN, Product::b_access, threads>;
  TileWalk<Product> walk_;
  WorkTile tile_ = {};
  int steps_left_ = 0;
  bool new_tile_ = false;
  A a_;
  B b_;
  uint32_t a_place_, b_place_, ring_bytes_, write_ = 0;
  int a_width_, b_width_;  // chunks of a row

 public:
  static constexpr int parts = 3;

  __device__ Producer(const int* starts, uint32_t ring, uint32_t ring_bytes, const Operands& p)
      : walk_(starts), a_place_(ring + A::place()), b_place_(ring + A::bytes + B::place()), ring_bytes_(ring_bytes) {
    a_width_ = (Product::a_access.down ? p.M : p.depth) / 8, b_width_ = (Product::b_access.down ? p.N : p.depth) / 8;
  }
  // Starts a step: enters the next tile where the last one has been filled.
  __device__ void begin(const Operands& p) {
    new_tile_ = false;
    if (steps_left_ > 0) return;
    if (!walk_.next(tile_, p)) return a_.close(), b_.close();
    const WorkTile& t = tile_;
    new_tile_ = true, steps_left_ = t.steps;
    a_.enter(p.a, a_width_, t.first_row, t.row_end - t.first_row, Product::a_access.down ? t.m0 / 8 : 0);
    if constexpr (Product::sums_rows)
      b_.enter(p.b, b_width_, t.first_row, t.row_end - t.first_row, t.n0 / 8);
    else if constexpr (Product::b_access.down)  // a weight, summed over its rows
      b_.enter(p.b, b_width_, int64_t(t.expert) * p.depth, p.depth, t.n0 / 8);
    else
      b_.enter(p.b, b_width_, int64_t(t.expert) * p.N + t.n0, p.N - t.n0, 0);
    a_.look_up(t.first_row, t.row_end, p), b_.look_up(t.first_row, t.row_end, p);
  }
  __device__ void fill(int part, const Operands& p) {
    if (part == 0 && (Product::sums_rows || new_tile_)) {
      a_.settle(a_width_, p), b_.settle(b_width_, p);
      if constexpr (Product::sums_rows) {
        const int next_row = tile_.first_row + (tile_.steps - steps_left_ + 1) * BK;
        a_.look_up(next_row, tile_.row_end, p), b_.look_up(next_row, tile_.row_end, p);
      }
    }
    constexpr int copies = A::copies + B::copies;
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      if (i * parts / copies != part) continue;
      if (i < A::copies)
        a_.copy(i, a_place_ + write_, a_width_);
      else
        b_.copy(i - A::copies, b_place_ + write_, b_width_);
    }
  }
  __device__ void end() {
    a_.advance(a_width_), b_.advance(b_width_), --steps_left_;
    write_ += Shape::stage_bytes;
    if (write_ == ring_bytes_) write_ = 0;
    commit_copies();
  }
};

// ---- from shared memory to the tensor cores ----

// Fragments of one operand for a warp: 64 rows (of A) or columns (of B) by 16 of the reduction, as four loads of four
// 8x8 matrices. mma wants pairs of neighbours along the reduction in a register. Where the window moves along the row
// these are neighbours in memory too; where it moves down, ldmatrix transposes on the way.
//   A: matrices 0, 1 hold rows 0-7, 8-15 with reduction 0-7; 2, 3 the same rows with reduction 8-15
//   B: matrices 0, 1 hold columns 0-7 with reduction 0-7, 8-15; 2, 3 columns 8-15
template <bool down, bool is_a>
class Fragments {
  uint32_t lane_at_;  // address of this lane's row of matrices (0, 0)

 public:
  __device__ Fragments(uint32_t ring, int warp) {
    // Of the two bits of the matrix's number one counts 8 rows of shared memory, the other one chunk.
    int lane = threadIdx.x % 32, low = lane / 8 % 2, high = lane / 16;
    int row = lane % 8 + 8 * (is_a != down ? low : high), chunk = is_a != down ? high : low;
    lane_at_ = ring + ((chunk ^ (lane % 8)) << 4) + row * 128 + warp * WM * 128;  // moving down: a panel a warp
  }
  // Load i (16 rows or columns each) of sub-step k. The swizzle is an exclusive or, and the bits it touches are clear
  // in everything but lane_at_, so a later chunk is another exclusive or.
  __device__ void load(uint32_t (&r)[4], uint32_t read, int i, int k) const {
    uint32_t at = lane_at_ + read;
    load_matrices<down>(r, down ? (at ^ (i << 5)) + k * 16 * 128 : (at ^ (k << 5)) + i * 16 * 128);
  }
};

// ---- the kernel ----

__device__ __forceinline__ void wait_for_next_stage(int stages) {
  // All but the newest stages - 2 groups have arrived. The instruction wants a constant.
  if (stages == 4)
    wait_copies<2>();
  else if (stages == 3)
    wait_copies<1>();
  else
    wait_copies<0>();
  __syncthreads();
}

// Shared memory: `stages` stages of A and B tile, then the starts of TileWalk.
template <class Product>
__global__ void __launch_bounds__(Product::Shape::threads, Product::Shape::blocks)
    grouped_product(const __grid_constant__ Product p, int stages) {
  using Shape = typename Product::Shape;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = shared_address(shared), ring_bytes = stages * Shape::stage_bytes;
  int* starts = reinterpret_cast<int*>(shared + ring_bytes);
  TileWalk<Product>::count(starts, p);

  Producer<Product> producer(starts, ring, ring_bytes, p);
  for (int s = 0; s < stages - 1; ++s) {
    producer.begin(p);
#pragma unroll
    for (int part = 0; part < Producer<Product>::parts; ++part) producer.fill(part, p);
    producer.end();
  }

  const int warp_m = threadIdx.x / 32 / Shape::warps_n, warp_n = threadIdx.x / 32 % Shape::warps_n;
  Fragments<Product::a_access.down, true> load_a(ring, warp_m);
  Fragments<Product::b_access.down, false> load_b(ring + Shape::BM * BK * 2, warp_n);
  uint32_t a[2][WM / 16][4], b[2][WN / 16][4];
  auto load = [&](int buffer, uint32_t read, int k) {
#pragma unroll
    for (int i = 0; i < WN / 16; ++i) load_b.load(b[buffer][i], read, i, k);
#pragma unroll
    for (int i = 0; i < WM / 16; ++i) load_a.load(a[buffer][i], read, i, k);
  };

  TileWalk<Product> walk(starts);
  WorkTile tile;
  uint32_t read = 0;
  wait_for_next_stage(stages);
  while (walk.next(tile, p)) {
    float acc[WM / 16][WN / 8][4] = {};
    load(0, read, 0);
    for (int step = 0; step < tile.steps; ++step) {
      if constexpr (Product::has_prefetch)
        if (step == max(0, tile.steps - prefetch_steps))
          p.template prefetch<Shape::BM, Shape::BN, Shape::threads>(tile, tile.m0, threadIdx.x);
          // Sub-steps of 16: while the tensor cores work on one, the fragments of the next are loaded. The last sub-step
          // loads from the next stage. Once every warp is past the barrier there, nobody reads the stage before it any
          // more, and the step that follows may fill it again.
#pragma unroll
      for (int k = 0; k < BK / 16; ++k) {
        if (k == 0)
          producer.begin(p);
        else
          producer.fill(k - 1, p);
        if (k == BK / 16 - 1) {
          producer.end();
          wait_for_next_stage(stages);
          read += Shape::stage_bytes;
          if (read == ring_bytes) read = 0;
        }
        load((k + 1) % 2, read, (k + 1) % (BK / 16));
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
#pragma unroll
          for (int j = 0; j < WN / 8; ++j)
            multiply_add(acc[i][j], a[k % 2][i], b[k % 2][j / 2][j % 2 * 2], b[k % 2][j / 2][j % 2 * 2 + 1]);
      }
    }
    p.finish(acc, Place<16>(tile, warp_m * WM, warp_n * WN), tile);
  }
  if constexpr (Product::sums_rows)
    p.write_empty(int64_t(blockIdx.x) * Shape::threads + threadIdx.x, int64_t(gridDim.x) * Shape::threads);
  wait_copies<0>();  // the zeros behind the last tile: shared memory is not ours for longer
}

// As many stages as the GPU has shared memory for, up to four.
template <class Product>
void run(GpuBase& dev, const Product& p) {
  using Shape = typename Product::Shape;
  int device, per_block, per_multiprocessor, reserved;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  CUDA_CHECK(cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  CUDA_CHECK(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device));
  int starts_bytes = (p.E + 1) * int(sizeof(int)), blocks = Shape::blocks, stages = 0;
  for (; blocks > 0 && stages < 2; --blocks)
    stages = (std::min(per_block, per_multiprocessor / blocks - reserved) - starts_bytes) / Shape::stage_bytes;
  ++blocks;
  if (stages < 2) fail("experts: this GPU has too little shared memory for ", p.E, " experts");
  stages = std::min(stages, 4);
  launch(dev, grouped_product<Product>, dim3(dev.multiprocessors * blocks), dim3(Shape::threads),
         size_t(stages) * Shape::stage_bytes + starts_bytes, p, stages);
}

}  // namespace portable
