#include "llmc/attention.h"

#include "llmc/cpu_math.h"

namespace {
constexpr int64_t tile = 64;  // queries, and keys, of a tile

// Views of one head of one sequence.
template <class Real>
struct HeadView {
  const Real *q, *k, *v;
  int64_t qk_stride, v_stride;
  HeadView(const Real* qk, const Real* qkv, int64_t b, int64_t h, int64_t T, HeadShape s)
      : qk_stride(s.qk_width()), v_stride(s.qkv_width()) {
    int64_t kv = h / (s.n_head / s.n_kv_head);
    q = qk + b * T * qk_stride + h * s.head_dim;
    k = qk + b * T * qk_stride + (s.n_head + kv) * s.head_dim;
    v = qkv + b * T * v_stride + (s.n_head + s.n_kv_head + kv) * s.head_dim;
  }
};

// Keys of the tile at k0 that query q0 + i may see.
inline int64_t visible(int64_t q0, int64_t i, int64_t k0, int64_t keys) {
  return std::clamp<int64_t>(q0 + i - k0 + 1, 0, keys);
}

int64_t forward_share(int64_t HD) { return tile * tile + 4 * tile * HD + 2 * tile; }
int64_t backward_share(int64_t T, int64_t HD) { return 2 * tile * tile + 4 * tile * HD + 3 * T * HD + T; }
}  // namespace

template <class Device>
void attention_forward(Device& dev, typename Device::Real* o, typename Device::Acc* lse, void* scratch,
                       const typename Device::Real* qk, const typename Device::Real* qkv, int64_t B, int64_t T,
                       HeadShape heads) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t HD = heads.head_dim, NH = heads.n_head, q_tiles = divide_up(T, tile);
  Acc scale = Acc(1) / std::sqrt(Acc(HD));
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t bh = 0; bh < B * NH; ++bh)
    for (int64_t qt = 0; qt < q_tiles; ++qt) {
      int64_t b = bh / NH, h = bh % NH, q0 = qt * tile, rows = std::min(tile, T - q0);
      HeadView<Real> head(qk, qkv, b, h, T, heads);
      Acc* p = thread_share<Acc>(scratch, forward_share(HD));  // (tile, tile) scores, then probabilities
      Acc *sum = p + tile * tile, *maximum = sum + tile, *out = maximum + tile, *copies = out + tile * HD;
      auto Q = load_block(head.q + q0 * head.qk_stride, head.qk_stride, rows, HD, copies);
      std::fill_n(out, tile * HD, Acc(0));
      std::fill_n(sum, tile, Acc(0));
      for (int64_t k0 = 0; k0 < q0 + rows; k0 += tile) {
        int64_t keys = std::min(tile, T - k0);
        auto K = load_block(head.k + k0 * head.qk_stride, head.qk_stride, keys, HD, copies + tile * HD);
        auto V = load_block(head.v + k0 * head.v_stride, head.v_stride, keys, HD, copies + 2 * tile * HD);
        gemm<Acc>(dev.plain_matmul, false, true, rows, keys, HD, scale, Q.data, Q.stride, K.data, K.stride, 0, p, tile);
        for (int64_t i = 0; i < rows; ++i) {
          Acc* s = p + i * tile;
          int64_t n = visible(q0, i, k0, keys);
          Acc m = k0 ? maximum[i] : s[0];
#pragma omp simd reduction(max : m)
          for (int64_t j = 0; j < n; ++j) m = s[j] > m ? s[j] : m;
          Acc correction = k0 ? exp_of(maximum[i] - m) : Acc(0), total = 0;
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < n; ++j) {
            Acc e = exp_of(s[j] - m);
            total += e;
            s[j] = rounded<Real>(e);
          }
          std::fill(s + n, s + keys, Acc(0));
          sum[i] = sum[i] * correction + total;
          maximum[i] = m;
          if (correction != Acc(1))
            for (int64_t c = 0; c < HD; ++c) out[i * HD + c] *= correction;
        }
        gemm<Acc>(dev.plain_matmul, false, false, rows, HD, keys, 1, p, tile, V.data, V.stride, 1, out, HD);
      }
      for (int64_t i = 0; i < rows; ++i) {
        int64_t n = b * T + q0 + i;
        for (int64_t c = 0; c < HD; ++c) o[(n * NH + h) * HD + c] = Real(out[i * HD + c] / sum[i]);
        lse[n * NH + h] = maximum[i] + std::log(sum[i]);
      }
    }
}

