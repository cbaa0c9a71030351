// The expert products in plain CUDA: one kernel that multiplies 64 x 64 tiles out of shared memory, and six
// descriptions of what it multiplies. Sums are float, term after term in the order of the reduction.
#include "moe/experts_plain.cuh"

#include "llmc/cuda_common.cuh"

namespace {

constexpr int tile = 64, step = 16, threads = 256;

// A 64 x 64 tile of the output of one expert.
struct Tile {
  int64_t expert, m0, n0;  // m0: a row of the plan, or of the weight gradient
  int64_t row, row_end;    // rows [row, row_end) of the plan are the rows of the tile, or what is summed over
};

// What all products share. Not `sums_rows`: output rows are rows of the plan, the reduction has length `depth`.
// `sums_rows`: the output is M x N for each expert, and the reduction runs over the expert's rows.
template <class Real_, bool sums_rows_>
struct Product {
  using Real = Real_;
  static constexpr bool sums_rows = sums_rows_;
  const int32_t *offsets, *row_slot;
  int64_t E, K, M, N, depth;

  __device__ int64_t token(int64_t r) const { return row_slot ? row_slot[r] / int(K) : r; }

  // Block (x, y, z) to tile; false if there is none. Over rows, x counts the row tiles of all experts.
  __device__ bool locate(Tile& t) const {
    t.n0 = blockIdx.y * int64_t(tile);
    if constexpr (sums_rows) {
      t.expert = blockIdx.z, t.m0 = blockIdx.x * int64_t(tile);
      t.row = offsets[t.expert], t.row_end = offsets[t.expert + 1];
      return true;
    } else {
      int64_t left = blockIdx.x;
      for (t.expert = 0; t.expert < E; ++t.expert) {
        t.row = offsets[t.expert], t.row_end = offsets[t.expert + 1];
        const int64_t tiles = ceil_div(t.row_end - t.row, tile);
        if (left < tiles) {
          t.m0 = t.row += left * tile;
          return true;
        }
        left -= tiles;
      }
      return false;
    }
  }
};

// Thread (x, y) of 16 x 16 makes rows y + 16 i and columns x + 16 j of the tile: result[i][j]. P says what stands at
// a(m, k) and b(k, n), along which index a and b are contiguous, and what to do with the result.
template <class P>
__global__ void __launch_bounds__(threads, 2) multiply(P p) {
  Tile t;
  if (!p.locate(t)) return;
  if constexpr (P::sums_rows)
    if (t.row == t.row_end && p.gradient.add) return;  // nothing to add; but zeros are written
  __shared__ float a[step][tile + 1], b[step][tile + 1];
  const int thread = threadIdx.x, x = thread % 16, y = thread / 16;
  const int64_t m_end = P::sums_rows ? p.M : t.row_end, first = P::sums_rows ? t.row : 0,
                last = P::sums_rows ? t.row_end : p.depth;
  float result[4][4] = {};
  for (int64_t k0 = first; k0 < last; k0 += step) {
    for (int i = thread; i < step * tile; i += threads) {
      int k = P::a_along_k ? i % step : i / tile, m = P::a_along_k ? i / step : i % tile;
      a[k][m] = t.m0 + m < m_end && k0 + k < last ? p.a_at(t, t.m0 + m, k0 + k) : 0;
      k = P::b_along_k ? i % step : i / tile, m = P::b_along_k ? i / step : i % tile;
      b[k][m] = t.n0 + m < p.N && k0 + k < last ? p.b_at(t, k0 + k, t.n0 + m) : 0;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < step; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) result[i][j] += a[k][y + 16 * i] * b[k][x + 16 * j];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // all threads come along: finishing a row may need the neighbours
    const int64_t m = t.m0 + y + 16 * i;
    p.finish(t, m, t.n0 + x, m < m_end, result[i]);
  }
}

template <class P>
void run(GpuBase& dev, const P& p, int64_t R) {
  const int64_t tiles_n = ceil_div(p.N, tile);
  dim3 grid = P::sums_rows
                  ? dim3(ceil_div(p.M, tile), tiles_n, p.E)
                  : dim3(R / tile + p.E, tiles_n);  // at most that many row tiles: one in each expert is ragged
  launch(dev, multiply<P>, grid, dim3(threads), 0, p);
}

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// ---- the six ----

template <class Real>
struct Up : Product<Real, false> {
  static constexpr bool a_along_k = true, b_along_k = true;
  Real *h, *act;
  const Real *x, *w13;
  __device__ float a_at(const Tile&, int64_t r, int64_t c) const {
    return to_float(x[this->token(r) * this->depth + c]);
  }
  __device__ float b_at(const Tile& t, int64_t c, int64_t n) const {
    return to_float(w13[(t.expert * this->N + n) * this->depth + c]);
  }
  // Columns of h are 8 of gate, 8 of up: this thread's are all gate or all up, the other kind is 8 threads away.
  __device__ void finish(const Tile&, int64_t r, int64_t n, bool valid, const float (&result)[4]) const {
    const int64_t F = this->N / 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float mine = rounded<Real>(result[j]), other = __shfl_xor_sync(~0u, mine, 8);
      const int64_t column = n + 16 * j;
      if (!valid || column >= this->N) continue;
      if (h) h[r * this->N + column] = from_float<Real>(mine);
      if (column % 16 < 8) act[r * F + column / 16 * 8 + column % 8] = from_float<Real>(mine * sigmoid(mine) * other);
    }
  }
};

