// Stable counting sort by small integer keys, without atomics: the routing plan, and the passes of a radix sort.
//
// Items are cut into at most 128 tiles, a block each, so that all blocks run at once; a warp takes its part of the tile
// 32 neighbours at a time. Lanes with the same key find each other by a ballot for each bit of it, so an item's place
// among its equals is a population count.
//   1. count: the rank of each item among its equals in the warp's part, and how many of each key warps and tiles hold
//   2. place: each block adds up the counts of all tiles, a few thousand integers out of the L2 cache (cheaper than a
//      launch in between), which says where buckets begin and where its tile goes on with them
// Order within a bucket is the order of the items, always.
#pragma once
#include <algorithm>

#include "llmc/cuda_mma.cuh"

inline constexpr int bucket_threads = 512, bucket_warps = bucket_threads / 32, most_bucket_tiles = 128;
inline constexpr int max_buckets = 1024;

struct BucketCounts {
  int64_t n;
  int buckets, stride;   // stride: buckets, rounded up to 16 bytes
  int rounds;            // items of a thread
  int32_t* tile_counts;  // (tiles, stride): items of each key
  int32_t* warp_counts;  // (tiles, warps, stride): items of each key in the tile's earlier warps
  int32_t* ranks;        // (n): items of the same key before this one in the warp's part

  // Item of this thread; n or more: none.
  __device__ int64_t item(int round) const {
    return ((int64_t(blockIdx.x) * bucket_warps + threadIdx.x / 32) * rounds + round) * 32 + threadIdx.x % 32;
  }
};
// How n items are cut, with its arrays in scratch, whose address is a multiple of 16.
inline BucketCounts bucket_counts(int64_t n, int64_t buckets, void* scratch) {
  BucketCounts c{n, int(buckets), int(ceil_div(buckets, 4) * 4)};
  c.rounds = int(std::max<int64_t>(1, ceil_div(n, most_bucket_tiles * bucket_threads)));
  c.tile_counts = static_cast<int32_t*>(scratch);
  c.warp_counts = c.tile_counts + most_bucket_tiles * c.stride;
  c.ranks = c.warp_counts + most_bucket_tiles * bucket_warps * c.stride;
  return c;
}
inline int64_t bucket_tiles(const BucketCounts& c) {
  return std::max<int64_t>(1, ceil_div(c.n, int64_t(c.rounds) * bucket_threads));
}
inline size_t bucket_scratch_bytes(int64_t n, int64_t buckets) {
  return size_t(most_bucket_tiles * (1 + bucket_warps) * ceil_div(buckets, 4) * 4 + n) * sizeof(int32_t);
}
// In the second step: how many threads share a bucket's tiles.
__host__ __device__ constexpr int bucket_groups(int stride) {
  return bucket_threads / (stride / 4) < 16 ? bucket_threads / (stride / 4) : 16;
}

// Lanes whose key is this lane's, for keys below 2^bits; for -1: any.
template <int bits>
__device__ __forceinline__ unsigned lanes_with(int key) {
  unsigned peers = __ballot_sync(~0u, key >= 0);
#pragma unroll
  for (int b = 0; b < bits; ++b) {
    bool set = key >> b & 1;
    unsigned with = __ballot_sync(~0u, set);
    peers &= set ? with : ~with;
  }
  return peers;
}

// key(i) is the bucket of item i, or -1: no bucket.
template <int bits, class Key>
__global__ void __launch_bounds__(bucket_threads) bucket_count(BucketCounts c, Key key) {
  extern __shared__ int32_t histograms[];  // (warps, stride)
  for (int i = threadIdx.x; i < bucket_warps * c.stride; i += bucket_threads) histograms[i] = 0;
  __syncthreads();
  int32_t* mine = histograms + threadIdx.x / 32 * c.stride;
  const unsigned lanes_before = (1u << threadIdx.x % 32) - 1;
  constexpr int batch = 8;  // loads in flight
  for (int r0 = 0; r0 < c.rounds; r0 += batch) {
    int keys[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      int64_t i = c.item(r0 + j);
      keys[j] = r0 + j < c.rounds && i < c.n ? key(i) : -1;
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (r0 + j >= c.rounds) break;
      int k = keys[j];
      unsigned peers = lanes_with<bits>(k);
      int before = __popc(peers & lanes_before), rank = k >= 0 ? mine[k] + before : 0;
      __syncwarp();
      if (k >= 0 && before == 0) mine[k] = rank + __popc(peers);
      __syncwarp();
      int64_t i = c.item(r0 + j);
      if (i < c.n) c.ranks[i] = rank;
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < c.stride; e += bucket_threads) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < bucket_warps; ++w) {
      c.warp_counts[(int64_t(blockIdx.x) * bucket_warps + w) * c.stride + e] = sum;
      sum += histograms[w * c.stride + e];
    }
    c.tile_counts[int64_t(blockIdx.x) * c.stride + e] = sum;
  }
}

