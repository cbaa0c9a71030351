// Rows over the link by index. A load from another GPU takes a microsecond or two, so what counts is how many are on their
// way: a warp asks for eight 16-byte units a lane before it stores the first. Ordinary loads, not the read-only path.
#include "moe/expert_pull.h"

#include <type_traits>

#include "llmc/cuda_common.cuh"

namespace {

constexpr int threads = 256, warps = threads / 32;
dim3 grid_of(int64_t n) { return dim3(unsigned(ceil_div(n, threads))); }

template <class To, class From>
__device__ __forceinline__ To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__global__ void __launch_bounds__(threads) plan(int32_t* source, int32_t* position, const int32_t* offsets,
                                                const int32_t* row_slot, const int32_t* slot_row, ExpertRanks r) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x, M = r.ranks * r.N;
  const int first = offsets[r.rank], n = offsets[r.rank + 1] - first;
  if (i < M) source[i] = i < n ? row_slot[first + i] / r.ranks : -1;
  if (i == M) source[M] = n;
  if (i >= r.N * r.ranks) return;
  const int row = slot_row[r.rank * r.N * r.ranks + i];
  position[i] = row < 0 ? -1 : row - offsets[i % r.ranks];
}

// What a lane moves at a time: 16 bytes, or one element where rows are no multiple of that. As a plain number, so that it is
// one load and one store.
template <class Real, bool packs>
using Unit = std::conditional_t<packs, uint4, std::conditional_t<sizeof(Real) == 4, uint32_t, uint16_t>>;

constexpr int rows_a_warp = 8, places = 8;

// width: units of a row; a warp takes one piece of 32 units of each of eight rows. What arrives is listed by rank: blocks
// work at eight places of the list in turn, so that rows of this GPU and of others are on their way together.
template <class Real, bool packs>
__global__ void __launch_bounds__(threads)
    pull(Real* arrived, const __grid_constant__ Peers<const Real> x, const int32_t* source, int64_t M, int64_t N,
         int64_t width, int pieces) {
  using U = Unit<Real, packs>;
  const int64_t n = source[M];
  const int64_t blocks_a_place = ceil_div(ceil_div(n, rows_a_warp) * pieces, warps * places);
  if (blockIdx.x >= blocks_a_place * places || (x.lost && *x.lost)) return;
  const int64_t block = blockIdx.x % places * blocks_a_place + blockIdx.x / places;
  const int64_t task = block * warps + threadIdx.x / 32;  // the pieces of a row are neighbours
  const int64_t row0 = task / pieces * rows_a_warp;
  if (row0 >= n) return;  // the whole warp
  const int lane = threadIdx.x % 32, here = int(min(int64_t(rows_a_warp), n - row0));
  const int64_t i = task % pieces * 32 + lane;

  uint64_t address = 0;  // lane k: of row k
  if (lane < here) {
    const int token = source[row0 + lane];
    address = reinterpret_cast<uint64_t>(x.at[token / N]) + uint64_t(token % N * width) * sizeof(U);
  }
  U unit[rows_a_warp];
#pragma unroll
  for (int k = 0; k < rows_a_warp; ++k) {
    const U* row = reinterpret_cast<const U*>(__shfl_sync(~0u, address, k));
    if (k < here && i < width) unit[k] = row[i];
  }
  U* to = reinterpret_cast<U*>(arrived) + row0 * width + i;
#pragma unroll
  for (int k = 0; k < rows_a_warp; ++k)
    if (k < here && i < width) to[k * width] = unit[k];
}

// A warp a piece of a token: the rows of four ranks are on their way before the first is added.
template <class Real, bool packs>
__global__ void __launch_bounds__(threads)
    pull_back(Real* out, const __grid_constant__ Peers<const Real> partial, const Real* addend, const int32_t* position,
              int64_t N, int ranks, int64_t width, int pieces) {
  using U = Unit<Real, packs>;
  constexpr int batch = 4, W = sizeof(U) / sizeof(Real);
  struct Values {
    Real v[W];
  };
  const int64_t task = int64_t(blockIdx.x) * warps + threadIdx.x / 32, t = task / pieces;
  const int64_t i = task % pieces * 32 + threadIdx.x % 32;
  if (t >= N || i >= width || (partial.lost && *partial.lost)) return;
  const U start = reinterpret_cast<const U*>(addend)[t * width + i];
  float sum[W] = {};
  for (int d0 = 0; d0 < ranks; d0 += batch) {
    U row[batch];
    int at[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k) at[k] = d0 + k < ranks ? position[t * ranks + d0 + k] : -1;
#pragma unroll
    for (int k = 0; k < batch; ++k)
      if (at[k] >= 0) row[k] = reinterpret_cast<const U*>(partial.at[d0 + k])[at[k] * width + i];
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if (at[k] < 0) continue;
      const Values values = bits<Values>(row[k]);
#pragma unroll
      for (int j = 0; j < W; ++j) sum[j] += to_float(values.v[j]);
    }
  }
  Values values = bits<Values>(start);
