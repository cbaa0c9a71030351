// The router on the GPU. Logits come from one dense product; everything after it, scores, log-sum-exp, top-k, gates and
// balance statistics, is one kernel in which a group of lanes holds all E scores of a token in registers.
//
// The backward pass needs ds (N,E) in fp32 times bf16 matrices. Tensor cores multiply bf16, so ds is written as the sum
// of three bf16 numbers, which hold all 24 bits of it, and the products with them are summed in fp32: as exact as fp32.
#include "moe/router.h"

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_matmul.cuh"

namespace {

constexpr int threads = 256, max_top_k = 32;
constexpr int block_tokens = 64;  // tokens whose statistics are summed before the blocks are

// A group of LANES lanes holds the E values of one token, lane l those of experts l, l + LANES, ...
template <int LANES, int V>
struct Scores {
  float v[V];
  static __device__ int lane() { return threadIdx.x % LANES; }
  static __device__ int expert(int i) { return i * LANES + lane(); }
  static __device__ float sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
  }
  static __device__ float maximum(float x) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
  }
  __device__ void load(const float* row, int E) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = expert(i) < E ? row[expert(i)] : -INFINITY;
  }
  // The value of expert e, in every lane of the group.
  __device__ float of(int e) const {
    float mine = 0;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (e / LANES == i) mine = v[i];
    return __shfl_sync(~0u, mine, e % LANES, LANES);
  }
  // p from the logits s.
  __device__ void activate(const Scores& s, float lse, int E, Gate gate) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      v[i] = expert(i) >= E ? 0 : gate == Gate::softmax ? expf(s.v[i] - lse) : 1.0f / (1.0f + expf(-s.v[i]));
  }
  __device__ float total() const {
    float t = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) t += v[i];
    return sum(t);
  }
};

// The best of key over the group's experts that are not yet taken; ties, and NaN, to the lower index.
template <int LANES, int V>
__device__ int best_expert(const float (&key)[V], unsigned taken, int E) {
  float value = 0;
  int best = -1;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    int e = Scores<LANES, V>::expert(i);
    if (e < E && !(taken >> i & 1) && (best < 0 || key[i] > value)) value = key[i], best = e;
  }
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) {
    float other = __shfl_xor_sync(~0u, value, step);
    int e = __shfl_xor_sync(~0u, best, step);
    if (e < 0) continue;
    bool higher = best < 0 || other > value;
    // Neither greater: equal, or a NaN is among them; as in a scan from the lowest index, the lower stays.
    if (higher && !(best >= 0 && best < e && !(other > value)))
      value = other, best = e;
    else if (best >= 0 && e < best && !(value > other))
      value = other, best = e;
  }
  return best;
}

