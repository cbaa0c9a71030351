// Rung 4: no sort and no atomics, by way of a dense map of experts by tokens, the way that the MoEBlaze paper describes
// (arXiv 2601.05296). A byte for each pair says which of the token's choices the expert is: k + 1, or 0 for none.
//   mark    a thread a slot writes its byte; no two slots write the same one
//   count   a block an expert adds up the bytes that are not 0 in its row of the map, warp by warp
//   place   a block an expert goes along its row again, a tile of 16384 tokens at a time; a prefix sum over the tile
//           says which row of the plan each of its tokens gets
// Walking in the order of the tokens makes the plan stable without further care.
//
// Predicted: EN bytes of map are cleared, and read twice; with 12R bytes for the rest that is 4 us for 128 experts and
// 32768 tokens if all of it came from memory, less from the L2 cache, where the map fits. Four launches cost as much
// again. What no number of bytes shows: E blocks work. With 128 experts that is the chip, with 8 a sixteenth of it, and
// since a block's work is N bytes whatever E is, fewer experts gain nothing but the smaller map to clear. Production
// counts over tiles of slots by experts instead.
//
// Sizes: E <= 1024, K <= 255; a token's choices are distinct (two of the same expert would share a byte).
#pragma once
#include "llmc/cuda_bucket.cuh"
#include "moe/dispatch.h"

namespace dense_map {

constexpr int threads = 1024, warps = threads / 32, chunk = 16;  // chunk: tokens of a thread

// Tokens of a row of the map: whole chunks. The map is (E, padded(N)) bytes.
inline int64_t padded(int64_t N) { return ceil_div(N, chunk) * chunk; }

__global__ void mark(uint8_t* map, const int32_t* top_k_index, int64_t R, int K, int64_t width) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= R) return;
  const int token = int(slot) / K, choice = int(slot) % K;
  map[top_k_index[slot] * width + token] = uint8_t(choice + 1);
}

// Tokens of a chunk that chose the expert.
__device__ __forceinline__ int chosen_in(uint4 v) {
  return (__popc(__vcmpgtu4(v.x, 0)) + __popc(__vcmpgtu4(v.y, 0)) + __popc(__vcmpgtu4(v.z, 0)) +
          __popc(__vcmpgtu4(v.w, 0))) /
         8;
}

// Sum over the block, in every thread.
__device__ __forceinline__ int sum_of_block(int v) {
  __shared__ int partial[warps];
  v = __reduce_add_sync(~0u, v);
  __syncthreads();  // the array may still be read from an earlier call
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  return __reduce_add_sync(~0u, partial[threadIdx.x % 32]);
}

__global__ void __launch_bounds__(threads) count(int32_t* counts, const uint8_t* map, int64_t width) {
  const uint8_t* row = map + blockIdx.x * width;
  int mine = 0;
  for (int64_t t = int64_t(threadIdx.x) * chunk; t < width; t += threads * chunk)
    mine += chosen_in(*reinterpret_cast<const uint4*>(row + t));
  mine = sum_of_block(mine);
  if (threadIdx.x == 0) counts[blockIdx.x] = mine;
}

__global__ void __launch_bounds__(threads) place(RoutingPlan p, const uint8_t* map, int E, int K, int64_t width) {
  __shared__ int warp_totals[warps];
  const int expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int next = sum_of_block(int(threadIdx.x) < expert ? p.counts[threadIdx.x] : 0);  // the first row of the tile
  if (threadIdx.x == 0) {
    p.offsets[expert] = next;
    if (expert == E - 1) p.offsets[E] = next + p.counts[expert];
  }
  for (int64_t t0 = 0; t0 < width; t0 += threads * chunk) {
    const int64_t t = t0 + threadIdx.x * chunk;
    const uint4 v = t < width ? *reinterpret_cast<const uint4*>(map + expert * width + t) : uint4{};
    const int mine = chosen_in(v), in_warp = warp_scan(mine);
    if (lane == 31) warp_totals[warp] = in_warp;
    __syncthreads();
    const int totals = warp_scan(warp_totals[lane]);  // of this warp and those before it
    const int before = __shfl_sync(~0u, totals, warp > 0 ? warp - 1 : 0), tile = __shfl_sync(~0u, totals, 31);
    int row = next + (warp > 0 ? before : 0) + in_warp - mine;
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      const int choice = int(words[i / 4] >> i % 4 * 8 & 0xFF);
      if (choice == 0) continue;
      const auto slot = int32_t((t + i) * K + choice - 1);
      p.row_slot[row] = slot;
      p.slot_row[slot] = row++;
    }
    next += tile;
    __syncthreads();  // before the totals are overwritten
  }
}

// map (E, padded(N)): scratch.
inline void plan(GpuBase& dev, RoutingPlan p, uint8_t* map, const int32_t* top_k_index, int64_t N, int64_t K, int E) {
  if (E > threads || K > 255) fail("routing_plan 04_dense_map: at most 1024 experts and 255 choices a token");
  const int64_t width = padded(N);
  dev.zero(map, size_t(E * width));
  launch(dev, mark, unsigned(ceil_div(N * K, 256)), 256, 0, map, top_k_index, N * K, int(K), width);
  launch(dev, count, unsigned(E), threads, 0, p.counts, map, width);
  launch(dev, place, unsigned(E), threads, 0, p, map, E, int(K), width);
}

}  // namespace dense_map
