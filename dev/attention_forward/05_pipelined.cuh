// Rung 5: two stages, and warps with 32 queries. While a tile of K and V is multiplied, cp.async brings the next one into
// the other half of a double buffer; and each operand of K and V that a warp reads serves two products. This is what the
// trainer runs on Ampere and Ada (llmc/attention_forward.cu): its launcher is called, told to use the portable kernels.
//
// Predicted: a copy's latency is hidden behind the tile before it, and shared memory delivers for 2048 multiply-adds a
// clock instead of 1024. What remains is mma.sync itself, two thirds of Hopper's rate at best, and that a warp which
// computes exponentials multiplies nothing: half of a matrix product's rate, less at HD 64.
#pragma once
#include "llmc/attention.h"

namespace pipelined {

inline void attention_forward(Gpu<bf16>& dev, bf16* o, float* lse, void* scratch, const bf16* qk, const bf16* qkv,
                              int64_t B, int64_t T, HeadShape heads) {
  const bool before = dev.portable;
  dev.portable = true;
  ::attention_forward(dev, o, lse, scratch, qk, qkv, B, T, heads);
  dev.portable = before;
}

}  // namespace pipelined
