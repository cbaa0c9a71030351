// Rung 2: kernels that read the other GPUs' memory themselves. A pointer to it is a pointer like any other: the load
// goes over the link and comes back with the data. So there is no staging buffer, no second pass, and no packing of
// pieces: a thread loads the same 16 bytes from every rank, adds them up in the order of the ranks, and stores the sum.
// Every rank computes all sums ("one shot"), each by the same additions in the same order: the same bits everywhere.
//
// Predicted, W ranks: (W-1)·S bytes over the link into each GPU, as in rung 1, for an all-reduce of S bytes, and
// (W-1)/W·S for an all-gather; local memory ((2 or 1 + 1/W)·S) is read and written meanwhile and is ten times as fast.
// A load over the link takes one to two microseconds, so about a megabyte has to be on its way at any time. With 16
// bytes a thread and rank, 132 multiprocessors of 1024 threads or more have two.
//
// The ranks still meet by events before and after: the inputs of all must be there, and must stay until all have read
// them. Below a megabyte this is what takes the time. Sizes: multiples of 16 bytes.
#pragma once
#include "dev/collectives/ranks.cuh"

namespace collectives::one_shot {

constexpr int threads = 512;

template <class T, int most>
__global__ void reduce(T* out, Peers<const T> in, int ranks, int64_t packs) {
  const int64_t step = int64_t(gridDim.x) * threads;
  for (int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x; i < packs; i += step)
    store_pack(out, i, sum_of_ranks<most>(in, ranks, i));
}

// blockIdx.x: whose part, counted from one's own on. Blocks of all parts run side by side, so that the link is busy
// while one's own part is copied, and no rank is asked by all others at the same time.
template <class T>
__global__ void gather(T* out, const __grid_constant__ Peers<const T> in, int rank, int ranks, int64_t packs) {
  const int s = (rank + int(blockIdx.x)) % ranks;
  const T* from = in.at[s];
  const int64_t step = int64_t(gridDim.y) * threads;
  for (int64_t i = int64_t(blockIdx.y) * threads + threadIdx.x; i < packs; i += step)
    store_pack(out, s * packs + i, load_pack(from, i));
}

// As many as run at once, at most, where each part has its own.
inline unsigned blocks_for(const Ranks& ranks, int64_t packs, int parts) {
  return unsigned(std::min<int64_t>(ceil_div(packs, threads), ceil_div(ranks.multiprocessors * 4, parts)));
}

// out[r] (n) = Σ_s in[s] (n), on every rank
template <class T>
void all_reduce(const Ranks& ranks, const Peers<T>& out, const ConstPeers<T>& in, int64_t n) {
  const int64_t packs = packs_of<T>("02_one_shot", n);
  ranks.meet();
  for (int r = 0; r < ranks.n; ++r)
    with_most(ranks.n, [&](auto most) {
      ranks.launch(r, reduce<T, most()>, blocks_for(ranks, packs, 1), threads, out[r], in, ranks.n, packs);
    });
  ranks.meet();
}

// out[r] (W,n): row s = in[s] (n)
template <class T>
void all_gather(const Ranks& ranks, const Peers<T>& out, const ConstPeers<T>& in, int64_t n) {
  const int64_t packs = packs_of<T>("02_one_shot", n);
  ranks.meet();
  for (int r = 0; r < ranks.n; ++r)
    ranks.launch(r, gather<T>, dim3(unsigned(ranks.n), blocks_for(ranks, packs, ranks.n)), threads, out[r], in, r,
                 ranks.n, packs);
  ranks.meet();
}

}  // namespace collectives::one_shot
