#include "llmc/rope.h"

#include "llmc/cpu_math.h"

std::vector<double> rope_table(int64_t positions, int64_t head_dim, double theta) {
  std::vector<double> table(positions * head_dim);
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t i = 0; i < head_dim / 2; ++i) {
      double angle = double(p) * std::pow(theta, -2.0 * double(i) / double(head_dim));
      table[p * head_dim + i] = std::cos(angle);
      table[p * head_dim + head_dim / 2 + i] = std::sin(angle);
    }
  return table;
}

template <class Device>
void qknorm_rope_forward(Device&, typename Device::Real* qk, typename Device::Acc* rstd,
                         const typename Device::Real* qkv, const typename Device::Real* q_weight,
                         const typename Device::Real* k_weight, const typename Device::Acc* table,
                         const int32_t* positions, int64_t N, HeadShape heads, double eps) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t HD = heads.head_dim, H = heads.n_head + heads.n_kv_head;
#pragma omp parallel for
  for (int64_t n = 0; n < N; ++n) {
    const Acc *cosine = table + int64_t(positions[n]) * HD, *sine = cosine + HD / 2;
    for (int64_t h = 0; h < H; ++h) {
      const Real* x = qkv + n * heads.qkv_width() + h * HD;
      Real* y = qk + n * heads.qk_width() + h * HD;
      const Real* w = h < heads.n_head ? q_weight : k_weight;
      Acc r = 1;
      if (w) {
        r = Acc(1) / std::sqrt(sum_of<Acc>(HD, [&](int64_t i) { return Acc(x[i]) * Acc(x[i]); }) / Acc(HD) + Acc(eps));
        rstd[n * H + h] = r;
      }
#pragma omp simd
      for (int64_t i = 0; i < HD / 2; ++i) {
        Acc a = Acc(x[i]), b = Acc(x[i + HD / 2]);
        if (w) a *= r * Acc(w[i]), b *= r * Acc(w[i + HD / 2]);
        y[i] = Real(a * cosine[i] - b * sine[i]);
        y[i + HD / 2] = Real(b * cosine[i] + a * sine[i]);
      }
    }
  }
}

namespace {
constexpr int64_t block_rows = 64;
}

template <class Device>
void qknorm_rope_backward(Device&, typename Device::Real* dqkv, Grad<Device> dq_weight, Grad<Device> dk_weight,
                          void* scratch, const typename Device::Real* qkv, const typename Device::Acc* rstd,
                          const typename Device::Real* q_weight, const typename Device::Real* k_weight,
                          const typename Device::Acc* table, const int32_t* positions, int64_t N, HeadShape heads) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t HD = heads.head_dim, H = heads.n_head + heads.n_kv_head;
  int64_t blocks = divide_up(N, block_rows);
  Acc* partial = static_cast<Acc*>(scratch);  // (blocks, 2, HD) weight gradients, then (threads, HD)
  Acc* rotated = partial + blocks * 2 * HD;
#pragma omp parallel for
  for (int64_t block = 0; block < blocks; ++block) {
    Acc* dw_block = partial + block * 2 * HD;
    Acc* d = thread_share<Acc>(rotated, HD);
    std::fill_n(dw_block, 2 * HD, Acc(0));
    for (int64_t n = block * block_rows; n < std::min(N, (block + 1) * block_rows); ++n) {
      const Acc *cosine = table + int64_t(positions[n]) * HD, *sine = cosine + HD / 2;
      for (int64_t h = 0; h < H; ++h) {
        bool query = h < heads.n_head;
        Real* dy = dqkv + n * heads.qkv_width() + h * HD;
        const Real* x = qkv + n * heads.qkv_width() + h * HD;
        const Real* w = query ? q_weight : k_weight;
#pragma omp simd
        for (int64_t i = 0; i < HD / 2; ++i) {  // the inverse rotation
          Acc a = Acc(dy[i]), b = Acc(dy[i + HD / 2]);
          d[i] = a * cosine[i] + b * sine[i];
          d[i + HD / 2] = b * cosine[i] - a * sine[i];
        }
        if (w) {  // RMSNorm backward
          Acc *dw = dw_block + (query ? 0 : HD), r = rstd[n * H + h];
          Acc mean = sum_of<Acc>(HD, [&](int64_t i) { return d[i] * Acc(w[i]) * Acc(x[i]); }) * r / Acc(HD);
#pragma omp simd
          for (int64_t i = 0; i < HD; ++i) {
            Acc xhat = Acc(x[i]) * r;
            dw[i] += d[i] * xhat;
            dy[i] = Real(r * (d[i] * Acc(w[i]) - xhat * mean));
          }
        } else {
          for (int64_t i = 0; i < HD; ++i) dy[i] = Real(d[i]);
        }
      }
    }
  }
  if (!q_weight) return;
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t i = 0; i < 2 * HD; ++i) partial[i] += partial[block * 2 * HD + i];
  add_to_gradient(dq_weight, 0, partial, HD);
  add_to_gradient(dk_weight, 0, partial + HD, HD);
}
template <class Device>
size_t qknorm_rope_backward_scratch_bytes(int64_t N, HeadShape heads) {
  return size_t((divide_up(N, block_rows) * 2 + omp_get_max_threads()) * heads.head_dim) * sizeof(typename Device::Acc);
}

#define INSTANTIATE(Real)                                                                                      \
  template void qknorm_rope_forward(Cpu<Real>&, Real*, Cpu<Real>::Acc*, const Real*, const Real*, const Real*, \
                                    const Cpu<Real>::Acc*, const int32_t*, int64_t, HeadShape, double);        \
  template void qknorm_rope_backward(Cpu<Real>&, Real*, Grad<Cpu<Real>>, Grad<Cpu<Real>>, void*, const Real*,  \
                                     const Cpu<Real>::Acc*, const Real*, const Real*, const Cpu<Real>::Acc*,   \
                                     const int32_t*, int64_t, HeadShape);                                      \
  template size_t qknorm_rope_backward_scratch_bytes<Cpu<Real>>(int64_t, HeadShape);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
