#include "moe/router.h"

#include "llmc/cpu_math.h"

namespace {
constexpr int64_t block_tokens = 64;

template <class Acc, class Real>
int64_t thread_values(const RouterShape& s) {
  return block_tokens * s.E + block_size<Acc, Real>((block_tokens + s.E) * s.C) + 2 * s.E;
}

// Logits of tokens [n0, n0 + n) into s (n, E).
template <class Device>
void logits(Device& dev, typename Device::Acc* s, typename Device::Acc* copies, const typename Device::Real* x,
            const typename Device::Real* wg, int64_t n0, int64_t n, const RouterShape& shape) {
  using Acc = typename Device::Acc;
  auto X = load_block(x + n0 * shape.C, shape.C, n, shape.C, copies);
  auto W = load_block(wg, shape.C, shape.E, shape.C, copies + block_tokens * shape.C);
  gemm<Acc>(dev.plain_matmul, false, true, n, shape.E, shape.C, 1, X.data, X.stride, W.data, W.stride, 0, s, shape.E);
}

// p (E) from logits s: softmax, or sigmoid.
template <class Acc>
void scores(Acc* p, const Acc* s, Acc lse, const RouterShape& shape) {
  if (shape.gate == Gate::softmax)
    for (int64_t e = 0; e < shape.E; ++e) p[e] = exp_of(s[e] - lse);
  else
    for (int64_t e = 0; e < shape.E; ++e) p[e] = sigmoid_of(s[e]);
}

// The K best of key (E), best first; ties go to the lowest free index; NaN comes after every number.
template <class Acc>
void top_k(int32_t* index, const Acc* key, int64_t E, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < E; ++e) {
      bool used = false;
      for (int64_t j = 0; j < k; ++j) used |= index[j] == e;
      if (!used && (best < 0 || key[e] > key[best] || (std::isnan(key[best]) && !std::isnan(key[e])))) best = e;
    }
    index[k] = int32_t(best);
  }
}
}  // namespace

template <class Device>
void router_forward(Device& dev, typename Device::Acc* gates, int32_t* top_k_index, typename Device::Acc* lse,
                    typename Device::Acc* group_prob, int32_t* group_count, void* scratch,
                    const typename Device::Real* x, const typename Device::Real* wg, const typename Device::Acc* bias,
                    const int32_t* replay, RouterShape shape) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t E = shape.E, K = shape.K, per_group = shape.N / shape.G, blocks = divide_up(per_group, block_tokens);
  // One sum of p for each block of a group, added in order at the end.
  Acc* block_prob = static_cast<Acc*>(scratch);
  Acc* shares = block_prob + shape.G * blocks * E;
#pragma omp parallel for collapse(2)
  for (int64_t g = 0; g < shape.G; ++g)
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t n0 = g * per_group + block * block_tokens;
      int64_t rows = std::min(block_tokens, (g + 1) * per_group - n0);
      Acc* s = thread_share<Acc>(shares, thread_values<Acc, Real>(shape));
      Acc *p = s + block_tokens * E, *key = p + E;
      logits(dev, s, key + E, x, wg, n0, rows, shape);
      Acc* prob = block_prob + (g * blocks + block) * E;
      std::fill_n(prob, E, Acc(0));
      for (int64_t i = 0; i < rows; ++i) {
        const Acc* si = s + i * E;
        int64_t n = n0 + i;
        Acc maximum = *std::max_element(si, si + E), sum = 0;
        for (int64_t e = 0; e < E; ++e) sum += exp_of(si[e] - maximum);
        lse[n] = maximum + std::log(sum);
        scores(p, si, lse[n], shape);

        int32_t* chosen = top_k_index + n * K;
        if (replay) {
          for (int64_t k = 0; k < K; ++k) {
            chosen[k] = replay[n * K + k];
            if (chosen[k] >= 0 && chosen[k] < E) continue;
#pragma omp critical
            dev.fault(DeviceStatus::expert_out_of_range, n, chosen[k]);
            chosen[k] = 0;
          }
        } else {
          for (int64_t e = 0; e < E; ++e) key[e] = p[e] + (bias ? bias[e] : Acc(0));
          top_k(chosen, key, E, K);
        }
        // Unscaled gates: p, or for renormalised softmax the softmax over the chosen logits, the same but never 0/0.
        bool among_chosen = shape.gate == Gate::softmax && shape.norm_topk_prob;
        Acc largest = si[chosen[0]], chosen_sum = 0, factor = 1;
        for (int64_t k = 1; k < K; ++k) largest = std::max(largest, si[chosen[k]]);
        for (int64_t k = 0; k < K; ++k) {
          Acc gate = among_chosen ? exp_of(si[chosen[k]] - largest) : p[chosen[k]];
          gates[n * K + k] = gate;
          chosen_sum += gate;
        }
        if (among_chosen) factor = Acc(1) / chosen_sum;
        if (shape.gate == Gate::sigmoid) {
          factor = Acc(shape.route_scale);
          if (shape.norm_topk_prob) factor /= chosen_sum + Acc(1e-20);
        }
        for (int64_t k = 0; k < K; ++k) gates[n * K + k] *= factor;

        Acc norm = 1;
        if (shape.gate == Gate::sigmoid) {
          norm = 0;
          for (int64_t e = 0; e < E; ++e) norm += p[e];
          norm = Acc(1) / norm;
        }
        for (int64_t e = 0; e < E; ++e) prob[e] += p[e] * norm;
      }
    }
  for (int64_t g = 0; g < shape.G; ++g) {
    std::fill_n(group_prob + g * E, E, Acc(0));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t e = 0; e < E; ++e) group_prob[g * E + e] += block_prob[(g * blocks + block) * E + e];
    std::fill_n(group_count + g * E, E, 0);
    for (int64_t i = g * per_group * K; i < (g + 1) * per_group * K; ++i) ++group_count[g * E + top_k_index[i]];
  }
}