template <int LANES, int V>
__global__ void __launch_bounds__(threads)
    choose(float* gates, int32_t* top_k_index, float* lse, float* block_prob, int32_t* block_count, const float* logits,
           const float* bias, const int32_t* replay, RouterShape shape, DeviceStatus* status, int layer) {
  using S = Scores<LANES, V>;
  constexpr int groups = threads / LANES;
  __shared__ float probs[groups][LANES];  // one i at a time
  __shared__ int32_t counts[groups][LANES];
  int E = int(shape.E), K = int(shape.K), group = threadIdx.x / LANES;
  // grid (G, blocks of a group of statistics)
  int64_t per_group = shape.N / shape.G, base = int64_t(blockIdx.x) * per_group;
  int64_t first = int64_t(blockIdx.y) * block_tokens, end = min(per_group, first + block_tokens);
  float prob[V] = {};
  int count[V] = {};
  for (int64_t start = first; start < end; start += groups) {
    bool live = start + group < end;  // no early exit: lanes of a warp work together
    int64_t n = base + (live ? start + group : first);
    S s, p;
    s.load(logits + n * E, E);
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) largest = fmaxf(largest, s.v[i]);
    largest = S::maximum(largest);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += S::expert(i) < E ? expf(s.v[i] - largest) : 0;
    float l = largest + logf(S::sum(sum));
    if (live && S::lane() == 0) lse[n] = l;
    p.activate(s, l, E, shape.gate);

    float key[V];
#pragma unroll
    for (int i = 0; i < V; ++i) key[i] = S::expert(i) < E ? p.v[i] + (bias ? bias[S::expert(i)] : 0) : 0;
    unsigned taken = 0;
    // Lane k of the group keeps choice k; where there are more choices than lanes, the next k's are in further slots.
    constexpr int slots = (max_top_k + LANES - 1) / LANES;
    int chosen[slots];
    float gate[slots];
    float chosen_sum = 0, largest_chosen = -INFINITY;
    for (int k = 0; k < K; ++k) {
      int e;
      if (replay) {
        e = replay[n * K + k];
        if (e < 0 || e >= E) {
          if (live && S::lane() == 0) report_fault(status, layer, DeviceStatus::expert_out_of_range, n, e);
          e = 0;
        }
      } else {
        e = best_expert<LANES, V>(key, taken, E);
      }
      if (S::lane() == e % LANES) {
        taken |= 1u << (e / LANES);
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (live && e / LANES == i) ++count[i];
      }
      float logit = s.of(e), score = p.of(e);
      largest_chosen = fmaxf(largest_chosen, logit);
#pragma unroll
      for (int i = 0; i < slots; ++i)
        if (k == i * LANES + S::lane())
          chosen[i] = e, gate[i] = shape.gate == Gate::softmax && shape.norm_topk_prob ? logit : score;
    }
    // Unscaled gates: p, or for renormalised softmax the softmax over the chosen logits, the same but never 0/0.
    bool among_chosen = shape.gate == Gate::softmax && shape.norm_topk_prob;
#pragma unroll
    for (int i = 0; i < slots; ++i)
      if (i * LANES + S::lane() < K) {
        if (among_chosen) gate[i] = expf(gate[i] - largest_chosen);
        chosen_sum += gate[i];
      }
    chosen_sum = S::sum(chosen_sum);
    float factor = 1;
    if (among_chosen) factor = 1.0f / chosen_sum;
    if (shape.gate == Gate::sigmoid) {
      factor = float(shape.route_scale);
      if (shape.norm_topk_prob) factor /= chosen_sum + 1e-20f;
    }
#pragma unroll
    for (int i = 0; i < slots; ++i) {
      int k = i * LANES + S::lane();
      if (live && k < K) gates[n * K + k] = gate[i] * factor, top_k_index[n * K + k] = chosen[i];
    }
    float norm = shape.gate == Gate::sigmoid ? 1.0f / p.total() : 1.0f;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (live) prob[i] += p.v[i] * norm;
  }
  int64_t block = int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    __syncthreads();
    probs[group][S::lane()] = prob[i], counts[group][S::lane()] = count[i];
    __syncthreads();
    int e = i * LANES + int(threadIdx.x);
    if (threadIdx.x < LANES && e < E) {
      float sum = 0;
      int total = 0;
      for (int g = 0; g < groups; ++g) sum += probs[g][threadIdx.x], total += counts[g][threadIdx.x];
      block_prob[block * E + e] = sum, block_count[block * E + e] = total;
    }
  }
}

// A warp an entry of (G,E): its blocks' sums, in a fixed order.
__global__ void sum_statistics(float* group_prob, int32_t* group_count, const float* block_prob,
                               const int32_t* block_count, int blocks, int E, int64_t entries) {
  int64_t entry = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (entry >= entries) return;
  int64_t g = entry / E, e = entry % E;
  float sum = 0;
  int count = 0;
  for (int b = threadIdx.x % 32; b < blocks; b += 32) {
    int64_t at = (g * blocks + b) * E + e;
    sum += block_prob[at], count += block_count[at];
  }
  sum = warp_sum(sum);
  for (int step = 16; step; step /= 2) count += __shfl_xor_sync(~0u, count, step);
  if (threadIdx.x % 32 == 0) group_prob[entry] = sum, group_count[entry] = count;
}

__global__ void __launch_bounds__(1024)
    add_balance_loss(StepStats* stats, int32_t* load, const float* group_prob, const int32_t* group_count,
                     const float* lse, const StepParams* params, RouterShape shape) {
  double tokens = double(shape.N) / double(shape.G), balance = 0, z = 0;
  for (int64_t i = threadIdx.x; i < shape.G * shape.E; i += 1024)
    balance += double(group_count[i]) / (tokens * double(shape.K)) * double(group_prob[i]) / tokens;
  for (int64_t n = threadIdx.x; n < shape.N; n += 1024) z += double(lse[n]) * double(lse[n]);
  for (int64_t e = threadIdx.x; e < shape.E; e += 1024) {
    int total = 0;
    for (int64_t g = 0; g < shape.G; ++g) total += group_count[g * shape.E + e];
    load[e] += total;
  }
  balance = block_sum(balance), z = block_sum(z);
  if (threadIdx.x > 0) return;
  stats->aux_loss += params->micro_step_scale * shape.aux_coef * double(shape.E) * balance / double(shape.G);
  stats->z_loss += params->micro_step_scale * shape.z_coef * z / double(shape.N);
}

