// Rung 3: the logits are a matrix product, and a library has a good one. Then a kernel in which a group of 8 to 32 lanes
// holds the E scores of a token: softmax, top-k by maxima over the group, gates, and sums of the statistics in a fixed
// order, a block's first. This is what production does where its fused kernels do not fit or are slower (fp32, more
// than 32 experts forward or 128 backward, rows that are no whole 16-byte chunks), so this rung has no code: it is
// production with those kernels switched off.
//
// Predicted, forward: x from DRAM once, N*C*2 bytes; the product's operations are nothing to tensor cores. The logits,
// N*E*4 bytes, are written and read again, E / C of the bytes of x each; both stay in L2 where they are below some
// 30 MB. The rest is three launches, each with a beginning and an end in which DRAM is idle, and a product whose E
// columns are fewer than any tile that a library is tuned for.
//
// Backward: logits again; ds (N,E) as three bf16 parts, since tensor cores multiply bf16; dx = parts (N,3E) Wg^3 (3E,C)
// and dWg^3 = parts^T x, whose three parts are added. x is read twice and dx written once: 3*N*C*2 bytes, and 14*N*C*E
// operations.
#pragma once
#include "llmc/gpu.h"

namespace product_then_choose {

// Runs a pass of production by way of the library.
template <class Pass>
void run(GpuBase& dev, const Pass& pass) {
  const bool before = dev.portable;
  dev.portable = true;
  pass();
  dev.portable = before;
}

}  // namespace product_then_choose
