// A grouped matrix product on tensor cores, for every GPU since Ampere: the pipeline that the six expert products
// share. experts_epilogue.cuh says what they read and how each finishes a tile.
//
// One product is many: expert e has its own rows [offsets[e], offsets[e+1]) and its own weight. How many rows an expert
// has is known on the device alone, so nothing here depends on the host knowing it. The output is cut into tiles of
// BM x BN, tiles never cross experts, and a fixed number of thread blocks, as many as run at once, walk over all tiles:
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
//
// Both operands are row-major matrices in global memory; an operand's tile is a window of such a matrix, and from step
// to step it moves along the row (the reduction runs along the row: x in x W^T) or down (it runs over rows: both
// operands of a weight gradient). Where a window reaches beyond the matrix, or beyond the rows of its expert, it holds
// zeros, and what stands there is not read: it belongs to somebody else and may be NaN, and 0 * NaN is NaN.
#pragma once
#include "llmc/cuda_common.cuh"

namespace portable {

constexpr int BK = 64;  // reduction elements of a step; 128 bytes
constexpr int WM = 64;  // a warp's part of a tile
constexpr int WN = 64;
constexpr int prefetch_steps = 4;  // how long before the end of a tile what finishing reads is asked for
constexpr int m_group = 16;        // tiles of neighbouring rows that share a weight tile while it is in the L2 cache

// A tile of BM x BN, finished by warps of 64 x 64 each; `blocks` of them share a multiprocessor.
template <int BM_, int BN_, int blocks_>
struct TileShape {
  static constexpr int BM = BM_, BN = BN_, blocks = blocks_;
  static constexpr int warps_n = BN / WN, threads = (BM / WM) * warps_n * 32;
  static constexpr int stage_bytes = (BM + BN) * BK * 2;
};

// Which way a window moves through its matrix, and whether its rows are tokens found through row_slot.
struct Access {
  bool down, gathered;
};

// Division by a number known at launch, a multiplication and a shift: n / d = n * m >> s, where m is 2^s / d rounded up
// and s is 31 + log2(d) rounded up. Exact for n < 2^31: m * d exceeds 2^s by less than d <= 2^(s-31), so n * m / 2^s
// exceeds n / d by less than 1 / d.
struct Divisor {
  uint32_t multiplier;
  int shift = 31;
  explicit Divisor(int64_t d) {
    while (int64_t(1) << (shift - 31) < d) ++shift;
    multiplier = uint32_t(((int64_t(1) << shift) + d - 1) / d);
  }
  __device__ uint32_t operator()(uint32_t n) const { return uint32_t(uint64_t(n) * multiplier >> shift); }
};

// What every product tells the pipeline. Either the expert's rows are rows of the output, N columns are made from a
// reduction of length `depth`; or they are what is summed over, and the output is the expert's own M x N.
struct Operands {
  const bf16 *a, *b;
  const int32_t *offsets, *row_slot;  // row_slot null: row r is read at r
  Divisor slots;                      // of a token, K; 1 where row_slot is null
  int E;
  int M, N, depth;
};

// ---- instructions ----

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// 16 bytes from global to shared memory, or 16 zero bytes without looking at the source.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
// Four 8x8 matrices; lane l gives the address of row l%8 of matrix l/8 and receives elements (l/4, 2*(l%4) + {0,1}) of
// each matrix, or of its transpose.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}
// c (16x8, fp32) += a (16x16) * b (16x8). Lane l holds rows l/4 and l/4 + 8 and columns 2*(l%4) + {0,1} of c.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- which tile ----

struct WorkTile {
  int expert, m0, n0;      // m0: first row of the output tile, counted over all experts where rows are output rows
  int first_row, row_end;  // rows of the plan that the tile reads: [first_row, row_end), at most BM of them as output
  int steps;
};

// The tiles of one block, in order. `starts` (E+1) in shared memory: number of tiles before those of each expert.
template <class Product>
class TileWalk {
  using Shape = typename Product::Shape;
  const int* starts_;
  int tile_ = blockIdx.x, expert_ = 0;

 public:
  // Fills starts: one warp scans the experts, 32 at a time.
  static __device__ void count(int* starts, const Operands& p) {
    if (threadIdx.x < 32) {
      int lane = threadIdx.x, before = 0;
      if (lane == 0) starts[0] = 0;
      for (int e0 = 0; e0 < p.E; e0 += 32) {
        int e = e0 + lane, rows = e < p.E ? p.offsets[e + 1] - p.offsets[e] : 0;
        int tiles_m =
            Product::sums_rows ? (rows > 0 ? int(ceil_div(p.M, Shape::BM)) : 0) : (rows + Shape::BM - 1) / Shape::BM;
        int sum = tiles_m * int(ceil_div(p.N, Shape::BN));
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          int other = __shfl_up_sync(~0u, sum, step);
          if (lane >= step) sum += other;
        }
        if (e < p.E) starts[e + 1] = before + sum;
        before += __shfl_sync(~0u, sum, 31);
      }
    }
    __syncthreads();
  }

