#include "llmc/homes.h"

#include "llmc/cpu_math.h"

template <class Device>
void sum_parts(Device&, typename Device::Acc* out, SumParts parts, bool wide, bool add, int64_t n) {
  using Acc = typename Device::Acc;
  const std::span all(parts.part, size_t(parts.n));
  wide ? sum_in_order<Acc, Acc>(out, all, add, n) : sum_in_order<typename Device::Real, Acc>(out, all, add, n);
}

#define INSTANTIATE(Real) template void sum_parts(Cpu<Real>&, Cpu<Real>::Acc*, SumParts, bool, bool, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
