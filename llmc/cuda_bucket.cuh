// Stable counting sort by small integer keys, without atomics: the routing plan, and the passes of a radix sort.
//
// Items are cut into tiles of 1024, a block each; a warp takes 128 neighbouring items, 32 at a time. Lanes with the same
// key find each other with __match_any_sync, so an item's place among its equals is a population count.
//   1. count: how many items of each key every tile holds
//   2. scan: one block turns the counts into exclusive prefix sums over the tiles, and the totals into bucket offsets
//   3. place: each item learns its rank within its bucket
// Order within a bucket is the order of the items, always.
#pragma once
#include "llmc/cuda_common.cuh"

inline constexpr int bucket_tile = 1024, bucket_threads = 256, bucket_warps = 8, max_buckets = 1024;

inline int64_t bucket_tiles(int64_t n) { return ceil_div(n, bucket_tile); }
// Scratch for n items: counts by (bucket, tile).
inline size_t bucket_scratch_bytes(int64_t n, int64_t buckets) {
  return size_t(bucket_tiles(n) * buckets) * sizeof(int32_t);
}

// Adds this warp's 128 items to its row of the histogram. key(i) is the bucket of item i, or -1: no bucket.
template <class Key>
__device__ void bucket_histogram(int32_t* histogram, int64_t n, const Key& key) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int round = 0; round < bucket_tile / bucket_threads; ++round) {
    int64_t i = int64_t(blockIdx.x) * bucket_tile + warp * 128 + round * 32 + lane;
    int k = i < n ? key(i) : -1;
    unsigned peers = __match_any_sync(~0u, k);
    if (k >= 0 && lane == __ffs(peers) - 1) histogram[k] += __popc(peers);
    __syncwarp();
  }
}

template <class Key>
__global__ void __launch_bounds__(bucket_threads) bucket_count(int32_t* counts, int64_t n, int buckets, Key key) {
  extern __shared__ int32_t histograms[];  // (warps, buckets)
  for (int i = threadIdx.x; i < bucket_warps * buckets; i += bucket_threads) histograms[i] = 0;
  __syncthreads();
  bucket_histogram(histograms + threadIdx.x / 32 * buckets, n, key);
  __syncthreads();
  for (int e = threadIdx.x; e < buckets; e += bucket_threads) {
    int sum = 0;
    for (int w = 0; w < bucket_warps; ++w) sum += histograms[w * buckets + e];
    counts[int64_t(e) * gridDim.x + blockIdx.x] = sum;
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

// One block of 1024 threads. counts (buckets, tiles) becomes its exclusive prefix sums over the tiles; totals (buckets),
// at most `capacity` each unless that is 0; offsets (buckets+1) their exclusive prefix sums.
static __global__ void __launch_bounds__(1024)
    bucket_scan(int32_t* counts, int32_t* totals, int32_t* offsets, int64_t tiles, int buckets, int64_t capacity) {
  __shared__ int32_t total[max_buckets];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int batch = 8;  // loads in flight
  for (int e = warp; e < buckets; e += 32) {
    int32_t* row = counts + int64_t(e) * tiles;
    int carry = 0;
    for (int64_t t0 = 0; t0 < tiles; t0 += 32 * batch) {
      int v[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        int64_t t = t0 + i * 32 + lane;
        v[i] = t < tiles ? row[t] : 0;
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        int64_t t = t0 + i * 32 + lane;
        if (t0 + i * 32 >= tiles) break;
        int sum = warp_scan(v[i]);
        if (t < tiles) row[t] = carry + sum - v[i];
        carry += __shfl_sync(~0u, sum, 31);
      }
    }
    if (lane == 0) total[e] = capacity > 0 && carry > capacity ? int(capacity) : carry;
  }
  __syncthreads();
  if (warp > 0) return;
  int carry = 0;
  for (int e0 = 0; e0 < buckets; e0 += 32) {
    int e = e0 + lane, v = e < buckets ? total[e] : 0, sum = warp_scan(v);
    if (e < buckets) totals[e] = v, offsets[e] = carry + sum - v;
    carry += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) offsets[buckets] = carry;
}

// Calls place(i, key, rank) for every item, rank = items of the same key before it (key -1: rank 0).
template <class Key, class Place>
__global__ void __launch_bounds__(bucket_threads)
    bucket_place(const int32_t* counts, int64_t n, int buckets, Key key, Place place) {
  extern __shared__ int32_t next[];  // (warps, buckets): first a histogram, then the rank of the next item
  for (int i = threadIdx.x; i < bucket_warps * buckets; i += bucket_threads) next[i] = 0;
  __syncthreads();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bucket_histogram(next + warp * buckets, n, key);
  __syncthreads();
  for (int e = threadIdx.x; e < buckets; e += bucket_threads) {
    int sum = counts[int64_t(e) * gridDim.x + blockIdx.x];
    for (int w = 0; w < bucket_warps; ++w) {
      int here = next[w * buckets + e];
      next[w * buckets + e] = sum;
      sum += here;
    }
  }
  __syncthreads();
  int32_t* mine = next + warp * buckets;
#pragma unroll
  for (int round = 0; round < bucket_tile / bucket_threads; ++round) {
    int64_t i = int64_t(blockIdx.x) * bucket_tile + warp * 128 + round * 32 + lane;
    int k = i < n ? key(i) : -1;
    unsigned peers = __match_any_sync(~0u, k);
    int before = __popc(peers & ((1u << lane) - 1)), rank = k >= 0 ? mine[k] + before : 0;
    __syncwarp();
    if (k >= 0 && before == 0) mine[k] += __popc(peers);
    __syncwarp();
    if (i < n) place(i, k, rank);
  }
}

// The three steps. totals (buckets), offsets (buckets+1); scratch: bucket_scratch_bytes. offsets is complete before
// place() is called, which may read it.
template <class Key, class Place>
void bucket_items(GpuBase& dev, int32_t* totals, int32_t* offsets, void* scratch, int64_t n, int64_t buckets,
                  int64_t capacity, Key key, Place place) {
  if (buckets > max_buckets) fail("the GPU sorts into at most ", max_buckets, " buckets, not ", buckets);
  int32_t* counts = static_cast<int32_t*>(scratch);
  int64_t tiles = bucket_tiles(n);
  size_t shared = size_t(bucket_warps * buckets) * sizeof(int32_t);
  launch(dev, bucket_count<Key>, dim3(unsigned(tiles)), bucket_threads, shared, counts, n, int(buckets), key);
  launch(dev, bucket_scan, 1, 1024, 0, counts, totals, offsets, tiles, int(buckets), capacity);
  launch(dev, bucket_place<Key, Place>, dim3(unsigned(tiles)), bucket_threads, shared, counts, n, int(buckets), key,
         place);
}
