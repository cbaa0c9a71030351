// Bringing expert rows back to tokens.
#pragma once
#include "llmc/device.h"

// out (N,C) = addend + sum over k of gates[t,k] * rows[slot_row[t,k]], k ascending, in Acc; dropped slots add nothing.
//   forward:  addend is the residual stream (null: 0), rows are Y
//   backward: gates is null (1), addend the router's part of dx, rows the gradient of each expert row
// out may be the same memory as addend.
template <class Device>
void combine(Device& dev, typename Device::Real* out, const typename Device::Real* rows,
             const typename Device::Real* addend, const typename Device::Acc* gates, const int32_t* slot_row, int64_t N,
             int64_t K, int64_t C);

// out += that sum, for a further pass of rows: as combine() with addend out. n_rows: where the number of rows is; with none,
// out is left alone at once.
template <class Device>
void combine_more(Device& dev, typename Device::Real* out, const typename Device::Real* rows,
                  const typename Device::Acc* gates, const int32_t* slot_row, const int32_t* n_rows, int64_t N,
                  int64_t K, int64_t C);
