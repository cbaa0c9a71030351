// The router: which K of E experts each token goes to, and with what weight.
//
//   s = x Wg^T in Acc.
//   softmax: p = softmax(s), top-k of p; gate = p / sum of the chosen p (norm_topk_prob), or p itself.
//   sigmoid: p = sigmoid(s), top-k of p + b (b: selection bias, DeepSeek-V3 eq. 16); gate = route_scale * p, divided by
//            (sum of the chosen p + 1e-20) with norm_topk_prob.
// Ties go to the lower index; NaN comes after every number. K <= E. No gradient flows through the choice, through b, or through f below. (N,E) is never kept:
// the backward pass computes s again.
//
// Balance loss (Fedus et al. 2021, eq. 4-6, generalised to K choices): over a group of tokens, f_e = selections of e /
// (tokens*K), P_e = mean p (sigmoid: p first divided by its sum over E); loss = coef * E * sum_e f_e P_e, averaged over
// the G groups: G = 1, all tokens of the micro-step, or G = B, one a sequence. 1 * coef at perfect balance.
// z-loss (Zoph et al. 2022, eq. 5): coef * mean(lse^2), lse = logsumexp(s).
#pragma once
#include "llmc/gradient.h"
#include "llmc/step.h"

enum class Gate : int32_t { softmax, sigmoid };

struct RouterShape {
  int64_t N, C, E, K;
  int64_t G;  // groups of balance statistics; divides N; tokens of a group are consecutive
  Gate gate;
  bool norm_topk_prob;
  double route_scale;  // sigmoid only
  double aux_coef, z_coef;
  int64_t ranks = 1;  // processes whose tokens share the statistics: group_prob and group_count are their sums
};

// out     gates (N,K) Acc; top_k_index (N,K) int32, best first
// saved   lse (N) Acc
// stats   group_prob (G,E) Acc: sum of p over the group; group_count (G,E) int32: selections, before any dropping
// in      x (N,C), wg (E,C), bias (E) Acc or null (softmax), replay (N,K) int32 or null: the choice to use instead of
//         the top-k (recorded earlier). Errors: a replayed index outside [0,E) sets DeviceStatus::expert_out_of_range.
template <class Device>
void router_forward(Device& dev, typename Device::Acc* gates, int32_t* top_k_index, typename Device::Acc* lse,
                    typename Device::Acc* group_prob, int32_t* group_count, void* scratch,
                    const typename Device::Real* x, const typename Device::Real* wg, const typename Device::Acc* bias,
                    const int32_t* replay, RouterShape shape);

// stats->aux_loss and z_loss += this layer's, times params->micro_step_scale; load (E) int32 += selections,
// unless it is null.
template <class Device>
void balance_loss(Device& dev, StepStats* stats, int32_t* load, const typename Device::Acc* group_prob,
                  const int32_t* group_count, const typename Device::Acc* lse, const StepParams* params,
                  RouterShape shape);

// dx (N,C) = the router's part of the gradient of x; dwg (E,C) += .
//   in  dgates (N,K), 0 for dropped slots; gates, top_k_index, lse, group_count as the forward pass left them
template <class Device>
void router_backward(Device& dev, typename Device::Real* dx, Grad<Device> dwg, void* scratch,
                     const typename Device::Acc* dgates, const typename Device::Acc* gates, const int32_t* top_k_index,
                     const typename Device::Acc* lse, const int32_t* group_count, const typename Device::Real* x,
                     const typename Device::Real* wg, const StepParams* params, RouterShape shape);
template <class Device>
size_t router_scratch_bytes(RouterShape shape);

// bias (E) += rate * sign(mean load - load_e), from the loads of a whole step, unless stats->skip
// (Wang et al. 2024, "Auxiliary-loss-free load balancing", algorithm 1).
template <class Device>
void router_bias_update(Device& dev, typename Device::Acc* bias, const int32_t* load, const StepStats* stats,
                        double rate, int64_t E);