// ds of every token, in place of its logits (parts null), or as three bf16 numbers: ds = parts[e] + parts[E+e] +
// parts[2E+e], rows of `width` elements, the rest zero.
template <int LANES, int V>
__global__ void __launch_bounds__(threads)
    logit_gradient(float* logits, bf16* parts, int width, const float* dgates, const float* gates,
                   const int32_t* top_k_index, const float* lse, const int32_t* group_count, const StepParams* params,
                   RouterShape shape) {
  using S = Scores<LANES, V>;
  int E = int(shape.E), K = int(shape.K);
  int64_t token = int64_t(blockIdx.x) * (threads / LANES) + threadIdx.x / LANES, n = min(token, shape.N - 1);
  int64_t per_group = shape.N / shape.G;
  float z_scale = float(2 * shape.z_coef * params->micro_step_scale / double(shape.N));
  // d aux / d P_e of a token's group, per selection counted: coef * E / G * f_e / tokens, f_e = count / (tokens * K).
  float aux_scale = float(shape.aux_coef * params->micro_step_scale * double(shape.E) / double(shape.G) /
                          (double(per_group) * double(per_group) * double(shape.K)));
  S s, p, d;
  s.load(logits + n * E, E);
  float l = lse[n];
  p.activate(s, l, E, shape.gate);

  const int32_t* count = group_count + n / per_group * E;
  float norm = shape.gate == Gate::softmax ? 1.0f : 1.0f / p.total(), weighted = 0, dp[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    dp[i] = S::expert(i) < E ? aux_scale * float(count[S::expert(i)]) : 0;
    weighted += dp[i] * p.v[i] * norm;
  }
  weighted = S::sum(weighted);
#pragma unroll
  for (int i = 0; i < V; ++i) dp[i] = (dp[i] - weighted) * norm;

  const float *g = gates + n * K, *dg = dgates + n * K;
  const int32_t* chosen = top_k_index + n * K;
  float chosen_sum = 0, inner = 0, z = z_scale * l;
  for (int k = 0; k < K; ++k) {
    float score = p.of(chosen[k]);
    chosen_sum += score;
    inner += dg[k] * (shape.norm_topk_prob ? g[k] : score);
  }
  bool softmax = shape.gate == Gate::softmax;
  float scale = float(shape.route_scale), sum = chosen_sum + 1e-20f;
#pragma unroll
  for (int i = 0; i < V; ++i) d.v[i] = softmax ? p.v[i] * (dp[i] + z - (shape.norm_topk_prob ? 0 : inner)) : dp[i];
  for (int k = 0; k < K; ++k) {
    int e = chosen[k];
    if (S::lane() != e % LANES) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (e / LANES != i) continue;
      if (softmax)
        d.v[i] += shape.norm_topk_prob ? g[k] * (dg[k] - inner) : p.v[i] * dg[k];
      else
        d.v[i] += shape.norm_topk_prob ? (scale * dg[k] - inner) / sum : scale * dg[k];
    }
  }
  if (token >= shape.N) return;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    int e = S::expert(i);
    if (e >= E) continue;
    float ds = softmax ? d.v[i] : p.v[i] * (1.0f - p.v[i]) * d.v[i] + z * expf(s.v[i] - l);
    if (!parts) {
      logits[n * E + e] = ds;
      continue;
    }
    bf16* row = parts + n * width;
    for (int part = 0; part < 3; ++part) {
      row[part * E + e] = from_float<bf16>(ds);
      ds -= rounded<bf16>(ds);
    }
  }
  if (parts)
    for (int e = 3 * E + S::lane(); e < width; e += LANES) parts[n * width + e] = from_float<bf16>(0);
}

