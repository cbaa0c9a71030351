// The tensors of a GPT-MoE: which there are, under which names, in which buffers, and where their optimizer state lives.
#pragma once
#include "llmc/parameters.h"
#include "moe/config.h"
#include "moe/pipeline.h"
#include "moe/tensor_parallel.h"

// Buffers of the table by what they are for; -1: the model has none, or another pipeline stage has it.
struct ModelBuffers {
  struct Layer {
    int norm1, qkv, o, q_norm = -1, k_norm = -1, norm2;
    int router = -1, w13, w2, shared13 = -1, shared2 = -1;  // w13, w2: the experts, or the dense MLP
  };
  int embedding = -1, norm = -1, head = -1;  // head: the embedding itself where they are tied
  std::vector<Layer> layers;
};

// Fills the plan with what this rank's stage has, and the table with every tensor, in the same order on all ranks.
template <class Device>
ModelBuffers declare_parameters(ParameterTable<Device>& table, Plan& plan, const ModelConfig& c,
                                const RunOptions& options) {
  const Parallel& parallel = options.parallel;
  const Stage stage = stage_of(c, options);
  bool here = true;  // does this stage have what is declared next?
  ModelBuffers buffers;
  int64_t C = c.d_model, HD = c.head_dim, E = c.n_expert, V = c.vocab_size, tp = parallel.layout.tp;
  bool train = options.train, wide = options.wide_gradients;
  // Experts whose rows come in several passes add to their gradients more than once.
  bool wide_experts = wide || expert_rows(options.expert_ranks(c), options.row_headroom).passes() > 1;
  const VocabularyPart ids = vocabulary_part(c, parallel.layout.tp, parallel.here.tp);
  struct Cut {  // of a matrix: this rank's part of so many
    int parts = 1, part = 0;
  };
  const Cut whole, by_tp{parallel.layout.tp, parallel.here.tp}, by_etp{parallel.layout.etp, 0};
  auto dense = [&](const std::vector<int64_t>& pieces, int64_t rows = 0) {
    return parallel.dense(pieces, norm_block_rows, rows);
  };
  auto add_buffer = [&](const std::string& name, const Homes& homes, int64_t cols, auto... kind_of_gradient) {
    return here ? table.add_buffer(plan, name, homes, cols, train, kind_of_gradient...) : -1;
  };
  auto matrix = [&](const std::string& name, int64_t rows, int64_t cols, Init init, int layer, int buffer, RowMap map,
                    Cut cut, bool cut_rows) {
    Parameter p;
    p.name = name, p.rows = rows, p.cols = cols, p.init = init, p.decay = true;
    p.layer = layer, p.buffer = buffer, p.map = map;
    p.cuts = cut.parts, p.cut = cut.part, p.cut_rows = cut_rows;
    table.add(p);
  };
  auto vector = [&](const std::string& name, int64_t cols, int layer) {
    Parameter p;
    p.name = name, p.cols = cols, p.vector = true, p.init = Init::ones, p.layer = layer;
    p.buffer = add_buffer(name, parallel.replicated({1}, norm_block_rows), cols, true);
    table.add(p);
    return p.buffer;
  };
  // A matrix whose gradient is one product a micro-step. Where that is one a step, it is written and never zeroed.
  auto product = [&](const std::string& name, const Homes& homes, int64_t cols, bool wide) {
    return add_buffer(name, homes, cols, wide, false, options.micro_steps == 1);
  };
  // An MLP of `experts` experts of width F, which is cut, at home as `homes` says; `prefix(e)` names expert e. A gate row
  // and an up row are updated together.
  auto mlp = [&](const std::string& name, int64_t experts, int64_t F, int layer, bool wide, auto homes, auto prefix,
                 Cut cut, int& w13, int& w2) {
    const int64_t part = F / cut.parts;
    w13 = product(name + ".w13", homes(2 * part, 2 * norm_block_rows), C, wide);
    w2 = product(name + ".w2", homes(C, norm_block_rows), part, wide);
    for (int64_t e = 0; e < experts; ++e) {
      auto rows = [&](bool up) { return RowMap{e * 2 * part + w13_row(0, up), 8, 16}; };
      matrix(prefix(e) + "gate_proj.weight", F, C, Init::normal, layer, w13, rows(false), cut, true);
      matrix(prefix(e) + "up_proj.weight", F, C, Init::normal, layer, w13, rows(true), cut, true);
      matrix(prefix(e) + "down_proj.weight", C, F, Init::residual, layer, w2, {e * C, 1, 1}, cut, false);
    }
  };
  auto one = [&](int64_t rows, int64_t unit) { return parallel.dense({rows}, unit, 0); };

  here = stage.first() || (c.tied && stage.last());
  buffers.embedding = add_buffer(
      "model.embed_tokens.weight",
      c.tied ? parallel.ends({ids.rows}, norm_block_rows, ids.padded) : dense({ids.rows}, ids.padded), C, wide, c.tied);
  matrix("model.embed_tokens.weight", V, C, Init::normal, -1, buffers.embedding, {}, by_tp, true);
  for (int l = 0; l < c.n_layer; ++l) {
    here = stage.has(l);
    ModelBuffers::Layer b;
    std::string layer = "model.layers." + std::to_string(l) + ".", attention = layer + "self_attn.",
                moe = layer + "mlp.";
    plan.set_place(l, "attention");
    b.norm1 = vector(layer + "input_layernorm.weight", C, l);
    int64_t q = c.n_head * HD, kv = c.n_kv_head * HD;
    b.qkv = product(attention + "qkv", dense({q / tp, kv / tp, kv / tp}), C, wide);
    matrix(attention + "q_proj.weight", q, C, Init::normal, l, b.qkv, {0, 1, 1}, by_tp, true);
    matrix(attention + "k_proj.weight", kv, C, Init::normal, l, b.qkv, {q / tp, 1, 1}, by_tp, true);
    matrix(attention + "v_proj.weight", kv, C, Init::normal, l, b.qkv, {(q + kv) / tp, 1, 1}, by_tp, true);
    b.o = product(attention + "o_proj.weight", dense({C}), q / tp, wide);
    matrix(attention + "o_proj.weight", C, q, Init::residual, l, b.o, {}, by_tp, false);
    if (c.qk_norm) {
      b.q_norm = vector(attention + "q_norm.weight", HD, l);
      b.k_norm = vector(attention + "k_norm.weight", HD, l);
    }
    plan.set_place(l, c.is_dense(l) ? "mlp" : "moe");
    b.norm2 = vector(layer + "post_attention_layernorm.weight", C, l);
    if (c.is_dense(l)) {
      mlp(
          moe + "dense", 1, c.d_dense, l, wide, one, [&](int64_t) { return moe; }, by_tp, b.w13, b.w2);
    } else {
      b.router = add_buffer(moe + "gate.weight", parallel.replicated({E}, norm_block_rows), C, true);
      matrix(moe + "gate.weight", E, C, Init::normal, l, b.router, {}, whole, true);
      auto expert = [&](int64_t e) { return moe + "experts." + std::to_string(e) + "."; };
      const ExpertSlots slots = options.expert_slots(c, l);
      auto many = [&](int64_t rows, int64_t unit) { return parallel.experts(slots, rows, unit); };
      mlp(moe + "experts", E, c.d_expert, l, wide_experts, many, expert, by_etp, b.w13, b.w2);
      auto shared = [&](int64_t) { return moe + "shared_expert."; };
      if (c.d_shared) mlp(moe + "shared", 1, c.d_shared, l, wide, one, shared, by_tp, b.shared13, b.shared2);
    }
    buffers.layers.push_back(b);
  }
  plan.set_place(-1, "");
  here = stage.last();
  buffers.norm = vector("model.norm.weight", C, -1);
  buffers.head = buffers.embedding;
  if (!c.tied) {
    buffers.head = add_buffer("lm_head.weight", dense({ids.rows}, ids.padded), C, true);
    matrix("lm_head.weight", V, C, Init::normal, -1, buffers.head, {}, by_tp, true);
  }
  return buffers;
}
