// The router on the GPU. In bf16 a pass is one kernel where that is faster (router_fused.cuh). Elsewhere logits
// come from one dense product, and everything after it is a kernel in which a group of lanes holds all E scores of a
// token in registers (router_token.cuh).
//
// The backward pass needs ds (N,E) in fp32 times bf16 matrices. Tensor cores multiply bf16, so ds is written as the sum
// of three bf16 numbers, which hold all 24 bits of it, and the products with them are summed in fp32: as exact as fp32.
#include "moe/router.h"

#include "llmc/cuda_common.cuh"
#include "llmc/cuda_matmul.cuh"
#include "moe/router_fused.cuh"
#include "moe/router_token.cuh"

namespace {

using namespace router_token;

constexpr int threads = 256;
constexpr int block_tokens = 64;  // tokens whose statistics are summed before the blocks are

// logits (N,E); grid (G, blocks of a group of statistics)
template <int LANES, int V>
__global__ void __launch_bounds__(threads) choose(Forward f, const float* logits) {
  __shared__ float probs[threads];
  __shared__ int32_t counts[threads];
  const int64_t per_group = f.shape.N / f.shape.G, first = int64_t(blockIdx.y) * block_tokens;
  const int64_t n0 = int64_t(blockIdx.x) * per_group + first;
  choose_tokens<LANES, V, threads>(f, logits + n0 * f.shape.E, int(f.shape.E), n0,
                                   int(min(int64_t(block_tokens), per_group - first)),
                                   int64_t(blockIdx.x) * gridDim.y + blockIdx.y, probs, counts);
}

// A warp an entry of (G,E): its blocks' sums, in a fixed order.
__global__ void sum_statistics(float* group_prob, int32_t* group_count, const float* block_prob,
                               const int32_t* block_count, int blocks, int E, int64_t entries) {
  int64_t entry = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (entry >= entries) return;
  int64_t g = entry / E, e = entry % E;
  float sum = 0;
  int count = 0;
#pragma unroll 8
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
  double tokens = double(shape.N * shape.ranks) / double(shape.G), balance = 0, z = 0;
  for (int64_t i = threadIdx.x; i < shape.G * shape.E; i += 1024)
    balance += double(group_count[i]) / (tokens * double(shape.K)) * double(group_prob[i]) / tokens;
  for (int64_t n = threadIdx.x; n < shape.N; n += 1024) z += double(lse[n]) * double(lse[n]);
  for (int64_t e = threadIdx.x; load && e < shape.E; e += 1024) {
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
__global__ void __launch_bounds__(threads) logit_gradient(float* logits, bf16* parts, int width, Backward b) {
  const int E = int(b.shape.E);
  // no early exit: lanes of a warp work together
  const int64_t token = int64_t(blockIdx.x) * (threads / LANES) + threadIdx.x / LANES, n = min(token, b.shape.N - 1);
  float* row = logits + n * E;
  float ds[V];
  const LogitGradient<LANES, V> gradient(b, n / (b.shape.N / b.shape.G));
  gradient(ds, row, Choice<LANES>(b, n));
  __syncwarp();  // the row has been read
  if (token >= b.shape.N) return;
  if (parts) {
    store_parts<LANES, V>(parts + n * width, ds, E, width);
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (Group<LANES>::index(i) < E) row[Group<LANES>::index(i)] = ds[i];
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

// (G, blocks of a group of statistics), where a block has `tokens` tokens
dim3 statistics_grid(const RouterShape& s, int64_t tokens) {
  const int64_t blocks = ceil_div(s.N / s.G, tokens);
  if (blocks > 65535) fail("the router on the GPU: at most ", 65535 * tokens, " tokens share balance statistics");
  return dim3(unsigned(s.G), unsigned(blocks));
}

// Pieces of the scratch memory, each at a multiple of 256 bytes: enough for either way.
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

// Whether a pass is one kernel (router_fused.cuh); p: the matrices that it reads and writes in rows of C. With more experts
// than these the library's product wins: forward the choice is work that nothing overlaps once all blocks are at it.
constexpr int64_t most_forward = 32, most_backward = 128;
template <class Real, class... Pointers>
bool is_fused(const GpuBase& dev, const RouterShape& s, int64_t most_experts, Pointers... p) {
  return std::is_same_v<Real, bf16> && !dev.portable && !dev.plain_matmul && s.E <= most_experts &&
         packable<Real>(s.C, p...) && dev.shared_bytes_per_block >= size_t(router_fused::Layout<32, 4>::bytes);
}
// Calls f<Layout>(grid) for a fused kernel.
template <int64_t most_experts, class F>
void with_layout(const RouterShape& shape, F f) {
  with_expert_shape(shape, [&]<int LANES, int V>() {
    if constexpr (LANES * V <= most_experts) {
      using L = router_fused::Layout<LANES, V>;
      static_assert(L::tokens >= block_tokens);  // which Scratch counts with
      f.template operator()<L>(statistics_grid(shape, L::tokens));
    }
  });
}

}  // namespace

template <class Device>
void router_forward(Device& dev, typename Device::Acc* gates, int32_t* top_k_index, typename Device::Acc* lse,
                    typename Device::Acc* group_prob, int32_t* group_count, void* scratch,
                    const typename Device::Real* x, const typename Device::Real* wg, const typename Device::Acc* bias,
                    const int32_t* replay, RouterShape s) {
  using Real = typename Device::Real;
  Scratch<Real> at(s);
  char* memory = static_cast<char*>(scratch);
  Forward f{gates,
            top_k_index,
            lse,
            reinterpret_cast<float*>(memory + at.block_prob),
            reinterpret_cast<int32_t*>(memory + at.block_count),
            bias,
            replay,
            s,
            dev.status,
            dev.layer};
  dim3 grid;
  if (is_fused<Real>(dev, s, most_forward, x, wg)) {
    if constexpr (std::is_same_v<Real, bf16>)
      with_layout<most_forward>(s, [&]<class L>(dim3 blocks) {
        grid = blocks;
        launch(dev, router_fused::forward<L>, grid, L::threads, L::bytes, f, x, wg);
      });
  } else {
    float* logits = reinterpret_cast<float*>(memory + at.logits);
    dense_product(dev, view(logits, s.E), memory + at.product, view(x, s.C), false, view(wg, s.C), true, s.N, s.E, s.C,
                  false);
    grid = statistics_grid(s, block_tokens);
    with_expert_shape(s, [&]<int LANES, int V>() { launch(dev, choose<LANES, V>, grid, threads, 0, f, logits); });
  }
  launch(dev, sum_statistics, dim3(unsigned(ceil_div(s.G * s.E, 8))), 256, 0, group_prob, group_count, f.block_prob,
         f.block_count, int(grid.y), int(s.E), s.G * s.E);
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
  const int width = int(at.width);
  const Backward b{dgates, gates, top_k_index, lse, group_count, params, s};
  const bool fused = is_fused<Real>(dev, s, most_backward, x, wg, dx);
  if (!fused) {
    dense_product(dev, view(logits, s.E), product, view(x, s.C), false, view(wg, s.C), true, s.N, s.E, s.C, false);
    with_expert_shape(s, [&]<int LANES, int V>() {
      launch(dev, logit_gradient<LANES, V>, dim3(unsigned(ceil_div(s.N, threads / LANES))), threads, 0, logits, parts,
             width, b);
    });
  }
  if constexpr (split) {
    if (fused) {
      with_layout<most_backward>(s, [&]<class L>(dim3 grid) {
        launch(dev, router_fused::backward<L>, grid, L::threads, L::bytes, dx, parts, width, b, x, wg);
      });
    } else {
      bf16* weights = reinterpret_cast<bf16*>(memory + at.weights);
      launch(dev, repeat_weight, dim3(unsigned(dev.multiprocessors)), 256, 0, weights, wg, s.E, s.C, at.width);
      dense_product(dev, view(dx, s.C), product, view(parts, at.width), false, view(weights, s.C), false, s.N, s.C,
                    at.width, false);
    }
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
