// Variant 1: a thread an element.
#pragma once
#include "llmc/cuda_common.cuh"

namespace naive {

__global__ void combine(bf16* out, const bf16* rows, const bf16* addend, const float* gates, const int32_t* slot_row,
                        int64_t N, int64_t K, int64_t C) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= N * C) return;
  int64_t t = i / C, c = i % C;
  float sum = 0;
  for (int64_t k = 0; k < K; ++k) {
    int64_t row = slot_row[t * K + k];
    if (row >= 0) sum += (gates ? gates[t * K + k] : 1.0f) * to_float(rows[row * C + c]);
  }
  out[i] = from_float<bf16>(to_float(addend[i]) + sum);
}

}  // namespace naive
