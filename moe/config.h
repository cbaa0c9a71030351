// What a model is: its dimensions and options, the presets, and the checks that refuse impossible ones.
#pragma once
#include <string>
#include <vector>

#include "llmc/rope.h"
#include "moe/experts.h"
#include "moe/router.h"

enum class Balance { aux, bias, none };
enum class BalanceScope { microbatch, sequence };

struct ModelConfig {
  int64_t n_layer = 4, d_model = 128, n_head = 4, n_kv_head = 2, head_dim = 64, vocab_size = 257;
  int64_t n_expert = 8, top_k = 2, d_expert = 128;
  int64_t d_shared = 0;               // width of the shared expert; 0: none
  std::vector<int64_t> dense_layers;  // these have a dense SwiGLU MLP of width d_dense instead of experts
  int64_t d_dense = 0;
  bool qk_norm = true, tied = true;
  Gate gate = Gate::softmax;
  bool norm_topk_prob = true;
  double route_scale = 1;
  Balance balance = Balance::aux;
  BalanceScope balance_scope = BalanceScope::microbatch;
  double aux_coef = 0.01, z_coef = 0.001, bias_rate = 0.001;
  double capacity_factor = 0;  // 0: dropless
  double rms_norm_eps = 1e-6, rope_theta = 10000;

  bool operator==(const ModelConfig&) const = default;
  bool is_dense(int64_t layer) const;
  HeadShape heads(int ranks = 1) const { return {n_head / ranks, n_kv_head / ranks, head_dim}; }  // of one of so many
  // Rows of the embedding and head buffers: V rounded up to 64.
  int64_t padded_vocab() const { return (vocab_size + 63) / 64 * 64; }
  // Most rows an expert keeps of a micro-batch of N tokens: ceil(c*N*K/E); 0: no limit.
  int64_t capacity(int64_t N) const;
  RouterShape router(int64_t B, int64_t T) const;
  ExpertShape experts(int64_t N) const { return {N * top_k, top_k, n_expert, d_model, d_expert}; }
  // Parameters in all, and those that a token passes through (embedding look-up not counted).
  int64_t parameters() const;
  int64_t active_parameters() const;
  // Throws one line naming the option for anything that cannot be built.
  void validate() const;
};

// tiny, gpt124-8x2, olmoe-1b-7b-size, qwen3-30b-a3b, mixtral-8x7b. Balance coefficients are in our convention (1 at
// balance, summed over layers), converted from the published ones. Throws naming the known presets.
ModelConfig preset(const std::string& name);
// The preset of these dimensions, however its experts are balanced; empty: none.
std::string preset_of(const ModelConfig& c);

// Names of enumerators as options and files spell them; parsers throw naming the choices.
const char* name_of(Gate g);
const char* name_of(Balance b);
const char* name_of(BalanceScope s);
Gate parse_gate(const std::string& s);
Balance parse_balance(const std::string& s);
BalanceScope parse_balance_scope(const std::string& s);