  __device__ explicit TileWalk(const int* starts) : starts_(starts) {}

  // The next tile; false after the last. Tiles of an expert are ordered so that those in flight at a time form a patch
  // of about equally many rows and columns, which reads the least: m_group row tiles by as many columns as it takes.
  __device__ bool next(WorkTile& t, const Operands& p) {
    if (tile_ >= starts_[p.E]) return false;
    while (tile_ >= starts_[expert_ + 1]) ++expert_;
    int begin = __ldg(p.offsets + expert_), end = __ldg(p.offsets + expert_ + 1);
    int local = tile_ - starts_[expert_], tiles_n = (p.N + Shape::BN - 1) / Shape::BN;
    int tiles_m = ((Product::sums_rows ? p.M : end - begin) + Shape::BM - 1) / Shape::BM;
    int first_m = local / (m_group * tiles_n) * m_group, group = min(m_group, tiles_m - first_m);
    local -= first_m * tiles_n;
    t.expert = expert_, t.n0 = local / group * Shape::BN, t.m0 = (first_m + local % group) * Shape::BM;
    t.first_row = begin, t.row_end = end;
    if constexpr (Product::sums_rows) {
      t.steps = (end - begin + BK - 1) / BK;
    } else {
      t.first_row = t.m0 += begin;
      t.steps = (p.depth + BK - 1) / BK;
    }
    tile_ += gridDim.x;
    return true;
  }
};

// ---- from global to shared memory ----

// The windows of one operand, as one thread sees them: it copies the same few 16-byte chunks of every window.
//
// In shared memory chunk c of row r is at place c ^ (r % 8) of the row. ldmatrix reads the same chunk of eight
// neighbouring rows at a time; unswizzled these would all lie in the same four banks.
template <int extent, Access access, int threads>
class Window {
  static constexpr int rows = access.down ? BK : extent, chunks = (access.down ? extent : BK) / 8;
  static constexpr int pass = threads / chunks;  // rows that all threads copy at once
  static constexpr bool indexed = access.gathered && !access.down;
  static_assert(pass % 8 == 0 && 32 % pass == 0 && rows % pass == 0, "swizzle and gather count on it");

  const char* at_ = nullptr;  // this thread's first chunk of the window; gathered: of the matrix
  int rows_left_ = 0;         // rows from that chunk on before the zeros begin
  int chunks_left_ = 0;       // positive: the chunk is within the row
  int next_row_ = 0;          // gathered, moving down: where the window after the next begins
  uint32_t index_[indexed ? rows / pass : access.gathered ? BK / 32 : 1] = {};  // see settle()
  int32_t next_[access.gathered && access.down ? BK / 32 : 1] = {};             // entries of row_slot, read ahead

 public:
  static constexpr int copies = rows / pass;  // of a thread
  static constexpr int bytes = rows * chunks * 16;

  // Where in a stage this thread writes its first chunk; the others follow at a constant distance.
  static __device__ uint32_t place() {
    int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
    return row * chunks * 16 + ((chunk ^ (row & 7)) << 4);
  }

