// Which tile each of the six products takes on Hopper, and their launches.
#include "moe/experts_hopper.cuh"
#include "moe/experts_hopper_kernels.h"

namespace hopper {

namespace {

// With the tile asked for, where the product comes in it.
template <template <class> class Product, class... Outputs>
void run_with(GpuBase& dev, int tile, const ExpertShape& s, const Operands& o, Outputs... outputs) {
  if (dev.expert_tile >= 0) tile = dev.expert_tile;
  constexpr bool sums_rows = Product<Wide>::sums_rows, has_slots = Product<Wide>::warp_slots > 0;
  if constexpr (comes_in(narrow, sums_rows, has_slots))
    if (tile == narrow) return run(dev, Product<Narrow>{{o, outputs...}}, s);
  if constexpr (comes_in(medium, sums_rows, has_slots))
    if (tile == medium) return run(dev, Product<Medium>{{o, outputs...}}, s);
  if constexpr (comes_in(tall, sums_rows, has_slots))
    if (tile == tall) return run(dev, Product<Tall>{{o, outputs...}}, s);
  return run(dev, Product<Wide>{{o, outputs...}}, s);
}

template <class Shape>
using Down = StagedRows<Shape, false>;
template <class Shape>
using UpInput = StagedRows<Shape, true>;
template <class Shape>
using DownWeight = Direct<WeightGradient<Shape, true>>;
template <class Shape>
using UpWeight = Direct<WeightGradient<Shape, false>>;

bool fits(const ExpertShape& s) { return s.E <= max_experts && s.C % 8 == 0 && s.F % 8 == 0; }

}  // namespace

const char* const tile_names[tile_choices] = {"128x128 ping-pong", "128x192 ping-pong", "128x256 cooperative",
                                              "256x128 cooperative"};

bool usable(const GpuBase& dev, const ExpertShape& s) { return usable(dev) && fits(s); }
void require(const GpuBase& dev, const ExpertShape& s) {
  if (dev.capability != 90)
    fail("--experts hopper: ", dev.gpu_name, " is not a Hopper GPU (compute capability 9.0); use auto or portable");
  if (!is_compiled()) fail("--experts hopper: this program was built without sm_90a code; build for 90a, or use auto");
  if (!fits(s))
    fail("--experts hopper: --n-expert ", s.E, " --d-model ", s.C, " --d-expert ", s.F, ": at most ", max_experts,
         " experts, widths that are multiples of 8; change them, or use auto");
}

// Measured on an H100 (dev/experts). The larger the tile, the less is read from the L2 cache for a multiplication; with a
// short reduction more is won by finishing a tile while the next is multiplied.
void up(GpuBase& dev, const Operands& o, bf16* h, bf16* a, const ExpertShape& s) {
  run_with<StagedUp>(dev, wide, s, o, h, a);
}
void down(GpuBase& dev, const Operands& o, bf16* y, const ExpertShape& s) {
  run_with<Down>(dev, down_tile(s), s, o, y);
}
void down_backward(GpuBase& dev, const Operands& o, bf16* dh, bf16* a_scaled, float* partial, const bf16* h,
                   const float* gates, const int32_t* slot_of_row, const ExpertShape& s) {
  const DownBackwardOutputs out{dh, a_scaled, partial, h, gates, slot_of_row, s.R};
  run_with<StagedDownBackward>(dev, s.C > 1536 ? wide : narrow, s, o, out);
}
void down_backward_weight(GpuBase& dev, const Operands& o, void* gradient, bool wide_gradient, const ExpertShape& s) {
  run_with<DownWeight>(dev, wide, s, o, gradient, wide_gradient);
}
void up_backward_input(GpuBase& dev, const Operands& o, bf16* dx_rows, const ExpertShape& s) {
  run_with<UpInput>(dev, s.F > 512 ? wide : medium, s, o, dx_rows);
}
void up_backward_weight(GpuBase& dev, const Operands& o, void* gradient, bool wide_gradient, const ExpertShape& s) {
  run_with<UpWeight>(dev, s.C % 512 == 0 ? wide : tall, s, o, gradient, wide_gradient);
}

}  // namespace hopper
