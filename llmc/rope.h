// QK-norm and rotary position embedding in one pass over the queries and keys.
//   RoPE, rotate-half form (Su et al. 2021, eq. 34, with the pairing (i, i + HD/2) of GPT-NeoX and Llama):
//   y[i] = x[i] cos(p w_i) - x[i+HD/2] sin(p w_i),  y[i+HD/2] = x[i+HD/2] cos(p w_i) + x[i] sin(p w_i),
//   w_i = theta^(-2i/HD).
//   QK-norm (Dehghani et al. 2023; as in Qwen3): an RMSNorm over the HD values of each head, before RoPE.
#pragma once
#include <vector>

#include "llmc/gradient.h"

// Sizes shared by the ops on queries, keys and values. A row of qkv is [NH queries | NKV keys | NKV values], each HD
// wide; a row of qk is the first two parts after norm and rotation.
struct HeadShape {
  int64_t n_head, n_kv_head, head_dim;
  constexpr int64_t q_width() const { return n_head * head_dim; }
  constexpr int64_t qk_width() const { return (n_head + n_kv_head) * head_dim; }
  constexpr int64_t qkv_width() const { return (n_head + 2 * n_kv_head) * head_dim; }
};

inline constexpr int64_t max_head_dim = 512;

// The table (positions, 2, HD/2) that the ops read: for each position the cosines, then the sines, of p w_i.
std::vector<double> rope_table(int64_t positions, int64_t head_dim, double theta);

// qk (N, (NH+NKV)*HD) from qkv (N, (NH+2*NKV)*HD).
//   saved  rstd (N, NH+NKV), written only with QK-norm
//   in     q_weight, k_weight (HD), both null: no QK-norm; table as above; positions (N) int32, rows of the table
template <class Device>
void qknorm_rope_forward(Device& dev, typename Device::Real* qk, typename Device::Acc* rstd,
                         const typename Device::Real* qkv, const typename Device::Real* q_weight,
                         const typename Device::Real* k_weight, const typename Device::Acc* table,
                         const int32_t* positions, int64_t N, HeadShape heads, double eps);

// In place: the query and key parts of dqkv hold gradients of qk on entry, of qkv on return; the value part stays.
// dq_weight, dk_weight (HD) += .
template <class Device>
void qknorm_rope_backward(Device& dev, typename Device::Real* dqkv, Grad<Device> dq_weight, Grad<Device> dk_weight,
                          void* scratch, const typename Device::Real* qkv, const typename Device::Acc* rstd,
                          const typename Device::Real* q_weight, const typename Device::Real* k_weight,
                          const typename Device::Acc* table, const int32_t* positions, int64_t N, HeadShape heads);
template <class Device>
size_t qknorm_rope_backward_scratch_bytes(int64_t N, HeadShape heads);
