// Token embedding on the GPU. Backward without floating-point atomics: positions are sorted by token (a stable radix
// sort made of bucket passes) and cut into runs of 32, a block each, which sums the tokens that begin in its run. The
// list of a frequent token is cut into pieces of 64 positions and a rest; a second kernel adds their sums in order.
#include "llmc/embedding.h"

#include "llmc/cuda_bucket.cuh"
#include "llmc/cuda_mma.cuh"

namespace {

constexpr int run = 32, piece = 64, digit_bits = 8;

template <class Real>
__global__ void copy_rows(Real* out, const int32_t* tokens, const Real* table, int64_t N, int64_t C, int64_t V,
                          bool packed, DeviceStatus* status, int layer) {
  int64_t n = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (n >= N) return;
  int lane = threadIdx.x % 32;
  int64_t id = tokens[n];
  if (id < 0 || id >= V) {
    if (lane == 0) report_fault(status, layer, DeviceStatus::token_out_of_range, n, id);
    id = 0;
  }
  constexpr int W = Pack<Real>::n;
  const Real* from = table + id * C;
  Real* to = out + n * C;
  if (packed)
    for (int64_t c = lane * W; c < C; c += 32 * W)
      *reinterpret_cast<Pack<Real>*>(to + c) = *reinterpret_cast<const Pack<Real>*>(from + c);
  else
    for (int64_t c = lane; c < C; c += 32) to[c] = from[c];
}

// A position and its token; tokens outside the vocabulary count as V, the last.
struct alignas(8) Sorted {
  int32_t token, position;
};
// The items of one pass of the sort: those of the pass before, or (null) the positions.
struct Items {
  const int32_t* tokens;
  const Sorted* sorted;
  int V;
  __device__ Sorted operator[](int64_t i) const {
    if (sorted) return sorted[i];
    int id = tokens[i];
    return {id >= 0 && id < V ? id : V, int32_t(i)};
  }
};
struct DigitOf {
  Items items;
  int shift;
  __device__ int operator()(int64_t i) const { return items[i].token >> shift & ((1 << digit_bits) - 1); }
};
struct PlaceItem {
  Sorted* to;
  Items items;
  __device__ void operator()(int64_t i, const InBucket& digit) const { to[digit.first + digit.rank] = items[i]; }
};

// W neighbouring columns of T, read and written 16 bytes at a time where they are as many.
template <class T, int W>
struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) Columns {
  T v[W];
  __device__ static Columns load(const T* p) { return *reinterpret_cast<const Columns*>(p); }
  __device__ void store(T* p) const {
    if constexpr (std::is_same_v<T, float> && W % 4 == 0) {
#pragma unroll
      for (int j = 0; j < W; j += 4)  // a struct's store would be cut into four
        *reinterpret_cast<float4*>(p + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
    } else {
      *reinterpret_cast<Columns*>(p) = *this;
    }
  }
};
template <class T, int W>
__device__ __forceinline__ void add(Columns<float, W>& sum, const Columns<T, W>& a) {
#pragma unroll
  for (int j = 0; j < W; ++j) sum.v[j] += to_float(a.v[j]);
}
template <class G, int W>
__device__ __forceinline__ void add_to_gradient(G* at, Columns<G, W> old, const Columns<float, W>& sum) {
#pragma unroll
  for (int j = 0; j < W; ++j) old.v[j] = from_float<G>(to_float(old.v[j]) + sum.v[j]);
  old.store(at);
}
// Into shared memory, 16 bytes without waiting for them.
template <class T, int W>
__device__ __forceinline__ void copy_columns(Columns<T, W>* to, const T* from) {
  if constexpr (sizeof(*to) == 16)
    copy_async(shared_address(to), from);
  else
    *to = Columns<T, W>::load(from);
}

// A warp's share of a row in shared memory: 32 * W columns of dout and, if they complete a sum, of the gradient. Lanes
// copy W neighbours of dout. They add and write `group` neighbours at a time, 16 bytes of the gradient, so that those
// of all lanes lie side by side there too.
template <class Real, class G, int W>
struct Stage {
  static constexpr int group = sizeof(G) * W > 16 ? int(16 / sizeof(G)) : W, parts = W / group;
  Columns<Real, W> value[32];
  Columns<G, group> old[parts][32];
};
constexpr int stages = 6;  // of a warp: the row that it adds and those on their way
constexpr int sum_warps = 8;

// Sums of the tokens whose positions begin in a run. Where all rows of an aligned piece of the order go on with the
// token before it, the list is cut: the block of the piece's first run sums them and the rest, if it has no piece of
// its own. So a block sums 127 rows at the most.
//
// Whole tokens go to the gradient. A piece goes to pieces (runs, C), by the block's run, and left (runs) says whose it
// is: `token` for a list's first piece, -1 - token for the next ones, V for none.
//
// Most rows of a large vocabulary occur once in a batch: what they add to is asked for together with dout's rows. Each
// warp keeps five rows on their way, whatever becomes of those before.
template <class Real, class G, int W>
__global__ void __launch_bounds__(sum_warps * 32, 3)
    sum_runs(G* gradient, float* pieces, int32_t* left, const Sorted* order, const Real* dout, int64_t N, int64_t C,
             int V) {
  extern __shared__ uint4 stage_memory[];               // (warps, stages) Stage
  constexpr int window = 2 * piece;                     // from the run's first position on
  __shared__ int position[window], tokens[1 + window];  // tokens: also the one before
  const int64_t first = int64_t(blockIdx.x) * run;
  for (int j = threadIdx.x; j <= window; j += blockDim.x) {
    int64_t i = first + j - 1;
    Sorted s = i >= 0 && i < N ? order[i] : Sorted{i < 0 ? -1 : V, 0};
    tokens[j] = s.token;
    if (j > 0) position[j - 1] = s.position;
  }
  __syncthreads();
  const int* token = tokens + 1;  // ascending
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, before = token[-1], last = token[run - 1];

  // The rows to sum, [begin, end) of the window: without those that an earlier block sums, and those of no token.
  int begin = __popc(__ballot_sync(~0u, token[lane] == before)), live = 0, list_end = run;
#pragma unroll
  for (int j = 0; j < window; j += 32) {
    live += __popc(__ballot_sync(~0u, token[j + lane] < V));
    if (j >= run) list_end += __popc(__ballot_sync(~0u, token[j + lane] == last));
  }
  const int in_piece = int(first % piece), next_piece = piece - in_piece;
  const bool goes_on = last < V && list_end >= next_piece + piece;  // in a piece of its own
  const bool middle = in_piece == 0 && before < V && token[piece - 1] == before;
  if (middle) begin = 0;
  const int end = min(live, goes_on ? next_piece : list_end);
  const bool any = begin < min(run, live), leaves = middle || goes_on;
  if (threadIdx.x == 0 && blockIdx.y == 0)
    left[blockIdx.x] = !any || !leaves ? V : middle ? -1 - token[end - 1] : token[end - 1];
  const int width = int(C), column = (int(blockIdx.y * (blockDim.x / 32)) + warp) * 32 * W;
  if (!any || column >= width) return;

  using Row = Stage<Real, G, W>;
  constexpr int group = Row::group, parts = Row::parts;
  Row* rows = reinterpret_cast<Row*>(stage_memory) + warp * stages;
  const bool copies = column + lane * W < width;
  const Real* dout_here = dout + column + lane * W;
  const int mine = column + lane * group;  // the lane's columns of part j: `group` from mine + j * 32 * group on
  bool adds[parts];
#pragma unroll
  for (int j = 0; j < parts; ++j) adds[j] = mine + j * 32 * group < width;
  auto row_at = [&](auto* first_row, int row) { return first_row + uint64_t(uint32_t(row)) * uint32_t(width); };
  auto completes = [&](int i) { return i + 1 == end || token[i + 1] != token[i]; };
  auto to_piece = [&](int i) { return leaves && i + 1 == end; };
  auto request = [&](int i, Row& to) {
    if (i < end) {
      if (copies) copy_columns(&to.value[lane], row_at(dout_here, position[i]));
      if (completes(i) && !to_piece(i)) {
        const G* from = row_at(gradient + mine, token[i]);
#pragma unroll
        for (int j = 0; j < parts; ++j)
          if (adds[j]) copy_columns(&to.old[j][lane], from + j * 32 * group);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) request(begin + i, rows[i]);
  Columns<float, group> sum[parts] = {};
  for (int i = begin, at = 0; i < end; ++i) {
    wait_copies<stages - 2>();
    __syncwarp();  // all lanes' copies of row i; and all have added row i - 1, whose place is the next one's
    request(i + stages - 1, rows[at == 0 ? stages - 1 : at - 1]);
    const Row& row = rows[at];
    at = at + 1 == stages ? 0 : at + 1;
    const Real* value = reinterpret_cast<const Real*>(row.value) + lane * group;
#pragma unroll
    for (int j = 0; j < parts; ++j) add(sum[j], Columns<Real, group>::load(value + j * 32 * group));
    if (!completes(i)) continue;
    if (to_piece(i)) {
      float* to = row_at(pieces + mine, int(blockIdx.x));
#pragma unroll
      for (int j = 0; j < parts; ++j)
        if (adds[j]) sum[j].store(to + j * 32 * group);
    } else {
      G* to = row_at(gradient + mine, token[i]);
#pragma unroll
      for (int j = 0; j < parts; ++j)
        if (adds[j]) add_to_gradient(to + j * 32 * group, row.old[j][lane], sum[j]);
    }
#pragma unroll
    for (int j = 0; j < parts; ++j) sum[j] = {};
  }
}

// Adds the pieces of the tokens whose first one some run of `joined` left.
constexpr int joined = 8;
template <class G, int W>
__global__ void __launch_bounds__(256)
    join_pieces(G* gradient, const float* pieces, const int32_t* left, int64_t runs, int64_t C, int V) {
  constexpr int step = piece / run;  // runs from one piece to the next
  int64_t first = int64_t(blockIdx.x) * joined;
  int lane = threadIdx.x % 32, here = lane < joined && first + lane < runs ? left[first + lane] : V;
  int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * W;
  for (unsigned begun = __ballot_sync(~0u, here >= 0 && here < V); begun; begun &= begun - 1) {
    int which = __ffs(int(begun)) - 1, id = __shfl_sync(~0u, here, which);
    int64_t b = first + which, next = (b / step + 1) * step, end = next;
    // The other pieces are [next, end) by `step`: each thread looks at one. Where not all find theirs, those that do
    // are the first.
    for (int found = int(blockDim.x); found == int(blockDim.x); end += int64_t(found) * step) {
      int64_t r = end + int64_t(threadIdx.x) * step;
      found = __syncthreads_count(r < runs && left[r] == -1 - id);
    }
    if (c >= C) continue;
    G* at = gradient + int64_t(id) * C + c;
    auto old = Columns<G, W>::load(at);
    auto sum = Columns<float, W>::load(pieces + b * C + c);
    constexpr int batch = 16;  // loads in flight
    for (int64_t r0 = next; r0 < end; r0 += batch * step) {
      Columns<float, W> part[batch];
#pragma unroll
      for (int j = 0; j < batch; ++j)
        if (r0 + j * step < end) part[j] = Columns<float, W>::load(pieces + (r0 + j * step) * C + c);
#pragma unroll
      for (int j = 0; j < batch; ++j)
        if (r0 + j * step < end) add(sum, part[j]);
    }
    add_to_gradient(at, old, sum);
  }
}

int passes(int64_t V) {
  int n = 1;
  while ((V >> (n * digit_bits)) > 0) ++n;
  return n;
}
// Scratch: two orders of the positions, then the counts of the sort, then what runs left, then their pieces. Each
// begins at a multiple of 16 bytes.
struct Scratch {
  int64_t N, C;
  static int64_t aligned(int64_t bytes) { return ceil_div(bytes, 16) * 16; }
  int64_t order_bytes() const { return aligned(N * int64_t(sizeof(Sorted))); }
  int64_t counts() const { return 2 * order_bytes(); }
  int64_t left() const { return counts() + aligned(int64_t(bucket_scratch_bytes(N, 1 << digit_bits))); }
  int64_t pieces() const { return left() + aligned(ceil_div(N, run) * int64_t(sizeof(int32_t))); }
  int64_t bytes() const { return pieces() + ceil_div(N, run) * C * int64_t(sizeof(float)); }
};

}  // namespace

template <class Device>
void embedding_forward(Device& dev, typename Device::Real* out, const int32_t* tokens,
                       const typename Device::Real* table, int64_t N, int64_t C, int64_t V) {
  using Real = typename Device::Real;
  launch(dev, copy_rows<Real>, dim3(unsigned(ceil_div(N, 8))), 256, 0, out, tokens, table, N, C, V,
         packable<Real>(C, out, table), dev.status, dev.layer);
}

template <class Device>
void embedding_backward(Device& dev, Grad<Device> dtable, void* scratch, const int32_t* tokens,
                        const typename Device::Real* dout, int64_t N, int64_t C, int64_t V) {
  using Real = typename Device::Real;
  const Scratch part{N, C};
  char* memory = static_cast<char*>(scratch);
  auto* left = reinterpret_cast<int32_t*>(memory + part.left());
  auto* pieces = reinterpret_cast<float*>(memory + part.pieces());
  const Sorted* order = nullptr;
  for (int p = 0; p < passes(V); ++p) {
    auto* to = reinterpret_cast<Sorted*>(memory + p % 2 * part.order_bytes());
    int shift = p * digit_bits;
    Items items{tokens, order, int(V)};
    bucket_items(dev, nullptr, nullptr, memory + part.counts(), N, std::min<int64_t>((V >> shift) + 1, 1 << digit_bits),
                 0, DigitOf{items, shift}, PlaceItem{to, items});
    order = to;
  }
  const int64_t runs = ceil_div(N, run);
  auto sum = [&]<int W, class G>(G* gradient) {
    int64_t shares = ceil_div(C, 32 * W), warps = std::min<int64_t>(sum_warps, shares);
    launch(dev, sum_runs<Real, G, W>, dim3(unsigned(runs), unsigned(ceil_div(shares, warps))), unsigned(warps * 32),
           size_t(warps * stages) * sizeof(Stage<Real, G, W>), gradient, pieces, left, order, dout, N, C, int(V));
    constexpr int width = W < 4 ? W : 4;  // pieces are fp32
    int64_t chunks = ceil_div(C, width), threads = std::min<int64_t>(256, ceil_div(chunks, 32) * 32);
    dim3 grid(unsigned(ceil_div(runs, joined)), unsigned(ceil_div(chunks, threads)));
    launch(dev, join_pieces<G, width>, grid, unsigned(threads), 0, gradient, pieces, left, runs, C, int(V));
  };
  dtable.visit([&](auto* gradient) {
    if (packable<Real>(C, dout, gradient, scratch))
      sum.template operator()<Pack<Real>::n>(gradient);
    else
      sum.template operator()<1>(gradient);
  });
}
template <class Device>
size_t embedding_backward_scratch_bytes(int64_t N, int64_t C, int64_t) {
  return size_t(Scratch{N, C}.bytes());
}

#define INSTANTIATE(Real)                                                                                             \
  template void embedding_forward(Gpu<Real>&, Real*, const int32_t*, const Real*, int64_t, int64_t, int64_t);         \
  template void embedding_backward(Gpu<Real>&, Grad<Gpu<Real>>, void*, const int32_t*, const Real*, int64_t, int64_t, \
                                   int64_t);                                                                          \
  template size_t embedding_backward_scratch_bytes<Gpu<Real>>(int64_t, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
