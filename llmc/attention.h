// Causal attention with grouped queries, streaming: softmax is computed tile by tile with a running maximum and sum
// (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1), so that no (T,T) tensor exists. Query head h reads
// key/value head h / (NH/NKV); scores are scaled by 1/sqrt(HD). Rows n = b*T + t; widths as in rope.h.
#pragma once
#include "llmc/rope.h"

// o (N, NH*HD). Both passes take a scratch of attention_scratch_bytes().
//   saved  lse (N, NH) Acc: log of the sum of exp(scores)
//   in     qk (N, (NH+NKV)*HD) rotated queries and keys; qkv (N, (NH+2*NKV)*HD), of which only the values are read
template <class Device>
void attention_forward(Device& dev, typename Device::Real* o, typename Device::Acc* lse, void* scratch,
                       const typename Device::Real* qk, const typename Device::Real* qkv, int64_t B, int64_t T,
                       HeadShape heads);

// dqkv (N, (NH+2*NKV)*HD): gradients of the rotated queries, the rotated keys, and the values. Probabilities are
// computed again from lse; with D = rowsum(do * o) the gradient of the scores is P * (do v^T - D).
template <class Device>
void attention_backward(Device& dev, typename Device::Real* dqkv, void* scratch, const typename Device::Real* dout,
                        const typename Device::Real* o, const typename Device::Acc* lse,
                        const typename Device::Real* qk, const typename Device::Real* qkv, int64_t B, int64_t T,
                        HeadShape heads);
template <class Device>
size_t attention_scratch_bytes(int64_t B, int64_t T, HeadShape heads);

// One new position a sequence, against a cache: stores the key and value of row b at positions[b] of k_cache, v_cache
// (B, S, NKV*HD), then o (B, NH*HD) attends to positions 0 .. positions[b].
template <class Device>
void attention_decode(Device& dev, typename Device::Real* o, typename Device::Real* k_cache,
                      typename Device::Real* v_cache, void* scratch, const typename Device::Real* qk,
                      const typename Device::Real* qkv, const int32_t* positions, int64_t B, int64_t S,
                      HeadShape heads);
template <class Device>
size_t attention_decode_scratch_bytes(int64_t S, int64_t head_dim);
