// Who sends which token where, on the GPU: the plans are dispatch_plan()'s, here is what surrounds them.
#include "moe/expert_parallel.h"

#include "llmc/cuda_common.cuh"

namespace {

constexpr int threads = 256;
dim3 grid_of(int64_t n) { return dim3(unsigned(ceil_div(n, threads))); }
__device__ int64_t thread_number() { return int64_t(blockIdx.x) * threads + threadIdx.x; }

__global__ void __launch_bounds__(threads)
    places(int32_t* place, const int32_t* top_k_index, const int32_t* table, int64_t first, int64_t n, ExpertRanks r) {
  const int64_t i = thread_number();
  if (i >= n * r.K) return;
  const int64_t e = top_k_index[i], source = (first + i / r.K) / r.N;
  place[i] = e >= 0 && e < r.E ? table[e * r.ranks + source] : -1;
}

__global__ void __launch_bounds__(threads) destinations(int32_t* destination, const int32_t* place, ExpertRanks r) {
  const int64_t i = thread_number(), t = i / r.ranks, d = i % r.ranks;
  if (t >= r.ranks * r.N) return;
  bool goes = false;
  for (int64_t k = 0; k < r.K; ++k) goes |= r.has(d, place[t * r.K + k]);
  destination[i] = goes ? int32_t(d) : -1;
}

__global__ void __launch_bounds__(threads)
    arrivals(int32_t* index, float* gates, const int32_t* offsets, const int32_t* row_slot, const int32_t* place,
             const float* all_gates, ExpertRanks r) {
  const int64_t at = thread_number(), i = at / r.K, k = at % r.K;
  if (i >= r.ranks * r.N) return;
  const int64_t first = offsets[r.rank], n = offsets[r.rank + 1] - first;
  const int64_t slot = i < n ? row_slot[first + i] / r.ranks * r.K + k : 0;
  const bool here = i < n && r.has(r.rank, place[slot]);
  index[at] = here ? int32_t(place[slot] - r.first_place(r.rank)) : -1;
  gates[at] = here ? all_gates[slot] : 0;
}

// The first row of bucket d whose token is rank s's or later.
__device__ int first_of(const int32_t* offsets, const int32_t* row_slot, const ExpertRanks& r, int s, int d) {
  int low = offsets[d], high = offsets[d + 1];
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (row_slot[middle] < s * r.N * r.ranks)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}
__global__ void __launch_bounds__(threads)
    count_rows(int32_t* counts, const int32_t* offsets, const int32_t* row_slot, ExpertRanks r) {
  const int i = int(thread_number()), s = i / r.ranks, d = i % r.ranks;
  if (s >= r.ranks) return;
  counts[i] = first_of(offsets, row_slot, r, s + 1, d) - first_of(offsets, row_slot, r, s, d);
}
__global__ void __launch_bounds__(threads) positions(int32_t* position, const int32_t* counts, const int32_t* offsets,
                                                     const int32_t* row_slot, const int32_t* slot_row, ExpertRanks r) {
  const int64_t i = thread_number();
  const int d = int(i % r.ranks);
  if (i >= r.N * r.ranks) return;
  const int row = slot_row[r.rank * r.N * r.ranks + i];
  int sent = 0;
  for (int earlier = 0; earlier < d; ++earlier) sent += counts[r.rank * r.ranks + earlier];
  position[i] = row < 0 ? -1 : sent + row - first_of(offsets, row_slot, r, r.rank, d);
}

// A warp a copy of a row.
template <class Real>
__global__ void __launch_bounds__(threads)
    pack(Real* packed, const Real* x, const int32_t* position, int64_t C, int64_t n, int ranks, bool vectors) {
  const int64_t i = thread_number() / 32;
  if (i >= n || position[i] < 0) return;
  copy_row(packed + position[i] * C, x + i / ranks * C, C, vectors);
}

__global__ void __launch_bounds__(threads)
    gate_gradients(float* dgates, const float* returned, const int32_t* position, const int32_t* place, ExpertRanks r) {
  const int64_t i = thread_number(), t = i / r.K, k = i % r.K;
  if (t >= r.N) return;
  float sum = 0;
  if (place[i] >= 0)
    for (int64_t host = place[i] / r.slots() * r.parts, d = host; d < host + r.parts; ++d)
      if (const int64_t at = position[t * r.ranks + d]; at >= 0) sum += returned[at * r.K + k];
  dgates[i] = sum;
}

}  // namespace

template <class Device>
void expert_places(Device& dev, int32_t* place, const int32_t* top_k_index, const int32_t* table, int64_t first,
                   int64_t n, ExpertRanks r) {
  launch(dev, places, grid_of(n * r.K), threads, 0, place, top_k_index, table, first, n, r);
}
template <class Device>
void expert_destinations(Device& dev, int32_t* destination, const int32_t* place, ExpertRanks r) {
  launch(dev, destinations, grid_of(r.M() * r.ranks), threads, 0, destination, place, r);
}
template <class Device>
void expert_arrivals(Device& dev, int32_t* index, typename Device::Acc* gates, const int32_t* offsets,
                     const int32_t* row_slot, const int32_t* top_k_index, const typename Device::Acc* all_gates,
                     ExpertRanks r) {
  launch(dev, arrivals, grid_of(r.M() * r.K), threads, 0, index, gates, offsets, row_slot, top_k_index, all_gates, r);
}
template <class Device>
void expert_positions(Device& dev, int32_t* position, int32_t* counts, const int32_t* offsets, const int32_t* row_slot,
                      const int32_t* slot_row, ExpertRanks r) {
  launch(dev, count_rows, grid_of(int64_t(r.ranks) * r.ranks), threads, 0, counts, offsets, row_slot, r);
  launch(dev, positions, grid_of(r.N * r.ranks), threads, 0, position, counts, offsets, row_slot, slot_row, r);
}
template <class Device>
void expert_pack(Device& dev, typename Device::Real* packed, const typename Device::Real* x, const int32_t* position,
                 int64_t C, ExpertRanks r) {
  launch(dev, pack<typename Device::Real>, grid_of(r.N * r.ranks * 32), threads, 0, packed, x, position, C,
         r.N * r.ranks, r.ranks, packable<typename Device::Real>(C, packed, x));
}
template <class Device>
void expert_gate_gradients(Device& dev, typename Device::Acc* dgates, const typename Device::Acc* returned,
                           const int32_t* position, const int32_t* place, ExpertRanks r) {
  launch(dev, gate_gradients, grid_of(r.N * r.K), threads, 0, dgates, returned, position, place, r);
}

#define INSTANTIATE(Real)                                                                                           \
  template void expert_places(Gpu<Real>&, int32_t*, const int32_t*, const int32_t*, int64_t, int64_t, ExpertRanks); \
  template void expert_destinations(Gpu<Real>&, int32_t*, const int32_t*, ExpertRanks);                             \
  template void expert_arrivals(Gpu<Real>&, int32_t*, float*, const int32_t*, const int32_t*, const int32_t*,       \
                                const float*, ExpertRanks);                                                         \
  template void expert_positions(Gpu<Real>&, int32_t*, int32_t*, const int32_t*, const int32_t*, const int32_t*,    \
                                 ExpertRanks);                                                                      \
  template void expert_pack(Gpu<Real>&, Real*, const Real*, const int32_t*, int64_t, ExpertRanks);                  \
  template void expert_gate_gradients(Gpu<Real>&, float*, const float*, const int32_t*, const int32_t*, ExpertRanks);
INSTANTIATE(float)
INSTANTIATE(bf16)
