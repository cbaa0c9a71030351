#include "moe/hf.h"

#include "llmc/files.h"

using nlohmann::ordered_json;

std::string hf_model_type(const ModelConfig& c, std::string* reason) {
  auto no = [&](const char* why) {
    if (reason) *reason = why;
    return std::string("gpt_moe");
  };
  if (c.gate == Gate::sigmoid) return no("--gate sigmoid");
  if (c.d_shared) return no("--d-shared");
  if (c.capacity_factor > 0) return no("--capacity-factor");
  if (c.qk_norm) return "qwen3_moe";
  if (!c.norm_topk_prob) return no("--norm-topk-prob false without --qk-norm");
  if (!c.dense_layers.empty()) return no("--dense-layers without --qk-norm");
  return "mixtral";
}

std::string hf_tensor_name(const std::string& logical, const std::string& model_type) {
  if (model_type != "mixtral") return logical;
  std::string name = logical;
  const std::pair<const char*, const char*> renames[] = {{".mlp.gate.", ".block_sparse_moe.gate."},
                                                         {".mlp.experts.", ".block_sparse_moe.experts."}};
  for (auto [from, to] : renames)
    if (size_t at = name.find(from); at != std::string::npos) name.replace(at, std::string(from).size(), to);
  if (name.find(".block_sparse_moe.experts.") != std::string::npos) {
    const std::pair<const char*, const char*> projections[] = {
        {"gate_proj", "w1"}, {"up_proj", "w3"}, {"down_proj", "w2"}};
    for (auto [from, to] : projections)
      if (size_t at = name.find(from); at != std::string::npos) name.replace(at, std::string(from).size(), to);
  }
  return name;
}

static ordered_json own_fields(const ModelConfig& c) {
  return {{"n_layer", c.n_layer},
          {"d_model", c.d_model},
          {"n_head", c.n_head},
          {"n_kv_head", c.n_kv_head},
          {"head_dim", c.head_dim},
          {"vocab_size", c.vocab_size},
          {"n_expert", c.n_expert},
          {"top_k", c.top_k},
          {"d_expert", c.d_expert},
          {"d_shared", c.d_shared},
          {"dense_layers", c.dense_layers},
          {"d_dense", c.d_dense},
          {"qk_norm", c.qk_norm},
          {"tied", c.tied},
          {"gate", name_of(c.gate)},
          {"norm_topk_prob", c.norm_topk_prob},
          {"route_scale", c.route_scale},
          {"balance", name_of(c.balance)},
          {"balance_scope", name_of(c.balance_scope)},
          {"aux_coef", c.aux_coef},
          {"z_coef", c.z_coef},
          {"bias_rate", c.bias_rate},
          {"capacity_factor", c.capacity_factor},
          {"rms_norm_eps", c.rms_norm_eps},
          {"rope_theta", c.rope_theta}};
}

