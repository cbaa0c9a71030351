// Variant 1: a thread an element of the result, which walks over the sum by itself. Two kernels are all six products: one
// for results with a row for every routed row, one for gradients of weights. SwiGLU follows them, through memory.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/swiglu.h"
#include "moe/experts.h"

namespace naive {

inline constexpr int block = 256;

// Row r of x or dout as the plan has it: token row_slot[r] / K, or row r itself.
__device__ inline int64_t source_row(const int32_t* row_slot, int64_t r, int64_t K) {
  return row_slot ? row_slot[r] / K : r;
}

// The weights of all experts: element (j, i) of expert e stands at e * expert + j * row + i * col.
struct Weight {
  const bf16* data;
  int64_t expert, row, col;
};

// out (R,n_out): out[r][j] = sum over i of in[source(r)][i] * weight (j, i) of r's expert
template <class Out>
__global__ void rows_product(Out* out, const bf16* in, Weight w, const int32_t* offsets, const int32_t* row_slot,
                             int64_t K, int64_t n_out, int64_t n_in) {
  int64_t blocks_a_row = ceil_div(n_out, block), r = blockIdx.x / blocks_a_row, e = 0;
  int64_t j = blockIdx.x % blocks_a_row * block + threadIdx.x;
  if (j >= n_out) return;
  while (r >= offsets[e + 1]) ++e;
  const bf16 *row = in + source_row(row_slot, r, K) * n_in, *weight = w.data + e * w.expert + j * w.row;
  float sum = 0;
  for (int64_t i = 0; i < n_in; ++i) sum += to_float(row[i]) * to_float(weight[i * w.col]);
  out[r * n_out + j] = from_float<Out>(sum);
}
template <class Out>
void launch_rows_product(GpuBase& dev, Out* out, const bf16* in, Weight w, const int32_t* offsets,
                         const int32_t* row_slot, const ExpertShape& s, int64_t n_out, int64_t n_in) {
  launch(dev, rows_product<Out>, unsigned(s.R * ceil_div(n_out, block)), block, 0, out, in, w, offsets, row_slot, s.K,
         n_out, n_in);
}

// dw (E,n_left,n_right) += sum over the rows r of expert e of left[r][i] * right[r][j]; one side is read by tokens.
__global__ void weight_product(bf16* dw, const bf16* left, const int32_t* left_slot, const bf16* right,
                               const int32_t* right_slot, const int32_t* offsets, int64_t K, int64_t n_left,
                               int64_t n_right) {
  int64_t blocks_a_row = ceil_div(n_right, block), row = blockIdx.x / blocks_a_row, e = row / n_left, i = row % n_left;
  int64_t j = blockIdx.x % blocks_a_row * block + threadIdx.x;
  if (j >= n_right) return;
  float sum = 0;
  for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r)
    sum += to_float(left[source_row(left_slot, r, K) * n_left + i]) *
           to_float(right[source_row(right_slot, r, K) * n_right + j]);
  add_to_gradient<bf16>(dw, false, row * n_right + j, sum);
}
inline void launch_weight_product(GpuBase& dev, bf16* dw, const bf16* left, const int32_t* left_slot, const bf16* right,
                                  const int32_t* right_slot, const int32_t* offsets, const ExpertShape& s,
                                  int64_t n_left, int64_t n_right) {
  launch(dev, weight_product, unsigned(s.E * n_left * ceil_div(n_right, block)), block, 0, dw, left, left_slot, right,
         right_slot, offsets, s.K, n_left, n_right);
}

// Where the gate of column f stands in a row of h; its up projection is swiglu_interleave further.
__device__ inline int64_t gate_column(int64_t f) { return w13_row(f, false); }

__global__ void swiglu(bf16* a, const bf16* h, int64_t n, int64_t F) {
  int64_t i = int64_t(blockIdx.x) * block + threadIdx.x;
  if (i >= n) return;
  const bf16* gate = h + i / F * 2 * F + gate_column(i % F);
  float g = to_float(gate[0]), u = to_float(gate[swiglu_interleave]);
  a[i] = from_float<bf16>(g * sigmoid_of(g) * u);
}

// A block a row: what experts_down_backward() makes of dA' (R,F).
__global__ void down_epilogue(bf16* dh, bf16* a_scaled, float* dgates, const float* da, const bf16* h,
                              const float* gates, const int32_t* row_slot, int64_t F) {
  int64_t r = blockIdx.x, slot = row_slot[r];
  float gate_weight = gates[slot], dot = 0;
  for (int64_t f = threadIdx.x; f < F; f += block) {
    int64_t at = r * 2 * F + gate_column(f);
    float g = to_float(h[at]), u = to_float(h[at + swiglu_interleave]), s = sigmoid_of(g), d = da[r * F + f];
    float a = rounded<bf16>(g * s * u);
    dot += d * a;
    a_scaled[r * F + f] = from_float<bf16>(gate_weight * a);
    dh[at] = from_float<bf16>(gate_weight * d * u * s * (1 + g * (1 - s)));
    dh[at + swiglu_interleave] = from_float<bf16>(gate_weight * d * g * s);
  }
  dot = block_sum(dot);
  if (threadIdx.x == 0) dgates[slot] = dot;
}

}  // namespace naive
