// Rung 3: the sum is out itself, in bf16. out begins as a copy of the addend, and rows are added to it where they
// belong, eight values with one request. No scratch, no last pass, and half the bytes of an addition.
//
// Each addition is rounded to bf16: a token's sum is rounded K times and not once, in an order that changes from run to
// run. It neither repeats its bits nor is it as exact: the check allows for it, a training run may not.
//
// Predicted: 4NC bytes for the copy, 2KNC for the rows, and 2 bytes read and 2 written for every element added, 4KNC:
// (6K + 4)NC to production's (2K + 4)NC, 2.0 times as long at K = 2, 2.6 at K = 8.
//
// Sizes: C a multiple of 8; no slot was dropped.
#pragma once
#include "llmc/cuda_common.cuh"

namespace bf16_atomics {

constexpr int warps = 8;

// Adds eight neighbours, each rounded when it is added: one request of 16 bytes where the GPU knows such (Hopper).
__device__ __forceinline__ void add8(bf16* to, const uint32_t (&v)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i)
    atomicAdd(reinterpret_cast<__nv_bfloat162*>(to) + i, *reinterpret_cast<const __nv_bfloat162*>(&v[i]));
#endif
}

// out (N,C) += gate * row.
__global__ void __launch_bounds__(warps * 32)
    add_rows(bf16* out, const bf16* rows, const float* gates, const int32_t* row_slot, int64_t R, int K, int64_t C) {
  const int64_t r = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (r >= R) return;
  const int slot = row_slot[r];
  const float gate = gates ? gates[slot] : 1;
  bf16* to = out + int64_t(slot / K) * C;
  for (int64_t c = threadIdx.x % 32 * 8; c < C; c += 32 * 8) {
    const auto y = *reinterpret_cast<const Pack<bf16>*>(rows + r * C + c);
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = pack_bf16(gate * y[2 * i], gate * y[2 * i + 1]);
    add8(to + c, v);
  }
}

inline void combine(GpuBase& dev, bf16* out, const bf16* rows, const bf16* addend, const float* gates,
                    const int32_t* row_slot, int64_t N, int64_t K, int64_t C) {
  if (C % 8) fail("combine 03_bf16_atomics: C must be a multiple of 8, not ", C);
  dev.copy(out, addend, size_t(N * C) * sizeof(bf16));
  launch(dev, add_rows, unsigned(ceil_div(N * K, warps)), warps * 32, 0, out, rows, gates, row_slot, N * K, int(K), C);
}

}  // namespace bf16_atomics
