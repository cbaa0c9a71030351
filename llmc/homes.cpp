#include "llmc/homes.h"

template <class Device>
void sum_parts(Device&, typename Device::Acc* out, SumParts parts, bool wide, bool add, int64_t n) {
  using Acc = typename Device::Acc;
#pragma omp parallel for
  for (int64_t i = 0; i < n; ++i) {
    Acc sum = 0;
    for (int r = 0; r < parts.n; ++r) {
      Acc value = wide ? static_cast<const Acc*>(parts.part[r])[i]
                       : Acc(static_cast<const typename Device::Real*>(parts.part[r])[i]);
      sum = r == 0 ? (add ? out[i] + value : value) : sum + value;
    }
    out[i] = sum;
  }
}

#define INSTANTIATE(Real) template void sum_parts(Cpu<Real>&, Cpu<Real>::Acc*, SumParts, bool, bool, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
