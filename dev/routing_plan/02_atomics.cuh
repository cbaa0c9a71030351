// Rung 2: a thread a slot. Every slot adds one to its expert's count, one warp turns the counts into offsets, and every
// slot asks its expert's cursor for the next free row: all with atomic additions in global memory.
//
// The rows of an expert come in the order in which the slots happened to ask. That is a routing plan, but another one
// in every run: it breaks the contract (ascending slots) and with it everything that is summed in the order of the
// rows.
//
// Predicted: 4R bytes of choices, read twice (the second time from the L2 cache), 8R written: 12R bytes, a microsecond
// or so at R = 262144. The atomics take longer. All counters lie in E/8 sectors of 32 bytes, each with one unit of the
// L2 cache that serves it; the R/E additions to an address are made one after the other, and in the second pass each
// waits for its result. The fewer experts, the longer the queue: 8 experts with 8192 slots each should be no faster
// than 128 experts with 2048, though there are four times fewer slots. And the time is four launches at the least.
// Measured: not so. 128 experts with 2048 slots each take four times as long as 8 with 8192. A guess: what queues is a
// warp's request to a sector, one for 8 experts and a dozen for 128, all of them to a few lines.
#pragma once
#include "llmc/cuda_bucket.cuh"
#include "moe/dispatch.h"

namespace atomic_plan {

__global__ void count_slots(int32_t* counts, const int32_t* top_k_index, int64_t R) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot < R) atomicAdd(counts + top_k_index[slot], 1);
}

// One warp: offsets (E+1) from counts (E); cursors (E) begin at an expert's first row.
__global__ void find_offsets(RoutingPlan p, int32_t* cursors, int E) {
  int carry = 0;
  for (int e0 = 0; e0 < E; e0 += 32) {
    const int e = e0 + int(threadIdx.x), count = e < E ? p.counts[e] : 0, sum = warp_scan(count);
    if (e < E) p.offsets[e] = cursors[e] = carry + sum - count;
    carry += __shfl_sync(~0u, sum, 31);
  }
  if (threadIdx.x == 0) p.offsets[E] = carry;
}

__global__ void place_slots(RoutingPlan p, int32_t* cursors, const int32_t* top_k_index, int64_t R) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= R) return;
  const int row = atomicAdd(cursors + top_k_index[slot], 1);
  p.row_slot[row] = int32_t(slot);
  p.slot_row[slot] = row;
}

// cursors (E): scratch.
inline void plan(GpuBase& dev, RoutingPlan p, int32_t* cursors, const int32_t* top_k_index, int64_t R, int E) {
  const auto blocks = unsigned(ceil_div(R, 256));
  dev.zero(p.counts, size_t(E) * sizeof(int32_t));
  launch(dev, count_slots, blocks, 256, 0, p.counts, top_k_index, R);
  launch(dev, find_offsets, 1, 32, 0, p, cursors, E);
  launch(dev, place_slots, blocks, 256, 0, p, cursors, top_k_index, R);
}

}  // namespace atomic_plan
