// Finishing a tile of the down projection's backward on Hopper. It reads h and writes dh and gate * A, five times the
// bytes of dA' itself: left to loads and stores of threads, these would wait for memory most of the time. Here they move
// by the copy engine, in pieces of 64 rows and 64 columns of dA':
//
//   h of a piece arrives in a slot of shared memory, asked for long before (while a piece `slots` earlier was finished)
//   the warps that hold the piece's dA' read it, and write dh over it and gate * A beside it
//   the copy engine stores both; once it has read them, h of the piece `slots` later is asked for
//
// A box in shared memory is swizzled like an operand's panel (hopper.cuh), and its 8x8 matrices are what ldmatrix and
// stmatrix deal in: a lane gets h of exactly those elements of which wgmma left it dA'.
//
// The copy engine would overwrite the next expert's rows where a piece passes an expert's last: such a piece is stored
// by threads.
#pragma once
#include "moe/experts_epilogue.cuh"
#include "moe/hopper.cuh"

namespace hopper {

using namespace grouped;

template <class Shape_>
struct StagedDownBackward : DownBackward<Shape_> {
  static constexpr bool has_prefetch = false;
};

// What one consumer warpgroup knows of the pieces of its block. Pieces are numbered in the order of tiles; piece n uses
// slot n % slots. The two consumers finish their tiles in turn.
template <class Product>
class Finish {
  using Shape = typename Product::Shape;
  static constexpr int strips = Shape::rows / 64, pieces = strips * (Shape::BN / 64), slots = Shape::slots;
  static constexpr int h_bytes = 2 * panel_bytes, slot_bytes = h_bytes + panel_bytes;
  static constexpr int batch = Shape::BN > 128 ? 2 : 4;  // of 8 columns worked on at a time: independent chains
  static_assert(slots <= pieces && slot_bytes == Shape::slot_bytes);

  const Product& p_;
  const TensorMap *h_, *dh_, *scaled_;
  uint32_t slots_at_, arrived_;  // shared memory; a barrier a slot
  uint32_t slot_ = 0, parity_ = 0;
  int consumer_;
  float gate_[strips][2];

 public:
  __device__ Finish(const Product& p, const TensorMap* maps, uint32_t slots_at, uint32_t arrived, int consumer)
      : p_(p),
        h_(maps),
        dh_(maps + 1),
        scaled_(maps + 2),
        slots_at_(slots_at),
        arrived_(arrived),
        consumer_(consumer) {}

  // One thread of the block, before the first tile.
  static __device__ void init(uint32_t arrived) {
    for (int s = 0; s < slots; ++s) init_barrier(arrived + s * 8, 1);
  }
  __device__ void first_pieces(const WorkTile& t) {
    if (thread() == 0)
      for (int q = 0; q < slots; ++q) load(t, q, q);
  }
  __device__ void skip_tile() { advance(pieces); }

  // While the tile is multiplied: the gates of this lane's rows.
  __device__ void begin(const WorkTile& t) {
#pragma unroll
    for (int i = 0; i < strips * 2; ++i) {
      const int row = t.m0 + i / 2 * 64 + row_in_piece() + i % 2 * 8;
      gate_[i / 2][i % 2] = row < t.row_end ? __ldg(p_.gates + __ldg(p_.slot_of_row + row)) : 0;
    }
  }

