#include "llmc/attention.h"

#include "llmc/cpu_math.h"

namespace {
// Scores exist for this many queries against this many keys at a time: wide, so that the products are efficient, and
// with few queries, so that little is computed above the diagonal.
constexpr int64_t q_tile = 64, k_tile = 256;

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

// Calls f(first key, keys) for the tiles of keys that queries before `end` may see.
template <class F>
void for_each_key_tile(int64_t end, F f) {
  for (int64_t k0 = 0; k0 < end; k0 += k_tile) f(k0, std::min(k_tile, end - k0));
}
// Of those keys, how many query t may see.
inline int64_t visible(int64_t t, int64_t k0, int64_t keys) { return std::clamp<int64_t>(t - k0 + 1, 0, keys); }
// n rounded up to whole vectors, so that loops leave no remainder, but within the tile.
inline int64_t whole_vectors(int64_t n, int64_t keys) { return std::min(divide_up(n, 16) * 16, keys); }

// Scratch of a thread, in values.
template <class Acc, class Real>
int64_t forward_share(int64_t HD) {
  return q_tile * (k_tile + HD + 2) + block_size<Acc, Real>((q_tile + 2 * k_tile) * HD);
}
template <class Acc, class Real>
int64_t backward_share(int64_t T, int64_t HD) {
  return q_tile * (2 * k_tile + HD) + 2 * T * HD + block_size<Acc, Real>((2 * q_tile + 2 * k_tile) * HD);
}
}  // namespace

template <class Device>
void attention_forward(Device& dev, typename Device::Real* o, typename Device::Acc* lse, void* scratch,
                       const typename Device::Real* qk, const typename Device::Real* qkv, int64_t B, int64_t T,
                       HeadShape heads) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t HD = heads.head_dim, NH = heads.n_head, q_tiles = divide_up(T, q_tile);
  Acc scale = Acc(1) / std::sqrt(Acc(HD));
  bool plain = dev.plain_matmul;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t bh = 0; bh < B * NH; ++bh)
    for (int64_t qt = 0; qt < q_tiles; ++qt) {
      int64_t b = bh / NH, h = bh % NH, q0 = qt * q_tile, rows = std::min(q_tile, T - q0);
      HeadView<Real> head(qk, qkv, b, h, T, heads);
      Acc* p = thread_share<Acc>(scratch, forward_share<Acc, Real>(HD));  // (q_tile, k_tile) scores, then probabilities
      Acc *out = p + q_tile * k_tile, *maximum = out + q_tile * HD, *sum = maximum + q_tile, *copies = sum + q_tile;
      auto Q = load_block(head.q + q0 * head.qk_stride, head.qk_stride, rows, HD, copies);
      for_each_key_tile(q0 + rows, [&](int64_t k0, int64_t keys) {
        auto K = load_block(head.k + k0 * head.qk_stride, head.qk_stride, keys, HD, copies + q_tile * HD);
        auto V = load_block(head.v + k0 * head.v_stride, head.v_stride, keys, HD, copies + (q_tile + k_tile) * HD);
        gemm<Acc>(plain, false, true, rows, keys, HD, scale, Q.data, Q.stride, K.data, K.stride, 0, p, k_tile);
        for (int64_t i = 0; i < rows; ++i) {
          Acc* s = p + i * k_tile;
          int64_t n = visible(q0 + i, k0, keys), whole = whole_vectors(n, keys);
          std::fill(s + n, s + whole, -std::numeric_limits<Acc>::infinity());
          Acc m = k0 ? maximum[i] : s[0];
#pragma omp simd reduction(max : m)
          for (int64_t j = 0; j < whole; ++j) m = s[j] > m ? s[j] : m;
#pragma omp simd
          for (int64_t j = 0; j < whole; ++j) s[j] = exp_of(s[j] - m);
          Acc total = sum_of<Acc>(n, [&](int64_t j) { return s[j]; });
          for (int64_t j = 0; j < n; ++j) s[j] = rounded<Real>(s[j]);
          std::fill(s + n, s + keys, Acc(0));
          // What was summed so far was relative to the old maximum.
          Acc correction = k0 ? exp_of(maximum[i] - m) : Acc(0);
          if (k0 && correction != Acc(1))
            for (int64_t c = 0; c < HD; ++c) out[i * HD + c] *= correction;
          sum[i] = k0 ? sum[i] * correction + total : total;
          maximum[i] = m;
        }
        gemm<Acc>(plain, false, false, rows, HD, keys, 1, p, k_tile, V.data, V.stride, k0 ? 1 : 0, out, HD);
      });
      for (int64_t i = 0; i < rows; ++i) {
        int64_t n = b * T + q0 + i;
        Acc inverse = Acc(1) / sum[i];
        for (int64_t c = 0; c < HD; ++c) o[(n * NH + h) * HD + c] = Real(out[i * HD + c] * inverse);
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
    Acc* p = thread_share<Acc>(scratch, backward_share<Acc, Real>(T, HD));  // (q_tile, k_tile)
    Acc *ds = p + q_tile * k_tile, *dq = ds + q_tile * k_tile, *dk = dq + q_tile * HD, *dv = dk + T * HD;
    Acc *copy_q = dv + T * HD, *copy_do = copy_q + block_size<Acc, Real>(q_tile * HD);
    Acc *copy_k = copy_do + block_size<Acc, Real>(q_tile * HD), *copy_v = copy_k + block_size<Acc, Real>(k_tile * HD);
    auto store = [&](const Acc* values, int64_t t0, int64_t rows, int64_t column) {
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t c = 0; c < HD; ++c)
          dqkv[(b * T + t0 + t) * heads.qkv_width() + column * HD + c] = Real(values[t * HD + c]);
    };
    std::fill_n(dk, 2 * T * HD, Acc(0));  // and dv
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      HeadView<Real> head(qk, qkv, b, h, T, heads);
      for (int64_t q0 = 0; q0 < T; q0 += q_tile) {
        int64_t rows = std::min(q_tile, T - q0), n0 = b * T + q0;
        auto Q = load_block(head.q + q0 * head.qk_stride, head.qk_stride, rows, HD, copy_q);
        auto dO = load_block(dout + (n0 * NH + h) * HD, NH * HD, rows, HD, copy_do);
        Acc D[q_tile];
        for (int64_t i = 0; i < rows; ++i) {
          const Real* oi = o + ((n0 + i) * NH + h) * HD;
          const Acc* di = dO.data + i * dO.stride;
          D[i] = sum_of<Acc>(HD, [&](int64_t c) { return di[c] * Acc(oi[c]); });
        }
        for_each_key_tile(q0 + rows, [&](int64_t k0, int64_t keys) {
          auto K = load_block(head.k + k0 * head.qk_stride, head.qk_stride, keys, HD, copy_k);
          auto V = load_block(head.v + k0 * head.v_stride, head.v_stride, keys, HD, copy_v);
          gemm<Acc>(plain, false, true, rows, keys, HD, scale, Q.data, Q.stride, K.data, K.stride, 0, p, k_tile);
          gemm<Acc>(plain, false, true, rows, keys, HD, 1, dO.data, dO.stride, V.data, V.stride, 0, ds, k_tile);
          for (int64_t i = 0; i < rows; ++i) {
            int64_t n = visible(q0 + i, k0, keys), whole = whole_vectors(n, keys);
            Acc l = lse[(n0 + i) * NH + h], d = D[i], *pi = p + i * k_tile, *dsi = ds + i * k_tile;
#pragma omp simd
            for (int64_t j = 0; j < whole; ++j) {
              Acc e = exp_of(pi[j] - l);
              pi[j] = rounded<Real>(e);
              dsi[j] = rounded<Real>(e * (dsi[j] - d) * scale);
            }
            std::fill(pi + n, pi + keys, Acc(0));
            std::fill(dsi + n, dsi + keys, Acc(0));
          }
          gemm<Acc>(plain, true, false, keys, HD, rows, 1, p, k_tile, dO.data, dO.stride, 1, dv + k0 * HD, HD);
          gemm<Acc>(plain, true, false, keys, HD, rows, 1, ds, k_tile, Q.data, Q.stride, 1, dk + k0 * HD, HD);
          gemm<Acc>(plain, false, false, rows, HD, keys, 1, ds, k_tile, K.data, K.stride, k0 ? 1 : 0, dq, HD);
        });
        store(dq, q0, rows, h);
      }
    }
    store(dk, 0, T, NH + kv);
    store(dv, 0, T, NH + NKV + kv);
  }
}

