// Rung 2: a thread two neighbouring elements, 4 bytes at a time. Half as many threads, addresses and requests, and each
// request of a warp is a whole line of 128 bytes of results, or of two lines of h the halves.
//
// Predicted: the same 6NF and 10NF bytes, but a multiprocessor now has twice as many on their way: 16 and 24 KB, where
// about 10 are needed. Near the floor both ways; production, with four times as many again, has little left to gain.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/swiglu.h"

namespace pairs {

constexpr int threads = 256, half = swiglu_interleave / 2;  // pairs of neighbouring gates

// Where the gates of pair i of a (N,F) stand in h (N,2F), in pairs; their up projections are `half` further.
__device__ __forceinline__ int64_t gates_at(int64_t i) { return i / half * 2 * half + i % half; }

__global__ void __launch_bounds__(threads) activate(uint32_t* a, const uint32_t* h, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= n) return;
  const float2 gate = unpack_bf16(h[gates_at(i)]), up = unpack_bf16(h[gates_at(i) + half]);
  a[i] = pack_bf16(gate.x * sigmoid_of(gate.x) * up.x, gate.y * sigmoid_of(gate.y) * up.y);
}

__global__ void __launch_bounds__(threads)
    activate_backward(uint32_t* dh, const uint32_t* da, const uint32_t* h, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= n) return;
  const int64_t at = gates_at(i);
  const float2 gate = unpack_bf16(h[at]), up = unpack_bf16(h[at + half]), d = unpack_bf16(da[i]);
  const float2 s = {sigmoid_of(gate.x), sigmoid_of(gate.y)};
  dh[at] = pack_bf16(d.x * up.x * s.x * (1 + gate.x * (1 - s.x)), d.y * up.y * s.y * (1 + gate.y * (1 - s.y)));
  dh[at + half] = pack_bf16(d.x * gate.x * s.x, d.y * gate.y * s.y);
}

inline void forward(GpuBase& dev, bf16* a, const bf16* h, int64_t N, int64_t F) {
  const int64_t n = N * F / 2;
  launch(dev, activate, unsigned(ceil_div(n, threads)), threads, 0, reinterpret_cast<uint32_t*>(a),
         reinterpret_cast<const uint32_t*>(h), n);
}
inline void backward(GpuBase& dev, bf16* dh, const bf16* da, const bf16* h, int64_t N, int64_t F) {
  const int64_t n = N * F / 2;
  launch(dev, activate_backward, unsigned(ceil_div(n, threads)), threads, 0, reinterpret_cast<uint32_t*>(dh),
         reinterpret_cast<const uint32_t*>(da), reinterpret_cast<const uint32_t*>(h), n);
}

}  // namespace pairs
