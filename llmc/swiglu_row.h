// SwiGLU of one row on the CPU, shared by the dense MLP and the experts.
#pragma once
#include "llmc/cpu_math.h"
#include "llmc/swiglu.h"

// h is taken apart into g and u, this many columns at a time, so that the arithmetic runs on contiguous values.
inline constexpr int64_t swiglu_chunk = 64;

template <class Acc, class Real>
inline void split_gate_up(Acc* g, Acc* u, const Real* h, int64_t n) {
  for (int64_t f = 0; f < n; f += swiglu_interleave)
    for (int64_t i = 0; i < swiglu_interleave; ++i) {
      g[f + i] = Acc(h[2 * f + i]);
      u[f + i] = Acc(h[2 * f + swiglu_interleave + i]);
    }
}

// a (F) from h (2F), in the type of sums, not yet rounded.
template <class Acc, class Real>
inline void swiglu_row(Acc* a, const Real* h, int64_t F) {
  Acc g[swiglu_chunk], u[swiglu_chunk];
  for (int64_t f0 = 0; f0 < F; f0 += swiglu_chunk) {
    int64_t n = std::min(swiglu_chunk, F - f0);
    split_gate_up(g, u, h + 2 * f0, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) a[f0 + i] = g[i] * sigmoid_of(g[i]) * u[i];
  }
}

// dh (2F) from scale * da, da (F), and h (2F).
template <class Acc, class Real>
inline void swiglu_backward_row(Real* dh, const Acc* da, const Real* h, Acc scale, int64_t F) {
  Acc g[swiglu_chunk], u[swiglu_chunk];
  for (int64_t f0 = 0; f0 < F; f0 += swiglu_chunk) {
    int64_t n = std::min(swiglu_chunk, F - f0);
    split_gate_up(g, u, h + 2 * f0, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      Acc d = scale * da[f0 + i], s = sigmoid_of(g[i]), dg = d * u[i] * s * (Acc(1) + g[i] * (Acc(1) - s));
      u[i] = d * g[i] * s;
      g[i] = dg;
    }
    for (int64_t f = 0; f < n; f += swiglu_interleave)
      for (int64_t i = 0; i < swiglu_interleave; ++i) {
        dh[2 * (f0 + f) + i] = Real(g[f + i]);
        dh[2 * (f0 + f) + swiglu_interleave + i] = Real(u[f + i]);
      }
  }
}