// wg three times over, one below the other, and zeros up to `rows` rows of C.
__global__ void repeat_weight(bf16* out, const bf16* wg, int64_t E, int64_t C, int64_t rows) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * C; i += int64_t(gridDim.x) * blockDim.x)
    out[i] = i < 3 * E * C ? wg[i % (E * C)] : from_float<bf16>(0);
}
// dwg (n) += the sum of `parts` arrays of n, one after the other.
template <class Real>
__global__ void add_parts(void* dwg, bool wide, const float* sums, int parts, int64_t n) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float sum = sums[i];
  for (int part = 1; part < parts; ++part) sum += sums[part * n + i];
  add_to_gradient<Real>(dwg, wide, i, sum);
}

__global__ void update_bias(float* bias, const int32_t* load, const StepStats* stats, double rate, int64_t E) {
  if (stats->skip) return;
  __shared__ int64_t total;
  if (threadIdx.x == 0) {
    total = 0;
    for (int64_t e = 0; e < E; ++e) total += load[e];
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < E; e += blockDim.x) {
    int64_t difference = total - int64_t(load[e]) * E;  // E * (mean - load), exact
    bias[e] += float(difference > 0 ? rate : difference < 0 ? -rate : 0.0);
  }
}

// Calls f<LANES, V>() with room for E experts.
template <class F>
void with_expert_shape(const RouterShape& shape, F f) {
  if (shape.K > max_top_k) fail("the router on the GPU: top-k of at most ", max_top_k, ", not ", shape.K);
  if (shape.E <= 8) return f.template operator()<8, 1>();
  if (shape.E <= 16) return f.template operator()<16, 1>();
  if (shape.E <= 32) return f.template operator()<32, 1>();
  if (shape.E <= 64) return f.template operator()<32, 2>();
  if (shape.E <= 128) return f.template operator()<32, 4>();
  if (shape.E <= 256) return f.template operator()<32, 8>();
  if (shape.E <= 512) return f.template operator()<32, 16>();
  fail("the router on the GPU: at most 512 experts, not ", shape.E);
}

// Pieces of the scratch memory, each at a multiple of 256 bytes.
template <class Real>
struct Scratch {
  static constexpr bool split = std::is_same_v<Real, bf16>;
  int64_t width;  // of a row of ds in three parts, whole 16-byte accesses
  size_t bytes = 0;
  size_t logits, block_prob, block_count, parts, weights, sums, product;
  explicit Scratch(const RouterShape& s) : width(split ? ceil_div(3 * s.E, 8) * 8 : s.E) {
    auto take = [&](int64_t n) {
      size_t at = bytes;
      bytes += size_t(ceil_div(n, 256) * 256);
      return at;
    };
    int64_t blocks = s.G * ceil_div(s.N / s.G, block_tokens);
    logits = take(s.N * s.E * 4), block_prob = take(blocks * s.E * 4), block_count = take(blocks * s.E * 4);
    parts = take(split ? s.N * width * 2 : 0), weights = take(split ? width * s.C * 2 : 0);
    sums = take(width * s.C * 4), product = take(int64_t(dense_scratch_bytes()));
  }
};

}  // namespace

template <class Device>
void router_forward(Device& dev, typename Device::Acc* gates, int32_t* top_k_index, typename Device::Acc* lse,
                    typename Device::Acc* group_prob, int32_t* group_count, void* scratch,
                    const typename Device::Real* x, const typename Device::Real* wg, const typename Device::Acc* bias,
                    const int32_t* replay, RouterShape s) {
  Scratch<typename Device::Real> at(s);
  char* memory = static_cast<char*>(scratch);
  float *logits = reinterpret_cast<float*>(memory + at.logits),
        *prob = reinterpret_cast<float*>(memory + at.block_prob);
  int32_t* count = reinterpret_cast<int32_t*>(memory + at.block_count);
  dense_product(dev, view(logits, s.E), memory + at.product, view(x, s.C), false, view(wg, s.C), true, s.N, s.E, s.C,
                false);
  int blocks = int(ceil_div(s.N / s.G, block_tokens));
  if (blocks > 65535) fail("the router on the GPU: at most ", 65535 * block_tokens, " tokens share balance statistics");
  with_expert_shape(s, [&]<int LANES, int V>() {
    launch(dev, choose<LANES, V>, dim3(unsigned(s.G), unsigned(blocks)), threads, 0, gates, top_k_index, lse, prob,
           count, logits, bias, replay, s, dev.status, dev.layer);
  });
  launch(dev, sum_statistics, dim3(unsigned(ceil_div(s.G * s.E, 8))), 256, 0, group_prob, group_count, prob, count,
         blocks, int(s.E), s.G * s.E);
}

