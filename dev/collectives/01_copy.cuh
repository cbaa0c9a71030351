// Rung 1: the copy engines. cudaMemcpyPeerAsync brings what is needed from the other GPUs, whole, and then a kernel
// that knows nothing of other GPUs does the rest: an add for the all-reduce, nothing for the all-gather. For the
// all-to-all it comes first: the rows that a rank will send are laid side by side, since a copy moves one piece.
//
// Predicted, W ranks: the copies move at the speed of the link, (W-1)·S bytes into each GPU for an all-reduce of S
// bytes, (W-1)/W·S for the other two. What the kernel reads and writes in local memory comes on top, since it begins
// when the copies are done, or they when it is: (W+1)·S for the sum, 2·S for the packing. So does the copy of a rank's
// own part, 2·S/W. A copy also has to be started, which takes microseconds, and the ranks meet twice by events: below a
// megabyte that is the whole time.
//
// Sizes: multiples of 16 bytes. staging: (W-1)·S bytes.
#pragma once
#include "dev/collectives/exchange.cuh"

namespace collectives::copy_engine {

constexpr int threads = 512;

template <class T, int most>
__global__ void sum(T* out, Peers<const T> in, int ranks, int64_t packs) {
  const int64_t step = int64_t(gridDim.x) * threads;
  for (int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x; i < packs; i += step)
    store_pack(out, i, sum_of_ranks<most>(in, ranks, i));
}

// out[r] (n) = Σ_s in[s] (n), on every rank
template <class T>
void all_reduce(const Ranks& ranks, const Peers<T>& out, const ConstPeers<T>& in, const Peers<T>& staging, int64_t n) {
  const int64_t packs = packs_of<T>("01_copy", n);
  const int64_t blocks = std::min<int64_t>(ceil_div(packs, threads), ranks.multiprocessors * 4);
  ranks.meet();  // all inputs are there
  for (int r = 0; r < ranks.n; ++r) {
    Peers<const T> here;
    here[r] = in[r];
    T* to = staging[r];
    for (int s = 0; s < ranks.n; ++s) {
      if (s == r) continue;
      ranks.copy(r, to, s, in[s], n * int64_t(sizeof(T)));
      here[s] = to, to += n;
    }
    with_most(ranks.n, [&](auto most) {
      ranks.launch(r, sum<T, most()>, unsigned(blocks), threads, out[r], here, ranks.n, packs);
    });
  }
  ranks.meet();  // nobody reads them any more
}

// out[r] (W,n): row s = in[s] (n)
template <class T>
void all_gather(const Ranks& ranks, const Peers<T>& out, const ConstPeers<T>& in, int64_t n) {
  ranks.meet();
  for (int r = 0; r < ranks.n; ++r)
    for (int k = 0; k < ranks.n; ++k) {
      const int s = (r + k) % ranks.n;  // so that not all read from the same rank first
      ranks.copy(r, out[r] + s * n, s, in[s], n * int64_t(sizeof(T)));
    }
  ranks.meet();
}

// out[d] (rows wanted, width) from the tables; packed[s] (rows sent, width) is scratch
template <class T>
void all_to_all(const Ranks& ranks, const Peers<T>& out, const Peers<T>& packed, const ConstPeers<T>& table,
                const Exchange& x) {
  pack_for_sending(ranks, packed, table, x);
  ranks.meet();
  for (int d = 0; d < ranks.n; ++d)
    for (int k = 0; k < ranks.n; ++k) {
      const int s = (d + k) % ranks.n;
      ranks.copy(d, out[d] + x.begin[d][s] * x.width, s, packed[s] + x.packed[s][d] * x.width,
                 x.rows(d, s) * x.width * int64_t(sizeof(T)));
    }
  ranks.meet();
}

}  // namespace collectives::copy_engine
