// Dense products with a weight matrix. Weights are (OC, IC): one row an output, as PyTorch stores them.
#pragma once
#include "llmc/gradient.h"

// out (N,OC) = x (N,IC) * weight (OC,IC)^T
template <class Device>
void matmul_forward(Device& dev, typename Device::Real* out, void* scratch, const typename Device::Real* x,
                    const typename Device::Real* weight, int64_t N, int64_t IC, int64_t OC);

// dx (N,IC) = dout (N,OC) * weight (OC,IC)
template <class Device>
void matmul_backward_input(Device& dev, typename Device::Real* dx, void* scratch, const typename Device::Real* dout,
                           const typename Device::Real* weight, int64_t N, int64_t IC, int64_t OC);

// dweight (OC,IC) += dout (N,OC)^T * x (N,IC), the sum over N finished before it is added; or = where dweight.add is not
// set. A narrow gradient is written, or starts at zero (gradient.h): onto anything else the library of a GPU may round
// the product before it adds.
template <class Device>
void matmul_backward_weight(Device& dev, Grad<Device> dweight, void* scratch, const typename Device::Real* dout,
                            const typename Device::Real* x, int64_t N, int64_t IC, int64_t OC);

// Enough for any of the three at these sizes.
template <class Device>
size_t matmul_scratch_bytes(int64_t N, int64_t IC, int64_t OC);
