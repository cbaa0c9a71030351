// Finishing tiles on Hopper by way of shared memory. A warp rounds and combines its accumulators, lays them down in a
// slot of its own with stmatrix, and TMA carries them away while the warp goes on: no shuffles, no waiting,
// no barrier between warps. A piece is 16 rows (a warp's strip) and 64 columns of the product, or 32 where h comes in
// the same way.
//
// What TMA stores is a box, and a box that passes an expert's last row would overwrite the next expert's:
// such a piece is stored by the lanes, from the same slot.
#pragma once
#include "moe/experts_epilogue.cuh"
#include "llmc/hopper.cuh"

namespace hopper {

using namespace grouped;

// ---- boxes of 16 rows ----

// A box holds 64 or 32 columns: 128 or 64 bytes a row, chunks swizzled as tensor_map() says. Where lane l of a warp
// points for load_matrices() and store_matrices(): row l % 16, chunks l / 16 and, by an exclusive or with j << 4 where j
// is even, j + l / 16. Registers are then {rows 0-7, rows 8-15} of 8 columns and of the next 8, as accumulators are.
constexpr int box_rows = 16;
template <int columns>
struct Box {
  static constexpr int row_bytes = columns * 2, bytes = box_rows * row_bytes;
  static __device__ int flip(int row) { return columns == 64 ? row % 8 : row / 2 % 4; }
  static __device__ uint32_t lane_offset() {
    const int lane = threadIdx.x % 32, row = lane % 16;
    return row * row_bytes + ((lane / 16 ^ flip(row)) << 4);
  }
  // By the lanes: rows before row_end, columns before `width` of the matrix.
  static __device__ void store_by_lanes(uint32_t box, bf16* matrix, int width, int column, int first, int row_end) {
    constexpr int chunks = row_bytes / 16;
    const int chunk = threadIdx.x % chunks;
    for (int row = threadIdx.x % 32 / chunks; row < min(box_rows, row_end - first); row += 32 / chunks) {
      uint4 v;
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(box + row * row_bytes + ((chunk ^ flip(row)) << 4)));
      if (column + chunk * 8 < width)
        *reinterpret_cast<uint4*>(matrix + int64_t(first + row) * width + column + chunk * 8) = v;
    }
  }
};
__device__ __forceinline__ bool first_lane() { return threadIdx.x % 32 == 0; }
// First row of strip i of this warp, in a tile that begins at m0; part_row: of the consumer's part.
__device__ __forceinline__ int strip_row(const WorkTile& t, int part_row, int i) {
  return t.m0 + part_row + i * 64 + threadIdx.x % warpgroup / 32 * box_rows;
}

// ---- y = a W2^T, dx_rows = dh W13 ----

template <class Shape, bool b_down>
struct StagedRows : Rows<Shape, b_down> {
  static constexpr int warp_bytes = Box<64>::bytes, warp_slots = 0;
  static constexpr bool looks_ahead = false;
  static void describe(TensorMap* maps, const Rows<Shape, b_down>& p, const ExpertShape& s) {
    maps[0] = tensor_map(p.out, 1, s.R, p.N, s.R * p.N, box_rows);
  }

  struct Finish {
    const StagedRows& p;
    const TensorMap* maps;
    uint32_t slot;
    int part_row;

    template <int strips, int blocks>
    __device__ __forceinline__ void operator()(const float (&acc)[strips][blocks][4], const WorkTile& t) {
      const uint32_t place = slot + Box<64>::lane_offset();
#pragma unroll
      for (int i = 0; i < strips; ++i)
#pragma unroll
        for (int part = 0; part < blocks / 8; ++part) {
          const int first = strip_row(t, part_row, i), column = t.n0 + part * 64;
          if (first_lane()) wait_stores_read<0>();
          __syncwarp();
#pragma unroll
          for (int j = 0; j < 8; j += 2) {
            const auto &x = acc[i][part * 8 + j], &y = acc[i][part * 8 + j + 1];
            store_matrices(place ^ (j << 4), {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(y[0], y[1]),
                                              pack_bf16(y[2], y[3])});
          }
          fence_async_proxy();
          __syncwarp();
          if (first + box_rows <= t.row_end) {
            if (first_lane()) store_box(maps, slot, column, first, 0), commit_stores();
          } else {
            Box<64>::store_by_lanes(slot, p.out, p.N, column, first, t.row_end);
          }
        }
    }
  };
};

// ---- h = x[token] W13^T, a = swiglu(h) ----

template <class Shape>
struct StagedUp : Up<Shape> {
  static constexpr int warp_bytes = Box<64>::bytes + Box<32>::bytes, warp_slots = 0;
  static constexpr bool looks_ahead = false;
  static void describe(TensorMap* maps, const Up<Shape>& p, const ExpertShape& s) {
    if (p.h) maps[0] = tensor_map(p.h, 1, s.R, 2 * s.F, s.R * 2 * s.F, box_rows);
    maps[1] = tensor_map(p.activated, 1, s.R, s.F, s.R * s.F, box_rows, 32);
  }

