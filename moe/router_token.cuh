// What the router does with the logits of one token, wherever they lie: scores, log-sum-exp, top-k, gates and balance
// statistics on the way forward, the gradient of the logits on the way back. A group of LANES lanes holds all E values
// of a token in registers, lane l those of experts l, l + LANES, ...; and likewise, of its K choices, l, l + LANES, ...
#pragma once
#include "llmc/cuda_common.cuh"
#include "moe/router.h"

namespace router_token {

constexpr int max_top_k = 32;

template <int LANES>
struct Group {
  static constexpr int slots = (max_top_k + LANES - 1) / LANES;  // choices of a lane
  static __device__ int lane() { return threadIdx.x % LANES; }
  static __device__ int index(int i) { return i * LANES + lane(); }
  // Of all lanes of the group, in each of them: the same tree every time.
  template <class T, class Operation>
  static __device__ T reduce(T x, Operation operation) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) x = operation(x, __shfl_xor_sync(~0u, x, step));
    return x;
  }
  static __device__ float sum(float x) {
    return reduce(x, [](float a, float b) { return a + b; });
  }
  static __device__ float maximum(float x) {
    return reduce(x, [](float a, float b) { return fmaxf(a, b); });
  }
  static __device__ unsigned maximum(unsigned x) {
    if constexpr (LANES == 32)
      return __reduce_max_sync(~0u, x);
    else
      return reduce(x, [](unsigned a, unsigned b) { return max(a, b); });
  }
  static __device__ int minimum(int x) {
    if constexpr (LANES == 32)
      return __reduce_min_sync(~0u, x);
    else
      return reduce(x, [](int a, int b) { return min(a, b); });
  }
};

// p of the logit s.
__device__ __forceinline__ float score(float s, float lse, Gate gate) {
  return gate == Gate::softmax ? expf(s - lse) : 1.0f / (1.0f + expf(-s));
}

template <int LANES, int V>
struct Scores {
  using Lanes = Group<LANES>;
  float v[V];
  __device__ void load(const float* row, int E) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = Lanes::index(i) < E ? row[Lanes::index(i)] : -INFINITY;
  }
  // p from the logits s.
  __device__ void activate(const Scores& s, float lse, int E, Gate gate) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = Lanes::index(i) < E ? score(s.v[i], lse, gate) : 0;
  }
  __device__ float total() const {
    float t = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) t += v[i];
    return Lanes::sum(t);
  }
};

// ---- forward ----

