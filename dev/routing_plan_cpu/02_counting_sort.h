// Rung 2: a counting sort. One pass counts the slots of all experts, a sum over E gives each expert its first row, and
// one pass more gives every slot the next row of its expert: 2 R steps whatever E is, no comparison and no branch, and
// slots stay in order within an expert since they come in order.
//
// Predicted: 4 R clocks on one thread. Counting stores once for a slot, placing three times (the row, the slot, the
// cursor), and a store a clock is what a processor does. The floor leaves out that the load of a counter has to wait
// for the store before it if that was the same counter, some 5 clocks, and the processor does not know so beforehand;
// and that the rows of E experts lie in E places: with many, their cache lines come and go. Bytes: 16 R, expert read
// twice, two tensors written; while R is below a million or so it all stays in the caches.
#pragma once
#include <algorithm>

#include "moe/dispatch.h"

namespace counting_sort {

// All indices are taken to be in [0,E). scratch: cursor (E), the next row of each expert.
inline void plan(RoutingPlan plan, int32_t* cursor, const int32_t* expert, int64_t R, int64_t E) {
  std::fill_n(plan.counts, E, 0);
  for (int64_t slot = 0; slot < R; ++slot) ++plan.counts[expert[slot]];
  plan.offsets[0] = 0;
  for (int64_t e = 0; e < E; ++e) plan.offsets[e + 1] = plan.offsets[e] + plan.counts[e];
  std::copy_n(plan.offsets, E, cursor);
  for (int64_t slot = 0; slot < R; ++slot) {
    const int32_t row = cursor[expert[slot]]++;
    plan.row_slot[row] = int32_t(slot);
    plan.slot_row[slot] = row;
  }
}

}  // namespace counting_sort