  struct Finish {
    const StagedUp& p;
    const TensorMap* maps;
    uint32_t slot;
    int part_row;

    template <int strips, int blocks>
    __device__ __forceinline__ void operator()(const float (&acc)[strips][blocks][4], const WorkTile& t) {
      const uint32_t h_place = slot + Box<64>::lane_offset(), a_slot = slot + Box<64>::bytes,
                     a_place = a_slot + Box<32>::lane_offset();
#pragma unroll
      for (int i = 0; i < strips; ++i)
#pragma unroll
        for (int part = 0; part < blocks / 8; ++part) {
          const int first = strip_row(t, part_row, i), column = t.n0 + part * 64;
          uint32_t h[8][2], a[4][2];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const auto& c = acc[i][part * 8 + j];
            h[j][0] = pack_bf16(c[0], c[1]), h[j][1] = pack_bf16(c[2], c[3]);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) a[j][half] = swiglu_pair(h[2 * j][half], h[2 * j + 1][half]);
          if (first_lane()) wait_stores_read<0>();
          __syncwarp();
          if (p.h)
#pragma unroll
            for (int j = 0; j < 8; j += 2)
              store_matrices(h_place ^ (j << 4), {h[j][0], h[j][1], h[j + 1][0], h[j + 1][1]});
#pragma unroll
          for (int j = 0; j < 4; j += 2)
            store_matrices(a_place ^ (j << 4), {a[j][0], a[j][1], a[j + 1][0], a[j + 1][1]});
          fence_async_proxy();
          __syncwarp();
          if (first + box_rows <= t.row_end) {
            if (first_lane()) {
              if (p.h) store_box(maps, slot, column, first, 0);
              store_box(maps + 1, a_slot, column / 2, first, 0), commit_stores();
            }
          } else {
            if (p.h) Box<64>::store_by_lanes(slot, p.h, p.N, column, first, t.row_end);
            Box<32>::store_by_lanes(a_slot, p.activated, p.N / 2, column / 2, first, t.row_end);
          }
        }
    }
  };
};

// ---- dA' = dout[token] W2, and all that follows from it ----

// It reads h and writes dh and gate * A, five times the bytes of dA' itself. h of a piece arrives in a slot long before,
// asked for when the piece `slots - 1` earlier had been finished; dh is laid over it and gate * A beside it.
template <class Shape>
struct StagedDownBackward : DownBackward<Shape> {
  static constexpr bool has_prefetch = false, looks_ahead = true;
  static constexpr int columns = 32;  // of dA' in a piece: 64 of h
  static constexpr int slot_bytes = Box<64>::bytes + Box<32>::bytes, warp_slots = Shape::BN > 192 ? 3 : 4,
                       warp_bytes = warp_slots * slot_bytes;
  static void describe(TensorMap* maps, const DownBackward<Shape>& p, const ExpertShape& s) {
    maps[0] = tensor_map(p.h, 1, s.R, 2 * s.F, s.R * 2 * s.F, box_rows);
    maps[1] = tensor_map(p.dh, 1, s.R, 2 * s.F, s.R * 2 * s.F, box_rows);
    maps[2] = tensor_map(p.a_scaled, 1, s.R, s.F, s.R * s.F, box_rows, 32);
  }

  class Finish {
    static constexpr int strips = Shape::rows / 64, parts = Shape::BN / columns, pieces = strips * parts;
    static_assert(parts % 2 == 0 && warp_slots <= pieces);
    const StagedDownBackward& p_;
    const TensorMap* maps_;
    uint32_t slots_at_, arrived_;  // in shared memory; a barrier a slot
    int part_row_;
    uint32_t slot_ = 0, parity_ = 0;
    float gate_[strips][2];

   public:
    __device__ Finish(const StagedDownBackward& p, const TensorMap* maps, uint32_t slots_at, int part_row,
                      uint32_t arrived)
        : p_(p), maps_(maps), slots_at_(slots_at), arrived_(arrived), part_row_(part_row) {}

