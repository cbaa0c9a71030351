#include "moe/experts.h"

#include "llmc/cpu_math.h"
#include "llmc/swiglu_row.h"

namespace {
constexpr int64_t tile_rows = 256;    // rows of an expert handled at a time
constexpr int64_t weight_rows = 256;  // rows of a weight gradient finished at a time

// Calls f(expert, first row, rows) for every tile of rows, in parallel. Tiles never cross experts.
template <class F>
void for_each_row_tile(const int32_t* offsets, int64_t E, F f) {
#pragma omp parallel
#pragma omp single nowait
  for (int64_t e = 0; e < E; ++e)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; r += tile_rows) {
#pragma omp task firstprivate(e, r)
      f(e, r, std::min<int64_t>(tile_rows, offsets[e + 1] - r));
    }
}

// Columns [c0, c0 + cols) of the tokens of rows [r, r + rows): where they stand if row_slot is null and no conversion is
// needed, else gathered into `copy`, a tile that stays in cache.
template <class Acc, class Real>
Block<Acc> gather(const Real* x, const int32_t* row_slot, int64_t K, int64_t r, int64_t rows, int64_t C, int64_t c0,
                  int64_t cols, Acc* copy) {
  if (!row_slot) return load_block(x + r * C + c0, C, rows, cols, copy);
  for (int64_t i = 0; i < rows; ++i) {
    const Real* source = x + row_slot[r + i] / K * C + c0;
    for (int64_t c = 0; c < cols; ++c) copy[i * cols + c] = Acc(source[c]);
  }
  return {copy, cols};
}

// C (m,n) = A (m,k) * op(B), written as Real at `out` (row distance ldo) through `tile` where Real is not Acc.
template <class Device, class Real = typename Device::Real, class Acc = typename Device::Acc>
void product(Device& dev, Real* out, int64_t ldo, Acc* tile, Block<Acc> A, Block<Acc> B, bool transposed, int64_t m,
             int64_t n, int64_t k) {
  if constexpr (std::is_same_v<Real, Acc>) {
    (void)tile;
    gemm<Acc>(dev.plain_matmul, false, transposed, m, n, k, 1, A.data, A.stride, B.data, B.stride, 0, out, ldo);
  } else {
    gemm<Acc>(dev.plain_matmul, false, transposed, m, n, k, 1, A.data, A.stride, B.data, B.stride, 0, tile, n);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) out[i * ldo + j] = Real(tile[i * n + j]);
  }
}

// Values a thread needs: two tiles of rows, a converted weight, and a third tile, of rows or of a weight gradient.
template <class Acc, class Real>
int64_t share(const ExpertShape& s) {
  int64_t wide = std::max(s.C, 2 * s.F);
  return 2 * tile_rows * wide + block_size<Acc, Real>(2 * s.F * s.C) + std::max(weight_rows, tile_rows) * wide;
}
}  // namespace

template <class Device>
void experts_up(Device& dev, typename Device::Real* h, typename Device::Real* a, void* scratch,
                const typename Device::Real* x, const typename Device::Real* w13, const int32_t* offsets,
                const int32_t* row_slot, ExpertShape s) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t C = s.C, F = s.F;
  for_each_row_tile(offsets, s.E, [&](int64_t e, int64_t r, int64_t rows) {
    Acc* copy = thread_share<Acc>(scratch, share<Acc, Real>(s));
    Acc *tile = copy + tile_rows * std::max(C, 2 * F), *weight = tile + tile_rows * std::max(C, 2 * F);
    auto X = gather(x, row_slot, s.K, r, rows, C, 0, C, copy);
    auto W = load_block(w13 + e * 2 * F * C, C, 2 * F, C, weight);
    // Of these rows; where nobody wants them, behind the weight.
    Real* rows_of_h = h ? h + r * 2 * F : reinterpret_cast<Real*>(weight + block_size<Acc, Real>(2 * F * C));
    product(dev, rows_of_h, 2 * F, tile, X, W, true, rows, 2 * F, C);
    for (int64_t i = 0; i < rows; ++i) {
      swiglu_row(tile, rows_of_h + i * 2 * F, F);
      for (int64_t f = 0; f < F; ++f) a[(r + i) * F + f] = Real(tile[f]);
    }
  });
}