template <class Device>
void attention_backward(Device& dev, typename Device::Real* dqkv, void* scratch, const typename Device::Real* dout,
                        const typename Device::Real* o, const typename Device::Acc* lse,
                        const typename Device::Real* qk, const typename Device::Real* qkv, int64_t B, int64_t T,
                        HeadShape heads) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t HD = heads.head_dim, NH = heads.n_head, NKV = heads.n_kv_head, group = NH / NKV;
  Acc scale = Acc(1) / std::sqrt(Acc(HD));
  bool plain = dev.plain_matmul;
  // One task a key/value head: it owns dk and dv, summed over its group of query heads in order.
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < B * NKV; ++task) {
    int64_t b = task / NKV, kv = task % NKV;
    Acc* p = thread_share<Acc>(scratch, backward_share(T, HD));  // (tile, tile)
    Acc *dp = p + tile * tile, *dq = dp + tile * tile, *dk = dq + T * HD, *dv = dk + T * HD;
    Acc *D = dv + T * HD, *copies = D + T;
    auto store = [&](const Acc* values, int64_t column) {
      for (int64_t t = 0; t < T; ++t)
        for (int64_t c = 0; c < HD; ++c)
          dqkv[(b * T + t) * heads.qkv_width() + column * HD + c] = Real(values[t * HD + c]);
    };
    std::fill_n(dk, T * HD, Acc(0));
    std::fill_n(dv, T * HD, Acc(0));
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      HeadView<Real> head(qk, qkv, b, h, T, heads);
      std::fill_n(dq, T * HD, Acc(0));
      for (int64_t t = 0; t < T; ++t) {
        const Real *dot_ = dout + ((b * T + t) * NH + h) * HD, *ot = o + ((b * T + t) * NH + h) * HD;
        Acc s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t c = 0; c < HD; ++c) s += Acc(dot_[c]) * Acc(ot[c]);
        D[t] = s;
      }
      for (int64_t k0 = 0; k0 < T; k0 += tile) {
        int64_t keys = std::min(tile, T - k0);
        auto K = load_block(head.k + k0 * head.qk_stride, head.qk_stride, keys, HD, copies);
        auto V = load_block(head.v + k0 * head.v_stride, head.v_stride, keys, HD, copies + tile * HD);
        for (int64_t q0 = k0; q0 < T; q0 += tile) {
          int64_t rows = std::min(tile, T - q0);
          auto Q = load_block(head.q + q0 * head.qk_stride, head.qk_stride, rows, HD, copies + 2 * tile * HD);
          auto dO = load_block(dout + ((b * T + q0) * NH + h) * HD, NH * HD, rows, HD, copies + 3 * tile * HD);
          gemm<Acc>(plain, false, true, rows, keys, HD, scale, Q.data, Q.stride, K.data, K.stride, 0, p, tile);
          gemm<Acc>(plain, false, true, rows, keys, HD, 1, dO.data, dO.stride, V.data, V.stride, 0, dp, tile);
          for (int64_t i = 0; i < rows; ++i) {
            int64_t n = visible(q0, i, k0, keys);
            Acc l = lse[(b * T + q0 + i) * NH + h], d = D[q0 + i];
            Acc *s = p + i * tile, *ds = dp + i * tile;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
              Acc e = exp_of(s[j] - l);
              s[j] = rounded<Real>(e);
              ds[j] = rounded<Real>(e * (ds[j] - d) * scale);
            }
            std::fill(s + n, s + keys, Acc(0));
            std::fill(ds + n, ds + keys, Acc(0));
          }
          gemm<Acc>(plain, true, false, keys, HD, rows, 1, p, tile, dO.data, dO.stride, 1, dv + k0 * HD, HD);
          gemm<Acc>(plain, true, false, keys, HD, rows, 1, dp, tile, Q.data, Q.stride, 1, dk + k0 * HD, HD);
          gemm<Acc>(plain, false, false, rows, HD, keys, 1, dp, tile, K.data, K.stride, 1, dq + q0 * HD, HD);
        }
      }
      store(dq, h);
    }
    store(dk, NH + kv);
    store(dv, NH + NKV + kv);
  }
}

