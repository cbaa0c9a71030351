// SwiGLU (Shazeer 2020, "GLU variants improve transformer"): a = silu(g) * u, silu(g) = g * sigmoid(g).
//
// g and u are the two halves of h (N, 2F). They are stored interleaved, 8 columns of g, then 8 of u, and so on, and the
// rows of the weight that makes h are stored in the same order, so that whoever holds 16 neighbouring columns of h (a
// SIMD register here, a thread of a GPU's accumulator tile there) can finish a without talking to anybody. F is a
// multiple of 8.
#pragma once
#include "llmc/device.h"

inline constexpr int64_t swiglu_interleave = 8;

// a (N,F) from h (N,2F).
template <class Device>
void swiglu_forward(Device& dev, typename Device::Real* a, const typename Device::Real* h, int64_t N, int64_t F);

// dh (N,2F) from da (N,F) and h: dg = da*u*s*(1 + g*(1-s)), du = da*g*s, s = sigmoid(g).
template <class Device>
void swiglu_backward(Device& dev, typename Device::Real* dh, const typename Device::Real* da,
                     const typename Device::Real* h, int64_t N, int64_t F);
