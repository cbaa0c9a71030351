// Token embedding.
#pragma once
#include "llmc/gradient.h"

// out (N,C) = table[tokens[n]]
//   in  tokens (N) int32 in [0,V), table (V,C)
// Errors: a token outside [0,V) sets DeviceStatus::token_out_of_range and reads row 0.
template <class Device>
void embedding_forward(Device& dev, typename Device::Real* out, const int32_t* tokens,
                       const typename Device::Real* table, int64_t N, int64_t C, int64_t V);

// dtable (V,C) += the sum of dout (N,C) over the positions of each token, in ascending position, added once.
template <class Device>
void embedding_backward(Device& dev, Grad<Device> dtable, void* scratch, const int32_t* tokens,
                        const typename Device::Real* dout, int64_t N, int64_t C, int64_t V);
template <class Device>
size_t embedding_backward_scratch_bytes(int64_t N, int64_t C, int64_t V);
