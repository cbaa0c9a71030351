// Variant 1: one block, a thread an expert. Each thread reads the choices of all tokens twice: to count its rows, and,
// once the offsets are known, to place them in token order. Nothing is shared and nothing is fast.
#pragma once
#include "llmc/cuda_common.cuh"
#include "moe/dispatch.h"

namespace naive {

__global__ void plan(RoutingPlan p, const int32_t* top_k_index, int64_t slots, int E) {
  int e = threadIdx.x;
  if (e < E) {
    int count = 0;
    for (int64_t slot = 0; slot < slots; ++slot) count += top_k_index[slot] == e;
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
  for (int64_t slot = 0; slot < slots; ++slot)
    if (top_k_index[slot] == e) {
      p.row_slot[row] = int32_t(slot);
      p.slot_row[slot] = row++;
    }
}

}  // namespace naive
