#include "moe/combine.h"

#include "llmc/cpu_math.h"

template <class Device>
void combine(Device&, typename Device::Real* out, const typename Device::Real* rows,
             const typename Device::Real* addend, const typename Device::Acc* gates, const int32_t* slot_row, int64_t N,
             int64_t K, int64_t C) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  constexpr int64_t chunk = 256;  // columns summed at a time
#pragma omp parallel for
  for (int64_t t = 0; t < N; ++t)
    for (int64_t c0 = 0; c0 < C; c0 += chunk) {
      int64_t n = std::min(chunk, C - c0);
      Acc sum[chunk] = {};
      for (int64_t k = 0; k < K; ++k) {
        int64_t row = slot_row[t * K + k];
        if (row < 0) continue;
        Acc gate = gates ? gates[t * K + k] : Acc(1);
        const Real* y = rows + row * C + c0;
        for (int64_t c = 0; c < n; ++c) sum[c] += gate * Acc(y[c]);
      }
      for (int64_t c = 0; c < n; ++c)
        out[t * C + c0 + c] = Real((addend ? Acc(addend[t * C + c0 + c]) : Acc(0)) + sum[c]);
    }
}

template <class Device>
void combine_more(Device& dev, typename Device::Real* out, const typename Device::Real* rows,
                  const typename Device::Acc* gates, const int32_t* slot_row, const int32_t* n_rows, int64_t N,
                  int64_t K, int64_t C) {
  if (*n_rows) combine(dev, out, rows, out, gates, slot_row, N, K, C);
}

#define INSTANTIATE(Real)                                                                                            \
  template void combine(Cpu<Real>&, Real*, const Real*, const Real*, const Cpu<Real>::Acc*, const int32_t*, int64_t, \
                        int64_t, int64_t);                                                                           \
  template void combine_more(Cpu<Real>&, Real*, const Real*, const Cpu<Real>::Acc*, const int32_t*, const int32_t*,  \
                             int64_t, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
