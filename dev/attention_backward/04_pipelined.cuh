// Rung 4: five products again, with the same bits every time. A block owns keys, as in rung 2, and dS goes through shared
// memory to become dQ; but the blocks add their shares of a tile of dQ one after another, in a fixed order: a counter
// says whose turn it is. Blocks with later keys are ahead from the start, so that waits are short. Queries and dO come
// through two stages, by cp.async, while the step before is multiplied. This is what the trainer runs on Ampere and Ada
// (llmc/attention_backward.cu): its launcher is called, told to use the portable kernels.
//
// Predicted: 5 * B*NH*T*T*HD operations on tensor cores, and shares of dQ that are read and written in the L2 cache,
// 8*HD bytes a query for each tile of keys. mma.sync reaches two thirds of Hopper's rate at best; a third of a matrix
// product's rate.
#pragma once
#include "llmc/attention.h"

namespace pipelined {

inline void attention_backward(Gpu<bf16>& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o,
                               const float* lse, const bf16* qk, const bf16* qkv, int64_t B, int64_t T,
                               HeadShape heads) {
  const bool before = dev.portable;
  dev.portable = true;
  ::attention_backward(dev, dqkv, scratch, dout, o, lse, qk, qkv, B, T, heads);
  dev.portable = before;
}

}  // namespace pipelined