  // next: the other consumer's tile that follows, if has_next.
  template <int blocks>
  __device__ void operator()(const float (&acc)[strips][blocks][4], const WorkTile& t, const WorkTile& next,
                             bool has_next) {
    sync_threads(3 + consumer_, 2 * warpgroup);  // the other has finished the tile before
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = thread() / 32 * 16 + matrix % 2 * 8 + lane % 8;
    const uint32_t place = row * 128 + ((matrix / 2 ^ lane % 8) << 4);  // of this lane's row of matrix lane / 8
#pragma unroll
    for (int q = 0; q < pieces; ++q) {
      const int i = q % strips, part = q / strips;
      const uint32_t slot = slots_at_ + slot_ * slot_bytes;
      wait(arrived_ + slot_ * 8, parity_);
      float dgate[2] = {0, 0};
      uint32_t h[2][batch][4];  // of 8 columns: gate of rows g and g + 8, up of both
      auto at = [&](int j) { return slot + j / 4 * panel_bytes + (place ^ (j % 4 << 5)); };
      auto load_batch = [&](int first) {
#pragma unroll
        for (int l = 0; l < batch; ++l) load_matrices<false>(h[first / batch % 2][l], at(first + l));
      };
      load_batch(0);
#pragma unroll
      for (int j = 0; j < 8; j += batch) {
        if (j + batch < 8) load_batch(j + batch);  // before the stores of this one, which it would have to wait for
        uint32_t dh[batch][4], scaled[batch][2];
#pragma unroll
        for (int l = 0; l < batch; ++l) {
          const auto& d = acc[i][part * 8 + j + l];
          const auto& hl = h[j / batch % 2][l];
          dgate[0] += swiglu_pair_backward(dh[l][0], dh[l][2], scaled[l][0], d[0], d[1], hl[0], hl[2], gate_[i][0]);
          dgate[1] += swiglu_pair_backward(dh[l][1], dh[l][3], scaled[l][1], d[2], d[3], hl[1], hl[3], gate_[i][1]);
        }
#pragma unroll
        for (int l = 0; l < batch; ++l) store_matrices(at(j + l), dh[l]);
#pragma unroll
        for (int l = 0; l < batch; l += 2)
          store_matrices(slot + h_bytes + (place ^ ((j + l) << 4)),
                         {scaled[l][0], scaled[l][1], scaled[l + 1][0], scaled[l + 1][1]});
      }
      fence_async_proxy();
      const int column = t.n0 + part * group_columns, first = t.m0 + i * 64;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        dgate[half] += __shfl_xor_sync(~0u, dgate[half], 1);
        dgate[half] += __shfl_xor_sync(~0u, dgate[half], 2);
        const int r = first + row_in_piece() + half * 8;
        if (lane % 4 == 0 && r < t.row_end && column < p_.N)
          p_.partial[column / group_columns * p_.R + r] = dgate[half];
      }
      sync_threads(5 + consumer_, warpgroup);
      if (first + 64 <= t.row_end) {
        if (thread() == 0) {
          for (int panel = 0; panel < 2; ++panel)
            store_box(dh_, slot + panel * panel_bytes, column * 2 + panel * 64, first, 0);
          store_box(scaled_, slot + h_bytes, column, first, 0);
          commit_stores();
        }
      } else {
        store_ragged(slot, first, column, t.row_end);
        fence_async_proxy();
        sync_threads(5 + consumer_, warpgroup);
        if (thread() == 0) commit_stores();  // an empty group: there is one a piece
      }
      // The slot of the piece before this one, if its stores have read it, is free for the piece `slots` later.
      if (thread() == 0 && q > 0) {
        wait_stores_read<1>();
        load_later(t, next, has_next, q - 1);
      }
      advance(1);
    }
    arrive_threads(4 - consumer_, 2 * warpgroup);
    if (thread() == 0) {
      wait_stores_read<0>();
      load_later(t, next, has_next, pieces - 1);
    }
  }

 private:
  static __device__ int thread() { return threadIdx.x % warpgroup; }
  static __device__ int row_in_piece() { return thread() / 32 * 16 + threadIdx.x % 32 / 4; }
  __device__ void advance(int n) {
    slot_ += n % slots, parity_ ^= n / slots & 1;
    if (slot_ >= slots) slot_ -= slots, parity_ ^= 1;
  }
  // h of piece q of a tile.
  __device__ void load(const WorkTile& t, int q, uint32_t slot) const {
    const int i = q % strips, part = q / strips;
    const uint32_t to = slots_at_ + slot * slot_bytes, arrived = arrived_ + slot * 8;
    arrive_expecting(arrived, h_bytes);
    for (int panel = 0; panel < 2; ++panel)
      load_box(to + panel * panel_bytes, h_, (t.n0 + part * group_columns) * 2 + panel * 64, t.m0 + i * 64, 0, arrived);
  }
  // h of the piece that takes the slot of piece q of tile t after it. The slot of piece q is the one before slot_.
  __device__ void load_later(const WorkTile& t, const WorkTile& next, bool has_next, int q) const {
    const bool here = q + slots < pieces;
    // slot_ is the slot of the piece being finished, q + 1, or, after the last, of the first of the next tile.
    const uint32_t slot = slot_ == 0 ? slots - 1 : slot_ - 1;
    if (here || has_next) load(here ? t : next, here ? q + slots : q + slots - pieces, slot);
  }
  __device__ void store_ragged(uint32_t slot, int first, int column, int row_end) const {
    for (int i = thread(); i < 64 * 24; i += warpgroup) {  // 16 chunks of dh and 8 of gate * A a row
      const int row = i / 24, chunk = i % 24, panel = chunk / 8;
      if (first + row >= row_end) break;
      uint4 v;
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(slot + panel * panel_bytes + row * 128 + ((chunk ^ row) % 8 << 4)));
      const int64_t r = first + row;
      const int c = panel < 2 ? column * 2 + chunk * 8 : column + chunk % 8 * 8;
      bf16* to = panel < 2 ? p_.dh + r * 2 * p_.N + c : p_.a_scaled + r * p_.N + c;
      if (c < (panel < 2 ? 2 : 1) * p_.N) *reinterpret_cast<uint4*>(to) = v;
    }
  }
};

}  // namespace hopper
