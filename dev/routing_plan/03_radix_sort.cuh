// Rung 3: the library's way, CUB's stable radix sort of (expert, slot) pairs, then offsets where the sorted expert
// changes. Stable, general, and the peer that ours are measured against.
//
// Predicted: up to 8 bits of a key are sorted in one pass. It reads the R keys for the histogram, reads keys and values
// and writes both: 20R bytes; the pass that turns the sorted pairs into a plan reads 4R and writes 4R. That is 28R
// bytes to production's 12R: 2.5 us at R = 262144, from memory. It is also five or so launches that depend on one
// another, at two to three microseconds each, and the slots 0, 1, 2, ... are carried along as values although they
// could be computed. Nearly all of the time is launches and latency, so R should matter little, and E not at all.
#pragma once
#include <cub/device/device_radix_sort.cuh>

#include "llmc/cuda_common.cuh"
#include "moe/dispatch.h"

namespace radix_sort {

struct Buffers {
  int32_t *slots, *sorted_experts;  // (R) each; slots holds 0, 1, 2, ...
  void* temporary;
  size_t temporary_bytes;
  int bits;  // of an expert's number
};

inline void sort_pairs(GpuBase& dev, void* temporary, size_t& bytes, const int32_t* experts, int32_t* sorted_experts,
                       const int32_t* slots, int32_t* row_slot, int64_t R, int bits) {
  CUDA_CHECK(cub::DeviceRadixSort::SortPairs(temporary, bytes, experts, sorted_experts, slots, row_slot, int(R), 0,
                                             bits, dev.stream));
}

// counts, offsets and slot_row from the sorted pairs.
__global__ void finish(RoutingPlan p, const int32_t* sorted_experts, int64_t R, int E) {
  int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < R) p.slot_row[p.row_slot[row]] = int32_t(row);
  if (row > E) return;
  auto first_row_of = [&](int e) {  // binary search
    int64_t low = 0, high = R;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (sorted_experts[middle] < e)
        low = middle + 1;
      else
        high = middle;
    }
    return int32_t(low);
  };
  int e = int(row);
  p.offsets[e] = first_row_of(e);
  if (e < E) p.counts[e] = first_row_of(e + 1) - first_row_of(e);
}

inline void plan(GpuBase& dev, RoutingPlan p, Buffers b, const int32_t* top_k_index, int64_t R, int E) {
  sort_pairs(dev, b.temporary, b.temporary_bytes, top_k_index, b.sorted_experts, b.slots, p.row_slot, R, b.bits);
  launch(dev, finish, unsigned(ceil_div(std::max<int64_t>(R, E + 1), 256)), 256, 0, p, b.sorted_experts, R, E);
}

}  // namespace radix_sort
