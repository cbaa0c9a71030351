// What the CUDA kernels share: checked calls, 16-byte accesses, sums over a warp and a block in a fixed order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "llmc/error.h"
#include "llmc/gpu.h"
#include "llmc/gradient.h"

inline void cuda_check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) fail("CUDA: ", call, ": ", cudaGetErrorString(error));
}
#define CUDA_CHECK(call) cuda_check(call, #call)

// kernel<<<...>>> with its errors.
template <class... Params, class... Args>
void launch(GpuBase& dev, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // A kernel has 48 KiB unless it asks for more, what it declares itself included: 16 KiB at the most.
  if (shared_bytes > 32 * 1024)
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  kernel<<<grid, block, shared_bytes, dev.stream>>>(static_cast<Params>(args)...);
  CUDA_CHECK(cudaGetLastError());
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- numbers ----

template <class Real>
__device__ __forceinline__ float to_float(Real v) {
  if constexpr (std::is_same_v<Real, bf16>)
    return __uint_as_float(uint32_t(v.bits) << 16);
  else
    return v;
}
template <class Real>
__device__ __forceinline__ Real from_float(float v) {
  if constexpr (std::is_same_v<Real, bf16>) {
    bf16 r;
    r.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
    return r;
  } else {
    return v;
  }
}
template <class Real>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<Real>(v));
}
// Two neighbouring bf16 in one register, the lower index in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}
__device__ __forceinline__ float2 unpack_bf16(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
}
__device__ __forceinline__ float sigmoid_of(float x) { return 1.0f / (1.0f + __expf(-x)); }

// ---- 16 bytes at a time ----

template <class Real>
struct alignas(16) Pack {
  static constexpr int n = 16 / sizeof(Real);
  Real v[n];
  __device__ float operator[](int i) const { return to_float(v[i]); }
  __device__ void set(int i, float value) { v[i] = from_float<Real>(value); }
};
// Whether rows of `width` elements from these pointers can be read 16 bytes at a time.
template <class Real, class... Pointers>
bool packable(int64_t width, Pointers... p) {
  return width % Pack<Real>::n == 0 && (((reinterpret_cast<uintptr_t>(p) & 15) == 0) && ...);
}
// A warp copies a row; packed: as packable() says.
template <class Real>
__device__ __forceinline__ void copy_row(Real* to, const Real* from, int64_t width, bool packed) {
  constexpr int n = Pack<Real>::n;
  const int lane = threadIdx.x % 32;
  if (packed)
    for (int64_t c = lane * n; c < width; c += 32 * n)
      *reinterpret_cast<Pack<Real>*>(to + c) = *reinterpret_cast<const Pack<Real>*>(from + c);
  else
    for (int64_t c = lane; c < width; c += 32) to[c] = from[c];
}

// ---- reductions: the same tree every time ----

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
  return v;
}
// Sum (or maximum) over the block, in every thread. All threads call it; blockDim.x is a multiple of 32.
template <class T>
__device__ T block_sum(T v) {
  __shared__ T partial[32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  v = warp_sum(v);
  __syncthreads();  // the array may still be read from an earlier call
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : T(0));
}
__device__ inline float block_max(float v) {
  __shared__ float partial[32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  v = warp_max(v);
  __syncthreads();
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  return warp_max(lane < warps ? partial[lane] : -INFINITY);
}

// ---- gradients and faults ----

// Adds a finished contribution to element i of a parameter gradient, or writes it: one rounding.
template <class Real>
__device__ __forceinline__ void add_to_gradient(void* data, bool wide, int64_t i, float value, bool add = true) {
  if (wide) {
    float* p = static_cast<float*>(data) + i;
    *p = add ? *p + value : value;
  } else {
    Real* p = static_cast<Real*>(data) + i;
    *p = from_float<Real>(add ? to_float(*p) + value : value);
  }
}
// Reports a fault; the first one wins.
__device__ inline void report_fault(DeviceStatus* status, int layer, DeviceStatus::Code code, int64_t token,
                                    int64_t value) {
  if (status && atomicCAS(&status->code, int(DeviceStatus::ok), int(code)) == int(DeviceStatus::ok))
    status->layer = layer, status->token = token, status->value = value;
}
