// Rung 4: all-to-all by index. The receiver knows which rows it wants and where they are, so it fetches them: no
// packing at the sender, no numbers of rows for the host, and each remote row passes the link once, straight to where
// it belongs. This is what the experts' gather of rows becomes when some of the rows lie on another GPU.
//
// A warp takes 512 bytes each of eight rows: its lanes read eight entries of the list and hand them round, each lane
// has eight loads of 16 bytes on their way before the first is stored. Eight, because a load over the link takes one to
// two microseconds: a warp has 4 KB on its way, a multiprocessor with 32 warps 128 KB, which is far more than the link
// can hold, so the kernel also does well with part of the chip. Pieces of 512 bytes rather than whole rows, so that a
// short list is spread over many warps: 256 rows of 4 KiB are 256 warps instead of 32.
//
// Predicted, W ranks, S bytes for each: (W-1)/W·S over the link, once. Whoever sends reads and writes 2·S of local
// memory first. The rows of one's own table are read meanwhile: blocks work at eight places of the list in turn, so
// that of a list that is grouped by ranks, rows of all of them are on their way. Sizes: rows of a multiple of 16 bytes.
#pragma once
#include "dev/collectives/exchange.cuh"

namespace collectives::pull_rows {

constexpr int warps = 8, rows_a_warp = 8, places = 8;

template <class T>
__global__ void __launch_bounds__(warps * 32) pull(T* out, const __grid_constant__ Peers<const T> table,
                                                   const RowOf* wanted, int64_t rows, int width_packs, int pieces) {
  const int lane = threadIdx.x % 32;
  const int64_t block = int64_t(blockIdx.x % places) * (gridDim.x / places) + blockIdx.x / places;
  const int64_t task = block * warps + threadIdx.x / 32;  // pieces of a row are neighbours
  const int64_t row0 = task / pieces * rows_a_warp;
  const int i = int(task % pieces) * 32 + lane;  // of the packs of a row
  if (row0 >= rows) return;                      // the whole warp
  const int here = int(min(int64_t(rows_a_warp), rows - row0));

  // Lane k has the address of row k.
  uint64_t address = 0;
  if (lane < here) {
    const RowOf from = wanted[row0 + lane];
    address = reinterpret_cast<uint64_t>(table.at[from.rank]) + uint64_t(from.row) * width_packs * sizeof(Pack<T>);
  }
  Pack<T> pack[rows_a_warp];
#pragma unroll
  for (int k = 0; k < rows_a_warp; ++k) {
    const T* row = reinterpret_cast<const T*>(__shfl_sync(~0u, address, k));
    if (k < here && i < width_packs) pack[k] = load_pack(row, i);
  }
#pragma unroll
  for (int k = 0; k < rows_a_warp; ++k)
    if (k < here && i < width_packs) store_pack(out, (row0 + k) * width_packs + i, pack[k]);
}

// out[d] (rows wanted, width) from the tables
template <class T>
void all_to_all(const Ranks& ranks, const Peers<T>& out, const ConstPeers<T>& table, const Exchange& x) {
  const int64_t width_packs = packs_of<T>("04_pull_rows", x.width), pieces = ceil_div(width_packs, 32);
  ranks.meet();  // the tables are there
  for (int d = 0; d < ranks.n; ++d) {
    const int64_t tasks = ceil_div(x.rows(d), rows_a_warp) * pieces, blocks_a_place = ceil_div(tasks, warps * places);
    ranks.launch(d, pull<T>, unsigned(blocks_a_place * places), warps * 32, out[d], table, x.wanted_on_gpu[d],
                 x.rows(d), int(width_packs), int(pieces));
  }
  ranks.meet();  // nobody reads them any more
}

}  // namespace collectives::pull_rows