template <class Device>
void experts_down(Device& dev, typename Device::Real* y, void* scratch, const typename Device::Real* a,
                  const typename Device::Real* w2, const int32_t* offsets, ExpertShape s) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t C = s.C, F = s.F;
  for_each_row_tile(offsets, s.E, [&](int64_t e, int64_t r, int64_t rows) {
    Acc* copy = thread_share<Acc>(scratch, share<Acc, Real>(s));
    Acc *tile = copy + tile_rows * std::max(C, 2 * F), *weight = tile + tile_rows * std::max(C, 2 * F);
    auto A = load_block(a + r * F, F, rows, F, copy);
    auto W = load_block(w2 + e * C * F, F, C, F, weight);
    product(dev, y + r * C, C, tile, A, W, true, rows, C, F);
  });
}

template <class Device>
void experts_down_backward(Device& dev, typename Device::Real* dh, typename Device::Real* a_scaled,
                           typename Device::Acc* dgates, void* scratch, const typename Device::Real* dout,
                           const typename Device::Real* w2, const typename Device::Real* h,
                           const typename Device::Real* a, const typename Device::Acc* gates, const int32_t* offsets,
                           const int32_t* row_slot, const int32_t* slot_of_row, ExpertShape s) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t C = s.C, F = s.F;
  std::fill_n(dgates, s.n_slots(), Acc(0));  // slots without a row
  for_each_row_tile(offsets, s.E, [&](int64_t e, int64_t r, int64_t rows) {
    Acc* copy = thread_share<Acc>(scratch, share<Acc, Real>(s));
    Acc *da = copy + tile_rows * std::max(C, 2 * F), *weight = da + tile_rows * std::max(C, 2 * F);
    auto dO = gather(dout, row_slot, s.K, r, rows, C, 0, C, copy);
    auto W = load_block(w2 + e * C * F, F, C, F, weight);
    gemm<Acc>(dev.plain_matmul, false, false, rows, F, C, 1, dO.data, dO.stride, W.data, W.stride, 0, da, F);
    for (int64_t i = 0; i < rows; ++i) {
      Acc *dai = da + i * F, *act = copy;  // the gathered tile has served
      Acc gate = gates[slot_of_row[r + i]];
      swiglu_backward_row(dh + (r + i) * 2 * F, dai, h + (r + i) * 2 * F, gate, F, act);
      const Real* kept = a ? a + (r + i) * F : nullptr;
      for (int64_t f = 0; f < F; ++f) act[f] = kept ? Acc(kept[f]) : rounded<Real>(act[f]);
      dgates[slot_of_row[r + i]] = sum_of<Acc>(F, [&](int64_t f) { return dai[f] * act[f]; });
      for (int64_t f = 0; f < F; ++f) a_scaled[(r + i) * F + f] = Real(gate * act[f]);
    }
  });
}

template <class Device>
void experts_down_backward_weight(Device& dev, Grad<Device> dw2, void* scratch, const typename Device::Real* dout,
                                  const typename Device::Real* a_scaled, const int32_t* offsets,
                                  const int32_t* row_slot, ExpertShape s) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t C = s.C, F = s.F;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t e = 0; e < s.E; ++e)
    for (int64_t c0 = 0; c0 < C; c0 += weight_rows) {
      int64_t cols = std::min(weight_rows, C - c0);
      if (offsets[e] == offsets[e + 1] && dw2.add) continue;
      Acc* copy = thread_share<Acc>(scratch, share<Acc, Real>(s));
      Acc *copy_a = copy + tile_rows * std::max(C, 2 * F), *sum = copy_a + tile_rows * std::max(C, 2 * F);
      if (offsets[e] == offsets[e + 1]) std::fill_n(sum, cols * F, Acc(0));
      for (int64_t r = offsets[e]; r < offsets[e + 1]; r += tile_rows) {
        int64_t rows = std::min<int64_t>(tile_rows, offsets[e + 1] - r);
        auto dO = gather(dout, row_slot, s.K, r, rows, C, c0, cols, copy);
        auto A = load_block(a_scaled + r * F, F, rows, F, copy_a);
        gemm<Acc>(dev.plain_matmul, true, false, cols, F, rows, 1, dO.data, dO.stride, A.data, A.stride,
                  r == offsets[e] ? 0 : 1, sum, F);
      }
      add_to_gradient(dw2, (e * C + c0) * F, sum, cols * F);
    }
}