  // The first window of a tile starts at (first_row, first_chunk) of the matrix `data` with `width` chunks a row.
  __device__ void enter(const bf16* data, int width, int64_t first_row, int rows_left, int first_chunk,
                        const Operands& p) {
    int row = threadIdx.x / chunks, chunk = first_chunk + threadIdx.x % chunks;
    rows_left_ = rows_left - row, chunks_left_ = width - chunk;
    at_ = reinterpret_cast<const char*>(data) + int64_t(chunk) * 16;
    if constexpr (!access.gathered) {
      at_ += (first_row + row) * width * 16;
    } else if constexpr (indexed) {
#pragma unroll
      for (int i = 0; i < copies; ++i) {
        int r = int(first_row) + row + i * pass;
        index_[i] = i * pass < rows_left_ ? (p.row_slot ? __ldg(p.row_slot + r) : r) : 0;
      }
    } else {
      next_row_ = int(first_row);
      read_ahead(int(first_row) + rows_left, p);
    }
  }
  // There is no further tile: all that is copied from now on is zeros. Nobody reads them, but a step stays a step.
  __device__ void close() { rows_left_ = 0; }
  // Gathered rows are found in two steps, so that nobody waits for row_slot: enter() or an earlier call started to read
  // it, and a good many instructions later this turns what came into the place of the rows.
  //   moving along rows  index_[i] is the distance, in chunks, of row i of this thread; set once a tile
  //   moving down        lane l of each warp holds the token of window rows l and l + 32; set every step
  __device__ void settle(bool new_tile, int width, int row_end, const Operands& p) {
    if constexpr (indexed) {
      if (new_tile)
#pragma unroll
        for (int i = 0; i < copies; ++i) index_[i] = p.slots(index_[i]) * uint32_t(width);
    } else if constexpr (access.gathered) {
#pragma unroll
      for (int i = 0; i < BK / 32; ++i) index_[i] = p.slots(uint32_t(next_[i]));
      read_ahead(row_end, p);
    }
  }
  __device__ void copy(int i, uint32_t to, int width) const {
    bool valid = i * pass < rows_left_ && chunks_left_ > 0;
    const char* from;
    if constexpr (!access.gathered) {
      from = at_ + int64_t(width) * (i * pass * 16);
    } else if constexpr (indexed) {
      from = at_ + int64_t(index_[i]) * 16;
    } else {
      int lane = threadIdx.x / chunks + i * pass % 32;
      from = at_ + int64_t(__shfl_sync(~0u, index_[i * pass / 32], lane)) * width * 16;
    }
    copy_async(to + i * pass * chunks * 16, from, valid);
  }
  __device__ void advance(int width) {
    if constexpr (access.down) {
      rows_left_ -= BK;
      if constexpr (!access.gathered) at_ += int64_t(width) * (BK * 16);
    } else {
      chunks_left_ -= chunks, at_ += chunks * 16;
    }
  }

 private:
  __device__ void read_ahead(int row_end, const Operands& p) {
#pragma unroll
    for (int i = 0; i < BK / 32; ++i) {
      int r = next_row_ + i * 32 + threadIdx.x % 32;
      next_[i] = r < row_end ? (p.row_slot ? __ldg(p.row_slot + r) : r) : 0;
    }
    next_row_ += BK;
  }
};

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
    a_.enter(p.a, a_width_, t.first_row, t.row_end - t.first_row, Product::a_access.down ? t.m0 / 8 : 0, p);
    if constexpr (Product::sums_rows)
      b_.enter(p.b, b_width_, t.first_row, t.row_end - t.first_row, t.n0 / 8, p);
    else if constexpr (Product::b_access.down)  // a weight, summed over its rows
      b_.enter(p.b, b_width_, int64_t(t.expert) * p.depth, p.depth, t.n0 / 8, p);
    else
      b_.enter(p.b, b_width_, int64_t(t.expert) * p.N + t.n0, p.N - t.n0, 0, p);
  }
  __device__ void fill(int part, const Operands& p) {
    if (part == 0) a_.settle(new_tile_, a_width_, tile_.row_end, p), b_.settle(new_tile_, b_width_, tile_.row_end, p);
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
template <int extent, bool down, bool is_a>
class Fragments {
  static constexpr int row_bytes = (down ? extent : BK) * 2;
  uint32_t lane_at_;  // address of this lane's row of matrices (0, 0)

 public:
  __device__ Fragments(uint32_t ring, int warp) {
    // Of the two bits of the matrix's number one counts 8 rows of shared memory, the other one chunk.
    int lane = threadIdx.x % 32, low = lane / 8 % 2, high = lane / 16;
    int row = lane % 8 + 8 * (is_a != down ? low : high), chunk = is_a != down ? high : low;
    lane_at_ =
        ring + ((chunk ^ (lane % 8)) << 4) + (down ? row * row_bytes + warp * WM * 2 : (row + warp * WM) * row_bytes);
  }
  // Load i (16 rows or columns each) of sub-step k. The swizzle is an exclusive or, and the bits it touches are clear
  // in everything but lane_at_, so a later chunk is another exclusive or.
  __device__ void load(uint32_t (&r)[4], uint32_t read, int i, int k) const {
    uint32_t at = lane_at_ + read;
    load_matrices<down>(r, down ? (at ^ (i << 5)) + k * 16 * row_bytes : (at ^ (k << 5)) + i * 16 * row_bytes);
  }
};

// A warp's 64 x 64 of the tile: [16 rows][8 columns][lane's four]
using Accumulators = float[WM / 16][WN / 8][4];

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
  Fragments<Shape::BM, Product::a_access.down, true> load_a(ring, warp_m);
  Fragments<Shape::BN, Product::b_access.down, false> load_b(ring + Shape::BM * BK * 2, warp_n);
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
    Accumulators acc = {};
    load(0, read, 0);
    for (int step = 0; step < tile.steps; ++step) {
      if constexpr (requires { p.prefetch(tile); }) {
        if (step == max(0, tile.steps - prefetch_steps)) p.prefetch(tile);
      }
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
    p.finish(acc, tile, warp_m, warp_n);
  }
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
