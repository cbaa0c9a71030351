// Who needs which rows: the all-to-all of expert parallelism. Every rank has a table of rows, its tokens, and a list of
// the rows that it wants, from its own table and from the others'.
#pragma once
#include <numeric>
#include <random>

#include "dev/collectives/ranks.cuh"

namespace collectives {

struct RowOf {
  int32_t rank, row;  // a row of this rank's table
};

// The list of rank d has its rows grouped by the rank that they come from, which is what sending needs. Pulling would
// take any order, the experts' for example.
struct Exchange {
  int ranks = 0;
  int64_t width = 0;                       // elements of a row
  std::vector<std::vector<RowOf>> wanted;  // [d]
  std::vector<std::vector<int64_t>>
      begin;  // [d][s]: where the rows from s begin in the result of d; [d][ranks]: their number
  std::vector<std::vector<int32_t>> sent;    // [s]: rows of the table of s that are wanted, grouped by who wants them
  std::vector<std::vector<int64_t>> packed;  // [s][d]: where the rows for d begin in it; [s][ranks]: their number
  Peers<RowOf> wanted_on_gpu;                // [d]
  Peers<int32_t> sent_on_gpu;                // [s]

  int64_t rows(int d) const { return begin[d][ranks]; }
  int64_t rows(int d, int s) const { return begin[d][s + 1] - begin[d][s]; }  // that d wants from s
  int64_t sent_rows(int s) const { return packed[s][ranks]; }
};

// count(d, s): how many rows d wants from s. Which ones: random, none twice.
template <class Count>
Exchange make_exchange(Ranks& ranks, int64_t table_rows, int64_t width, Count count) {
  Exchange x;
  x.ranks = ranks.n, x.width = width;
  x.wanted.resize(ranks.n), x.begin.resize(ranks.n), x.sent.resize(ranks.n), x.packed.resize(ranks.n);
  std::mt19937 random(42);
  std::vector<int32_t> order(table_rows);
  std::iota(order.begin(), order.end(), 0);
  for (int s = 0; s < ranks.n; ++s)
    for (int d = 0; d < ranks.n; ++d) {
      std::shuffle(order.begin(), order.end(), random);
      x.packed[s].push_back(int64_t(x.sent[s].size()));
      x.sent[s].insert(x.sent[s].end(), order.begin(), order.begin() + count(d, s));
    }
  for (int r = 0; r < ranks.n; ++r) x.packed[r].push_back(int64_t(x.sent[r].size()));
  for (int d = 0; d < ranks.n; ++d) {
    for (int s = 0; s < ranks.n; ++s) {
      x.begin[d].push_back(int64_t(x.wanted[d].size()));
      for (int64_t i = x.packed[s][d]; i < x.packed[s][d + 1]; ++i) x.wanted[d].push_back({s, x.sent[s][i]});
    }
    x.begin[d].push_back(int64_t(x.wanted[d].size()));
    x.wanted_on_gpu[d] = ranks.upload(d, x.wanted[d]);
    x.sent_on_gpu[d] = ranks.upload(d, x.sent[d]);
  }
  return x;
}

// What a sender has to do first: lay the rows for each receiver side by side. packed (n, width) from a table on the
// same GPU, a block a row.
template <class T>
__global__ void pack_rows(T* packed, const T* table, const int32_t* rows, int64_t width_packs) {
  const T* from = table + rows[blockIdx.x] * width_packs * Pack<T>::n;
  T* to = packed + int64_t(blockIdx.x) * width_packs * Pack<T>::n;
  for (int64_t i = threadIdx.x; i < width_packs; i += blockDim.x) store_pack(to, i, load_pack(from, i));
}
template <class T>
void pack_for_sending(const Ranks& ranks, const Peers<T>& packed, const ConstPeers<T>& table, const Exchange& x) {
  const int64_t width_packs = packs_of<T>("pack_rows", x.width);
  for (int s = 0; s < ranks.n; ++s)
    ranks.launch(s, pack_rows<T>, unsigned(x.sent_rows(s)), 256, packed[s], table[s], x.sent_on_gpu[s], width_packs);
}

}  // namespace collectives
