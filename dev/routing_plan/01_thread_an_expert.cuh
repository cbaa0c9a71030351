// Rung 1: one block, a thread an expert. Each thread reads all R choices twice: to count its rows, and, once the
// offsets are known, to place them in the order of the slots. Nothing is shared, and nothing needs an explanation.
//
// Predicted: 2R loads one after the other. All threads of a warp read the same choice, so a load is one broadcast from
// the L1 cache, some 35 clocks; in the second pass a store may follow each, so the compiler cannot read ahead. With 35
// to 70 clocks for each choice and pass, R = 65536 takes about 4 ms, and one multiprocessor of 132 works. No count of
// bytes (12R, half a microsecond) says so: latency is the limit, and the number of experts does not matter.
//
// Sizes: E <= 1024.
#pragma once
#include "llmc/cuda_common.cuh"
#include "moe/dispatch.h"

namespace thread_an_expert {

__global__ void plan_rows(RoutingPlan p, const int32_t* top_k_index, int64_t R, int E) {
  const int e = threadIdx.x;
  if (e < E) {
    int count = 0;
    for (int64_t slot = 0; slot < R; ++slot) count += top_k_index[slot] == e;
    p.counts[e] = count;
  }
  __syncthreads();
  if (e == 0) {
    p.offsets[0] = 0;
    for (int i = 0; i < E; ++i) p.offsets[i + 1] = p.offsets[i] + p.counts[i];
  }
  __syncthreads();
  if (e >= E) return;
  int row = p.offsets[e];
  for (int64_t slot = 0; slot < R; ++slot)
    if (top_k_index[slot] == e) {
      p.row_slot[row] = int32_t(slot);
      p.slot_row[slot] = row++;
    }
}

inline void plan(GpuBase& dev, RoutingPlan p, const int32_t* top_k_index, int64_t R, int E) {
  if (E > 1024) fail("routing_plan 01_thread_an_expert: at most 1024 experts, not ", E);
  launch(dev, plan_rows, 1, unsigned(ceil_div(E, 32) * 32), 0, p, top_k_index, R, E);
}

}  // namespace thread_an_expert
