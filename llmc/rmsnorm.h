// RMSNorm (Zhang and Sennrich 2019, eq. 4): y = x / rms(x) * w, rms(x)^2 = mean(x^2) + eps, over the last dimension. A GPU takes
// rows of at most 1024 times 16 bytes (1024 elements where they are not a multiple of 16 bytes).
#pragma once
#include "llmc/gradient.h"

// out (N,C), rstd (N) = 1/rms in Acc, from x (N,C) and weight (C).
template <class Device>
void rmsnorm_forward(Device& dev, typename Device::Real* out, typename Device::Acc* rstd,
                     const typename Device::Real* x, const typename Device::Real* weight, int64_t N, int64_t C,
                     double eps);

// sum (N,C) = residual + branch, rounded to Real; then out and rstd as rmsnorm_forward of the rounded sum. sum may be
// the same memory as residual.
template <class Device>
void residual_rmsnorm_forward(Device& dev, typename Device::Real* sum, typename Device::Real* out,
                              typename Device::Acc* rstd, const typename Device::Real* residual,
                              const typename Device::Real* branch, const typename Device::Real* weight, int64_t N,
                              int64_t C, double eps);

// dx (N,C) = dresidual + rstd * (w*dout - xhat * mean(w*dout*xhat)), xhat = x*rstd; dweight (C) += sum_n dout*xhat.
//   in  dresidual (N,C): the gradient that reaches x past the norm, or null; dx may be the same memory
template <class Device>
void rmsnorm_backward(Device& dev, typename Device::Real* dx, Grad<Device> dweight, void* scratch,
                      const typename Device::Real* dout, const typename Device::Real* dresidual,
                      const typename Device::Real* x, const typename Device::Real* weight,
                      const typename Device::Acc* rstd, int64_t N, int64_t C);
template <class Device>
size_t rmsnorm_backward_scratch_bytes(int64_t N, int64_t C);

// out (n) = a + b, element by element; out may be the same memory as either.
template <class Device>
void residual_add(Device& dev, typename Device::Real* out, const typename Device::Real* a,
                  const typename Device::Real* b, int64_t n);
