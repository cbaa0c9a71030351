// Rows over the link by index. A load from another GPU takes a microsecond or two, so what counts is how many are on their
// way: a warp asks for eight 16-byte packs a lane before it stores the first. Ordinary loads, not the read-only path.
#include "moe/expert_pull.h"

#include "llmc/cuda_common.cuh"

namespace {

constexpr int threads = 256, warps = threads / 32;
dim3 grid_of(int64_t n) { return dim3(unsigned(ceil_div(n, threads))); }

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

constexpr int rows_a_warp = 8, places = 8;

// A warp takes one piece, 32 packs of W elements, of each of eight rows. What arrives is listed by rank: blocks work at
// eight places of the list in turn, so that rows of this GPU and of others are on their way together.
template <class Real, int W>
__global__ void __launch_bounds__(threads) pull(Real* arrived, const __grid_constant__ Peers<const Real> x,
                                                const int32_t* source, int64_t M, int64_t N, int64_t C, int pieces) {
  struct alignas(sizeof(Real) * W) Chunk {
    Real v[W];
  };
  const int64_t n = source[M];
  const int64_t blocks_a_place = ceil_div(ceil_div(n, rows_a_warp) * pieces, warps * places);
  if (blockIdx.x >= blocks_a_place * places || (x.lost && *x.lost)) return;
  const int64_t block = blockIdx.x % places * blocks_a_place + blockIdx.x / places;
  const int64_t task = block * warps + threadIdx.x / 32,
                row0 = task / pieces * rows_a_warp;  // the pieces of a row side by side
  if (row0 >= n) return;                             // the whole warp
  const int lane = threadIdx.x % 32, here = int(min(int64_t(rows_a_warp), n - row0));
  const int64_t c = (task % pieces * 32 + lane) * W;

  uint64_t address = 0;  // lane k: of row k
  if (lane < here) {
    const int token = source[row0 + lane];
    address = reinterpret_cast<uint64_t>(x.at[token / N] + token % N * C);
  }
  Chunk chunk[rows_a_warp];
#pragma unroll
  for (int k = 0; k < rows_a_warp; ++k) {
    const Real* row = reinterpret_cast<const Real*>(__shfl_sync(~0u, address, k));
    if (k < here && c < C) chunk[k] = *reinterpret_cast<const Chunk*>(row + c);
  }
#pragma unroll
  for (int k = 0; k < rows_a_warp; ++k)
    if (k < here && c < C) *reinterpret_cast<Chunk*>(arrived + (row0 + k) * C + c) = chunk[k];
}

// A warp a piece of a token: the rows of four ranks are on their way before the first is added.
template <class Real, int W>
__global__ void __launch_bounds__(threads)
    pull_back(Real* out, const __grid_constant__ Peers<const Real> partial, const Real* addend, const int32_t* position,
              int64_t N, int ranks, int64_t C, int pieces) {
  struct alignas(sizeof(Real) * W) Chunk {
    Real v[W];
  };
  constexpr int batch = 4;
  const int64_t task = int64_t(blockIdx.x) * warps + threadIdx.x / 32, t = task / pieces;
  const int64_t c = (task % pieces * 32 + threadIdx.x % 32) * W;
  if (t >= N || c >= C || (partial.lost && *partial.lost)) return;
  Chunk start = *reinterpret_cast<const Chunk*>(addend + t * C + c);
  float sum[W] = {};
  for (int d0 = 0; d0 < ranks; d0 += batch) {
    Chunk row[batch];
    int at[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      at[i] = d0 + i < ranks ? position[t * ranks + d0 + i] : -1;
      if (at[i] >= 0) row[i] = *reinterpret_cast<const Chunk*>(partial.at[d0 + i] + at[i] * C + c);
    }
#pragma unroll
    for (int i = 0; i < batch; ++i)
      if (at[i] >= 0)
#pragma unroll
        for (int j = 0; j < W; ++j) sum[j] += to_float(row[i].v[j]);
  }
#pragma unroll
  for (int j = 0; j < W; ++j) start.v[j] = from_float<Real>(to_float(start.v[j]) + sum[j]);
  *reinterpret_cast<Chunk*>(out + t * C + c) = start;
}

__global__ void __launch_bounds__(threads)
    pull_gate_gradients(float* dgates, const __grid_constant__ Peers<const float> theirs, const int32_t* position,
                        const int32_t* top_k_index, ExpertRanks r) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x, t = i / r.K, k = i % r.K;
  if (t >= r.N || (theirs.lost && *theirs.lost)) return;
  const int64_t e = top_k_index[i];
  const int d = e >= 0 && e < r.E ? int(e / (r.E / r.ranks)) : -1;
  const int64_t at = d >= 0 ? position[t * r.ranks + d] : -1;
  dgates[i] = at < 0 ? 0 : theirs.at[d][at * r.K + k];
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
  const int64_t pieces = ceil_div(C, 32 * (packs ? Pack<Real>::n : 1));
  const int64_t blocks = ceil_div(ceil_div(r.M(), rows_a_warp) * pieces, warps * places) * places;
  launch(dev, packs ? pull<Real, Pack<Real>::n> : pull<Real, 1>, dim3(unsigned(blocks)), threads, 0, arrived, x, source,
         r.M(), r.N, C, int(pieces));
}

template <class Device>
void expert_pull_back(Device& dev, typename Device::Real* out, Peers<const typename Device::Real> partial,
                      const typename Device::Real* addend, const int32_t* position, int64_t C, ExpertRanks r) {
  using Real = typename Device::Real;
  const bool packs = in_packs<Real>(C, partial, r.ranks, out, addend);
  const int64_t pieces = ceil_div(C, 32 * (packs ? Pack<Real>::n : 1));
  launch(dev, packs ? pull_back<Real, Pack<Real>::n> : pull_back<Real, 1>,
         dim3(unsigned(ceil_div(r.N * pieces, warps))), threads, 0, out, partial, addend, position, r.N, r.ranks, C,
         int(pieces));
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