template <class Device>
void balance_loss(Device&, StepStats* stats, int32_t* load, const typename Device::Acc* group_prob,
                  const int32_t* group_count, const typename Device::Acc* lse, const StepParams* params,
                  RouterShape shape) {
  double tokens = double(shape.N * shape.ranks) / double(shape.G), balance = 0, z = 0;
  for (int64_t i = 0; i < shape.G * shape.E; ++i) {
    balance += double(group_count[i]) / (tokens * double(shape.K)) * double(group_prob[i]) / tokens;
    if (load) load[i % shape.E] += group_count[i];
  }
  for (int64_t n = 0; n < shape.N; ++n) z += double(lse[n]) * double(lse[n]);
  stats->aux_loss += params->micro_step_scale * shape.aux_coef * double(shape.E) * balance / double(shape.G);
  stats->z_loss += params->micro_step_scale * shape.z_coef * z / double(shape.N);
}

template <class Device>
void router_backward(Device& dev, typename Device::Real* dx, Grad<Device> dwg, void* scratch,
                     const typename Device::Acc* dgates, const typename Device::Acc* gates, const int32_t* top_k_index,
                     const typename Device::Acc* lse, const int32_t* group_count, const typename Device::Real* x,
                     const typename Device::Real* wg, const StepParams* params, RouterShape shape) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  int64_t N = shape.N, C = shape.C, E = shape.E, K = shape.K, per_group = N / shape.G;
  Acc* ds_all = static_cast<Acc*>(scratch);  // (N,E), transient
  Acc* shares = ds_all + N * E;
  Acc z_scale = Acc(2 * shape.z_coef * params->micro_step_scale / double(N));
  // d aux / d P_e of a token's group, per selection counted: coef * E / G * f_e / tokens, f_e = count / (tokens * K). Over
  // several ranks f_e is of the tokens of all; that P_e is too is in micro_step_scale, an average over ranks.
  Acc aux_scale = Acc(shape.aux_coef * params->micro_step_scale * double(E) / double(shape.G) /
                      (double(per_group) * double(per_group * shape.ranks) * double(K)));
