// The expert products on the GPU. bf16 goes through tensor cores, Hopper's own way or the one of every GPU since Ampere;
// float, and bf16 in widths that are not whole 16-byte chunks, through plain kernels with the same rounding points
// (experts_plain.cu).
#include "moe/experts.h"

#include "moe/experts_hopper_kernels.h"
#include "moe/experts_plain.cuh"
#include "moe/experts_portable.cuh"

namespace {

// Tiles of the portable kernels. Per multiply-add, 128 x 256 reads a quarter less from the L2 cache than 128 x 128, but
// occupies the multiprocessor alone: while it finishes a tile, the tensor cores rest. Where finishing is much work, two
// smaller blocks that cover for each other do better.
using Wide = portable::TileShape<128, 256, 1>;
using Pair = portable::TileShape<128, 128, 2>;

using Up = grouped::Up<Wide>;
using Down = grouped::Rows<Wide, false>;
using DownBackward = grouped::DownBackward<Pair>;
using DownWeight = grouped::WeightGradient<Wide, true>;
using UpInput = grouped::Rows<Wide, true>;
using UpWeight = grouped::WeightGradient<Wide, false>;

constexpr int dgate_columns = 64;  // that one partial sum of <dA', A> covers, in either implementation
static_assert(dgate_columns == grouped::group_columns);

// Tensor cores are fed 16 bytes at a time.
template <class Device>
bool on_tensor_cores(const ExpertShape& s) {
  return std::is_same_v<typename Device::Real, bf16> && s.C % 8 == 0 && s.F % 8 == 0;
}

bool on_hopper(const GpuBase& dev, const ExpertShape& s) { return !dev.portable && hopper::usable(dev, s); }

grouped::Operands operands(const bf16* a, const bf16* b, const int32_t* offsets, const int32_t* row_slot,
                           const ExpertShape& s, int64_t M, int64_t N, int64_t depth) {
  return {a, b, offsets, row_slot, grouped::Divisor(row_slot ? s.K : 1), int(s.E), int(M), int(N), int(depth)};
}

// dgates at slot(r) = the sum of r's partial sums, in the order of columns.
__global__ void sum_dgates(float* dgates, const float* partial, const int32_t* offsets, const int32_t* slot_of_row,
                           int E, int64_t R, int parts) {
  const int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r >= offsets[E]) return;
  float sum = 0;
  for (int i = 0; i < parts; ++i) sum += partial[i * R + r];
  dgates[slot_of_row[r]] = sum;
}

}  // namespace

template <class Device>
void experts_up(Device& dev, typename Device::Real* h, typename Device::Real* a, void*, const typename Device::Real* x,
                const typename Device::Real* w13, const int32_t* offsets, const int32_t* row_slot, ExpertShape s) {
  if constexpr (std::is_same_v<typename Device::Real, bf16>)
    if (on_tensor_cores<Device>(s)) {
      const auto o = operands(x, w13, offsets, row_slot, s, 0, 2 * s.F, s.C);
      return on_hopper(dev, s) ? hopper::up(dev, o, h, a, s) : portable::run(dev, Up{o, h, a});
    }
  plain::up(dev, h, a, x, w13, offsets, row_slot, s);
}

template <class Device>
void experts_down(Device& dev, typename Device::Real* y, void*, const typename Device::Real* a,
                  const typename Device::Real* w2, const int32_t* offsets, ExpertShape s) {
  if constexpr (std::is_same_v<typename Device::Real, bf16>)
    if (on_tensor_cores<Device>(s)) {
      const auto o = operands(a, w2, offsets, nullptr, s, 0, s.C, s.F);
      return on_hopper(dev, s) ? hopper::down(dev, o, y, s) : portable::run(dev, Down{o, y});
    }
  plain::down(dev, y, a, w2, offsets, s);
}

template <class Device>
void experts_down_backward(Device& dev, typename Device::Real* dh, typename Device::Real* a_scaled,
                           typename Device::Acc* dgates, void* scratch, const typename Device::Real* dout,
                           const typename Device::Real* w2, const typename Device::Real* h,
                           const typename Device::Real*, const typename Device::Acc* gates, const int32_t* offsets,
                           const int32_t* row_slot, const int32_t* slot_of_row, ExpertShape s) {
  float* partial = static_cast<float*>(scratch);
  [&] {
    if constexpr (std::is_same_v<typename Device::Real, bf16>)
      if (on_tensor_cores<Device>(s)) {
        const auto o = operands(dout, w2, offsets, row_slot, s, 0, s.F, s.C);
        return on_hopper(dev, s)
                   ? hopper::down_backward(dev, o, dh, a_scaled, partial, h, gates, slot_of_row, s)
                   : portable::run(dev, DownBackward{o, {dh, a_scaled, partial, h, gates, slot_of_row, s.R}});
      }
    plain::down_backward(dev, dh, a_scaled, partial, dout, w2, h, gates, offsets, row_slot, slot_of_row, s);
  }();
  dev.zero(dgates, s.n_slots() * sizeof(*dgates));  // slots without a row
  launch(dev, sum_dgates, dim3(ceil_div(s.R, 256)), dim3(256), 0, dgates, partial, offsets, slot_of_row, int(s.E), s.R,
         int(ceil_div(s.F, dgate_columns)));
}