ordered_json hf_config(const ModelConfig& c, const ModelFileInfo& info) {
  std::string type = hf_model_type(c);
  int eot = info.tokenizer_id == 1 ? 256 : 50256;
  ordered_json j;
  j["architectures"] = {type == "qwen3_moe" ? "Qwen3MoeForCausalLM"
                        : type == "mixtral" ? "MixtralForCausalLM"
                                            : "GptMoeForCausalLM"};
  j["model_type"] = type;
  j["vocab_size"] = c.vocab_size;
  j["hidden_size"] = c.d_model;
  j["intermediate_size"] = type == "mixtral" ? c.d_expert : c.d_dense ? c.d_dense : c.d_expert;
  j["num_hidden_layers"] = c.n_layer;
  j["num_attention_heads"] = c.n_head;
  j["num_key_value_heads"] = c.n_kv_head;
  j["head_dim"] = c.head_dim;
  j[type == "mixtral" ? "num_local_experts" : "num_experts"] = c.n_expert;
  j["num_experts_per_tok"] = c.top_k;
  if (type != "mixtral") {
    j["moe_intermediate_size"] = c.d_expert;
    j["norm_topk_prob"] = c.norm_topk_prob;
    j["decoder_sparse_step"] = 1;
    j["mlp_only_layers"] = c.dense_layers;
    j["use_sliding_window"] = false;
    j["attention_bias"] = false;
  }
  j["router_aux_loss_coef"] =
      c.aux_coef * double(c.n_layer) / double(c.top_k);  // their loss is K at balance, pooled over layers
  j["rms_norm_eps"] = c.rms_norm_eps;
  j["rope_theta"] = c.rope_theta;
  j["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", c.rope_theta}};
  j["max_position_embeddings"] = info.seq_len;
  j["tie_word_embeddings"] = c.tied;
  j["hidden_act"] = "silu";
  j["torch_dtype"] = info.dtype;
  for (const char* key : {"bos_token_id", "eos_token_id"})
    j[key] = info.token_ids.contains(key) ? info.token_ids[key]
             : eot < c.vocab_size         ? ordered_json(eot)
                                          : ordered_json();
  j["gpt_moe"] = own_fields(c);
  j["gpt_moe"]["tokenizer_id"] = info.tokenizer_id;
  return j;
}

namespace {
// Reads keys of one JSON object, naming file and key in every complaint.
struct Reader {
  const ordered_json& object;
  const std::string& path;
  template <class T>
  void operator()(const char* key, T& value) const {
    auto it = object.find(key);
    if (it == object.end() || it->is_null()) fail(path, ": key '", key, "' is missing");
    try {
      if constexpr (std::is_same_v<T, int64_t>)
        if (!it->is_number_integer()) fail(path, ": key '", key, "' is not an integer");
      if constexpr (std::is_same_v<T, double>)
        if (!it->is_number()) fail(path, ": key '", key, "' is not a number");
      if constexpr (std::is_same_v<T, std::vector<int64_t>>)
        for (const auto& element : *it)
          if (!it->is_array() || !element.is_number_integer())
            fail(path, ": key '", key, "' is not a list of integers");
      value = it->get<T>();
    } catch (const nlohmann::json::exception&) { fail(path, ": key '", key, "' has the wrong type"); }
  }
  template <class T>
  void optional(const char* key, T& value) const {
    auto it = object.find(key);
    if (it != object.end() && !it->is_null()) (*this)(key, value);
  }
};
}  // namespace

