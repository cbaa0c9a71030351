// The routing plan on the GPU: a stable counting sort of the slots by expert (llmc/cuda_bucket.cuh).
#include "moe/dispatch.h"

#include "llmc/cuda_bucket.cuh"

namespace {

struct ExpertOf {
  const int32_t* top_k_index;
  int E;
  __device__ int operator()(int64_t slot) const {
    int e = top_k_index[slot];
    return e >= 0 && e < E ? e : -1;
  }
};

struct PlaceSlot {
  RoutingPlan plan;
  const int32_t* top_k_index;
  int K;
  int64_t capacity;
  DeviceStatus* status;
  int layer;
  __device__ void operator()(int64_t slot, const InBucket& expert) const {
    bool kept = expert.key >= 0 && (capacity == 0 || expert.rank < capacity);
    int row = kept ? expert.first + expert.rank : -1;
    plan.slot_row[slot] = row;
    if (kept) plan.row_slot[row] = int32_t(slot);
    if (slot >= expert.all) plan.row_slot[slot] = -1;  // rows that nobody has: this slot's number as a row
    if (expert.key < 0 && top_k_index[slot] != -1)
      report_fault(status, layer, DeviceStatus::expert_out_of_range, slot / K, top_k_index[slot]);
  }
};

__global__ void part_of_plan(RoutingPlan part, RoutingPlan plan, int64_t first, int64_t n, int64_t slots, int E) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  auto offset = [&](int64_t e) { return int(min(max(plan.offsets[e] - first, int64_t(0)), n)); };
  if (i <= E) part.offsets[i] = offset(i);
  if (i < E) part.counts[i] = offset(i + 1) - offset(i);
  if (i < n) part.row_slot[i] = first + i < slots ? plan.row_slot[first + i] : -1;
  if (i < slots) {
    const int64_t whole = plan.slot_row[i], row = whole - first;
    part.slot_row[i] = whole >= 0 && row >= 0 && row < n ? int(row) : -1;
  }
}

template <class Real>
__global__ void gather_rows(Real* rows, const Real* x, const int32_t* offsets, const int32_t* row_slot, int K, int E,
                            int64_t C, bool packed) {
  int64_t r = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (r >= offsets[E]) return;
  copy_row(rows + r * C, x + int64_t(row_slot[r] / K) * C, C, packed);
}

}  // namespace

template <class Device>
void dispatch_plan(Device& dev, RoutingPlan plan, void* scratch, const int32_t* top_k_index, int64_t N, int64_t K,
                   int64_t E, int64_t capacity) {
  ExpertOf key{top_k_index, int(E)};
  PlaceSlot place{plan, top_k_index, int(K), capacity, dev.status, dev.layer};
  bucket_items(dev, plan.counts, plan.offsets, scratch, N * K, E, capacity, key, place);
}
template <class Device>
size_t dispatch_scratch_bytes(int64_t N, int64_t K, int64_t E) {
  return bucket_scratch_bytes(N * K, E);
}

template <class Device>
void dispatch_part(Device& dev, RoutingPlan part, RoutingPlan plan, int64_t first, int64_t n, int64_t N, int64_t K,
                   int64_t E) {
  launch(dev, part_of_plan, dim3(unsigned(ceil_div(std::max({n, N * K, E + 1}), 256))), 256, 0, part, plan, first, n,
         N * K, int(E));
}

template <class Device>
void dispatch_gather(Device& dev, typename Device::Real* rows, const typename Device::Real* x, const int32_t* offsets,
                     const int32_t* row_slot, int64_t N, int64_t K, int64_t E, int64_t C) {
  launch(dev, gather_rows<typename Device::Real>, dim3(unsigned(ceil_div(N * K, 8))), 256, 0, rows, x, offsets,
         row_slot, int(K), int(E), C, packable<typename Device::Real>(C, rows, x));
}

#define INSTANTIATE(Real)                                                                                          \
  template void dispatch_plan(Gpu<Real>&, RoutingPlan, void*, const int32_t*, int64_t, int64_t, int64_t, int64_t); \
  template size_t dispatch_scratch_bytes<Gpu<Real>>(int64_t, int64_t, int64_t);                                    \
  template void dispatch_part(Gpu<Real>&, RoutingPlan, RoutingPlan, int64_t, int64_t, int64_t, int64_t, int64_t);  \
  template void dispatch_gather(Gpu<Real>&, Real*, const Real*, const int32_t*, const int32_t*, int64_t, int64_t,  \
                                int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
