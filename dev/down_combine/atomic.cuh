// Variant 1: no Y. The down product adds gate * y to its token, by atomic additions, while the tile is in registers; a
// pass over the tokens then adds the residual stream and rounds. The sum over a token's experts has no fixed order: it
// does not repeat its bits.
#pragma once
#include "dev/combine/02_fp32_atomics.cuh"
#include "moe/experts_hopper.cuh"

namespace down_combine {

// row_slot and slots of the operands say where a row belongs, not where it is read: nothing is gathered.
template <class Shape_>
struct Scatter : grouped::Operands {
  using Shape = Shape_;
  static constexpr bool sums_rows = false, has_prefetch = false;
  static constexpr grouped::Access a_access{.down = false, .gathered = false}, b_access = a_access;
  float* sum;  // (N,C)
  const float* gates;

  template <int strips, int blocks, int distance>
  __device__ __forceinline__ void finish(const float (&acc)[strips][blocks][4], const grouped::Place<distance>& place,
                                         const grouped::WorkTile& t) const {
#pragma unroll
    for (int i = 0; i < strips; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.row_of(i, half);
        const bool valid = row < t.row_end;
        const int slot = valid ? __ldg(row_slot + row) : 0;
        const float gate = valid ? __ldg(gates + slot) : 0;
        float* to = sum + int64_t(slots(uint32_t(slot))) * N;
#pragma unroll
        for (int group = 0; group < blocks / 4; ++group) {
          float even[4], odd[4];
          grouped::block_of(even, odd, acc[i], half, group);
          const int column = place.column_of(group);
          if (!valid || column >= N) continue;
#pragma unroll
          for (int k = 0; k < 4; k += 2)
            atomics::add4(to + column + 2 * k, gate * even[k], gate * odd[k], gate * even[k + 1], gate * odd[k + 1]);
        }
      }
  }
};

// sum (N,C): scratch.
inline void atomic(GpuBase& dev, bf16* out, float* sum, const bf16* a, const bf16* w2, const bf16* residual,
                   const float* gates, const int32_t* offsets, const int32_t* row_slot, const ExpertShape& s) {
  const int64_t n = s.R / s.K * s.C;
  dev.zero(sum, size_t(n) * sizeof(float));
  const grouped::Operands o{a, w2, offsets, row_slot, grouped::Divisor(s.K), int(s.E), 0, int(s.C), int(s.F)};
  if (hopper::down_tile(s) == hopper::wide)
    hopper::run(dev, hopper::Direct<Scatter<hopper::Wide>>{{o, sum, gates}}, s);
  else
    hopper::run(dev, hopper::Direct<Scatter<hopper::Medium>>{{o, sum, gates}}, s);
  atomics::launch_add_residual(dev, out, sum, residual, n);
}

}  // namespace down_combine
