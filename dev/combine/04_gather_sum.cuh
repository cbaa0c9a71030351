// Rung 4: back to gathering, a warp a token. Which rows the token has, and their gates, is read once a token: lane k
// holds those of slot k and tells the others by a shuffle. Nobody divides, and no load waits for another but at the
// start. The sum is made in registers, in the order of the slots, and rounded once: the same bits every time.
//
// Predicted: 2(K+2)NC bytes, the least there is. A lane still reads 2 bytes at a time, so a warp's request is 64 bytes
// and the 64 warps of a multiprocessor have about 8 KB on their way at K = 2, of the 16 KB that full bandwidth takes;
// at K = 8 the K loads of a column are independent and enough. Below the floor by up to one half at small K, by little
// at large. Production is this with 16 bytes a lane. Measured: at K = 8 slower than rung 1. As compiled, of four rows
// the first is waited for before the other three are asked for, since shuffles stand between the loads.
//
// Sizes: K <= 32.
#pragma once
#include "llmc/cuda_common.cuh"

namespace gather_sum {

constexpr int warps = 8;

__global__ void __launch_bounds__(warps * 32)
    sum_rows(bf16* out, const bf16* rows, const bf16* addend, const float* gates, const int32_t* slot_row, int64_t N,
             int K, int64_t C) {
  const int64_t t = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (t >= N) return;
  const int lane = threadIdx.x % 32, my_row = lane < K ? slot_row[t * K + lane] : -1;
  const float my_gate = lane < K && gates ? gates[t * K + lane] : 1;
  for (int64_t c0 = 0; c0 < C; c0 += 32) {  // all lanes go all rounds: they shuffle
    const int64_t c = c0 + lane;
    float sum = 0;
    for (int k = 0; k < K; ++k) {
      const int row = __shfl_sync(~0u, my_row, k);
      const float gate = __shfl_sync(~0u, my_gate, k);
      if (row >= 0 && c < C) sum += gate * to_float(rows[int64_t(row) * C + c]);
    }
    if (c < C) out[t * C + c] = from_float<bf16>(to_float(addend[t * C + c]) + sum);
  }
}

inline void combine(GpuBase& dev, bf16* out, const bf16* rows, const bf16* addend, const float* gates,
                    const int32_t* slot_row, int64_t N, int64_t K, int64_t C) {
  if (K > 32) fail("combine 04_gather_sum: at most 32 rows a token, not ", K);
  launch(dev, sum_rows, unsigned(ceil_div(N, warps)), warps * 32, 0, out, rows, addend, gates, slot_row, N, int(K), C);
}

}  // namespace gather_sum
