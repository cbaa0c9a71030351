#include "moe/expert_pull.h"

#include "llmc/cpu_math.h"

template <class Device>
void expert_pull_plan(Device&, int32_t* source, int32_t* position, const int32_t* offsets, const int32_t* row_slot,
                      const int32_t* slot_row, ExpertRanks r) {
  const int64_t M = r.M(), first = offsets[r.rank], n = offsets[r.rank + 1] - first;
  for (int64_t i = 0; i < M; ++i) source[i] = i < n ? row_slot[first + i] / r.ranks : -1;
  source[M] = int32_t(n);
  for (int64_t t = 0; t < r.N; ++t)
    for (int d = 0; d < r.ranks; ++d) {
      const int32_t row = slot_row[(r.rank * r.N + t) * r.ranks + d];
      position[t * r.ranks + d] = row < 0 ? -1 : row - offsets[d];
    }
}

template <class Device>
void expert_pull(Device&, typename Device::Real* arrived, Peers<const typename Device::Real> x, const int32_t* source,
                 int64_t C, ExpertRanks r) {
#pragma omp parallel for
  for (int64_t i = 0; i < source[r.M()]; ++i)
    std::copy_n(x.at[source[i] / r.N] + source[i] % r.N * C, C, arrived + i * C);
}

template <class Device>
void expert_pull_back(Device&, typename Device::Real* out, Peers<const typename Device::Real> partial,
                      const typename Device::Real* addend, const int32_t* position, int64_t C, ExpertRanks r) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
#pragma omp parallel for
  for (int64_t t = 0; t < r.N; ++t)
    for (int64_t c = 0; c < C; ++c) {
      Acc sum = 0;
      for (int d = 0; d < r.ranks; ++d)
        if (const int64_t at = position[t * r.ranks + d]; at >= 0) sum += Acc(partial.at[d][at * C + c]);
      out[t * C + c] = Real(Acc(addend[t * C + c]) + sum);
    }
}

template <class Device>
void expert_pull_gate_gradients(Device&, typename Device::Acc* dgates, Peers<const typename Device::Acc> theirs,
                                const int32_t* position, const int32_t* top_k_index, ExpertRanks r) {
  using Acc = typename Device::Acc;
  for (int64_t t = 0; t < r.N; ++t)
    for (int64_t k = 0; k < r.K; ++k) {
      const int64_t e = top_k_index[t * r.K + k];
      Acc sum = 0;
      if (e >= 0 && e < r.E)
        for (int64_t host = e / r.experts() * r.parts, d = host; d < host + r.parts; ++d)
          if (const int64_t at = position[t * r.ranks + d]; at >= 0) sum += theirs.at[d][at * r.K + k];
      dgates[t * r.K + k] = sum;
    }
}

#define INSTANTIATE(Real)                                                                                            \
  template void expert_pull_plan(Cpu<Real>&, int32_t*, int32_t*, const int32_t*, const int32_t*, const int32_t*,     \
                                 ExpertRanks);                                                                       \
  template void expert_pull(Cpu<Real>&, Real*, Peers<const Real>, const int32_t*, int64_t, ExpertRanks);             \
  template void expert_pull_back(Cpu<Real>&, Real*, Peers<const Real>, const Real*, const int32_t*, int64_t,         \
                                 ExpertRanks);                                                                       \
  template void expert_pull_gate_gradients(Cpu<Real>&, Cpu<Real>::Acc*, Peers<const Cpu<Real>::Acc>, const int32_t*, \
                                           const int32_t*, ExpertRanks);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
