// Variants 2 and 3: a warp an expert row, which adds gate * row to its token wherever it is, by atomic additions. Tokens
// need no list of their rows then; but several rows add to one token in whatever order they come, and floating-point
// sums depend on the order: these variants do not repeat their bits.
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
// Adds eight neighbours, each rounded when it is added.
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

// sum (N,C) += gate * row; C % 4 == 0, and no slot was dropped.
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
// The same into out (N,C), which holds the addend; C % 8 == 0.
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

// combine() by way of sum (N,C).
inline void combine_fp32(GpuBase& dev, bf16* out, float* sum, const bf16* rows, const bf16* addend, const float* gates,
                         const int32_t* row_slot, int64_t N, int64_t K, int64_t C) {
  void (*kernel)(float*, const bf16*, const float*, const int32_t*, int64_t, int, int64_t) = add_rows;
  dev.zero(sum, size_t(N * C) * sizeof(float));
  launch(dev, kernel, unsigned(ceil_div(N * K, warps)), warps * 32, 0, sum, rows, gates, row_slot, N * K, int(K), C);
  launch_add_residual(dev, out, sum, addend, N * C);
}
// combine() into out itself.
inline void combine_bf16(GpuBase& dev, bf16* out, const bf16* rows, const bf16* addend, const float* gates,
                         const int32_t* row_slot, int64_t N, int64_t K, int64_t C) {
  void (*kernel)(bf16*, const bf16*, const float*, const int32_t*, int64_t, int, int64_t) = add_rows;
  dev.copy(out, addend, size_t(N * C) * sizeof(bf16));
  launch(dev, kernel, unsigned(ceil_div(N * K, warps)), warps * 32, 0, out, rows, gates, row_slot, N * K, int(K), C);
}

}  // namespace atomics
