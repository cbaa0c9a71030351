// Rung 1: a thread an element of h, which finds its expert and its token, and walks along the token's row of x and a
// row of the expert's weight. The activation is a second kernel. (The kernels are those that dev/experts checks with.)
//
// Predicted: as for the naive dense product, each multiply-add waits for loads: well below 1 TFLOP/s. But nothing is
// copied beforehand and the host knows nothing of the routing: what the last rung keeps, all others give up for a
// while.
#pragma once
#include "dev/experts/buffers.h"
#include "dev/experts/naive.cuh"

namespace naive {

inline void up(Gpu<bf16>& dev, const ExpertBuffers& b) {
  const ExpertShape& s = b.s;
  const Weight w13{b.w13, 2 * s.F * s.C, s.C, 1};
  launch_rows_product(dev, b.h, b.x, w13, b.offsets, b.row_slot, s, 2 * s.F, s.C);
  launch(dev, swiglu, unsigned(ceil_div(s.R * s.F, block)), block, 0, b.a, b.h, s.R * s.F, s.F);
}

}  // namespace naive
