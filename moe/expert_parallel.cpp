#include "moe/expert_parallel.h"

#include "llmc/cpu_math.h"

template <class Device>
void expert_places(Device&, int32_t* place, const int32_t* top_k_index, const int32_t* table, int64_t first, int64_t n,
                   ExpertRanks r) {
  for (int64_t i = 0; i < n * r.K; ++i) {
    const int64_t e = top_k_index[i], source = (first + i / r.K) / r.N;
    place[i] = e >= 0 && e < r.E ? table[e * r.ranks + source] : -1;
  }
}

template <class Device>
void expert_destinations(Device&, int32_t* destination, const int32_t* place, ExpertRanks r) {
  for (int64_t t = 0; t < r.M(); ++t) {
    int32_t* to = destination + t * r.ranks;
    std::fill_n(to, r.ranks, -1);
    for (int64_t k = 0; k < r.K; ++k)
      for (int d = 0; d < r.ranks; ++d)
        if (r.has(d, place[t * r.K + k])) to[d] = d;
  }
}

template <class Device>
void expert_arrivals(Device&, int32_t* index, typename Device::Acc* gates, const int32_t* offsets,
                     const int32_t* row_slot, const int32_t* place, const typename Device::Acc* all_gates,
                     ExpertRanks r) {
  const int64_t first = offsets[r.rank], n = offsets[r.rank + 1] - first;
  for (int64_t i = 0; i < r.M(); ++i)
    for (int64_t k = 0; k < r.K; ++k) {
      const int64_t slot = i < n ? row_slot[first + i] / r.ranks * r.K + k : 0;
      const bool here = i < n && r.has(r.rank, place[slot]);
      index[i * r.K + k] = here ? int32_t(place[slot] - r.first_place(r.rank)) : -1;
      gates[i * r.K + k] = here ? all_gates[slot] : 0;
    }
}

template <class Device>
void expert_positions(Device&, int32_t* position, int32_t* counts, const int32_t* offsets, const int32_t* row_slot,
                      const int32_t* slot_row, ExpertRanks r) {
  // The first row of bucket d whose token is rank s's or later.
  auto first_of = [&](int s, int d) {
    return std::lower_bound(row_slot + offsets[d], row_slot + offsets[d + 1], s * r.N * r.ranks) - row_slot;
  };
  int64_t sent = 0;
  for (int d = 0; d < r.ranks; ++d) {
    for (int s = 0; s < r.ranks; ++s) counts[s * r.ranks + d] = int32_t(first_of(s + 1, d) - first_of(s, d));
    for (int64_t t = 0; t < r.N; ++t) {
      const int64_t row = slot_row[(r.rank * r.N + t) * r.ranks + d];
      position[t * r.ranks + d] = row < 0 ? -1 : int32_t(sent + row - first_of(r.rank, d));
    }
    sent += counts[r.rank * r.ranks + d];
  }
}

template <class Device>
void expert_pack(Device&, typename Device::Real* packed, const typename Device::Real* x, const int32_t* position,
                 int64_t C, ExpertRanks r) {
#pragma omp parallel for
  for (int64_t t = 0; t < r.N; ++t)
    for (int d = 0; d < r.ranks; ++d)
      if (int64_t to = position[t * r.ranks + d]; to >= 0) std::copy_n(x + t * C, C, packed + to * C);
}

template <class Device>
void expert_gate_gradients(Device&, typename Device::Acc* dgates, const typename Device::Acc* returned,
                           const int32_t* position, const int32_t* place, ExpertRanks r) {
  for (int64_t t = 0; t < r.N; ++t)
    for (int64_t k = 0; k < r.K; ++k) {
      typename Device::Acc sum = 0;
      for (int d = 0; d < r.ranks; ++d)
        if (const int64_t at = position[t * r.ranks + d]; at >= 0 && r.has(d, place[t * r.K + k]))
          sum += returned[at * r.K + k];
      dgates[t * r.K + k] = sum;
    }
}

#define INSTANTIATE(Real)                                                                                              \
  template void expert_places(Cpu<Real>&, int32_t*, const int32_t*, const int32_t*, int64_t, int64_t, ExpertRanks);    \
  template void expert_destinations(Cpu<Real>&, int32_t*, const int32_t*, ExpertRanks);                                \
  template void expert_arrivals(Cpu<Real>&, int32_t*, Cpu<Real>::Acc*, const int32_t*, const int32_t*, const int32_t*, \
                                const Cpu<Real>::Acc*, ExpertRanks);                                                   \
  template void expert_positions(Cpu<Real>&, int32_t*, int32_t*, const int32_t*, const int32_t*, const int32_t*,       \
                                 ExpertRanks);                                                                         \
  template void expert_pack(Cpu<Real>&, Real*, const Real*, const int32_t*, int64_t, ExpertRanks);                     \
  template void expert_gate_gradients(Cpu<Real>&, Cpu<Real>::Acc*, const Cpu<Real>::Acc*, const int32_t*,              \
                                      const int32_t*, ExpertRanks);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
