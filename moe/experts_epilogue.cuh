// The six products: which windows they read, and how they finish a tile while it is still in registers. Both pipelines
// (experts_portable.cuh, experts_hopper.cuh) compute them.
//
// As mma and wgmma leave a tile, lane 4*g + t of a warp holds columns 2t and 2t+1 of rows g and g+8 of every 8 columns
// of a strip of 16 rows: four lanes (a quad) share a row. Stored like that, a row would leave in pieces of 4 bytes. A
// transpose across the quad gives each of its lanes all 8 columns of one of four neighbouring blocks of 8 instead: 16
// bytes a lane as bf16, 64 contiguous bytes a quad. A lane then decides for all 8 columns at once whether they are within
// the matrix.
#pragma once
#include "moe/experts_tiles.cuh"

namespace grouped {

// ---- between lanes ----

// Lane t of a quad has v[0..3]; afterwards its v[i] is what v[t] of lane i was. Neighbours exchange, then pairs do.
template <class T>
__device__ __forceinline__ void quad_transpose(T (&v)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    T other = __shfl_xor_sync(~0u, odd ? v[i] : v[i + 1], 1);
    v[i] = odd ? other : v[i], v[i + 1] = odd ? v[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T other = __shfl_xor_sync(~0u, high ? v[i] : v[i + 2], 2);
    v[i] = high ? other : v[i], v[i + 2] = high ? v[i + 2] : other;
  }
}
// The same for two neighbouring lanes: afterwards the even lane has both x, its own first, and the odd lane both y.
template <class T, int n>
__device__ __forceinline__ void pair_transpose(T (&x)[n], T (&y)[n]) {
  const bool odd = threadIdx.x & 1;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    T other = __shfl_xor_sync(~0u, odd ? x[i] : y[i], 1);
    x[i] = odd ? other : x[i], y[i] = odd ? y[i] : other;
  }
}

// ---- a lane's part of a tile ----

// Accumulators of a warp: acc[i][j] are the lane's four of strip i (16 rows) and columns 8j ... 8j + 7. Columns are
// finished 64 at a time.
constexpr int group_columns = 64;

// Where a warp's part lies. Strips are `distance` rows apart.
template <int distance>
struct Place {
  int row, column;  // this lane's first row, the first column
  __device__ Place(const WorkTile& t, int part_row, int part_column)
      : row(t.m0 + part_row + threadIdx.x % 32 / 4), column(t.n0 + part_column) {}
  __device__ int row_of(int i, int half) const { return row + i * distance + half * 8; }
  // After a quad_transpose over blocks 4*group ... 4*group + 3.
  __device__ int column_of(int group) const { return column + (group * 4 + threadIdx.x % 4) * 8; }
};

// Columns 2k and 2k+1, k = 0..3, of the block that column_of(group) names, as even[k] and odd[k].
template <int blocks>
__device__ __forceinline__ void block_of(float (&even)[4], float (&odd)[4], const float (&strip)[blocks][4], int half,
                                         int group) {
#pragma unroll
  for (int j = 0; j < 4; ++j) even[j] = strip[group * 4 + j][half * 2], odd[j] = strip[group * 4 + j][half * 2 + 1];
  quad_transpose(even), quad_transpose(odd);
}
__device__ __forceinline__ void store16(bf16* to, const uint32_t (&v)[4]) {
  *reinterpret_cast<uint4*>(to) = {v[0], v[1], v[2], v[3]};
}
__device__ __forceinline__ void load16(uint32_t (&v)[4], const bf16* from) {
  uint4 u = __ldg(reinterpret_cast<const uint4*>(from));
  v[0] = u.x, v[1] = u.y, v[2] = u.z, v[3] = u.w;
}