template <class Device>
void experts_down_backward_weight(Device& dev, Grad<Device> dw2, void*, const typename Device::Real* dout,
                                  const typename Device::Real* a_scaled, const int32_t* offsets,
                                  const int32_t* row_slot, ExpertShape s) {
  if constexpr (std::is_same_v<typename Device::Real, bf16>)
    if (on_tensor_cores<Device>(s)) {
      const auto o = operands(dout, a_scaled, offsets, row_slot, s, s.C, s.F, 0);
      return on_hopper(dev, s) ? hopper::down_backward_weight(dev, o, dw2.data, dw2.wide, dw2.add, s)
                               : portable::run(dev, DownWeight{o, dw2.data, dw2.wide, dw2.add});
    }
  plain::down_backward_weight(dev, dw2, dout, a_scaled, offsets, row_slot, s);
}

template <class Device>
void experts_up_backward_input(Device& dev, typename Device::Real* dx_rows, void*, const typename Device::Real* dh,
                               const typename Device::Real* w13, const int32_t* offsets, ExpertShape s) {
  if constexpr (std::is_same_v<typename Device::Real, bf16>)
    if (on_tensor_cores<Device>(s)) {
      const auto o = operands(dh, w13, offsets, nullptr, s, 0, s.C, 2 * s.F);
      return on_hopper(dev, s) ? hopper::up_backward_input(dev, o, dx_rows, s)
                               : portable::run(dev, UpInput{o, dx_rows});
    }
  plain::up_backward_input(dev, dx_rows, dh, w13, offsets, s);
}

template <class Device>
void experts_up_backward_weight(Device& dev, Grad<Device> dw13, void*, const typename Device::Real* dh,
                                const typename Device::Real* x, const int32_t* offsets, const int32_t* row_slot,
                                ExpertShape s) {
  if constexpr (std::is_same_v<typename Device::Real, bf16>)
    if (on_tensor_cores<Device>(s)) {
      const auto o = operands(dh, x, offsets, row_slot, s, 2 * s.F, s.C, 0);
      return on_hopper(dev, s) ? hopper::up_backward_weight(dev, o, dw13.data, dw13.wide, dw13.add, s)
                               : portable::run(dev, UpWeight{o, dw13.data, dw13.wide, dw13.add});
    }
  plain::up_backward_weight(dev, dw13, dh, x, offsets, row_slot, s);
}

template <class Device>
size_t experts_scratch_bytes(ExpertShape s) {
  return size_t(ceil_div(s.F, dgate_columns)) * s.R * sizeof(float);
}

#define INSTANTIATE(Real)                                                                                             \
  template void experts_up(Gpu<Real>&, Real*, Real*, void*, const Real*, const Real*, const int32_t*, const int32_t*, \
                           ExpertShape);                                                                              \
  template void experts_down(Gpu<Real>&, Real*, void*, const Real*, const Real*, const int32_t*, ExpertShape);        \
  template void experts_down_backward(Gpu<Real>&, Real*, Real*, float*, void*, const Real*, const Real*, const Real*, \
                                      const Real*, const float*, const int32_t*, const int32_t*, const int32_t*,      \
                                      ExpertShape);                                                                   \
  template void experts_down_backward_weight(Gpu<Real>&, Grad<Gpu<Real>>, void*, const Real*, const Real*,            \
                                             const int32_t*, const int32_t*, ExpertShape);                            \
  template void experts_up_backward_input(Gpu<Real>&, Real*, void*, const Real*, const Real*, const int32_t*,         \
                                          ExpertShape);                                                               \
  template void experts_up_backward_weight(Gpu<Real>&, Grad<Gpu<Real>>, void*, const Real*, const Real*,              \
                                           const int32_t*, const int32_t*, ExpertShape);                              \
  template size_t experts_scratch_bytes<Gpu<Real>>(ExpertShape);
INSTANTIATE(float)
INSTANTIATE(bf16)