template <class Device>
size_t attention_scratch_bytes(int64_t, int64_t T, HeadShape heads) {
  int64_t share = std::max(forward_share(heads.head_dim), backward_share(T, heads.head_dim));
  return size_t(share * omp_get_max_threads()) * sizeof(typename Device::Acc);
}

template <class Device>
void attention_decode(Device&, typename Device::Real* o, typename Device::Real* k_cache,
                      typename Device::Real* v_cache, void* scratch, const typename Device::Real* qk,
                      const typename Device::Real* qkv, const int32_t* positions, int64_t B, int64_t S,
                      HeadShape heads) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t HD = heads.head_dim, NH = heads.n_head, NKV = heads.n_kv_head, width = NKV * HD;
  Acc scale = Acc(1) / std::sqrt(Acc(HD));
  for (int64_t b = 0; b < B; ++b) {
    std::copy_n(qk + b * heads.qk_width() + NH * HD, width, k_cache + (b * S + positions[b]) * width);
    std::copy_n(qkv + b * heads.qkv_width() + (NH + NKV) * HD, width, v_cache + (b * S + positions[b]) * width);
  }
#pragma omp parallel for collapse(2)
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < NH; ++h) {
      int64_t kv = h / (NH / NKV), n = positions[b] + 1;
      const Real* q = qk + b * heads.qk_width() + h * HD;
      const Real *K = k_cache + b * S * width + kv * HD, *V = v_cache + b * S * width + kv * HD;
      Acc* p = thread_share<Acc>(scratch, S + HD);
      Acc *out = p + S, maximum = 0, sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        Acc s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t c = 0; c < HD; ++c) s += Acc(q[c]) * Acc(K[j * width + c]);
        p[j] = s * scale;
        maximum = j == 0 || p[j] > maximum ? p[j] : maximum;
      }
      std::fill_n(out, HD, Acc(0));
      for (int64_t j = 0; j < n; ++j) {
        Acc e = exp_of(p[j] - maximum);
        sum += e;
        e = rounded<Real>(e);
        for (int64_t c = 0; c < HD; ++c) out[c] += e * Acc(V[j * width + c]);
      }
      for (int64_t c = 0; c < HD; ++c) o[(b * NH + h) * HD + c] = Real(out[c] / sum);
    }
}
template <class Device>
size_t attention_decode_scratch_bytes(int64_t S, int64_t head_dim) {
  return size_t((S + head_dim) * omp_get_max_threads()) * sizeof(typename Device::Acc);
}

#define INSTANTIATE(Real)                                                                                              \
  template void attention_forward(Cpu<Real>&, Real*, Cpu<Real>::Acc*, void*, const Real*, const Real*, int64_t,        \
                                  int64_t, HeadShape);                                                                 \
  template void attention_backward(Cpu<Real>&, Real*, void*, const Real*, const Real*, const Cpu<Real>::Acc*,          \
                                   const Real*, const Real*, int64_t, int64_t, HeadShape);                             \
  template size_t attention_scratch_bytes<Cpu<Real>>(int64_t, int64_t, HeadShape);                                     \
  template void attention_decode(Cpu<Real>&, Real*, Real*, Real*, void*, const Real*, const Real*, const int32_t*,     \
                                 int64_t, int64_t, HeadShape);                                                         \
  template size_t attention_decode_scratch_bytes<Cpu<Real>>(int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
