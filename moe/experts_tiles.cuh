// Tiles of a grouped matrix product: what both pipelines (experts_portable.cuh, experts_hopper.cuh) walk over and read.
//
// One product is many: expert e has its own rows [offsets[e], offsets[e+1]) and its own weight. How many rows an expert
// has is known on the device alone, so nothing here depends on the host knowing it. The output is cut into tiles of
// BM x BN, tiles never cross experts, and a fixed number of thread blocks, as many as run at once, walk over all tiles.
//
// Both operands are row-major matrices in global memory; an operand's tile is a window of such a matrix, and from step
// to step it moves along the row (the reduction runs along the row: x in x W^T) or down (it runs over rows: both
// operands of a weight gradient). Where a window reaches beyond the matrix, or beyond the rows of its expert, it holds
// zeros, and what stands there is not read: it belongs to somebody else and may be NaN, and 0 * NaN is NaN.
#pragma once
#include "llmc/cuda_mma.cuh"

namespace grouped {

constexpr int BK = 64;                 // reduction elements of a step; 128 bytes
constexpr int panel_bytes = BK * 128;  // 64 rows of 128 bytes
constexpr int prefetch_steps = 4;      // how long before the end of a tile what finishing reads is asked for
constexpr int m_group = 16;  // tiles of neighbouring rows that share a weight tile while it is in the L2 cache

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

// ---- which tile ----

struct WorkTile {
  int expert, m0, n0;      // m0: first row of the output tile, counted over all experts where rows are output rows
  int first_row, row_end;  // rows of the plan that the tile reads: [first_row, row_end), at most BM of them as output
  int steps;
};

// The tiles of one block, in order. `starts` (E+1) in shared memory: number of units before those of each expert.
//
// A unit is a tile, or, for a cluster of blocks, a tile for each of them: neighbours that read the same tile of one
// operand, the one that is not gathered. Where an expert ends within a unit some of its tiles lie beyond: all their rows
// or columns are outside.
template <class Product>
class TileWalk {
  using Shape = typename Product::Shape;
  static constexpr int cluster = Shape::cluster;
  static constexpr bool share_b = !Product::b_access.gathered;
  static constexpr int UM = Shape::BM * (share_b ? cluster : 1), UN = Shape::BN * (share_b ? 1 : cluster);
  const int* starts_;
  int unit_ = blockIdx.x / cluster, expert_ = 0;