#pragma unroll
  for (int j = 0; j < W; ++j) values.v[j] = from_float<Real>(to_float(values.v[j]) + sum[j]);
  reinterpret_cast<U*>(out)[t * width + i] = bits<U>(values);
}

__global__ void __launch_bounds__(threads)
    pull_gate_gradients(float* dgates, const __grid_constant__ Peers<const float> theirs, const int32_t* position,
                        const int32_t* top_k_index, ExpertRanks r) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x, t = i / r.K, k = i % r.K;
  if (t >= r.N || (theirs.lost && *theirs.lost)) return;
  const int64_t e = top_k_index[i];
  float sum = 0;
  if (e >= 0 && e < r.E)
    for (int64_t host = e / r.experts() * r.parts, d = host; d < host + r.parts; ++d)
      if (const int64_t at = position[t * r.ranks + d]; at >= 0) sum += theirs.at[d][at * r.K + k];
  dgates[i] = sum;
}

// The arenas of all ranks are aligned alike (Plan::alignment), and so is a tensor in each.
template <class Real>
bool in_packs(int64_t C, const Peers<const Real>& p, int ranks, const Real* other, const Real* another) {
  bool all = packable<Real>(C, other, another);
  for (int r = 0; r < ranks; ++r) all = all && packable<Real>(C, p.at[r]);
  return all;
}

}  // namespace

template <class Device>
void expert_pull_plan(Device& dev, int32_t* source, int32_t* position, const int32_t* offsets, const int32_t* row_slot,
                      const int32_t* slot_row, ExpertRanks r) {
  launch(dev, plan, grid_of(r.M() + 1), threads, 0, source, position, offsets, row_slot, slot_row, r);
}

template <class Device>
void expert_pull(Device& dev, typename Device::Real* arrived, Peers<const typename Device::Real> x,
                 const int32_t* source, int64_t C, ExpertRanks r) {
  using Real = typename Device::Real;
  const bool packs = in_packs<Real>(C, x, r.ranks, arrived, arrived);
  const int64_t width = packs ? C / Pack<Real>::n : C, pieces = ceil_div(width, 32);
  const int64_t blocks = ceil_div(ceil_div(r.M(), rows_a_warp) * pieces, warps * places) * places;
  launch(dev, packs ? pull<Real, true> : pull<Real, false>, dim3(unsigned(blocks)), threads, 0, arrived, x, source,
         r.M(), r.N, width, int(pieces));
}

template <class Device>
void expert_pull_back(Device& dev, typename Device::Real* out, Peers<const typename Device::Real> partial,
                      const typename Device::Real* addend, const int32_t* position, int64_t C, ExpertRanks r) {
  using Real = typename Device::Real;
  const bool packs = in_packs<Real>(C, partial, r.ranks, out, addend);
  const int64_t width = packs ? C / Pack<Real>::n : C, pieces = ceil_div(width, 32);
  launch(dev, packs ? pull_back<Real, true> : pull_back<Real, false>, dim3(unsigned(ceil_div(r.N * pieces, warps))),
         threads, 0, out, partial, addend, position, r.N, r.ranks, width, int(pieces));
}

template <class Device>
void expert_pull_gate_gradients(Device& dev, typename Device::Acc* dgates, Peers<const typename Device::Acc> theirs,
                                const int32_t* position, const int32_t* top_k_index, ExpertRanks r) {
  launch(dev, pull_gate_gradients, grid_of(r.N * r.K), threads, 0, dgates, theirs, position, top_k_index, r);
}

#define INSTANTIATE(Real)                                                                                          \
  template void expert_pull_plan(Gpu<Real>&, int32_t*, int32_t*, const int32_t*, const int32_t*, const int32_t*,   \
                                 ExpertRanks);                                                                     \
  template void expert_pull(Gpu<Real>&, Real*, Peers<const Real>, const int32_t*, int64_t, ExpertRanks);           \
  template void expert_pull_back(Gpu<Real>&, Real*, Peers<const Real>, const Real*, const int32_t*, int64_t,       \
                                 ExpertRanks);                                                                     \
  template void expert_pull_gate_gradients(Gpu<Real>&, float*, Peers<const float>, const int32_t*, const int32_t*, \
                                           ExpertRanks);
INSTANTIATE(float)
INSTANTIATE(bf16)
