// Rung 3: each sum is computed once, and the GPUs meet on the device. Rank r adds up part r of W (reduce-scatter), then
// fetches the other parts from those who computed them (all-gather): two shots in one kernel. The ranks meet in it
// three times: before the inputs are read, between the shots, and before anybody may overwrite what others read.
//
// Predicted, W ranks: 2·(W-1)/W·S bytes over the link into each GPU for an all-reduce of S bytes, against (W-1)·S of
// the one shot: the same with two ranks, half with four, a quarter with eight. What two ranks gain is the meeting:
// events pass through the queues of both GPUs, a flag takes one store over the link and is seen a microsecond or two
// later. So this rung should lead at 64 KiB (three meetings, about 10 us in all) and draw level with rung 2 at 512 MiB.
// (Measured: level at both.)
//
// A meeting is of the blocks with the same number, one on each rank, since block b of one rank only reads what the
// blocks b of the others wrote: it walks through every part with the same steps. Each has a word for each peer in its
// own memory, and a count of its meetings, the epoch. To meet, it stores its new epoch into the peers' words and waits
// until its own words show it, or more: a peer may be on its way to the next meeting already. The words only ever grow
// (differences are signed, so that they may wrap around) and live from call to call; nothing is reset, and the host
// plays no part.
//
//   __syncthreads()      all of the block's reads and writes come before what thread s does next
//   st.release.sys       and become visible to rank s before the flag does
//   ld.acquire.sys       who sees the flag sees them
//   __syncthreads()      and so does its whole block
//
// All blocks must run at once, on every rank: no more of them than multiprocessors. A wait ends after two seconds even
// if the peer never comes; it then leaves the peer's number in an error word, and with that set nobody waits any more.
//
// Sizes: multiples of 16 bytes.
#pragma once
#include "dev/collectives/ranks.cuh"

namespace collectives::two_shot {

constexpr int threads = 1024, most_blocks = 256;
constexpr uint64_t most_nanoseconds = 2'000'000'000;

// ---- meeting on the device ----

struct Meeting {
  Peers<uint32_t> reached;  // of each rank: (W, most_blocks): the epoch that block b of rank s has reached
  Peers<uint32_t> epoch;    // of each rank: (most_blocks): the epoch of its own blocks, between calls
  Peers<int32_t> no_show;   // of each rank: 1 + the rank that it waited for in vain; 0: none
};

__device__ __forceinline__ void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// Of all blocks blockIdx.x. Thread s sees to rank s; all threads of the block call it.
__device__ __forceinline__ void meet(const Meeting& m, int rank, int ranks, uint32_t epoch) {
  __syncthreads();
  const int peer = threadIdx.x;
  if (peer < ranks && peer != rank) {
    store_release(m.reached.at[peer] + rank * most_blocks + blockIdx.x, epoch);
    const uint32_t* word = m.reached.at[rank] + peer * most_blocks + blockIdx.x;
    const uint64_t deadline = nanoseconds() + most_nanoseconds;
    while (int32_t(load_acquire(word) - epoch) < 0) {
      if (*static_cast<volatile int32_t*>(m.no_show.at[rank]) != 0) break;
      if (nanoseconds() > deadline) {
        atomicCAS(m.no_show.at[rank], 0, peer + 1);
        break;
      }
    }
  }
  __syncthreads();
}

// ---- the collective ----

// Where part p of W begins.
__device__ __forceinline__ int64_t part_begin(int64_t packs, int part, int ranks) { return packs * part / ranks; }

template <class T, int most>
__global__ void __launch_bounds__(threads, 1)
    reduce(const __grid_constant__ Peers<T> out, const __grid_constant__ Peers<const T> in,
           const __grid_constant__ Meeting m, int rank, int ranks, int64_t packs) {
  const uint32_t epoch = m.epoch.at[rank][blockIdx.x];
  const int64_t first = int64_t(blockIdx.x) * threads + threadIdx.x, step = int64_t(gridDim.x) * threads;
  T* mine = out.at[rank];

  meet(m, rank, ranks, epoch + 1);
  int64_t end = part_begin(packs, rank + 1, ranks);
  for (int64_t i = part_begin(packs, rank, ranks) + first; i < end; i += step)
    store_pack(mine, i, sum_of_ranks<most>(in, ranks, i));

  meet(m, rank, ranks, epoch + 2);
  for (int k = 1; k < ranks; ++k) {
    const int s = (rank + k) % ranks;
    const T* theirs = out.at[s];
    end = part_begin(packs, s + 1, ranks);
    for (int64_t i = part_begin(packs, s, ranks) + first; i < end; i += step) store_pack(mine, i, load_pack(theirs, i));
  }

  meet(m, rank, ranks, epoch + 3);
  if (threadIdx.x == 0) m.epoch.at[rank][blockIdx.x] = epoch + 3;
}

// The flags' memory. The kernel is loaded here, on every GPU: loading it at the first launch could wait for the GPUs to
// be idle, while the first of them waits in it for the second.
template <class T>
Meeting make_meeting(Ranks& ranks) {
  Meeting m;
  for (int r = 0; r < ranks.n; ++r) {
    m.reached[r] = ranks.upload(r, std::vector<uint32_t>(size_t(ranks.n) * most_blocks));
    m.epoch[r] = ranks.upload(r, std::vector<uint32_t>(most_blocks));
    m.no_show[r] = ranks.upload(r, std::vector<int32_t>(1));
    with_most(ranks.n, [](auto most) {
      cudaFuncAttributes attributes;
      CUDA_CHECK(cudaFuncGetAttributes(&attributes, reduce<T, most()>));
    });
  }
  return m;
}

// out[r] (n) = Σ_s in[s] (n), on every rank
template <class T>
void all_reduce(const Ranks& ranks, const Peers<T>& out, const ConstPeers<T>& in, const Meeting& m, int64_t n) {
  const int64_t packs = packs_of<T>("03_two_shot", n);
  const int64_t most = std::min(ranks.multiprocessors, most_blocks);
  const int64_t blocks = std::min(ceil_div(ceil_div(packs, ranks.n), threads), most);
  for (int r = 0; r < ranks.n; ++r)
    with_most(ranks.n, [&](auto most) {
      ranks.launch(r, reduce<T, most()>, unsigned(blocks), threads, out, in, m, r, ranks.n, packs);
    });
}

// Whether somebody did not come, in words; empty: all did.
inline std::string no_show(const Ranks& ranks, const Meeting& m) {
  for (int r = 0; r < ranks.n; ++r)
    if (const int32_t who = ranks.host(r, m.no_show[r], 1)[0]; who != 0)
      return "rank " + std::to_string(r) + " waited in vain for rank " + std::to_string(who - 1);
  return "";
}

}  // namespace collectives::two_shot
