// SwiGLU of one row on the CPU, shared by the dense MLP and the experts.
#pragma once
#include "llmc/cpu_math.h"
#include "llmc/swiglu.h"

// a (F) from h (2F), in the type of sums, not yet rounded.
template <class Acc, class Real>
inline void swiglu_row(Acc* a, const Real* h, int64_t F) {
  for (int64_t f = 0; f < F; f += swiglu_interleave)
    for (int64_t i = 0; i < swiglu_interleave; ++i) {
      Acc g = Acc(h[2 * f + i]), u = Acc(h[2 * f + swiglu_interleave + i]);
      a[f + i] = g * sigmoid_of(g) * u;
    }
}

// dh (2F) from da (F) and h (2F). da may hold any multiple of the gradient: `scale` is applied to it.
template <class Acc, class Real>
inline void swiglu_backward_row(Real* dh, const Acc* da, const Real* h, Acc scale, int64_t F) {
  for (int64_t f = 0; f < F; f += swiglu_interleave)
    for (int64_t i = 0; i < swiglu_interleave; ++i) {
      Acc g = Acc(h[2 * f + i]), u = Acc(h[2 * f + swiglu_interleave + i]), d = scale * da[f + i];
      Acc s = sigmoid_of(g);
      dh[2 * f + i] = Real(d * u * s * (Acc(1) + g * (Acc(1) - s)));
      dh[2 * f + swiglu_interleave + i] = Real(d * g * s);
    }
}