 public:
  // Fills starts: one warp scans the experts, 32 at a time.
  static __device__ void count(int* starts, const Operands& p) {
    if (threadIdx.x < 32) {
      int lane = threadIdx.x, before = 0;
      if (lane == 0) starts[0] = 0;
      for (int e0 = 0; e0 < p.E; e0 += 32) {
        int e = e0 + lane, rows = e < p.E ? p.offsets[e + 1] - p.offsets[e] : 0;
        int tiles_m = Product::sums_rows ? (rows > 0 ? int(ceil_div(p.M, UM)) : 0) : (rows + UM - 1) / UM;
        int sum = tiles_m * int(ceil_div(p.N, UN));
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

  // The next tile; false after the last. Units of an expert are ordered so that those in flight at a time form a patch
  // of about equally many rows and columns, which reads the least: m_group row tiles by as many columns as it takes.
  __device__ bool next(WorkTile& t, const Operands& p) {
    if (unit_ >= starts_[p.E]) return false;
    while (unit_ >= starts_[expert_ + 1]) ++expert_;
    constexpr int most = m_group * Shape::BM / UM;
    int begin = __ldg(p.offsets + expert_), end = __ldg(p.offsets + expert_ + 1);
    int local = unit_ - starts_[expert_], units_n = (p.N + UN - 1) / UN;
    int units_m = ((Product::sums_rows ? p.M : end - begin) + UM - 1) / UM;
    int first_m = local / (most * units_n) * most, group = min(most, units_m - first_m);
    local -= first_m * units_n;
    t.expert = expert_, t.n0 = local / group * UN, t.m0 = (first_m + local % group) * UM;
    if constexpr (cluster > 1) (share_b ? t.m0 : t.n0) += blockIdx.x % cluster * (share_b ? Shape::BM : Shape::BN);
    t.first_row = begin, t.row_end = end;
    if constexpr (Product::sums_rows) {
      t.steps = (end - begin + BK - 1) / BK;
    } else {
      t.first_row = t.m0 += begin;
      t.steps = (p.depth + BK - 1) / BK;
    }
    unit_ += gridDim.x / cluster;
    return true;
  }
};

// ---- from global to shared memory ----

// The windows of one operand, as one of `threads` threads sees them: it copies the same few 16-byte chunks of each.
//
// In shared memory a window is one panel of `extent` rows of 128 bytes (moving along), or extent / 64 panels of 64 rows
// (moving down), one after the other. Chunk c of a panel's row r is at place c ^ (r % 8) of the row: ldmatrix and the
// tensor cores read the same chunk of eight neighbouring rows at a time, which unswizzled would all lie in the same
// four banks.
template <int extent, Access access, int threads>
class Window {
  static constexpr int rows = access.down ? BK : extent, panels = access.down ? extent / 64 : 1;
  static constexpr int pass = threads / 8, passes = rows / pass;  // rows of a panel that all threads copy at once
  static constexpr bool indexed = access.gathered && !access.down;
  static_assert(pass % 8 == 0 && 32 % pass == 0 && rows % pass == 0, "swizzle and gather count on it");

  const char* at_ = nullptr;  // this thread's first chunk of the window; gathered: of the matrix
  int rows_left_ = 0;         // rows from that chunk on before the zeros begin
  int chunks_left_ = 0;       // chunks of the matrix from that chunk on
  int rows_skipped_ = 0;      // rows from that chunk on that are zeros before the others
  static constexpr int indices = indexed ? passes : access.gathered ? BK / 32 : 1;
  uint32_t index_[indices] = {};  // see settle()
  int32_t next_[indices] = {};    // entries of row_slot, read ahead

 public:
  static constexpr int copies = panels * passes;  // of a thread
  static constexpr int bytes = panels * rows * 128;

  // Where in a stage this thread writes its first chunk; the others follow at a constant distance.
  static __device__ uint32_t place() {
    int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    return row * 128 + ((chunk ^ (row & 7)) << 4);
  }

  // The first window of a tile starts at (first_row, first_chunk) of the matrix `data` with `width` chunks a row.
  __device__ void enter(const bf16* data, int width, int64_t first_row, int rows_left, int first_chunk) {
    int row = threadIdx.x / 8, chunk = first_chunk + threadIdx.x % 8;
    rows_left_ = rows_left - row, chunks_left_ = width - chunk, rows_skipped_ = 0;
    at_ = reinterpret_cast<const char*>(data) + int64_t(chunk) * 16;
    if constexpr (!access.gathered) at_ += (first_row + row) * width * 16;
  }
  // The window begins `by` rows earlier, at rows that were there before and are zeros now. look_up() is told by the
  // caller. Only for the last window of a tile.
  __device__ void shift(int by) { rows_left_ += by, rows_skipped_ = by - int(threadIdx.x / 8); }
  // There is no further tile: all that is copied from now on is zeros. Nobody reads them, but a step stays a step.
  __device__ void close() { rows_left_ = 0; }
  // Gathered rows are found in two steps, so that nobody waits for row_slot: look_up() starts to read it for the window
  // that begins at first_row, and a good many instructions later settle() turns what came into the place of the rows.
  //   moving along rows  once a tile. index_[i] is the distance, in chunks, of row i of this thread
  //   moving down        every step. Lane l of each warp holds that of window rows l and l + 32
  __device__ void look_up(int first_row, int row_end, const Operands& p) {
    if constexpr (access.gathered)
#pragma unroll
      for (int i = 0; i < indices; ++i) {
        int r = first_row + (indexed ? threadIdx.x / 8 + i * pass : threadIdx.x % 32 + i * 32);
        next_[i] = r < row_end ? (p.row_slot ? __ldg(p.row_slot + r) : r) : 0;
      }
  }
  __device__ void settle(int width, const Operands& p) {
    if constexpr (access.gathered)
#pragma unroll
      for (int i = 0; i < indices; ++i) index_[i] = p.slots(uint32_t(next_[i])) * uint32_t(width);
  }
  // Whether nothing of the window is to be zero: the first row and chunk beyond it are not beyond the matrix.
  __device__ static bool is_whole(int rows_left, int chunks_left) {
    return rows_left >= rows && chunks_left >= panels * 8;
  }
  // Copy i of this thread, 0 <= i < copies, into the window that begins at `to` - place(). whole: see is_whole().
  template <bool whole = false>
  __device__ void copy(int i, uint32_t to, int width) const {
    const int panel = i % panels, row = i / panels * pass;
    const char* from;
    if constexpr (!access.gathered) {
      from = at_ + int64_t(width) * (row * 16);
    } else if constexpr (indexed) {
      from = at_ + uint64_t(index_[i]) * 16;
    } else {
      int lane = threadIdx.x / 8 + row % 32;
      from = at_ + uint64_t(__shfl_sync(~0u, index_[row / 32], lane)) * 16;
    }
    to += panel * panel_bytes + row * 128, from += panel * 128;
    if constexpr (whole)
      copy_async(to, from);
    else
      copy_async(to, from, row < rows_left_ && row >= rows_skipped_ && chunks_left_ > panel * 8);
  }
  __device__ void advance(int width) {
    if constexpr (access.down) {
      rows_left_ -= BK;
      if constexpr (!access.gathered) at_ += int64_t(width) * (BK * 16);
    } else {
      chunks_left_ -= 8, at_ += 128;
    }
  }
};

}  // namespace grouped
