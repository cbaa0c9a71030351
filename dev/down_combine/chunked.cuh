// Variant 2: Y a few columns at a time. The down product makes `chunk` columns of all rows, combine brings these to the
// tokens, then the next columns take their place: R * chunk elements are in memory instead of R * C, and A is read again
// for every chunk. Sums are in production's order.
#pragma once
#include <algorithm>

#include "moe/experts_hopper.cuh"

namespace down_combine {

// y (R,width) = a W2[e]^T for the columns [first, first + width): a part of the rows of every W2.
template <class Shape>
void down_columns(GpuBase& dev, bf16* y, const bf16* a, const bf16* w2, const int32_t* offsets, const ExpertShape& s,
                  int64_t first, int64_t width) {
  const grouped::Operands o{a, w2 + first * s.F, offsets, nullptr, grouped::Divisor(1), int(s.E),
                            0, int(width),       int(s.F)};
  hopper::run(dev, hopper::StagedRows<Shape, false>{{o, y}}, s, s.C * s.F);
}

// out = residual + sum over k of gate * y, of the columns that y (R,width) has; out and residual are rows of C. A warp a
// token, eight columns a lane.
constexpr int chunk_warps = 8;
__global__ void __launch_bounds__(chunk_warps * 32)
    combine_columns(bf16* out, const bf16* y, const bf16* residual, const float* gates, const int32_t* slot_row,
                    int64_t N, int K, int64_t width, int64_t C) {
  using Chunk = Pack<bf16>;
  constexpr int batch = 4;  // rows in flight
  const int64_t t = int64_t(blockIdx.x) * chunk_warps + threadIdx.x / 32;
  if (t >= N) return;
  for (int64_t c = threadIdx.x % 32 * 8; c < width; c += 32 * 8) {
    auto start = *reinterpret_cast<const Chunk*>(residual + t * C + c);
    float sum[8] = {};
    for (int k0 = 0; k0 < K; k0 += batch) {
      Chunk rows[batch] = {};
      float gate[batch] = {};
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int row = k0 + i < K ? slot_row[t * K + k0 + i] : -1;
        if (row < 0) continue;
        gate[i] = gates[t * K + k0 + i];
        rows[i] = *reinterpret_cast<const Chunk*>(y + row * width + c);
      }
#pragma unroll
      for (int i = 0; i < batch; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += gate[i] * rows[i][j];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) start.set(j, start[j] + sum[j]);
    *reinterpret_cast<Chunk*>(out + t * C + c) = start;
  }
}

// y (R,chunk): scratch. chunk % 8 == 0.
inline void chunked(GpuBase& dev, bf16* out, bf16* y, const bf16* a, const bf16* w2, const bf16* residual,
                    const float* gates, const int32_t* offsets, const int32_t* slot_row, const ExpertShape& s,
                    int64_t chunk) {
  const int64_t N = s.R / s.K;
  for (int64_t first = 0; first < s.C; first += chunk) {
    const int64_t width = std::min(chunk, s.C - first);
    const auto down = width % 256 == 0 ? down_columns<hopper::Wide> : down_columns<hopper::Narrow>;
    down(dev, y, a, w2, offsets, s, first, width);
    launch(dev, combine_columns, unsigned(ceil_div(N, chunk_warps)), chunk_warps * 32, 0, out + first, y,
           residual + first, gates, slot_row, N, int(s.K), width, s.C);
  }
}

}  // namespace down_combine
