// Rung 2: the other way round. A warp takes a row of an expert and adds gate * row to its token, wherever that is, by
// atomic additions into an fp32 sum. Tokens need no list of their rows then, and every row could be added by whoever
// made it (dev/down_combine does that). But several rows add to one token in whatever order they come, and
// floating-point sums depend on the order: this does not repeat its bits.
//
// Predicted: 4NC bytes to clear the sum, 2KNC to read the rows. Neighbouring rows of an expert belong to distant
// tokens, and the sum is larger than the L2 cache, so each addition finds its place in memory: 4 bytes read and 4
// written for an element, 8KNC. The last pass reads the sum and the addend and writes out: 8NC. (10K + 12)NC bytes to
// production's (2K + 4)NC: 4.0 times as long at K = 2, 4.6 at K = 8. Additions of four values at a time (Hopper has
// such a request) are needed to get that far; single ones would be limited by their number.
//
// Sizes: C a multiple of 8; no slot was dropped.
#pragma once
#include "llmc/cuda_common.cuh"

namespace atomics {

constexpr int warps = 8;

// Adds four neighbours: one request of 16 bytes where the GPU knows such (Hopper).
__device__ __forceinline__ void add4(float* to, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
#else
  atomicAdd(to, x), atomicAdd(to + 1, y), atomicAdd(to + 2, z), atomicAdd(to + 3, w);
#endif
}

// sum (N,C) += gate * row.
__global__ void __launch_bounds__(warps * 32)
    add_rows(float* sum, const bf16* rows, const float* gates, const int32_t* row_slot, int64_t R, int K, int64_t C) {
  const int64_t r = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (r >= R) return;
  const int slot = row_slot[r];
  const float gate = gates ? gates[slot] : 1;
  float* to = sum + int64_t(slot / K) * C;
  for (int64_t c = threadIdx.x % 32 * 4; c < C; c += 32 * 4) {
    const uint2 v = *reinterpret_cast<const uint2*>(rows + r * C + c);
    const float2 low = unpack_bf16(v.x), high = unpack_bf16(v.y);
    add4(to + c, gate * low.x, gate * low.y, gate * high.x, gate * high.y);
  }
}

// out (n) = addend + sum, rounded; n % 8 == 0.
__global__ void add_residual(bf16* out, const float* sum, const bf16* addend, int64_t n) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (i >= n) return;
  auto v = *reinterpret_cast<const Pack<bf16>*>(addend + i);
  const float4 low = *reinterpret_cast<const float4*>(sum + i), high = *reinterpret_cast<const float4*>(sum + i + 4);
  const float s[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) v.set(j, v[j] + s[j]);
  *reinterpret_cast<Pack<bf16>*>(out + i) = v;
}
inline void launch_add_residual(GpuBase& dev, bf16* out, const float* sum, const bf16* addend, int64_t n) {
  launch(dev, add_residual, unsigned(ceil_div(n, 256 * 8)), 256, 0, out, sum, addend, n);
}

// sum (N,C): scratch.
inline void combine(GpuBase& dev, bf16* out, float* sum, const bf16* rows, const bf16* addend, const float* gates,
                    const int32_t* row_slot, int64_t N, int64_t K, int64_t C) {
  if (C % 8) fail("combine 02_fp32_atomics: C must be a multiple of 8, not ", C);
  dev.zero(sum, size_t(N * C) * sizeof(float));
  launch(dev, add_rows, unsigned(ceil_div(N * K, warps)), warps * 32, 0, sum, rows, gates, row_slot, N * K, int(K), C);
  launch_add_residual(dev, out, sum, addend, N * C);
}

}  // namespace atomics