// A number as an integer of the same order, at least 2; NaN is 1. What must not be chosen is 0.
constexpr unsigned not_available = 0;
__device__ __forceinline__ unsigned ordered(float v) {
  if (isnan(v)) return 1;
  const unsigned bits = __float_as_uint(v + 0.0f);  // -0 becomes 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The best of key over the group; ties to the lower index.
template <int LANES, int V>
__device__ int best_expert(const unsigned (&key)[V]) {
  unsigned best = key[0];
#pragma unroll
  for (int i = 1; i < V; ++i) best = max(best, key[i]);
  best = Group<LANES>::maximum(best);
  int e = INT32_MAX;
#pragma unroll
  for (int i = V - 1; i >= 0; --i)
    if (key[i] == best) e = Group<LANES>::index(i);
  return Group<LANES>::minimum(e);
}

struct Forward {
  float* gates;           // (N,K)
  int32_t* top_k_index;   // (N,K)
  float* lse;             // (N)
  float* block_prob;      // (G, blocks of a group, E)
  int32_t* block_count;   // likewise
  const float* bias;      // (E) or null
  const int32_t* replay;  // (N,K) or null
  RouterShape shape;
  DeviceStatus* status;
  int layer;
};

// Tokens [n0, n0 + tokens), whose logits are rows of `logits`, by a block of `threads`; their statistics become entry
// `block` of the blocks'. probs, counts: shared memory, an element a thread.
template <int LANES, int V, int threads>
__device__ void choose_tokens(const Forward& f, const float* logits, int stride, int64_t n0, int tokens, int64_t block,
                              float* probs, int32_t* counts) {
  using Lanes = Group<LANES>;
  constexpr int groups = threads / LANES, slots = Lanes::slots;
  const RouterShape& shape = f.shape;
  const int E = int(shape.E), K = int(shape.K), group = threadIdx.x / LANES;
  // Unscaled gates: p, or for renormalised softmax the softmax over the chosen logits, the same but never 0/0.
  const bool among_chosen = shape.gate == Gate::softmax && shape.norm_topk_prob;
  float prob[V] = {};
  int count[V] = {};
  for (int start = 0; start < tokens; start += groups) {
    const bool live = start + group < tokens;  // no early exit: lanes of a warp work together
    const int t = live ? start + group : 0;
    const int64_t n = n0 + t;
    const float* row = logits + t * stride;
    Scores<LANES, V> s, p;
    s.load(row, E);
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) largest = fmaxf(largest, s.v[i]);
    largest = Lanes::maximum(largest);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += Lanes::index(i) < E ? expf(s.v[i] - largest) : 0;
    const float lse = largest + logf(Lanes::sum(sum));
    if (live && Lanes::lane() == 0) f.lse[n] = lse;
    p.activate(s, lse, E, shape.gate);

    unsigned key[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = Lanes::index(i);
      key[i] = e < E ? ordered(p.v[i] + (f.bias ? f.bias[e] : 0)) : not_available;
    }
    int chosen[slots] = {};
    for (int k = 0; k < K; ++k) {
      int e;
      if (f.replay) {
        e = f.replay[n * K + k];
        if (e < 0 || e >= E) {
          if (live && Lanes::lane() == 0) report_fault(f.status, f.layer, DeviceStatus::expert_out_of_range, n, e);
          e = 0;
        }
      } else {
        e = best_expert<LANES, V>(key);
      }
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (Lanes::index(i) == e) key[i] = not_available, count[i] += live;
#pragma unroll
      for (int i = 0; i < slots; ++i)
        if (Lanes::index(i) == k) chosen[i] = e;
    }
    float gate[slots], chosen_sum = 0, largest_chosen = -INFINITY;
#pragma unroll
    for (int i = 0; i < slots; ++i) {
      gate[i] = Lanes::index(i) < K ? row[chosen[i]] : -INFINITY;
      largest_chosen = fmaxf(largest_chosen, gate[i]);
    }
    if (among_chosen) largest_chosen = Lanes::maximum(largest_chosen);
#pragma unroll
    for (int i = 0; i < slots; ++i)
      if (Lanes::index(i) < K) {
        gate[i] = among_chosen ? expf(gate[i] - largest_chosen) : score(gate[i], lse, shape.gate);
        chosen_sum += gate[i];
      }
    chosen_sum = Lanes::sum(chosen_sum);
    float factor = 1;
    if (among_chosen) factor = 1.0f / chosen_sum;
    if (shape.gate == Gate::sigmoid) {
      factor = float(shape.route_scale);
      if (shape.norm_topk_prob) factor /= chosen_sum + 1e-20f;
    }
#pragma unroll
    for (int i = 0; i < slots; ++i) {
      const int k = Lanes::index(i);
      if (live && k < K) f.gates[n * K + k] = gate[i] * factor, f.top_k_index[n * K + k] = chosen[i];
    }
    const float norm = shape.gate == Gate::sigmoid ? 1.0f / p.total() : 1.0f;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (live) prob[i] += p.v[i] * norm;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    __syncthreads();
    probs[threadIdx.x] = prob[i], counts[threadIdx.x] = count[i];
    __syncthreads();
    const int e = i * LANES + int(threadIdx.x);
    if (threadIdx.x < LANES && e < E) {
      float sum = 0;
      int total = 0;
      for (int g = 0; g < groups; ++g) sum += probs[g * LANES + threadIdx.x], total += counts[g * LANES + threadIdx.x];
      f.block_prob[block * E + e] = sum, f.block_count[block * E + e] = total;
    }
  }
}

// ---- backward ----

struct Backward {
  const float* dgates;         // (N,K)
  const float* gates;          // (N,K)
  const int32_t* top_k_index;  // (N,K)
  const float* lse;            // (N)
  const int32_t* group_count;  // (G,E)
  const StepParams* params;
  RouterShape shape;
};

// What the forward pass left of a token.
template <int LANES>
struct Choice {
  static constexpr int slots = Group<LANES>::slots;
  float lse, gate[slots], dgate[slots];
  int expert[slots];
  __device__ Choice(const Backward& b, int64_t n) : lse(b.lse[n]) {
    const int K = int(b.shape.K);
#pragma unroll
    for (int i = 0; i < slots; ++i) {
      const int64_t at = n * K + Group<LANES>::index(i);
      const bool inside = Group<LANES>::index(i) < K;
      expert[i] = inside ? b.top_k_index[at] : 0;
      gate[i] = inside ? b.gates[at] : 0, dgate[i] = inside ? b.dgates[at] : 0;
    }
  }
};