// Asks for a tile of `rows` rows of `bytes` bytes to be in the L2 cache: what finishing will read. Rows from
// `rows_left` on and bytes from `bytes_left` on are nobody's. `threads` threads share the work, a sector of 32 bytes each.
template <int rows, int bytes, int threads>
__device__ __forceinline__ void prefetch_tile(const void* first, int64_t row_bytes, int rows_left, int64_t bytes_left,
                                              int thread) {
  constexpr int sectors = bytes / 32, pass = threads / sectors;
  const int row = thread / sectors, byte = thread % sectors * 32;
  const char* at = static_cast<const char*>(first) + row * row_bytes + byte;
  if (byte < bytes_left)
#pragma unroll 1
    for (int r = row; r < min(rows, rows_left); r += pass, at += pass * row_bytes)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// 1 / (1 + exp(-x)) to a few units of float: two instructions of the special function unit.
__device__ __forceinline__ float fast_sigmoid(float x) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
}

// ---- h = x[token] W13^T, a = swiglu(h) ----

// Two neighbouring columns of a, from those of the gate and the up half of h.
__device__ __forceinline__ uint32_t swiglu_pair(uint32_t h_gate, uint32_t h_up) {
  const float2 g = unpack_bf16(h_gate), u = unpack_bf16(h_up);
  return pack_bf16(g.x * fast_sigmoid(g.x) * u.x, g.y * fast_sigmoid(g.y) * u.y);
}

// Blocks of 8 columns of the tile are gate and up in turn, in the same lanes: each thread has all that its columns of a
// need. h is null where nobody wants it.
template <class Shape_>
struct Up : Operands {
  using Shape = Shape_;
  static constexpr bool sums_rows = false, has_prefetch = false;
  static constexpr Access a_access{.down = false, .gathered = true}, b_access{.down = false, .gathered = false};
  bf16 *h, *activated;

  template <int strips, int blocks, int distance>
  __device__ __forceinline__ void finish(const float (&acc)[strips][blocks][4], const Place<distance>& place,
                                         const WorkTile& t) const {
    const int F = N / 2;
#pragma unroll
    for (int i = 0; i < strips; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.row_of(i, half);
#pragma unroll
        for (int part = 0; part < blocks / 8; ++part) {
          const int f = (place.column + part * group_columns) / 2 + threadIdx.x % 4 * 8;
          uint32_t packed[2][4], act[4];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const auto& c = acc[i][part * 8 + j];
            packed[j / 4][j % 4] = pack_bf16(c[half * 2], c[half * 2 + 1]);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // of the rounded h: the backward pass has no other
            act[j] = swiglu_pair(packed[j / 2][j % 2 * 2], packed[j / 2][j % 2 * 2 + 1]);
          }
          quad_transpose(packed[0]), quad_transpose(packed[1]), quad_transpose(act);
          if (row >= t.row_end) continue;
#pragma unroll
          for (int group = 0; group < 2; ++group) {
            const int column = place.column_of(part * 2 + group);
            if (h && column < N) store16(h + int64_t(row) * N + column, packed[group]);
          }
          if (f < F) store16(activated + int64_t(row) * F + f, act);
        }
      }
  }
};

// ---- y = a W2^T, dx_rows = dh W13 ----

// b_down: the weight is summed over its rows instead of along them.
template <class Shape_, bool b_down>
struct Rows : Operands {
  using Shape = Shape_;
  static constexpr bool sums_rows = false, has_prefetch = false;
  static constexpr Access a_access{.down = false, .gathered = false}, b_access{.down = b_down, .gathered = false};
  bf16* out;

