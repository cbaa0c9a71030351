// The expert MLPs: six grouped products over the rows of a routing plan. x and dout are read through row_slot while they
// are loaded; the activation, its backward and the gate gradient are finished before a result leaves the tile.
//
// Rows of expert e are [offsets[e], offsets[e+1]) (dispatch.h). Row r reads token row_slot[r]/K of x and dout, or row r
// itself where row_slot is null (--dispatch materialized: x and dout are then already gathered). Rows past offsets[E]
// are not written, and nothing that stands there, or in the rows of another expert, reaches a result.
//   W13 (E, 2F, C)  gate and up projections, rows interleaved 8 and 8 (swiglu.h)
//   W2  (E, C, F)   down projection
#pragma once
#include "llmc/gradient.h"

struct ExpertShape {
  int64_t R, K, E, C, F;  // R: rows that buffers hold; K: slots of a token
  int64_t slots = 0;      // of all tokens: N*K; 0: R
  int64_t n_slots() const { return slots ? slots : R; }
};

// Physical row, inside W13 of an expert, of row f of its gate (up = false) or up projection.
constexpr int64_t w13_row(int64_t f, bool up) { return f / 8 * 16 + f % 8 + (up ? 8 : 0); }

// h (R,2F) = x[token(r)] W13[e]^T, rounded to Real; a (R,F) = swiglu of the rounded h. Where h is null it is not written,
// and a has the same bits.
template <class Device>
void experts_up(Device& dev, typename Device::Real* h, typename Device::Real* a, void* scratch,
                const typename Device::Real* x, const typename Device::Real* w13, const int32_t* offsets,
                const int32_t* row_slot, ExpertShape shape);

// y (R,C) = a W2[e]^T
template <class Device>
void experts_down(Device& dev, typename Device::Real* y, void* scratch, const typename Device::Real* a,
                  const typename Device::Real* w2, const int32_t* offsets, ExpertShape shape);

// With dA' = dout[token(r)] W2[e], never stored, and gate = gates[slot(r)]:
//   dh (R,2F) = swiglu backward of gate * dA';  a_scaled (R,F) = gate * A;  dgates (N,K) at slot(r) = <dA', A>,
//   0 where the slot was dropped. A is computed again from h, or read from `a` where it was kept (same bits).
//   in  slot_of_row (R): row_slot of the plan, never null: dgates and gates are indexed by slot in either dispatch
template <class Device>
void experts_down_backward(Device& dev, typename Device::Real* dh, typename Device::Real* a_scaled,
                           typename Device::Acc* dgates, void* scratch, const typename Device::Real* dout,
                           const typename Device::Real* w2, const typename Device::Real* h,
                           const typename Device::Real* a, const typename Device::Acc* gates, const int32_t* offsets,
                           const int32_t* row_slot, const int32_t* slot_of_row, ExpertShape shape);

// dW2[e] += dout[tokens]^T * a_scaled over the rows of e; or, where dw2.add is not set, =: zeros where e has no rows.
template <class Device>
void experts_down_backward_weight(Device& dev, Grad<Device> dw2, void* scratch, const typename Device::Real* dout,
                                  const typename Device::Real* a_scaled, const int32_t* offsets,
                                  const int32_t* row_slot, ExpertShape shape);

// dx_rows (R,C) = dh W13[e]: the gradient of each expert row, to be summed into tokens by combine().
template <class Device>
void experts_up_backward_input(Device& dev, typename Device::Real* dx_rows, void* scratch,
                               const typename Device::Real* dh, const typename Device::Real* w13,
                               const int32_t* offsets, ExpertShape shape);

// dW13[e] += dh^T * x[tokens] over the rows of e; or = as above.
template <class Device>
void experts_up_backward_weight(Device& dev, Grad<Device> dw13, void* scratch, const typename Device::Real* dh,
                                const typename Device::Real* x, const int32_t* offsets, const int32_t* row_slot,
                                ExpertShape shape);

// Enough for any of the six.
template <class Device>
size_t experts_scratch_bytes(ExpertShape shape);
