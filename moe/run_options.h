// How a model is run: batch, memory, kernels, processes.
#pragma once
#include <vector>

#include "llmc/adamw.h"
#include "llmc/global_norm.h"
#include "moe/config.h"
#include "moe/expert_mlp.h"
#include "moe/expert_parallel.h"
#include "moe/parallel.h"

// How tokens get to the ranks of their experts: sent, as many as the host has read that there are, or fetched by kernels
// from memory that is mapped (peer_memory.h), which a captured graph can hold.
enum class Transport { exchange, pull };

struct RunOptions {
  int64_t B = 16, T = 256;  // sequences of a micro-batch, tokens of a sequence
  int64_t micro_steps = 1;  // micro-batches of a step; micro_step() is to be called so many times
  bool train = true, evaluate = true;
  bool token_losses = false, logits = false;  // evaluation leaves the loss, the logits of every token
  int64_t decode_positions = 0;               // length of the key/value cache; 0: no decoding
  bool wide_gradients = true;                 // gradients of matrices in Acc; else in Real
  int64_t grad_bucket = int64_t(32) << 20;    // elements of gradients that ranks exchange at a time, at least
  Dispatch dispatch = Dispatch::zero_buffer;
  std::vector<Recompute> recompute;  // per layer; empty: act
  bool separate_arena = false;
  bool graphs = true;  // GPU: programs are captured and replayed; off: launched op by op, with the same bits
  bool record_routing = false, replay_routing = false;
  Transport transport = Transport::exchange;
  double row_headroom = 1.5;  // rows that a rank's experts have memory for, over the mean (--ep, --etp)
  // Slots of a rank over its share of the experts; of these (the last ones) those that are filled within a step only.
  int64_t extra_slots = 0, shadow_slots = 0;
  std::vector<std::vector<int32_t>> places;  // of the experts (expert_slots.h), by layer; empty: in order
  AdamWConfig adamw;
  UpdateRules rules;
  Parallel parallel;  // B, T and micro_steps are of this rank

  int64_t tokens() const { return B * T / parallel.layout.tp; }  // whose residual stream this rank has
  ExpertRanks expert_ranks(const ModelConfig& c) const {
    const Layout& layout = parallel.layout;
    const Place& here = parallel.here;
    return {layout.ep * layout.etp,    here.ep * layout.etp + here.etp, tokens(), c.top_k, c.n_expert, layout.etp,
            extra_slots + shadow_slots};
  }
  ExpertSlots expert_slots(const ModelConfig& c, int64_t layer) const {
    const ExpertRanks r = expert_ranks(c);
    ExpertSlots s = experts_in_order(r.E, r.ranks / r.parts, r.ranks, r.slots());
    if (!places.empty()) s.place = places[layer];
    return s;
  }
  Recompute policy(int64_t layer) const { return recompute.empty() ? Recompute::act : recompute[layer]; }
};

// Rows of the experts of one of the ranks that share them: as many as its own tokens have where it has all experts, else a
// headroom over its share, and what exceeds it in further passes.
struct ExpertRows {
  int64_t a_pass, most;
  int64_t passes() const { return (most + a_pass - 1) / a_pass; }
};
inline ExpertRows expert_rows(const ExpertRanks& r, double headroom) {
  if (r.ranks == 1) return {r.share(), r.share()};
  const int64_t most = r.M() * std::min(r.K, r.slots());
  return {std::min(most, std::max<int64_t>(64, (int64_t(headroom * double(r.share())) + 63) / 64 * 64)), most};
}