#pragma omp parallel for
  for (int64_t n0 = 0; n0 < N; n0 += block_tokens) {
    int64_t rows = std::min(block_tokens, N - n0);
    Acc* ds = ds_all + n0 * E;
    Acc* p = thread_share<Acc>(shares, thread_values<Acc, Real>(shape));
    Acc *dp = p + E, *copies = dp + E;
    logits(dev, ds, copies, x, wg, n0, rows, shape);  // overwritten row by row by their gradient
    for (int64_t i = 0; i < rows; ++i) {
      int64_t n = n0 + i;
      Acc* s = ds + i * E;
      const Acc *g = gates + n * K, *dg = dgates + n * K;
      const int32_t* chosen = top_k_index + n * K;
      const int32_t* count = group_count + n / per_group * E;
      scores(p, s, lse[n], shape);

      // Balance loss: a_e = d loss / d P-contribution of this token.
      Acc weighted = 0, total = 0;
      for (int64_t e = 0; e < E; ++e) total += p[e];
      Acc norm = shape.gate == Gate::softmax ? Acc(1) : Acc(1) / total;
      for (int64_t e = 0; e < E; ++e) weighted += aux_scale * Acc(count[e]) * p[e] * norm;
      for (int64_t e = 0; e < E; ++e) dp[e] = (aux_scale * Acc(count[e]) - weighted) * norm;

      // Gates. Softmax: d s directly for the renormalised form (a softmax over the chosen logits), through p otherwise.
      Acc chosen_sum = 0, inner = 0;
      for (int64_t k = 0; k < K; ++k) {
        chosen_sum += p[chosen[k]];
        inner += dg[k] * (shape.norm_topk_prob ? g[k] : p[chosen[k]]);
      }
      Acc z = z_scale * lse[n];
      if (shape.gate == Gate::softmax) {
        for (int64_t e = 0; e < E; ++e) s[e] = p[e] * (dp[e] + z - (shape.norm_topk_prob ? Acc(0) : inner));
        for (int64_t k = 0; k < K; ++k) {
          int64_t e = chosen[k];
          s[e] += shape.norm_topk_prob ? g[k] * (dg[k] - inner) : p[e] * dg[k];
        }
      } else {
        Acc scale = Acc(shape.route_scale), sum = chosen_sum + Acc(1e-20);
        for (int64_t k = 0; k < K; ++k)
          dp[chosen[k]] += shape.norm_topk_prob ? (scale * dg[k] - inner) / sum : scale * dg[k];
        for (int64_t e = 0; e < E; ++e) s[e] = p[e] * (Acc(1) - p[e]) * dp[e] + z * exp_of(s[e] - lse[n]);
      }
    }
    auto W = load_block(wg, C, E, C, copies);
    if constexpr (std::is_same_v<Acc, Real>) {
      gemm<Acc>(dev.plain_matmul, false, false, rows, C, E, 1, ds, E, W.data, W.stride, 0, dx + n0 * C, C);
    } else {
      Acc* out = copies + E * C;
      gemm<Acc>(dev.plain_matmul, false, false, rows, C, E, 1, ds, E, W.data, W.stride, 0, out, C);
      for (int64_t i = 0; i < rows * C; ++i) dx[n0 * C + i] = Real(out[i]);
    }
  }
  // dWg (E,C) = ds^T x, in blocks of tokens.
  Acc *sum = shares, *copies = sum + E * C;
  for (int64_t n0 = 0; n0 < N; n0 += block_tokens) {
    int64_t rows = std::min(block_tokens, N - n0);
    auto X = load_block(x + n0 * C, C, rows, C, copies);
    gemm<Acc>(dev.plain_matmul, true, false, E, C, rows, 1, ds_all + n0 * E, E, X.data, X.stride, n0 ? 1 : 0, sum, C);
  }
  add_to_gradient(dwg, 0, sum, E * C);
}

template <class Device>
size_t router_scratch_bytes(RouterShape shape) {
  using Acc = typename Device::Acc;
  using Real = typename Device::Real;
  int64_t shares = omp_get_max_threads() * thread_values<Acc, Real>(shape);
  int64_t forward = shape.G * divide_up(shape.N / shape.G, block_tokens) * shape.E + shares;
  int64_t product = shape.E * shape.C + block_size<Acc, Real>(block_tokens * shape.C);
  int64_t backward = shape.N * shape.E + std::max(shares, product);
  return size_t(std::max(forward, backward)) * sizeof(Acc);
}

template <class Device>
void router_bias_update(Device&, typename Device::Acc* bias, const int32_t* load, const StepStats* stats, double rate,
                        int64_t E) {
  if (stats->skip) return;
  int64_t total = 0;
  for (int64_t e = 0; e < E; ++e) total += load[e];
  for (int64_t e = 0; e < E; ++e) {
    int64_t difference = total - int64_t(load[e]) * E;  // E * (mean - load), exact
    bias[e] += typename Device::Acc(difference > 0 ? rate : difference < 0 ? -rate : 0.0);
  }
}

#define INSTANTIATE(Real)                                                                                            \
  template void router_forward(Cpu<Real>&, Cpu<Real>::Acc*, int32_t*, Cpu<Real>::Acc*, Cpu<Real>::Acc*, int32_t*,    \
                               void*, const Real*, const Real*, const Cpu<Real>::Acc*, const int32_t*, RouterShape); \
  template void balance_loss(Cpu<Real>&, StepStats*, int32_t*, const Cpu<Real>::Acc*, const int32_t*,                \
                             const Cpu<Real>::Acc*, const StepParams*, RouterShape);                                 \
  template void router_backward(Cpu<Real>&, Real*, Grad<Cpu<Real>>, void*, const Cpu<Real>::Acc*,                    \
                                const Cpu<Real>::Acc*, const int32_t*, const Cpu<Real>::Acc*, const int32_t*,        \
                                const Real*, const Real*, const StepParams*, RouterShape);                           \
  template size_t router_scratch_bytes<Cpu<Real>>(RouterShape);                                                      \
  template void router_bias_update(Cpu<Real>&, Cpu<Real>::Acc*, const int32_t*, const StepStats*, double, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
