// What the rungs of the ladder share: router and routing plan, which are production's in every rung; the way of a
// gradient back to the tokens; the passes over rows that production has no need of; and the letters of predictions.
#pragma once
#include "dev/bench.h"
#include "dev/moe_layer/layer_program.h"
#include "llmc/cuda_common.cuh"

namespace ladder {

using Device = Gpu<bf16>;
using Layer = MoeLayer<Device>;
using Saved = Kept<Device>;
using Rows = Tensor<bf16>;

// ---- predictions ----

// N tokens of width C, R = N*K rows, E experts of width F.
struct Letters {
  double NC, RC, RF, ECF, NE, RCF;
  explicit Letters(const MoeShape& s)
      : NC(double(s.T * s.d)),
        RC(double(s.rows() * s.d)),
        RF(double(s.rows() * s.n)),
        ECF(double(s.E * s.d * s.n)),
        NE(double(s.T * s.E)),
        RCF(RC * double(s.n)) {}
};

// A pass of the layer is kernels one after another, each bound by the tensor cores or by memory, so floors add up. Bytes:
// every tensor that a kernel reads or writes counts once, tokens that are read through row_slot once for each row (they
// are too many for the L2 cache to hold until the next expert asks for the same one). The router's own operations, 14 N C E
// in all, are left out.
using Steps = std::vector<bench::Work>;
inline bench::Work pass(double bytes) { return {0, bytes}; }
inline bench::Work product(double flops, double bytes) { return {flops, bytes}; }
inline bench::Work router_pass(const Letters& l) { return pass(2 * l.NC + 8 * l.NE); }
inline bench::Work router_backward_pass(const Letters& l) { return pass(6 * l.NC + 26 * l.NE); }
inline bench::Work combine_pass(const Letters& l) { return pass(2 * l.RC + 4 * l.NC); }

// ---- what all rungs begin and end with ----

// Gates, choices and the routing plan, as MoeLayer::forward() makes them. counts are metadata here: rung 1 wants them
// again.
inline void route(Layer& l, Saved& s, Rows input, bool keep) {
  auto& x = l.x;
  const int64_t N = l.router.N, E = l.router.E, K = l.router.K;
  const Category metadata = keep ? Category::metadata : Category::workspace;
  s.gates = x.tensor<float>("gates", {N, K}, metadata);
  s.lse = x.tensor<float>("lse", {N}, metadata);
  s.top_k_index = x.tensor<int32_t>("top_k_index", {N, K}, metadata);
  s.group_count = x.tensor<int32_t>("group_count", {l.router.G, E}, metadata);
  auto group_prob = x.tensor<float>("group_prob", {l.router.G, E});
  x.op("router", router_forward<Device>, s.gates, s.top_k_index, s.lse, group_prob, s.group_count, l.router_scratch(),
       input, l.wg, l.bias, l.replay, l.router);
  x.op("balance loss", balance_loss<Device>, l.stats, l.load, group_prob, s.group_count, s.lse, l.params, l.router);
  s.experts.plan.counts = x.tensor<int32_t>("counts", {E}, metadata);
  s.experts.plan.offsets = x.tensor<int32_t>("offsets", {E + 1}, metadata);
  s.experts.plan.row_slot = x.tensor<int32_t>("row_slot", {l.experts.shape.R}, metadata);
  s.experts.plan.slot_row = x.tensor<int32_t>("slot_row", {N, K}, metadata);
  auto scratch = x.tensor<char>("plan.scratch", {int64_t(dispatch_scratch_bytes<Device>(N, K, E))});
  x.op("routing plan", dispatch_plan<Device>, s.experts.plan, scratch, s.top_k_index, N, K, E, l.experts.capacity);
}

// out (N,C) = residual + the gated sum of each token's rows of y (R,C).
inline Rows combine_rows(Layer& l, const Saved& s, Rows y, Rows residual) {
  const int64_t N = l.router.N, C = l.router.C, K = l.router.K;
  auto out = l.x.tensor<bf16>("residual", {N, C});
  l.x.op("combine", combine<Device>, out, y, residual, s.gates, s.experts.plan.slot_row, N, K, C);
  return out;
}

// The router's part of the gradient of x (N,C), from dgates (N,K).
inline Rows router_gradient(Layer& l, const Saved& s, Rows input, Tensor<float> dgates) {
  auto dx = l.x.tensor<bf16>("dx", {l.router.N, l.router.C});
  l.x.op("router backward", router_backward<Device>, dx, l.dwg, l.router_scratch(), dgates, s.gates, s.top_k_index,
         s.lse, s.group_count, input, l.wg, l.params, l.router);
  return dx;
}

// From dh (R,2F) on nothing differs between rungs 2 to 4 and production: dX, and dinput (N,C) from the router's part and
// the rows'.
inline Rows gradient_of_tokens(Layer& l, const Saved& s, Rows input, Rows dh, Tensor<float> dgates) {
  const int64_t N = l.router.N, C = l.router.C, K = l.router.K;
  auto dx_rows = l.x.tensor<bf16>("dx_rows", {l.experts.shape.R, C});
  l.x.op("experts dX", experts_up_backward_input<Device>, dx_rows, l.experts.scratch(), dh, l.experts.weights.w13,
         s.experts.plan.offsets, l.experts.shape);
  Rows dinput = router_gradient(l, s, input, dgates);
  l.x.op("combine backward", combine<Device>, dinput, dx_rows, dinput, nullptr, s.experts.plan.slot_row, N, K, C);
  return dinput;
}

// ---- passes over rows ----
// A warp a row, 16 bytes a lane at a time. Rows are [0, offsets[E]): of one expert alone where the caller shifts all
// pointers to its first row and passes its count as offsets[0] and 0 as E.

constexpr int row_warps = 8;

// rows (R,W): row r times gates[slot(r)], in place.
__global__ void __launch_bounds__(row_warps * 32)
    scale_rows_kernel(bf16* rows, const float* gates, const int32_t* offsets, const int32_t* row_slot, int E,
                      int64_t W) {
  const int64_t r = int64_t(blockIdx.x) * row_warps + threadIdx.x / 32;
  if (r >= offsets[E]) return;
  const float gate = gates[row_slot[r]];
  for (int64_t c = threadIdx.x % 32 * Pack<bf16>::n; c < W; c += 32 * Pack<bf16>::n) {
    auto* at = reinterpret_cast<Pack<bf16>*>(rows + r * W + c);
    Pack<bf16> v = *at;
#pragma unroll
    for (int i = 0; i < Pack<bf16>::n; ++i) v.set(i, gate * v[i]);
    *at = v;
  }
}
inline void scale_rows(Device& dev, bf16* rows, const float* gates, const int32_t* offsets, const int32_t* row_slot,
                       int64_t R, int64_t E, int64_t W) {
  launch(dev, scale_rows_kernel, dim3(unsigned(ceil_div(R, row_warps))), row_warps * 32, 0, rows, gates, offsets,
         row_slot, int(E), W);
}

// dgates (N,K) at slot(r) = <dout of row r, y of row r>, y (R,C). K > 0: dout is (N,C) and row r is that of its token;
// K = 0: dout is (R,C).
__global__ void __launch_bounds__(row_warps * 32)
    dot_rows_kernel(float* dgates, const bf16* dout, const bf16* y, const int32_t* offsets, const int32_t* row_slot,
                    int K, int E, int64_t C) {
  const int64_t r = int64_t(blockIdx.x) * row_warps + threadIdx.x / 32;
  if (r >= offsets[E]) return;
  const int slot = row_slot[r];
  const bf16 *d = dout + (K > 0 ? slot / K : r) * C, *v = y + r * C;
  float sum = 0;
  for (int64_t c = threadIdx.x % 32 * Pack<bf16>::n; c < C; c += 32 * Pack<bf16>::n) {
    const Pack<bf16> p = *reinterpret_cast<const Pack<bf16>*>(d + c), q = *reinterpret_cast<const Pack<bf16>*>(v + c);
#pragma unroll
    for (int i = 0; i < Pack<bf16>::n; ++i) sum += p[i] * q[i];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) dgates[slot] = sum;
}
inline void dot_rows(Device& dev, float* dgates, const bf16* dout, const bf16* y, const int32_t* offsets,
                     const int32_t* row_slot, int64_t R, int64_t K, int64_t E, int64_t C) {
  launch(dev, dot_rows_kernel, dim3(unsigned(ceil_div(R, row_warps))), row_warps * 32, 0, dgates, dout, y, offsets,
         row_slot, int(K), int(E), C);
}

}  // namespace ladder