ModelConfig read_hf_config(const std::string& path, ModelFileInfo& info, std::string& model_type) {
  ordered_json j = ordered_json::parse(read_file(path, size_t(16) << 20), nullptr, false);
  if (!j.is_object()) fail(path, ": not a JSON object");
  Reader read{j, path};
  read("model_type", model_type);
  read.optional("max_position_embeddings", info.seq_len);
  read.optional("torch_dtype", info.dtype), read.optional("dtype", info.dtype);
  for (const char* key : {"bos_token_id", "eos_token_id"})
    if (j.contains(key)) info.token_ids[key] = j[key];
  ModelConfig c;
  if (auto own = j.find("gpt_moe"); own != j.end() && own->is_object()) {
    Reader r{*own, path};
    std::string gate, balance, scope;
    r("n_layer", c.n_layer), r("d_model", c.d_model), r("n_head", c.n_head), r("n_kv_head", c.n_kv_head);
    r("head_dim", c.head_dim), r("vocab_size", c.vocab_size), r("n_expert", c.n_expert), r("top_k", c.top_k);
    r("d_expert", c.d_expert), r("d_shared", c.d_shared), r("dense_layers", c.dense_layers), r("d_dense", c.d_dense);
    r("qk_norm", c.qk_norm), r("tied", c.tied), r("gate", gate), r("norm_topk_prob", c.norm_topk_prob);
    r("route_scale", c.route_scale), r("balance", balance), r("balance_scope", scope), r("aux_coef", c.aux_coef);
    r("z_coef", c.z_coef), r("bias_rate", c.bias_rate), r("capacity_factor", c.capacity_factor);
    r("rms_norm_eps", c.rms_norm_eps), r("rope_theta", c.rope_theta);
    int64_t tokenizer = 1;
    r("tokenizer_id", tokenizer);
    if (tokenizer != 0 && tokenizer != 1) fail(path, ": key 'tokenizer_id' is ", tokenizer, " (0 GPT-2, 1 bytes)");
    info.tokenizer_id = int(tokenizer), info.own = true;
    try {
      c.gate = parse_gate(gate), c.balance = parse_balance(balance), c.balance_scope = parse_balance_scope(scope);
    } catch (const Error& e) { fail(path, ": ", e.what()); }
  } else if (model_type == "qwen3_moe" || model_type == "mixtral") {
    bool mixtral = model_type == "mixtral";
    read("num_hidden_layers", c.n_layer), read("hidden_size", c.d_model), read("num_attention_heads", c.n_head);
    c.n_kv_head = c.n_head;
    read.optional("num_key_value_heads", c.n_kv_head);
    c.head_dim = c.n_head > 0 ? c.d_model / c.n_head : 0;
    read.optional("head_dim", c.head_dim);
    read("vocab_size", c.vocab_size);
    const bool local = mixtral || (j.contains("num_local_experts") && !j.contains("num_experts"));  // transformers 5
    read(local ? "num_local_experts" : "num_experts", c.n_expert);
    read("num_experts_per_tok", c.top_k);
    read(mixtral ? "intermediate_size" : "moe_intermediate_size", c.d_expert);
    c.qk_norm = !mixtral;
    c.tied = false;
    read.optional("tie_word_embeddings", c.tied);
    c.norm_topk_prob = mixtral;
    double aux = 0.001;
    read.optional("router_aux_loss_coef", aux);
    c.aux_coef = aux * double(c.top_k) / double(std::max<int64_t>(1, c.n_layer));
    c.z_coef = 0;
    read("rms_norm_eps", c.rms_norm_eps);
    bool has_theta = j.contains("rope_theta");
    if (has_theta) read("rope_theta", c.rope_theta);
    if (auto rope = j.find("rope_parameters"); rope != j.end() && rope->is_object()) {
      Reader r{*rope, path};
      std::string kind = "default";
      r.optional("rope_type", kind);
      if (kind != "default") fail(path, ": rope_type '", kind, "' is not supported (only default)");
      r.optional("rope_theta", c.rope_theta);
    }
    std::string act = "silu";
    read.optional("hidden_act", act);
    if (act != "silu") fail(path, ": hidden_act '", act, "' is not supported (only silu)");
    bool sliding = mixtral && j.contains("sliding_window") && !j["sliding_window"].is_null();
    if (!mixtral) read.optional("use_sliding_window", sliding);
    if (sliding) fail(path, ": sliding-window attention is not supported");
    if (auto scaling = j.find("rope_scaling"); scaling != j.end() && scaling->is_object())
      fail(path, ": rope_scaling is not supported");
    if (!mixtral) {
      read.optional("norm_topk_prob", c.norm_topk_prob);
      read.optional("mlp_only_layers", c.dense_layers);
      if (!c.dense_layers.empty()) read("intermediate_size", c.d_dense);
      int64_t sparse_step = 1;
      read.optional("decoder_sparse_step", sparse_step);
      if (sparse_step != 1) fail(path, ": decoder_sparse_step ", sparse_step, " is not supported (only 1)");
    }
    info.tokenizer_id = 0;
  } else {
    fail(path, ": model_type '", model_type, "' is not supported (qwen3_moe, mixtral, gpt_moe are)");
  }
  try {
    c.validate();
  } catch (const Error& e) { fail(path, ": ", e.what()); }
  return c;
}
