// Rung 1: a thread an element of out, which finds its token and column by a division and adds up its K rows there.
//
// Predicted: the K rows of a token are read once, the addend too, out is written: 2(K+2)NC bytes, production's count,
// and neighbouring threads read neighbouring values, so nothing is wasted. What is short is what a thread asks for at a
// time: 2 bytes of each of K rows, and only after it has read which row that is; a warp's request is 64 bytes. A
// multiprocessor needs some 16 KB on their way to keep the memory busy, and 64 warps with two such requests are 8 KB.
// So about a third to a half of the bandwidth at K = 2, more at K = 8. The division, of 64-bit numbers, costs every
// thread about a hundred instructions, for an element.
#pragma once
#include "llmc/cuda_common.cuh"

namespace thread_an_element {

__global__ void sum_rows(bf16* out, const bf16* rows, const bf16* addend, const float* gates, const int32_t* slot_row,
                         int64_t N, int64_t K, int64_t C) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= N * C) return;
  const int64_t t = i / C, c = i % C;
  float sum = 0;
  for (int64_t k = 0; k < K; ++k) {
    const int64_t row = slot_row[t * K + k];
    if (row >= 0) sum += (gates ? gates[t * K + k] : 1.0f) * to_float(rows[row * C + c]);
  }
  out[i] = from_float<bf16>(to_float(addend[i]) + sum);
}

inline void combine(GpuBase& dev, bf16* out, const bf16* rows, const bf16* addend, const float* gates,
                    const int32_t* slot_row, int64_t N, int64_t K, int64_t C) {
  launch(dev, sum_rows, unsigned(ceil_div(N * C, 256)), 256, 0, out, rows, addend, gates, slot_row, N, K, C);
}

}  // namespace thread_an_element