  template <int strips, int blocks, int distance>
  __device__ __forceinline__ void finish(const float (&acc)[strips][blocks][4], const Place<distance>& place,
                                         const WorkTile& t) const {
#pragma unroll
    for (int i = 0; i < strips; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int group = 0; group < blocks / 4; ++group) {
          const int row = place.row_of(i, half), column = place.column_of(group);
          uint32_t packed[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            packed[j] = pack_bf16(acc[i][group * 4 + j][half * 2], acc[i][group * 4 + j][half * 2 + 1]);
          quad_transpose(packed);
          if (row < t.row_end && column < N) store16(out + int64_t(row) * N + column, packed);
        }
  }
};

// ---- dA' = dout[token] W2, and all that follows from it ----

// Two neighbouring columns, from dA' and both halves of h: dh, gate * A, and the return value, their part of <dA', A>.
// A is computed again from h and not read where it was kept: silu(g) is needed for du anyway, so A is one more product.
__device__ __forceinline__ float swiglu_pair_backward(uint32_t& dg, uint32_t& du, uint32_t& scaled, float d0, float d1,
                                                      uint32_t h_gate, uint32_t h_up, float gate) {
  const float2 gs = unpack_bf16(h_gate), us = unpack_bf16(h_up);
  const float d[2] = {d0, d1}, g[2] = {gs.x, gs.y}, u[2] = {us.x, us.y};
  float silu[2], dg_l[2], du_l[2];
#pragma unroll
  for (int l = 0; l < 2; ++l) {
    const float s = fast_sigmoid(g[l]), da = gate * d[l];
    silu[l] = g[l] * s;
    du_l[l] = da * silu[l];
    dg_l[l] = da * u[l] * (s + silu[l] * (1.0f - s));
  }
  const float2 a = unpack_bf16(pack_bf16(silu[0] * u[0], silu[1] * u[1]));  // rounded, as the forward pass used it
  dg = pack_bf16(dg_l[0], dg_l[1]), du = pack_bf16(du_l[0], du_l[1]), scaled = pack_bf16(gate * a.x, gate * a.y);
  return d0 * a.x + d1 * a.y;
}

// N = F. Every 64 columns of dA' in a row, their part of <dA', A> goes to partial (ceil(F/64), rows).
struct DownBackwardOutputs {
  bf16 *dh, *a_scaled;
  float* partial;
  const bf16* h;
  const float* gates;
  const int32_t* slot_of_row;
  int64_t R;
};
template <class Shape_>
struct DownBackward : Operands, DownBackwardOutputs {
  using Shape = Shape_;
  static constexpr bool sums_rows = false, has_prefetch = true;
  static constexpr Access a_access{.down = false, .gathered = true}, b_access{.down = true, .gathered = false};

  using HBlocks = uint32_t[2][2][2][4];  // of 16 rows: [half][group][gate, up][pair of columns]

  template <int rows, int columns, int threads>
  __device__ __forceinline__ void prefetch(const WorkTile& t, int m0, int thread) const {
    prefetch_tile<rows, columns * 4, threads>(h + (int64_t(m0) * N + t.n0) * 2, int64_t(N) * 4, t.row_end - m0,
                                              int64_t(N - t.n0) * 4, thread);
  }

  template <int strips, int blocks, int distance>
  __device__ __forceinline__ void finish(const float (&acc)[strips][blocks][4], const Place<distance>& place,
                                         const WorkTile& t) const {
    constexpr int parts = blocks / 8;
    float gate[strips][2];
#pragma unroll
    for (int i = 0; i < strips * 2; ++i) {
      const int row = place.row_of(i / 2, i % 2);
      gate[i / 2][i % 2] = row < t.row_end ? __ldg(gates + __ldg(slot_of_row + row)) : 0;
    }
    HBlocks blocks_of_h[2];  // h of the next 16 rows and 64 columns is on its way while these are worked on
    load_h(blocks_of_h[0], place, t.row_end, 0, 0);
#pragma unroll
    for (int piece = 0; piece < strips * parts; ++piece) {
      const int i = piece / parts, part = piece % parts;
      if (piece + 1 < strips * parts)
        load_h(blocks_of_h[(piece + 1) % 2], place, t.row_end, (piece + 1) / parts, (piece + 1) % parts);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float dgate = 0;
#pragma unroll
        for (int group = 0; group < 2; ++group)
          dgate += finish_block(acc[i], place, t.row_end, gate[i][half], blocks_of_h[piece % 2][half][group], i, half,
                                part * 2 + group);
        dgate += __shfl_xor_sync(~0u, dgate, 1);
        dgate += __shfl_xor_sync(~0u, dgate, 2);
        const int row = place.row_of(i, half), column = place.column + part * group_columns;
        if (threadIdx.x % 4 == 0 && row < t.row_end && column < N) partial[column / group_columns * R + row] = dgate;
      }
    }
  }

