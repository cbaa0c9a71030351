// Attention in bf16 by Hopper's own kernels (attention_hopper_forward.cu, attention_hopper_backward.cu). Arguments and
// results as attention.h has them; attention_scratch_bytes() is enough for both.
#pragma once
#include "llmc/attention.h"
#include "llmc/gpu.h"

namespace attention_hopper {

// Whether this GPU runs them for this shape: it is a Hopper, sm_90a code is in the program, the head size is 64 or 128, and
// dev.portable does not forbid it.
bool usable(const GpuBase& dev, HeadShape heads);

void forward(GpuBase& dev, bf16* o, float* lse, void* scratch, const bf16* qk, const bf16* qkv, int64_t B, int64_t T,
             HeadShape heads);
void backward(GpuBase& dev, bf16* dqkv, void* scratch, const bf16* dout, const bf16* o, const float* lse,
              const bf16* qk, const bf16* qkv, int64_t B, int64_t T, HeadShape heads);

}  // namespace attention_hopper