template <class Device>
void experts_up_backward_input(Device& dev, typename Device::Real* dx_rows, void* scratch,
                               const typename Device::Real* dh, const typename Device::Real* w13,
                               const int32_t* offsets, ExpertShape s) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t C = s.C, F = s.F;
  for_each_row_tile(offsets, s.E, [&](int64_t e, int64_t r, int64_t rows) {
    Acc* copy = thread_share<Acc>(scratch, share<Acc, Real>(s));
    Acc *tile = copy + tile_rows * std::max(C, 2 * F), *weight = tile + tile_rows * std::max(C, 2 * F);
    auto dH = load_block(dh + r * 2 * F, 2 * F, rows, 2 * F, copy);
    auto W = load_block(w13 + e * 2 * F * C, C, 2 * F, C, weight);
    product(dev, dx_rows + r * C, C, tile, dH, W, false, rows, C, 2 * F);
  });
}

template <class Device>
void experts_up_backward_weight(Device& dev, Grad<Device> dw13, void* scratch, const typename Device::Real* dh,
                                const typename Device::Real* x, const int32_t* offsets, const int32_t* row_slot,
                                ExpertShape s) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t C = s.C, F = s.F;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t e = 0; e < s.E; ++e)
    for (int64_t f0 = 0; f0 < 2 * F; f0 += weight_rows) {
      int64_t cols = std::min(weight_rows, 2 * F - f0);
      if (offsets[e] == offsets[e + 1] && dw13.add) continue;
      Acc* copy = thread_share<Acc>(scratch, share<Acc, Real>(s));
      Acc *copy_h = copy + tile_rows * std::max(C, 2 * F), *sum = copy_h + tile_rows * std::max(C, 2 * F);
      if (offsets[e] == offsets[e + 1]) std::fill_n(sum, cols * C, Acc(0));
      for (int64_t r = offsets[e]; r < offsets[e + 1]; r += tile_rows) {
        int64_t rows = std::min<int64_t>(tile_rows, offsets[e + 1] - r);
        auto X = gather(x, row_slot, s.K, r, rows, C, 0, C, copy);
        auto dH = load_block(dh + r * 2 * F + f0, 2 * F, rows, cols, copy_h);
        gemm<Acc>(dev.plain_matmul, true, false, cols, C, rows, 1, dH.data, dH.stride, X.data, X.stride,
                  r == offsets[e] ? 0 : 1, sum, C);
      }
      add_to_gradient(dw13, (e * 2 * F + f0) * C, sum, cols * C);
    }
}

template <class Device>
size_t experts_scratch_bytes(ExpertShape s) {
  using Acc = typename Device::Acc;
  return size_t(share<Acc, typename Device::Real>(s) * omp_get_max_threads()) * sizeof(Acc);
}

#define INSTANTIATE(Real)                                                                                              \
  template void experts_up(Cpu<Real>&, Real*, Real*, void*, const Real*, const Real*, const int32_t*, const int32_t*,  \
                           ExpertShape);                                                                               \
  template void experts_down(Cpu<Real>&, Real*, void*, const Real*, const Real*, const int32_t*, ExpertShape);         \
  template void experts_down_backward(Cpu<Real>&, Real*, Real*, Cpu<Real>::Acc*, void*, const Real*, const Real*,      \
                                      const Real*, const Real*, const Cpu<Real>::Acc*, const int32_t*, const int32_t*, \
                                      const int32_t*, ExpertShape);                                                    \
  template void experts_down_backward_weight(Cpu<Real>&, Grad<Cpu<Real>>, void*, const Real*, const Real*,             \
                                             const int32_t*, const int32_t*, ExpertShape);                             \
  template void experts_up_backward_input(Cpu<Real>&, Real*, void*, const Real*, const Real*, const int32_t*,          \
                                          ExpertShape);                                                                \
  template void experts_up_backward_weight(Cpu<Real>&, Grad<Cpu<Real>>, void*, const Real*, const Real*,               \
                                           const int32_t*, const int32_t*, ExpertShape);                               \
  template size_t experts_scratch_bytes<Cpu<Real>>(ExpertShape);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