    __device__ void start(const WorkTile& t) {
      if (first_lane())
        for (int q = 0; q < warp_slots; ++q) load(t, q, q);
    }
    // Before the tile is multiplied: the gates of this lane's rows are asked for.
    __device__ void begin(const WorkTile& t) {
#pragma unroll
      for (int i = 0; i < strips * 2; ++i) {
        const int row = strip_row(t, part_row_, i / 2) + threadIdx.x % 32 / 4 + i % 2 * 8;
        gate_[i / 2][i % 2] = row < t.row_end ? __ldg(p_.gates + __ldg(p_.slot_of_row + row)) : 0;
      }
    }
    // next: this warp's tile after t, if has_next.
    template <int blocks>
    __device__ __forceinline__ void operator()(const float (&acc)[strips][blocks][4], const WorkTile& t,
                                               const WorkTile& next, bool has_next) {
      const uint32_t h_place = Box<64>::lane_offset(), a_place = Box<64>::bytes + Box<32>::lane_offset();
      float dgate[2] = {0, 0};
#pragma unroll
      for (int q = 0; q < pieces; ++q) {
        const int i = q / parts, part = q % parts;
        const uint32_t slot = slots_at_ + slot_ * slot_bytes;
        const int first = strip_row(t, part_row_, i), column = t.n0 + part * columns;
        wait(arrived_ + slot_ * 8, parity_);
        uint32_t h[4][4], scaled[4][2];  // of 8 columns: gate of rows g and g + 8, up of both
#pragma unroll
        for (int j = 0; j < 4; ++j) load_matrices<false>(h[j], slot + (h_place ^ (j << 5)));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto& d = acc[i][part * 4 + j];
          uint32_t dh[4];
          dgate[0] += swiglu_pair_backward(dh[0], dh[2], scaled[j][0], d[0], d[1], h[j][0], h[j][2], gate_[i][0]);
          dgate[1] += swiglu_pair_backward(dh[1], dh[3], scaled[j][1], d[2], d[3], h[j][1], h[j][3], gate_[i][1]);
          store_matrices(slot + (h_place ^ (j << 5)), dh);
        }
#pragma unroll
        for (int j = 0; j < 4; j += 2)
          store_matrices(slot + (a_place ^ (j << 4)), {scaled[j][0], scaled[j][1], scaled[j + 1][0], scaled[j + 1][1]});
        fence_async_proxy();
        __syncwarp();
        if (first + box_rows <= t.row_end) {
          if (first_lane())
            store_box(maps_ + 1, slot, column * 2, first, 0),
                store_box(maps_ + 2, slot + Box<64>::bytes, column, first, 0);
        } else {
          Box<64>::store_by_lanes(slot, p_.dh, 2 * p_.N, column * 2, first, t.row_end);
          Box<32>::store_by_lanes(slot + Box<64>::bytes, p_.a_scaled, p_.N, column, first, t.row_end);
          fence_async_proxy();
          __syncwarp();
        }
        if (first_lane()) {  // the slot of the piece before this one is free once its stores have read it
          commit_stores();
          wait_stores_read<1>();
          const int later = q - 1 + warp_slots;
          const uint32_t free = slot_ == 0 ? warp_slots - 1 : slot_ - 1;
          if (q > 0 && later < pieces)
            load(t, later, free);
          else if (q > 0 && has_next)
            load(next, later - pieces, free);
        }
        if (part % 2) {  // 64 columns are complete
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            dgate[half] += __shfl_xor_sync(~0u, dgate[half], 1);
            dgate[half] += __shfl_xor_sync(~0u, dgate[half], 2);
            const int r = first + threadIdx.x % 32 / 4 + half * 8;
            if (threadIdx.x % 4 == 0 && r < t.row_end && column - columns < p_.N)
              p_.partial[column / group_columns * p_.R + r] = dgate[half];
            dgate[half] = 0;
          }
        }
        if (++slot_ == warp_slots) slot_ = 0, parity_ ^= 1;
      }
      if (first_lane() && has_next) {
        wait_stores_read<0>();
        load(next, warp_slots - 1, slot_ == 0 ? warp_slots - 1 : slot_ - 1);
      }
    }

   private:
    __device__ void load(const WorkTile& t, int q, uint32_t slot) const {
      const uint32_t arrived = arrived_ + slot * 8;
      arrive_expecting(arrived, Box<64>::bytes);
      load_box(slots_at_ + slot * slot_bytes, maps_, (t.n0 + q % parts * columns) * 2,
               strip_row(t, part_row_, q / parts), 0, arrived);
    }
  };
};

// ---- the rest is finished by threads (experts_epilogue.cuh) ----

template <class Product>
struct Direct : Product {
  static constexpr int warp_bytes = 0, warp_slots = 0;
  static constexpr bool looks_ahead = false;
  static void describe(TensorMap*, const Product&, const ExpertShape&) {}
  struct Finish {
    const Direct& p;
    const TensorMap* maps;
    uint32_t slot;
    int part_row;
    template <int strips, int blocks>
    __device__ __forceinline__ void operator()(const float (&acc)[strips][blocks][4], const WorkTile& t) {
      p.finish(acc, Place<64>(t, part_row + threadIdx.x % warpgroup / 32 * box_rows, 0), t);
    }
  };
};

}  // namespace hopper
