#include "moe/dispatch.h"

#include "llmc/cpu_math.h"

template <class Device>
void dispatch_plan(Device& dev, RoutingPlan plan, void*, const int32_t* top_k_index, int64_t N, int64_t K, int64_t E,
                   int64_t capacity) {
  std::fill_n(plan.counts, E, 0);
  for (int64_t slot = 0; slot < N * K; ++slot) {
    int32_t e = top_k_index[slot];
    if (e == -1) continue;
    if (e < 0 || e >= E) {
      dev.fault(DeviceStatus::expert_out_of_range, slot / K, e);
    } else if (capacity == 0 || plan.counts[e] < capacity) {
      ++plan.counts[e];
    }
  }
  plan.offsets[0] = 0;
  for (int64_t e = 0; e < E; ++e) plan.offsets[e + 1] = plan.offsets[e] + plan.counts[e];
  // counts is used as a cursor, and ends as it began.
  std::fill_n(plan.counts, E, 0);
  for (int64_t slot = 0; slot < N * K; ++slot) {
    int32_t e = top_k_index[slot];
    plan.slot_row[slot] = -1;
    if (e < 0 || e >= E || (capacity > 0 && plan.counts[e] >= capacity)) continue;
    int32_t row = plan.offsets[e] + plan.counts[e]++;
    plan.row_slot[row] = int32_t(slot);
    plan.slot_row[slot] = row;
  }
  for (int64_t row = plan.offsets[E]; row < N * K; ++row) plan.row_slot[row] = -1;
}

template <class Device>
size_t dispatch_scratch_bytes(int64_t, int64_t, int64_t) {
  return 16;
}

template <class Device>
void dispatch_part(Device&, RoutingPlan part, RoutingPlan plan, int64_t first, int64_t n, int64_t N, int64_t K,
                   int64_t E) {
  for (int64_t e = 0; e <= E; ++e) part.offsets[e] = int32_t(std::clamp<int64_t>(plan.offsets[e] - first, 0, n));
  for (int64_t e = 0; e < E; ++e) part.counts[e] = part.offsets[e + 1] - part.offsets[e];
  for (int64_t i = 0; i < n; ++i) part.row_slot[i] = first + i < N * K ? plan.row_slot[first + i] : -1;
  for (int64_t slot = 0; slot < N * K; ++slot) {
    const int64_t row = plan.slot_row[slot] - first;
    part.slot_row[slot] = plan.slot_row[slot] >= 0 && row >= 0 && row < n ? int32_t(row) : -1;
  }
}

template <class Device>
void dispatch_gather(Device&, typename Device::Real* rows, const typename Device::Real* x, const int32_t* offsets,
                     const int32_t* row_slot, int64_t, int64_t K, int64_t E, int64_t C) {
#pragma omp parallel for
  for (int64_t r = 0; r < int64_t(offsets[E]); ++r) std::copy_n(x + row_slot[r] / K * C, C, rows + r * C);
}

#define INSTANTIATE(Real)                                                                                          \
  template void dispatch_plan(Cpu<Real>&, RoutingPlan, void*, const int32_t*, int64_t, int64_t, int64_t, int64_t); \
  template size_t dispatch_scratch_bytes<Cpu<Real>>(int64_t, int64_t, int64_t);                                    \
  template void dispatch_part(Cpu<Real>&, RoutingPlan, RoutingPlan, int64_t, int64_t, int64_t, int64_t, int64_t);  \
  template void dispatch_gather(Cpu<Real>&, Real*, const Real*, const int32_t*, const int32_t*, int64_t, int64_t,  \
                                int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
