// The routing plan: which slot is row r, and where each slot's row is. A few int arrays stand in for the gathered copies
// of the tokens that other systems keep.
#pragma once
#include "llmc/device.h"
#include "llmc/plan.h"

// counts (E)       rows of each expert
// offsets (E+1)    exclusive prefix sum: rows of expert e are [offsets[e], offsets[e+1]); offsets[E] <= R = N*K
// row_slot (R)     slot t*K+k of row r, grouped by expert, ascending within it; the token is row_slot/K. Rows past
//                  offsets[E] hold -1.
// slot_row (N,K)   the row of slot k of token t, or -1 where capacity dropped it
struct RoutingPlan {
  int32_t *counts, *offsets, *row_slot, *slot_row;
};

// in  top_k_index (N,K) int32, values in [0,E), or -1: no row (an expert of another rank's); capacity: most rows an
//     expert keeps, the first in token order; 0 = dropless
// Errors: an index outside [0,E) sets DeviceStatus::expert_out_of_range, and its slot is dropped.
template <class Device>
void dispatch_plan(Device& dev, RoutingPlan plan, void* scratch, const int32_t* top_k_index, int64_t N, int64_t K,
                   int64_t E, int64_t capacity);
template <class Device>
size_t dispatch_scratch_bytes(int64_t N, int64_t K, int64_t E);

// The plan of rows [first, first + n) of a plan, as rows 0 to n: slots whose row is another have none.
//   part.row_slot (n), part.slot_row (N,K), part.offsets (E+1), part.counts (E)
template <class Device>
void dispatch_part(Device& dev, RoutingPlan part, RoutingPlan plan, int64_t first, int64_t n, int64_t N, int64_t K,
                   int64_t E);

// rows (R,C) = x[row_slot/K]: the gathered copy of --dispatch materialized. Rows past offsets[E] are not written.
template <class Device>
void dispatch_gather(Device& dev, typename Device::Real* rows, const typename Device::Real* x, const int32_t* offsets,
                     const int32_t* row_slot, int64_t N, int64_t K, int64_t E, int64_t C);

// The plan's tensors, as the executor sees them.
struct RoutingTensors {
  Tensor<int32_t> counts, offsets, row_slot, slot_row;
  operator RoutingPlan() const { return {counts, offsets, row_slot, slot_row}; }
  template <class F>
  void for_each_tensor(F f) const {
    f(counts), f(offsets), f(row_slot), f(slot_row);
  }
};