template <class Device>
void balance_loss(Device& dev, StepStats* stats, int32_t* load, const typename Device::Acc* group_prob,
                  const int32_t* group_count, const typename Device::Acc* lse, const StepParams* params,
                  RouterShape shape) {
  launch(dev, add_balance_loss, 1, 1024, 0, stats, load, group_prob, group_count, lse, params, shape);
}

template <class Device>
void router_backward(Device& dev, typename Device::Real* dx, Grad<Device> dwg, void* scratch,
                     const typename Device::Acc* dgates, const typename Device::Acc* gates, const int32_t* top_k_index,
                     const typename Device::Acc* lse, const int32_t* group_count, const typename Device::Real* x,
                     const typename Device::Real* wg, const StepParams* params, RouterShape s) {
  using Real = typename Device::Real;
  Scratch<Real> at(s);
  char* memory = static_cast<char*>(scratch);
  float *logits = reinterpret_cast<float*>(memory + at.logits), *sums = reinterpret_cast<float*>(memory + at.sums);
  void* product = memory + at.product;
  constexpr bool split = Scratch<Real>::split;
  bf16* parts = split ? reinterpret_cast<bf16*>(memory + at.parts) : nullptr;
  dense_product(dev, view(logits, s.E), product, view(x, s.C), false, view(wg, s.C), true, s.N, s.E, s.C, false);
  with_expert_shape(s, [&]<int LANES, int V>() {
    launch(dev, logit_gradient<LANES, V>, dim3(unsigned(ceil_div(s.N, threads / LANES))), threads, 0, logits, parts,
           int(at.width), dgates, gates, top_k_index, lse, group_count, params, s);
  });
  if constexpr (split) {
    bf16* weights = reinterpret_cast<bf16*>(memory + at.weights);
    launch(dev, repeat_weight, dim3(unsigned(dev.multiprocessors)), 256, 0, weights, wg, s.E, s.C, at.width);
    dense_product(dev, view(dx, s.C), product, view(parts, at.width), false, view(weights, s.C), false, s.N, s.C,
                  at.width, false);
    dense_product(dev, view(sums, s.C), product, view(parts, at.width), true, view(x, s.C), false, at.width, s.C, s.N,
                  false);
  } else {
    dense_product(dev, view(dx, s.C), product, view(logits, s.E), false, view(wg, s.C), false, s.N, s.C, s.E, false);
    dense_product(dev, view(sums, s.C), product, view(logits, s.E), true, view(x, s.C), false, s.E, s.C, s.N, false);
  }
  launch(dev, add_parts<Real>, dim3(unsigned(ceil_div(s.E * s.C, 256))), 256, 0, dwg.data, dwg.wide, sums,
         split ? 3 : 1, s.E * s.C);
}

template <class Device>
size_t router_scratch_bytes(RouterShape shape) {
  return Scratch<typename Device::Real>(shape).bytes;
}

template <class Device>
void router_bias_update(Device& dev, typename Device::Acc* bias, const int32_t* load, const StepStats* stats,
                        double rate, int64_t E) {
  launch(dev, update_bias, 1, 256, 0, bias, load, stats, rate, E);
}

#define INSTANTIATE(Real)                                                                                              \
  template void router_forward(Gpu<Real>&, float*, int32_t*, float*, float*, int32_t*, void*, const Real*,             \
                               const Real*, const float*, const int32_t*, RouterShape);                                \
  template void balance_loss(Gpu<Real>&, StepStats*, int32_t*, const float*, const int32_t*, const float*,             \
                             const StepParams*, RouterShape);                                                          \
  template void router_backward(Gpu<Real>&, Real*, Grad<Gpu<Real>>, void*, const float*, const float*, const int32_t*, \
                                const float*, const int32_t*, const Real*, const Real*, const StepParams*,             \
                                RouterShape);                                                                          \
  template size_t router_scratch_bytes<Gpu<Real>>(RouterShape);                                                        \
  template void router_bias_update(Gpu<Real>&, float*, const int32_t*, const StepStats*, double, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
