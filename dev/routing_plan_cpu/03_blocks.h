// Rung 3: the counting sort of many workers, which is what the GPU runs. The slots are cut into blocks, here one a
// thread. Each block counts its own slots into counters of its own; one sum over (expert, block), experts outside,
// tells every block where its rows of every expert begin; then each block places its slots. Within an expert the rows
// of block 0 come first, then those of block 1: the plan is the same, bit for bit, for any number of blocks.
//
// Predicted: 4 R clocks shared by the threads, and twice the few microseconds that it takes to start them and to wait.
// A block's counters begin on a cache line of their own: on a shared line each store of one core would take the line
// away from the other.
#pragma once
#include <omp.h>

#include <algorithm>

#include "moe/dispatch.h"

namespace blocks {

inline constexpr int64_t line = 16;  // counters in a cache line
inline int64_t row_of_counters(int64_t E) { return (E + line - 1) / line * line; }

// All indices are taken to be in [0,E). scratch: (threads, row_of_counters(E)) from the start of a cache line.
inline void plan(RoutingPlan plan, int32_t* scratch, const int32_t* expert, int64_t R, int64_t E) {
  const int64_t blocks = omp_get_max_threads(), pitch = row_of_counters(E);
  auto first_slot = [=](int64_t block) { return R * block / blocks; };
#pragma omp parallel for
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t* counts = scratch + b * pitch;
    std::fill_n(counts, E, 0);
    for (int64_t slot = first_slot(b); slot < first_slot(b + 1); ++slot) ++counts[expert[slot]];
  }
  int32_t row = 0;
  for (int64_t e = 0; e < E; ++e) {
    plan.offsets[e] = row;
    for (int64_t b = 0; b < blocks; ++b) {
      int32_t& counter = scratch[b * pitch + e];
      const int32_t count = counter;
      counter = row;
      row += count;
    }
    plan.counts[e] = row - plan.offsets[e];
  }
  plan.offsets[E] = row;
#pragma omp parallel for
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t* cursor = scratch + b * pitch;
    for (int64_t slot = first_slot(b); slot < first_slot(b + 1); ++slot) {
      const int32_t mine = cursor[expert[slot]]++;
      plan.row_slot[mine] = int32_t(slot);
      plan.slot_row[slot] = mine;
    }
  }
}

}  // namespace blocks