 private:
  template <int distance>
  __device__ __forceinline__ void load_h(HBlocks& to, const Place<distance>& place, int row_end, int i,
                                         int part) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        auto& block = to[half][group];
        const int row = place.row_of(i, half), f = place.column_of(part * 2 + group);
        if (row < row_end && f < N) {
          const bf16* from = h + (int64_t(row) * N + f) * 2;
          load16(block[0], from), load16(block[1], from + 8);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) block[0][k] = block[1][k] = 0;
        }
      }
  }
  // Eight columns of one row: stores dh and a_scaled, returns their part of <dA', A>.
  template <int blocks, int distance>
  __device__ __forceinline__ float finish_block(const float (&strip)[blocks][4], const Place<distance>& place,
                                                int row_end, float gate, const uint32_t (&h_block)[2][4], int i,
                                                int half, int group) const {
    float d[2][4], dgate = 0;  // dA' of even and of odd columns
    block_of(d[0], d[1], strip, half, group);
    uint32_t dg[4], du[4], scaled[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      dgate += swiglu_pair_backward(dg[k], du[k], scaled[k], d[0][k], d[1][k], h_block[0][k], h_block[1][k], gate);
    const int row = place.row_of(i, half), f = place.column_of(group);
    const bool valid = row < row_end;
    if (valid && f < N) store16(a_scaled + int64_t(row) * N + f, scaled);
    // A lane has 8 columns of dg and the 8 of du beside them, and would write the two halves of a 32-byte sector with
    // two instructions. With its neighbour it writes one whole sector after the other: first that of the even lane.
    pair_transpose(dg, du);
    const int odd = threadIdx.x & 1, f_even = f - odd * 8;
    bf16* to = dh + (int64_t(row) * N + f_even) * 2 + odd * 8;
    if (valid && f_even < N) store16(to, dg);
    if (valid && f_even + 8 < N) store16(to + 16, du);
    return dgate;
  }
};

// ---- dW2 += dout[tokens]^T a_scaled, dW13 += dh^T x[tokens]; or = ----

// Output M x N of each expert, summed over its rows: both windows move down. One operand is read through row_slot. An
// expert without rows has no tiles.
template <class Shape_, bool gather_a>
struct WeightGradient : Operands {
  using Shape = Shape_;
  static constexpr bool sums_rows = true, has_prefetch = true;
  static constexpr Access a_access{.down = true, .gathered = gather_a}, b_access{.down = true, .gathered = !gather_a};
  void* gradient;
  bool wide, adds;  // adds: to the gradient; else it is written, and not read

  template <int rows, int columns, int threads>
  __device__ __forceinline__ void prefetch(const WorkTile& t, int m0, int thread) const {
    if (!adds) return;
    const int64_t first = (int64_t(t.expert) * M + m0) * N + t.n0;
    if (wide)
      prefetch_tile<rows, columns * 4, threads>(static_cast<float*>(gradient) + first, int64_t(N) * 4, M - m0,
                                                int64_t(N - t.n0) * 4, thread);
    else
      prefetch_tile<rows, columns * 2, threads>(static_cast<bf16*>(gradient) + first, int64_t(N) * 2, M - m0,
                                                int64_t(N - t.n0) * 2, thread);
  }

  template <int strips, int blocks, int distance>
  __device__ __forceinline__ void finish(const float (&acc)[strips][blocks][4], const Place<distance>& place,
                                         const WorkTile& t) const {
    if (wide)
      add(static_cast<float*>(gradient) + int64_t(t.expert) * M * N, acc, place);
    else
      add(static_cast<bf16*>(gradient) + int64_t(t.expert) * M * N, acc, place);
  }

  // Where the gradient is written: zeros for the experts without rows, each by all callers together. The caller is
  // `thread` of `threads`; whole warps call.
  __device__ void write_empty(int64_t thread, int64_t threads) const {
    if (adds) return;
    const int64_t chunks = int64_t(M) * N * (wide ? sizeof(float) : sizeof(bf16)) / 16;
    for (int e0 = 0; e0 < E; e0 += 32) {
      const int e = e0 + threadIdx.x % 32;
      for (unsigned empty = __ballot_sync(~0u, e < E && offsets[e] == offsets[e + 1]); empty; empty &= empty - 1) {
        uint4* to = static_cast<uint4*>(gradient) + (e0 + __ffs(empty) - 1) * chunks;
        for (int64_t i = thread; i < chunks; i += threads) to[i] = {0, 0, 0, 0};
      }
    }
  }