// The gradient of a token's logits, with what is the same for all tokens of a balance group.
template <int LANES, int V>
struct LogitGradient {
  using Lanes = Group<LANES>;
  RouterShape shape;
  float z_scale, balance[V];

  __device__ LogitGradient(const Backward& b, int64_t group) : shape(b.shape) {
    const double per_group = double(shape.N / shape.G), scale = b.params->micro_step_scale;
    z_scale = float(2 * shape.z_coef * scale / double(shape.N));
    // d aux / d P_e of a token's group, per selection counted: coef * E / G * f_e / tokens, f_e = count / (tokens * K); of
    // several ranks as in router.cpp.
    const float aux_scale = float(shape.aux_coef * scale * double(shape.E) / double(shape.G) /
                                  (per_group * per_group * double(shape.ranks) * double(shape.K)));
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = Lanes::index(i);
      balance[i] = e < shape.E ? aux_scale * float(b.group_count[group * shape.E + e]) : 0;
    }
  }

  // ds from the token's logits in `row`; of no meaning from expert E on.
  __device__ void operator()(float (&ds)[V], const float* row, const Choice<LANES>& c) const {
    const int E = int(shape.E), K = int(shape.K);
    const bool softmax = shape.gate == Gate::softmax, renormalised = shape.norm_topk_prob;
    Scores<LANES, V> s, p;
    s.load(row, E);
    p.activate(s, c.lse, E, shape.gate);
    const float norm = softmax ? 1.0f : 1.0f / p.total();
    float weighted = 0, chosen_sum = 0, inner = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) weighted += balance[i] * p.v[i] * norm;
    weighted = Lanes::sum(weighted);

    float chosen_score[c.slots] = {};
#pragma unroll
    for (int i = 0; i < c.slots; ++i)
      if (Lanes::index(i) < K) {
        chosen_score[i] = score(row[c.expert[i]], c.lse, shape.gate);
        chosen_sum += chosen_score[i];
        inner += c.dgate[i] * (renormalised ? c.gate[i] : chosen_score[i]);
      }
    chosen_sum = Lanes::sum(chosen_sum) + 1e-20f, inner = Lanes::sum(inner);
    const float z = z_scale * c.lse, scale = float(shape.route_scale);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float dp = (balance[i] - weighted) * norm;
      ds[i] = softmax ? p.v[i] * (dp + z - (renormalised ? 0 : inner)) : dp;
    }
    // Every lane computes what its choices add, and hands it to the lane that has the expert.
#pragma unroll
    for (int i = 0; i < c.slots; ++i) {
      if (i * LANES >= K) break;
      float mine;
      if (softmax)
        mine = renormalised ? c.gate[i] * (c.dgate[i] - inner) : chosen_score[i] * c.dgate[i];
      else
        mine = renormalised ? (scale * c.dgate[i] - inner) / chosen_sum : scale * c.dgate[i];
      for (int from = 0; from < LANES && i * LANES + from < K; ++from) {
        const float added = __shfl_sync(~0u, mine, from, LANES);
        const int e = __shfl_sync(~0u, c.expert[i], from, LANES);
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (Lanes::index(j) == e) ds[j] += added;
      }
    }
    if (softmax) return;
#pragma unroll
    for (int i = 0; i < V; ++i) ds[i] = p.v[i] * (1.0f - p.v[i]) * ds[i] + z * expf(s.v[i] - c.lse);
  }
};

// ds as the sum of three bf16 numbers, which hold all 24 bits of it.
__device__ __forceinline__ void split(bf16 (&part)[3], float ds) {
#pragma unroll
  for (int i = 0; i < 3; ++i) part[i] = from_float<bf16>(ds), ds -= to_float(part[i]);
}

// A token's row of parts, `width` elements: the highest parts of all E experts, then the next, then the last, then zeros.
template <int LANES, int V>
__device__ void store_parts(bf16* row, const float (&ds)[V], int E, int width) {
  using Lanes = Group<LANES>;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int e = Lanes::index(i);
    if (e >= E) continue;
    bf16 part[3];
    split(part, ds[i]);
#pragma unroll
    for (int j = 0; j < 3; ++j) row[j * E + e] = part[j];
  }
  for (int i = 3 * E + Lanes::lane(); i < width; i += LANES) row[i] = from_float<bf16>(0);
}

}  // namespace router_token