// out (R, N) = in (R, depth) times a weight of each expert: (N, depth) where along_k, else (depth, N).
template <class Real, bool along_k>
struct Rows : Product<Real, false> {
  static constexpr bool a_along_k = true, b_along_k = along_k;
  Real* out;
  const Real *in, *weight;
  __device__ float a_at(const Tile&, int64_t r, int64_t k) const { return to_float(in[r * this->depth + k]); }
  __device__ float b_at(const Tile& t, int64_t k, int64_t n) const {
    const Real* w = weight + t.expert * this->N * this->depth;
    return to_float(along_k ? w[n * this->depth + k] : w[k * this->N + n]);
  }
  __device__ void finish(const Tile&, int64_t r, int64_t n, bool valid, const float (&result)[4]) const {
    for (int j = 0; j < 4; ++j)
      if (valid && n + 16 * j < this->N) out[r * this->N + n + 16 * j] = from_float<Real>(result[j]);
  }
};

template <class Real>
struct DownBackward : Product<Real, false> {
  static constexpr bool a_along_k = true, b_along_k = false;
  Real *dh, *a_scaled;
  float* partial;
  const Real *dout, *w2, *h;
  const float* gates;
  const int32_t* slot_of_row;
  int64_t R;
  __device__ float a_at(const Tile&, int64_t r, int64_t c) const {
    return to_float(dout[this->token(r) * this->depth + c]);
  }
  __device__ float b_at(const Tile& t, int64_t c, int64_t f) const {
    return to_float(w2[(t.expert * this->depth + c) * this->N + f]);
  }
  __device__ void finish(const Tile&, int64_t r, int64_t n, bool valid, const float (&result)[4]) const {
    const int64_t F = this->N;
    const float gate = valid ? gates[slot_of_row[r]] : 0;
    float dgate = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t f = n + 16 * j;
      if (!valid || f >= F) continue;
      const int64_t g_at = r * 2 * F + w13_row(f, false), u_at = r * 2 * F + w13_row(f, true);
      const float g = to_float(h[g_at]), u = to_float(h[u_at]), s = sigmoid(g), da = gate * result[j];
      const float a = rounded<Real>(g * s * u);
      dh[g_at] = from_float<Real>(da * u * s * (1 + g * (1 - s)));
      dh[u_at] = from_float<Real>(da * (g * s));
      a_scaled[r * F + f] = from_float<Real>(gate * a);
      dgate += result[j] * a;
    }
#pragma unroll
    for (int other = 8; other; other /= 2) dgate += __shfl_xor_sync(~0u, dgate, other);  // over the 16 threads of a row
    if (valid && threadIdx.x % 16 == 0) partial[n / tile * R + r] = dgate;
  }
};

