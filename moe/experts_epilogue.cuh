// The products that portable::grouped_product computes: which windows they read, and how they finish a tile while it is
// still in registers.
//
// As mma leaves a tile, lane 4*g + t of a warp holds columns 2t and 2t+1 of rows g and g+8 of every 8 columns: four
// lanes (a quad) share a row. Stored like that, a row would leave in pieces of 4 bytes. A transpose across the quad
// gives each of its lanes all 8 columns of one of four neighbouring blocks of 8 instead: 16 bytes a lane as bf16, 64
// contiguous bytes a quad. A lane then decides for all 8 columns at once whether they are within the matrix.
#pragma once
#include "moe/experts_portable.cuh"

namespace portable {

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

// ---- a lane's part of a warp's 64 x 64 ----

struct Place {
  int row, column;  // of the warp's part: this lane's first row, the first column
  __device__ Place(const WorkTile& t, int warp_m, int warp_n)
      : row(t.m0 + warp_m * WM + threadIdx.x % 32 / 4), column(t.n0 + warp_n * WN) {}
  __device__ int row_of(int i, int half) const { return row + i * 16 + half * 8; }
  // After a quad_transpose over blocks 4*group ... 4*group + 3.
  __device__ int column_of(int group) const { return column + (group * 4 + threadIdx.x % 4) * 8; }
};

// Columns 2k and 2k+1, k = 0..3, of the block that column_of(group) names, as even[k] and odd[k].
__device__ __forceinline__ void block_of(float (&even)[4], float (&odd)[4], const Accumulators& acc, int i, int half,
                                         int group) {
#pragma unroll
  for (int j = 0; j < 4; ++j) even[j] = acc[i][group * 4 + j][half * 2], odd[j] = acc[i][group * 4 + j][half * 2 + 1];
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
// `rows_left` on and bytes from `bytes_left` on are nobody's. All threads share the work, a sector of 32 bytes each.
template <int rows, int bytes, int threads>
__device__ __forceinline__ void prefetch_tile(const void* first, int64_t row_bytes, int rows_left, int64_t bytes_left) {
  constexpr int sectors = bytes / 32, pass = threads / sectors;
  const int row = threadIdx.x / sectors, byte = threadIdx.x % sectors * 32;
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

// Blocks of 8 columns of the tile are gate and up in turn, in the same lanes: each thread has all that its columns of a
// need.
template <class Shape_>
struct Up : Operands {
  using Shape = Shape_;
  static constexpr bool sums_rows = false;
  static constexpr Access a_access{.down = false, .gathered = true}, b_access{.down = false, .gathered = false};
  bf16 *h, *activated;

  __device__ __forceinline__ void finish(const Accumulators& acc, const WorkTile& t, int warp_m, int warp_n) const {
    const Place place(t, warp_m, warp_n);
    const int F = N / 2, f = place.column / 2 + threadIdx.x % 4 * 8;
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.row_of(i, half);
        uint32_t packed[2][4], act[4];
#pragma unroll
        for (int j = 0; j < WN / 8; ++j) packed[j / 4][j % 4] = pack_bf16(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // of the rounded h: the backward pass has no other
          float2 g = unpack_bf16(packed[j / 2][j % 2 * 2]), u = unpack_bf16(packed[j / 2][j % 2 * 2 + 1]);
          act[j] = pack_bf16(g.x * fast_sigmoid(g.x) * u.x, g.y * fast_sigmoid(g.y) * u.y);
        }
        quad_transpose(packed[0]), quad_transpose(packed[1]), quad_transpose(act);
        if (row >= t.row_end) continue;
#pragma unroll
        for (int group = 0; group < 2; ++group)
          if (place.column_of(group) < N) store16(h + int64_t(row) * N + place.column_of(group), packed[group]);
        if (f < F) store16(activated + int64_t(row) * F + f, act);
      }
  }
};

// ---- y = a W2^T, dx_rows = dh W13 ----

// b_down: the weight is summed over its rows instead of along them.
template <class Shape_, bool b_down>
struct Rows : Operands {
  using Shape = Shape_;
  static constexpr bool sums_rows = false;
  static constexpr Access a_access{.down = false, .gathered = false}, b_access{.down = b_down, .gathered = false};
  bf16* out;

  __device__ __forceinline__ void finish(const Accumulators& acc, const WorkTile& t, int warp_m, int warp_n) const {
    const Place place(t, warp_m, warp_n);
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int group = 0; group < 2; ++group) {
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

// N = F. Of each row a warp holds 64 columns of dA'; their part of <dA', A> goes to partial (ceil(F/64), rows).
//
// A is computed again from h and not read where it was kept: silu(g) is needed for du anyway, so A is one more product.
template <class Shape_>
struct DownBackward : Operands {
  using Shape = Shape_;
  static constexpr bool sums_rows = false;
  static constexpr Access a_access{.down = false, .gathered = true}, b_access{.down = true, .gathered = false};
  bf16 *dh, *a_scaled;
  float* partial;
  const bf16* h;
  const float* gates;
  const int32_t* slot_of_row;
  int64_t R;

  using HBlocks = uint32_t[2][2][2][4];  // of 16 rows: [half][group][gate, up][pair of columns]

  __device__ __forceinline__ void prefetch(const WorkTile& t) const {
    prefetch_tile<Shape::BM, Shape::BN * 4, Shape::threads>(h + (int64_t(t.m0) * N + t.n0) * 2, int64_t(N) * 4,
                                                            t.row_end - t.m0, int64_t(N - t.n0) * 4);
  }

  __device__ __forceinline__ void load_h(HBlocks& blocks, const Place& place, int row_end, int i) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        auto& block = blocks[half][group];
        const int row = place.row_of(i, half), f = place.column_of(group);
        if (row < row_end && f < N) {
          const bf16* from = h + (int64_t(row) * N + f) * 2;
          load16(block[0], from), load16(block[1], from + 8);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) block[0][k] = block[1][k] = 0;
        }
      }
  }

  __device__ __forceinline__ void finish(const Accumulators& acc, const WorkTile& t, int warp_m, int warp_n) const {
    const Place place(t, warp_m, warp_n);
    float gate[WM / 16][2];
#pragma unroll
    for (int i = 0; i < WM / 8; ++i) {
      const int row = place.row_of(i / 2, i % 2);
      gate[i / 2][i % 2] = row < t.row_end ? __ldg(gates + __ldg(slot_of_row + row)) : 0;
    }
    HBlocks blocks[2];  // h of the next 16 rows is on its way while these are worked on
    load_h(blocks[0], place, t.row_end, 0);
#pragma unroll
    for (int i = 0; i < WM / 16; ++i) {
      if (i + 1 < WM / 16) load_h(blocks[(i + 1) % 2], place, t.row_end, i + 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float dgate = 0;
#pragma unroll
        for (int group = 0; group < 2; ++group)
          dgate += finish_block(acc, place, t.row_end, gate[i][half], blocks[i % 2][half][group], i, half, group);
        dgate += __shfl_xor_sync(~0u, dgate, 1);
        dgate += __shfl_xor_sync(~0u, dgate, 2);
        const int row = place.row_of(i, half);
        if (threadIdx.x % 4 == 0 && row < t.row_end && place.column < N) partial[place.column / WN * R + row] = dgate;
      }
    }
  }

 private:
  // Eight columns of one row: stores dh and a_scaled, returns their part of <dA', A>.
  __device__ __forceinline__ float finish_block(const Accumulators& acc, const Place& place, int row_end, float gate,
                                                const uint32_t (&h_block)[2][4], int i, int half, int group) const {
    float d[2][4], dgate = 0;  // dA' of even and of odd columns
    block_of(d[0], d[1], acc, i, half, group);
    uint32_t dg[4], du[4], scaled[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 gs = unpack_bf16(h_block[0][k]), us = unpack_bf16(h_block[1][k]);
      const float g[2] = {gs.x, gs.y}, u[2] = {us.x, us.y};
      float silu[2], dg_k[2], du_k[2];
#pragma unroll
      for (int l = 0; l < 2; ++l) {
        const float s = fast_sigmoid(g[l]), da = gate * d[l][k];
        silu[l] = g[l] * s;
        du_k[l] = da * silu[l];
        dg_k[l] = da * u[l] * (s + silu[l] * (1.0f - s));
      }
      const float2 a = unpack_bf16(pack_bf16(silu[0] * u[0], silu[1] * u[1]));  // rounded, as the forward pass used it
      dgate += d[0][k] * a.x;
      dgate += d[1][k] * a.y;
      dg[k] = pack_bf16(dg_k[0], dg_k[1]), du[k] = pack_bf16(du_k[0], du_k[1]);
      scaled[k] = pack_bf16(gate * a.x, gate * a.y);
    }
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

// ---- dW2 += dout[tokens]^T a_scaled, dW13 += dh^T x[tokens] ----

// Output M x N of each expert, summed over its rows: both windows move down. One operand is read through row_slot.
template <class Shape_, bool gather_a>
struct WeightGradient : Operands {
  using Shape = Shape_;
  static constexpr bool sums_rows = true;
  static constexpr Access a_access{.down = true, .gathered = gather_a}, b_access{.down = true, .gathered = !gather_a};
  void* gradient;
  bool wide;

  __device__ __forceinline__ void prefetch(const WorkTile& t) const {
    const int64_t first = (int64_t(t.expert) * M + t.m0) * N + t.n0;
    if (wide)
      prefetch_tile<Shape::BM, Shape::BN * 4, Shape::threads>(static_cast<float*>(gradient) + first, int64_t(N) * 4,
                                                              M - t.m0, int64_t(N - t.n0) * 4);
    else
      prefetch_tile<Shape::BM, Shape::BN * 2, Shape::threads>(static_cast<bf16*>(gradient) + first, int64_t(N) * 2,
                                                              M - t.m0, int64_t(N - t.n0) * 2);
  }

  __device__ __forceinline__ void finish(const Accumulators& acc, const WorkTile& t, int warp_m, int warp_n) const {
    if (wide)
      add(static_cast<float*>(gradient) + int64_t(t.expert) * M * N, acc, Place(t, warp_m, warp_n));
    else
      add(static_cast<bf16*>(gradient) + int64_t(t.expert) * M * N, acc, Place(t, warp_m, warp_n));
  }

 private:
  // Adds in eighths of 8 rows: what the gradient holds for the eighth after the next is on its way while one is added.
  //
  // Two blocks of 8 columns at a time: of a row the even lane of a pair takes 4 columns of the first, the odd lane 4 of
  // the second.
  __device__ __forceinline__ void add(float* g, const Accumulators& acc, const Place& place) const {
    const int odd = threadIdx.x & 1, column = place.column + odd * 8 + (threadIdx.x & 2) * 2;
    const int rows_left = M - place.row, columns_left = N - column;
    g += int64_t(place.row) * N + column;
    float4 old[3][WN / 16] = {};
    auto load = [&](int eighth) {
      const float* from = g + int64_t(N) * (eighth * 8);
#pragma unroll
      for (int j = 0; j < WN / 16; ++j)
        if (eighth * 8 < rows_left && j * 16 < columns_left)
          old[eighth % 3][j] = *reinterpret_cast<const float4*>(from + j * 16);
    };
    load(0), load(1);
#pragma unroll
    for (int eighth = 0; eighth < WM / 8; ++eighth) {
      if (eighth + 2 < WM / 8) load(eighth + 2);
      float* to = g + int64_t(N) * (eighth * 8);
#pragma unroll
      for (int j = 0; j < WN / 16; ++j) {
        const auto &first = acc[eighth / 2][j * 2], &second = acc[eighth / 2][j * 2 + 1];
        const int half = eighth % 2 * 2;
        float x[2] = {first[half], first[half + 1]}, y[2] = {second[half], second[half + 1]};
        pair_transpose(x, y);
        const float4 o = old[eighth % 3][j], sum = {o.x + x[0], o.y + x[1], o.z + y[0], o.w + y[1]};
        if (eighth * 8 < rows_left && j * 16 < columns_left) *reinterpret_cast<float4*>(to + j * 16) = sum;
      }
    }
  }
  __device__ __forceinline__ void add(bf16* g, const Accumulators& acc, const Place& place) const {
    const int rows_left = M - place.row, columns_left = N - place.column_of(0);
    g += int64_t(place.row) * N + place.column_of(0);
    uint4 old[3][2] = {};
    auto load = [&](int eighth) {
      const bf16* from = g + int64_t(N) * (eighth * 8);
#pragma unroll
      for (int group = 0; group < 2; ++group)
        if (eighth * 8 < rows_left && group * 32 < columns_left)
          old[eighth % 3][group] = *reinterpret_cast<const uint4*>(from + group * 32);
    };
    load(0), load(1);
#pragma unroll
    for (int eighth = 0; eighth < WM / 8; ++eighth) {
      if (eighth + 2 < WM / 8) load(eighth + 2);
      bf16* to = g + int64_t(N) * (eighth * 8);
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        float even[4], odd[4];
        block_of(even, odd, acc, eighth / 2, eighth % 2, group);
        const uint4 o = old[eighth % 3][group];
        const uint32_t before[4] = {o.x, o.y, o.z, o.w};
        uint32_t sum[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 v = unpack_bf16(before[k]);
          sum[k] = pack_bf16(v.x + even[k], v.y + odd[k]);
        }
        if (eighth * 8 < rows_left && group * 32 < columns_left) store16(to + group * 32, sum);
      }
    }
  }
};

}  // namespace portable