// Inclusive sum over the warp.
__device__ inline int warp_scan(int v) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(~0u, v, step);
    if (int(threadIdx.x % 32) >= step) v += other;
  }
  return v;
}
__device__ __forceinline__ void add(int4& sum, const int4& v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// Where an item belongs. key -1: nowhere, and rank and first mean nothing.
struct InBucket {
  int key, rank;  // rank: items of the same key before it
  int first;      // place of the bucket's first item: the sum of the totals of the buckets before it
  int all;        // the sum of all totals
};

// Calls place(i, InBucket) for every item. totals (buckets): items of each key, at most `capacity` each unless that is
// 0; offsets (buckets+1): their exclusive prefix sums. Either may be null.
template <class Key, class Place>
__global__ void __launch_bounds__(bucket_threads, 2)
    bucket_place(BucketCounts c, int32_t* totals, int32_t* offsets, int64_t capacity, Key key, Place place) {
  extern __shared__ int4 bucket_shared[];
  __shared__ int32_t sums_of_32[max_buckets / 32];
  const int quads = c.stride / 4, groups = bucket_groups(c.stride), tiles = int(gridDim.x), tile = int(blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int4* earlier = bucket_shared;                                 // (warps, quads): warp_counts
  int4* before = earlier + bucket_warps * quads;                 // (groups, quads): of tiles before this one
  int4* all = before + groups * quads;                           // (groups, quads): of all tiles
  auto* bucket = reinterpret_cast<int2*>(all + groups * quads);  // (stride): {items in tiles before, first place}

  constexpr int batch = 4, tile_batch = 8;  // loads in flight: of items and of counts
  int keys[batch], ranks[batch];
  auto load = [&](int r0) {
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      int64_t i = c.item(r0 + j);
      bool inside = r0 + j < c.rounds && i < c.n;
      keys[j] = inside ? key(i) : -1;
      ranks[j] = inside ? c.ranks[i] : 0;
    }
  };
  const int quad = int(threadIdx.x) % quads, group = int(threadIdx.x) / quads, t_first = group < groups ? group : tiles;
  int4 counts[tile_batch];
  auto load_counts = [&](int t0) {
#pragma unroll
    for (int j = 0; j < tile_batch; ++j) {
      int t = t0 + j * groups;
      counts[j] = t < tiles ? reinterpret_cast<const int4*>(c.tile_counts)[t * quads + quad] : int4{};
    }
  };
  // All that the block reads is asked for before it waits for any of it.
  const int32_t* warp_counts = c.warp_counts + int64_t(tile) * bucket_warps * c.stride;
  for (int i = threadIdx.x; i < bucket_warps * quads; i += bucket_threads)
    copy_async(shared_address(earlier + i), warp_counts + i * 4);
  load_counts(t_first);
  load(0);
  int4 sum_before = {}, sum_all = {};
  for (int t0 = t_first; t0 < tiles; load_counts(t0 += groups * tile_batch))
#pragma unroll
    for (int j = 0; j < tile_batch; ++j) {
      add(sum_all, counts[j]);
      if (t0 + j * groups < tile) add(sum_before, counts[j]);
    }
  if (group < groups) before[group * quads + quad] = sum_before, all[group * quads + quad] = sum_all;
  wait_copies();
  __syncthreads();

  // A thread a bucket, by whole warps: offsets within 32 buckets, then over all.
  for (int e0 = warp * 32; e0 < c.buckets; e0 += bucket_threads) {
    int e = e0 + lane, sum = 0, sum_before = 0;
    if (e < c.buckets)
      for (int g = 0; g < groups; ++g) {
        sum += reinterpret_cast<const int*>(all)[g * c.stride + e];
        sum_before += reinterpret_cast<const int*>(before)[g * c.stride + e];
      }
    int total = capacity > 0 && sum > capacity ? int(capacity) : sum, scan = warp_scan(total);
    if (e < c.buckets) bucket[e] = {sum_before, scan - total};
    if (lane == 31) sums_of_32[e0 / 32] = scan;
    if (tile == 0 && totals && e < c.buckets) totals[e] = total;
  }
  __syncthreads();
  int sum = lane * 32 < c.buckets ? sums_of_32[lane] : 0, scan = warp_scan(sum);
  for (int e0 = warp * 32; e0 < c.buckets; e0 += bucket_threads) {
    int e = e0 + lane, first = __shfl_sync(~0u, scan - sum, e0 / 32);
    if (e >= c.buckets) continue;
    bucket[e].y += first;
    if (tile == 0 && offsets) offsets[e] = bucket[e].y;
  }
  const int all_items = __shfl_sync(~0u, scan, 31);
  if (tile == 0 && offsets && threadIdx.x == 0) offsets[c.buckets] = all_items;
  __syncthreads();

  const int32_t* mine = reinterpret_cast<const int32_t*>(earlier) + warp * c.stride;
  for (int r0 = 0; r0 < c.rounds; load(r0 += batch)) {
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      int64_t i = c.item(r0 + j);
      if (r0 + j >= c.rounds || i >= c.n) break;
      InBucket at{keys[j], 0, 0, all_items};
      if (at.key >= 0) at.rank = bucket[at.key].x + mine[at.key] + ranks[j], at.first = bucket[at.key].y;
      place(i, at);
    }
  }
}

// The two steps; scratch: bucket_scratch_bytes at a multiple of 16.
template <class Key, class Place>
void bucket_items(GpuBase& dev, int32_t* totals, int32_t* offsets, void* scratch, int64_t n, int64_t buckets,
                  int64_t capacity, Key key, Place place) {
  if (buckets > max_buckets) fail("the GPU sorts into at most ", max_buckets, " buckets, not ", buckets);
  BucketCounts c = bucket_counts(n, buckets, scratch);
  dim3 tiles = unsigned(bucket_tiles(c));
  auto count = buckets <= 16 ? bucket_count<4, Key> : buckets <= 256 ? bucket_count<8, Key> : bucket_count<10, Key>;
  launch(dev, count, tiles, bucket_threads, size_t(bucket_warps * c.stride) * sizeof(int32_t), c, key);
  int rows = bucket_warps + 2 * bucket_groups(c.stride) + 2;  // of shared memory, stride integers each
  launch(dev, bucket_place<Key, Place>, tiles, bucket_threads, size_t(rows * c.stride) * sizeof(int32_t), c, totals,
         offsets, capacity, key, place);
}