 private:
  // Adds in pieces of 8 rows and 64 columns: what the gradient holds for the next `ahead` is on its way while one is
  // added, two where the accumulators leave registers for it. Where it is written, zeros stand in for what it holds.
  //
  // Two blocks of 8 columns at a time: of a row the even lane of a pair takes 4 columns of the first, the odd lane 4 of
  // the second.
  template <int strips, int blocks, int distance>
  __device__ __forceinline__ void add(float* g, const float (&acc)[strips][blocks][4],
                                      const Place<distance>& place) const {
    constexpr int pieces = strips * 2 * (blocks / 8), ahead = strips * blocks > 32 ? 1 : 2;
    const int odd = threadIdx.x & 1, column = place.column + odd * 8 + (threadIdx.x & 2) * 2;
    g += int64_t(place.row) * N + column;
    float4 old[ahead + 1][4] = {};
    // Piece 2i + half of each group of columns: rows half * 8 ... + 7 of strip i.
    auto at = [&](int piece, int j) {
      return g + int64_t(N) * (place.row_of(piece % (strips * 2) / 2, piece % 2) - place.row) +
             piece / (strips * 2) * group_columns + j * 16;
    };
    auto inside = [&](int piece, int j) {
      return place.row_of(piece % (strips * 2) / 2, piece % 2) < M &&
             column + piece / (strips * 2) * group_columns + j * 16 < N;
    };
    auto load = [&](int piece) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (adds && inside(piece, j)) old[piece % (ahead + 1)][j] = *reinterpret_cast<const float4*>(at(piece, j));
    };
#pragma unroll
    for (int piece = 0; piece < ahead; ++piece) load(piece);
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
      if (piece + ahead < pieces) load(piece + ahead);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto& strip = acc[piece % (strips * 2) / 2];
        const int block = piece / (strips * 2) * 8 + j * 2, half = piece % 2 * 2;
        float x[2] = {strip[block][half], strip[block][half + 1]};
        float y[2] = {strip[block + 1][half], strip[block + 1][half + 1]};
        pair_transpose(x, y);
        const float4 o = old[piece % (ahead + 1)][j], sum = {o.x + x[0], o.y + x[1], o.z + y[0], o.w + y[1]};
        if (inside(piece, j)) *reinterpret_cast<float4*>(at(piece, j)) = sum;
      }
    }
  }
  template <int strips, int blocks, int distance>
  __device__ __forceinline__ void add(bf16* g, const float (&acc)[strips][blocks][4],
                                      const Place<distance>& place) const {
    constexpr int pieces = strips * 2 * (blocks / 8), ahead = strips * blocks > 32 ? 1 : 2;
    uint4 old[ahead + 1][2] = {};
    auto at = [&](int piece, int group) {
      return g + int64_t(place.row_of(piece % (strips * 2) / 2, piece % 2)) * N +
             place.column_of(piece / (strips * 2) * 2 + group);
    };
    auto inside = [&](int piece, int group) {
      return place.row_of(piece % (strips * 2) / 2, piece % 2) < M &&
             place.column_of(piece / (strips * 2) * 2 + group) < N;
    };
    auto load = [&](int piece) {
#pragma unroll
      for (int group = 0; group < 2; ++group)
        if (adds && inside(piece, group))
          old[piece % (ahead + 1)][group] = *reinterpret_cast<const uint4*>(at(piece, group));
    };
#pragma unroll
    for (int piece = 0; piece < ahead; ++piece) load(piece);
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
      if (piece + ahead < pieces) load(piece + ahead);
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        float even[4], odd[4];
        block_of(even, odd, acc[piece % (strips * 2) / 2], piece % 2, piece / (strips * 2) * 2 + group);
        const uint4 o = old[piece % (ahead + 1)][group];
        const uint32_t before[4] = {o.x, o.y, o.z, o.w};
        uint32_t sum[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 v = unpack_bf16(before[k]);
          sum[k] = pack_bf16(v.x + even[k], v.y + odd[k]);
        }
        if (inside(piece, group)) store16(at(piece, group), sum);
      }
    }
  }
};

}  // namespace grouped