template <class Device>
size_t attention_scratch_bytes(int64_t, int64_t T, HeadShape heads) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t share = std::max(forward_share<Acc, Real>(heads.head_dim), backward_share<Acc, Real>(T, heads.head_dim));
  return size_t(share * omp_get_max_threads()) * sizeof(Acc);
}

template <class Device>
void attention_decode(Device&, typename Device::Real* o, typename Device::Real* k_cache, typename Device::Real* v_cache,
                      void* scratch, const typename Device::Real* qk, const typename Device::Real* qkv,
                      const int32_t* positions, int64_t B, int64_t S, HeadShape heads) {
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

#define INSTANTIATE(Real)                                                                                          \
  template void attention_forward(Cpu<Real>&, Real*, Cpu<Real>::Acc*, void*, const Real*, const Real*, int64_t,    \
                                  int64_t, HeadShape);                                                             \
  template void attention_backward(Cpu<Real>&, Real*, void*, const Real*, const Real*, const Cpu<Real>::Acc*,      \
                                   const Real*, const Real*, int64_t, int64_t, HeadShape);                         \
  template size_t attention_scratch_bytes<Cpu<Real>>(int64_t, int64_t, HeadShape);                                 \
  template void attention_decode(Cpu<Real>&, Real*, Real*, Real*, void*, const Real*, const Real*, const int32_t*, \
                                 int64_t, int64_t, HeadShape);                                                     \
  template size_t attention_decode_scratch_bytes<Cpu<Real>>(int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
