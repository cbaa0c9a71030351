// The expert products by Hopper's kernels (experts_hopper.cuh): which tile each takes. The products themselves are the
// structs of experts_epilogue.cuh without their tile.
#pragma once
#include "llmc/gpu.h"
#include "moe/experts.h"

namespace grouped {
struct Operands;
}

namespace hopper {

// Whether this GPU runs them: sm_90a code is in the program and the GPU is a Hopper; E is at most 512, C and F are
// multiples of 8.
bool usable(const GpuBase& dev, const ExpertShape& s);
// Error that says why where it does not (--experts hopper).
void require(const GpuBase& dev, const ExpertShape& s);

// Tiles. For measuring, GpuBase::expert_tile, where it is not negative, picks one of them; a product that does not come
// in it takes 128x256.
enum Tile { narrow, medium, wide, tall };
constexpr int tile_choices = 4;
extern const char* const tile_names[tile_choices];
// Whether a product comes in a tile. Sums over rows (the weights' gradients) go on for long and want the least traffic;
// slots for h (down backward) leave no registers for the accumulators of the medium tile.
constexpr bool comes_in(int tile, bool sums_rows, bool has_slots) {
  return sums_rows ? tile == wide || tile == tall : tile == narrow || tile == wide || (tile == medium && !has_slots);
}

// The ops of experts.h, on operands that experts.cu describes; partial (ceil(F/64), R) fp32 is what sum_dgates() adds up,
// gradient (E,C,F) or (E,2F,C) is added to, fp32 where wide_gradient, else bf16. For shapes that are usable(). Errors:
// of the driver that describes tensors, of the launch.
void up(GpuBase& dev, const grouped::Operands& o, bf16* h, bf16* a, const ExpertShape& s);
void down(GpuBase& dev, const grouped::Operands& o, bf16* y, const ExpertShape& s);
void down_backward(GpuBase& dev, const grouped::Operands& o, bf16* dh, bf16* a_scaled, float* partial, const bf16* h,
                   const float* gates, const int32_t* slot_of_row, const ExpertShape& s);
void down_backward_weight(GpuBase& dev, const grouped::Operands& o, void* gradient, bool wide_gradient,
                          const ExpertShape& s);
void up_backward_input(GpuBase& dev, const grouped::Operands& o, bf16* dx_rows, const ExpertShape& s);
void up_backward_weight(GpuBase& dev, const grouped::Operands& o, void* gradient, bool wide_gradient,
                        const ExpertShape& s);

}  // namespace hopper
