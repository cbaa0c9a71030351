// SwiGLU of one row on the CPU, shared by the dense MLP and the experts. Rows are taken 8 columns at a time, the width
// at which gate and up columns alternate, so that both are contiguous.
#pragma once
#include "llmc/cpu_math.h"
#include "llmc/swiglu.h"

// a (F) from h (2F), in the type of sums, not yet rounded.
template <class Acc, class Real>
inline void swiglu_row(Acc* a, const Real* h, int64_t F) {
  for (int64_t f = 0; f < F; f += swiglu_interleave) {
    const Real *g = h + 2 * f, *u = g + swiglu_interleave;
#pragma omp simd
    for (int64_t i = 0; i < swiglu_interleave; ++i) {
      Acc gate = Acc(g[i]);
      a[f + i] = gate * sigmoid_of(gate) * Acc(u[i]);
    }
  }
}

// dh (2F) from scale * da, da (F), and h (2F). Unless null, a (F) receives the same as from swiglu_row.
template <class Acc, class Real>
inline void swiglu_backward_row(Real* dh, const Acc* da, const Real* h, Acc scale, int64_t F, Acc* a = nullptr) {
  for (int64_t f = 0; f < F; f += swiglu_interleave) {
    const Real *g = h + 2 * f, *u = g + swiglu_interleave;
    Real *dg = dh + 2 * f, *du = dg + swiglu_interleave;
#pragma omp simd
    for (int64_t i = 0; i < swiglu_interleave; ++i) {
      Acc gate = Acc(g[i]), up = Acc(u[i]), d = scale * da[f + i], s = sigmoid_of(gate), silu = gate * s;
      if (a) a[f + i] = silu * up;
      dg[i] = Real(d * up * s * (Acc(1) + gate * (Acc(1) - s)));
      du[i] = Real(d * silu);
    }
  }
}