// gradient (M, N) of each expert += left (rows, M)^T right (rows, N). One of the two is read through row_slot.
template <class Real, bool gather_left>
struct WeightGradient : Product<Real, true> {
  static constexpr bool a_along_k = false, b_along_k = false;
  Grad<Gpu<Real>> gradient;
  const Real *left, *right;
  __device__ float a_at(const Tile&, int64_t m, int64_t r) const {
    return to_float(left[(gather_left ? this->token(r) : r) * this->M + m]);
  }
  __device__ float b_at(const Tile&, int64_t r, int64_t n) const {
    return to_float(right[(gather_left ? r : this->token(r)) * this->N + n]);
  }
  __device__ void finish(const Tile& t, int64_t m, int64_t n, bool valid, const float (&result)[4]) const {
    for (int j = 0; j < 4; ++j)
      if (valid && n + 16 * j < this->N)
        add_to_gradient<Real>(gradient.data, gradient.wide, (t.expert * this->M + m) * this->N + n + 16 * j, result[j],
                              gradient.add);
  }
};

}  // namespace

namespace plain {

template <class Real>
void up(Gpu<Real>& dev, Real* h, Real* a, const Real* x, const Real* w13, const int32_t* offsets,
        const int32_t* row_slot, ExpertShape s) {
  run(dev, Up<Real>{{offsets, row_slot, s.E, s.K, 0, 2 * s.F, s.C}, h, a, x, w13}, s.R);
}
template <class Real>
void down(Gpu<Real>& dev, Real* y, const Real* a, const Real* w2, const int32_t* offsets, ExpertShape s) {
  run(dev, Rows<Real, true>{{offsets, nullptr, s.E, s.K, 0, s.C, s.F}, y, a, w2}, s.R);
}
template <class Real>
void down_backward(Gpu<Real>& dev, Real* dh, Real* a_scaled, float* partial, const Real* dout, const Real* w2,
                   const Real* h, const float* gates, const int32_t* offsets, const int32_t* row_slot,
                   const int32_t* slot_of_row, ExpertShape s) {
  run(dev,
      DownBackward<Real>{
          {offsets, row_slot, s.E, s.K, 0, s.F, s.C}, dh, a_scaled, partial, dout, w2, h, gates, slot_of_row, s.R},
      s.R);
}
template <class Real>
void down_backward_weight(Gpu<Real>& dev, Grad<Gpu<Real>> dw2, const Real* dout, const Real* a_scaled,
                          const int32_t* offsets, const int32_t* row_slot, ExpertShape s) {
  run(dev, WeightGradient<Real, true>{{offsets, row_slot, s.E, s.K, s.C, s.F, 0}, dw2, dout, a_scaled}, s.R);
}
template <class Real>
void up_backward_input(Gpu<Real>& dev, Real* dx_rows, const Real* dh, const Real* w13, const int32_t* offsets,
                       ExpertShape s) {
  run(dev, Rows<Real, false>{{offsets, nullptr, s.E, s.K, 0, s.C, 2 * s.F}, dx_rows, dh, w13}, s.R);
}
template <class Real>
void up_backward_weight(Gpu<Real>& dev, Grad<Gpu<Real>> dw13, const Real* dh, const Real* x, const int32_t* offsets,
                        const int32_t* row_slot, ExpertShape s) {
  run(dev, WeightGradient<Real, false>{{offsets, row_slot, s.E, s.K, 2 * s.F, s.C, 0}, dw13, dh, x}, s.R);
}

#define INSTANTIATE(Real)                                                                                            \
  template void up(Gpu<Real>&, Real*, Real*, const Real*, const Real*, const int32_t*, const int32_t*, ExpertShape); \
  template void down(Gpu<Real>&, Real*, const Real*, const Real*, const int32_t*, ExpertShape);                      \
  template void down_backward(Gpu<Real>&, Real*, Real*, float*, const Real*, const Real*, const Real*, const float*, \
                              const int32_t*, const int32_t*, const int32_t*, ExpertShape);                          \
  template void down_backward_weight(Gpu<Real>&, Grad<Gpu<Real>>, const Real*, const Real*, const int32_t*,          \
                                     const int32_t*, ExpertShape);                                                   \
  template void up_backward_input(Gpu<Real>&, Real*, const Real*, const Real*, const int32_t*, ExpertShape);         \
  template void up_backward_weight(Gpu<Real>&, Grad<Gpu<Real>>, const Real*, const Real*, const int32_t*,            \
                                   const int32_t*, ExpertShape);
INSTANTIATE(float)
INSTANTIATE(bf16)

}  // namespace plain
