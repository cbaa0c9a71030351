// Rung 1: a thread an element of dout, which adds it to its token's row of the gradient by an atomic addition.
//
// Predicted: memory sees 2NC bytes of dout and each row that occurs once in each direction, as the op must. The limit
// is the L2 cache, which does the additions: NC of them, 4 bytes each, in requests of 32 neighbours. A frequent token's
// row is added to N/16 times, and the additions to one address come one after the other: about N/16 of a few clocks
// each, while others go on elsewhere. A few times the floor where C is large.
//
// The order of a token's additions is any, and so are the last bits of its sum: this rung does not repeat its bits.
#pragma once
#include "llmc/cuda_common.cuh"

namespace atomic {

__global__ void add_elements(float* dtable, const int32_t* tokens, const bf16* dout, int64_t N, int64_t C) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < N * C) atomicAdd(dtable + tokens[i / C] * C + i % C, to_float(dout[i]));
}

// dtable (V,C) += the sum of dout (N,C) over the positions of each token.
inline void backward(GpuBase& dev, float* dtable, const int32_t* tokens, const bf16* dout, int64_t N, int64_t C) {
  launch(dev, add_elements, unsigned(ceil_div(N * C, 256)), 256, 0, dtable, tokens, dout, N, C);
}

}  // namespace atomic
