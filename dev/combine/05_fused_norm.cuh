// Rung 5: combine() and the next layer's RMSNorm in one kernel. A warp a token, as in production, keeps the token's row
// of the residual stream in registers between writing it and normalising it; two launches read that row once more.
//
// Predicted: 2(K+3)NC bytes to the 2(K+4)NC of two launches: 5/6 of the time at K = 2, 11/12 at K = 8. The row takes
// C/64 registers of each lane, 64 at C = 4096, and more registers are fewer warps; but a lane has K loads of 16 bytes
// on their way at a time, so few warps should be enough.
//
// Sizes: C a multiple of 8, at most 4096.
#pragma once
#include "llmc/cuda_common.cuh"

namespace fused_norm {

constexpr int warps = 4;  // few, so that blocks fit where wide rows take many registers
constexpr int chunk = 8;  // elements that a lane takes at a time

// P chunks a lane.
template <int P>
__global__ void __launch_bounds__(warps * 32)
    combine_norm(bf16* sum, bf16* out, float* rstd, const bf16* rows, const bf16* addend, const float* gates,
                 const int32_t* slot_row, const bf16* weight, int64_t N, int K, int64_t C, float eps) {
  using Chunk = Pack<bf16>;
  constexpr int batch = 4;  // rows in flight
  const int64_t t = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (t >= N) return;
  auto at = [](int i) { return int64_t(i * 32 + int(threadIdx.x % 32)) * chunk; };
  Chunk stream[P];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const int64_t c = at(i);
    if (c >= C) continue;
    stream[i] = *reinterpret_cast<const Chunk*>(addend + t * C + c);
    float total[chunk] = {};
    for (int k0 = 0; k0 < K; k0 += batch) {
      Chunk y[batch] = {};
      float gate[batch] = {};
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int row = k0 + b < K ? slot_row[t * K + k0 + b] : -1;
        if (row < 0) continue;
        gate[b] = gates[t * K + k0 + b];
        y[b] = *reinterpret_cast<const Chunk*>(rows + int64_t(row) * C + c);
      }
#pragma unroll
      for (int b = 0; b < batch; ++b)
#pragma unroll
        for (int j = 0; j < chunk; ++j) total[j] += gate[b] * y[b][j];
    }
#pragma unroll
    for (int j = 0; j < chunk; ++j) {
      stream[i].set(j, stream[i][j] + total[j]);
      squares += stream[i][j] * stream[i][j];  // of the rounded stream, which is what the backward pass will find
    }
    *reinterpret_cast<Chunk*>(sum + t * C + c) = stream[i];
  }
  const float r = 1.0f / sqrtf(warp_sum(squares) / float(C) + eps);
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const int64_t c = at(i);
    if (c >= C) continue;
    const auto w = *reinterpret_cast<const Chunk*>(weight + c);
#pragma unroll
    for (int j = 0; j < chunk; ++j) stream[i].set(j, stream[i][j] * r * w[j]);
    *reinterpret_cast<Chunk*>(out + t * C + c) = stream[i];
  }
  if (threadIdx.x % 32 == 0) rstd[t] = r;
}

// sum (N,C), the residual stream; out (N,C) and rstd (N) as rmsnorm_forward() of it.
inline void combine_and_norm(GpuBase& dev, bf16* sum, bf16* out, float* rstd, const bf16* rows, const bf16* addend,
                             const float* gates, const int32_t* slot_row, const bf16* weight, int64_t N, int64_t K,
                             int64_t C, double eps) {
  const int64_t chunks = ceil_div(C, 32 * chunk);
  if (C % chunk || chunks > 16) fail("combine 05_fused_norm: rows of ", C, " elements");
  auto kernel = chunks <= 2   ? combine_norm<2>
                : chunks <= 3 ? combine_norm<3>
                : chunks <= 4 ? combine_norm<4>
                : chunks <= 6 ? combine_norm<6>
                : chunks <= 8 ? combine_norm<8>
                              : combine_norm<16>;
  launch(dev, kernel, unsigned(ceil_div(N, warps)), warps * 32, 0, sum, out, rstd, rows, addend, gates, slot_row,
         weight, N, int(K), C, float(eps));
}

}  // namespace fused_norm
