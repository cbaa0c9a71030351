// Rung 1: every expert looks for its own slots. It reads all R of them to count, and once more to give each a row.
// Experts are independent, so each is a task for a thread.
//
// Predicted: R E comparisons to count, `lanes` of them a clock since the compiler makes vectors of that loop, and R E
// to place, a clock each: a load, a comparison, a branch. Each slot is once the exception to "not mine", and a branch
// that was predicted wrong costs about 20 clocks. Together R (E (1 + 1/lanes) + 20) clocks, shared by the threads.
#pragma once
#include "moe/dispatch.h"

namespace scan_an_expert {

// All indices are taken to be in [0,E). scratch: not used.
inline void plan(RoutingPlan plan, int32_t*, const int32_t* expert, int64_t R, int64_t E) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t e = 0; e < E; ++e) {
    int32_t count = 0;
    for (int64_t slot = 0; slot < R; ++slot) count += expert[slot] == e;
    plan.counts[e] = count;
  }
  plan.offsets[0] = 0;
  for (int64_t e = 0; e < E; ++e) plan.offsets[e + 1] = plan.offsets[e] + plan.counts[e];
#pragma omp parallel for schedule(dynamic)
  for (int64_t e = 0; e < E; ++e) {
    int32_t row = plan.offsets[e];
    for (int64_t slot = 0; slot < R; ++slot)
      if (expert[slot] == e) {
        plan.row_slot[row] = int32_t(slot);
        plan.slot_row[slot] = row++;
      }
  }
}

}  // namespace scan_an_expert
