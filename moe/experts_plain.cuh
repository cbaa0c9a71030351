// The six expert products without tensor cores, for Gpu<float> and for widths whose rows are not whole 16-byte chunks:
// experts_plain.cu. Arguments as in experts.h.
#pragma once
#include "llmc/gpu.h"
#include "moe/experts.h"

namespace plain {

template <class Real>
void up(Gpu<Real>& dev, Real* h, Real* a, const Real* x, const Real* w13, const int32_t* offsets,
        const int32_t* row_slot, ExpertShape s);
template <class Real>
void down(Gpu<Real>& dev, Real* y, const Real* a, const Real* w2, const int32_t* offsets, ExpertShape s);
// partial (ceil(F / 64), R): the part of <dA', A> that 64 columns contribute
template <class Real>
void down_backward(Gpu<Real>& dev, Real* dh, Real* a_scaled, float* partial, const Real* dout, const Real* w2,
                   const Real* h, const float* gates, const int32_t* offsets, const int32_t* row_slot,
                   const int32_t* slot_of_row, ExpertShape s);
template <class Real>
void down_backward_weight(Gpu<Real>& dev, Grad<Gpu<Real>> dw2, const Real* dout, const Real* a_scaled,
                          const int32_t* offsets, const int32_t* row_slot, ExpertShape s);
template <class Real>
void up_backward_input(Gpu<Real>& dev, Real* dx_rows, const Real* dh, const Real* w13, const int32_t* offsets,
                       ExpertShape s);
template <class Real>
void up_backward_weight(Gpu<Real>& dev, Grad<Gpu<Real>> dw13, const Real* dh, const Real* x, const int32_t* offsets,
                        const int32_t* row_slot, ExpertShape s);

}  // namespace plain
