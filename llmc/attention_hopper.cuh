// What Hopper's two attention kernels share.
#pragma once
#include "llmc/attention_hopper.h"
#include "llmc/attention_tile.cuh"
#include "llmc/hopper.cuh"

namespace attention_hopper {
using namespace hopper;
using attention_tile::exp2_of;
using attention_tile::log2_e;
using attention_tile::Sizes;

// Stages are filled and emptied in the same order for ever. Fill n is use n / stages of stage n % stages; a power of
// two, so that n may wrap.
template <int stages>
struct Fill {
  static_assert((stages & (stages - 1)) == 0);
  uint32_t n = 0;
  __device__ __forceinline__ uint32_t stage() const { return n % stages; }
  __device__ __forceinline__ uint32_t parity() const { return n / stages & 1; }
  __device__ __forceinline__ Fill before() const { return {n - 1}; }
};

// fence.proxy.async.global: ordinary accesses to global memory before it are ordered before bulk copies after it, and
// the other way round. (Without .global it also waits for all that is on its way to memory: MEMBAR.ALL.GPU.)
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

constexpr int panel_64 = 64 * 128;  // bytes of a panel of 64 rows

// A warpgroup's 64 x HD values, rounded, go to its own panels at `to` in shared memory, and from there by TMA to columns
// `column` ... of rows row0 ... of batch b; rows past T are left out. The panels are free; barrier `id` is the warpgroup's own.
template <int HD, class F>
__device__ __forceinline__ void store_panels(const TensorMap* map, uint32_t to, F four_of, int column, int row0, int b,
                                             int T, int id) {
  // (opaque: the compiler would compute the addresses before the loops and keep them.)
  const int thread = attention_tile::opaque(threadIdx.x) % warpgroup, lane = thread % 32;
  const int row = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int n = 0; n < HD / 8; n += 2) {
    uint32_t four[4];
    four_of(four, n);
    store_matrices(to + n / 8 * panel_64 + row * 128 + (((n % 8 + lane / 16) ^ (row & 7)) << 4), four);
  }
  fence_async_proxy();
  sync_threads(id, warpgroup);
  if (thread == 0 && row0 < T) {
#pragma unroll
    for (int p = 0; p < HD / 64; ++p) store_box(map, to + p * panel_64, column + 64 * p, row0, b);
    commit_stores();
  }
}

}  // namespace attention_hopper
