// Hugging Face's view of a model: config.json and tensor names. A model that Qwen3-MoE (with QK-norm) or Mixtral
// (without) expresses exactly gets that model_type and opens in transformers as it is; any other is written as
// model_type gpt_moe, which only this engine reads.
#pragma once
#include <nlohmann/json.hpp>
#include <string>

#include "moe/config.h"
#include "moe/tokenizer_files.h"

// What a config.json holds besides the model itself.
struct ModelFileInfo {
  int64_t seq_len = 0;   // max_position_embeddings: tokens of a training sequence
  int tokenizer_id = 1;  // 0 GPT-2, 1 bytes
  std::string dtype = "float32";
  bool own = false;  // read from a file that this program wrote: tokenizer_id is known
  // What a model brings with it: its tokenizer's files, and bos_token_id and eos_token_id of its config.json, if there.
  TokenizerFiles tokenizer_files;
  nlohmann::ordered_json token_ids = nlohmann::ordered_json::object();
};

// "qwen3_moe", "mixtral" or "gpt_moe". `reason`, if not null, gets the option that keeps a gpt_moe model from being one
// of the others.
std::string hf_model_type(const ModelConfig& c, std::string* reason = nullptr);

// The name of a logical tensor in files of that model type.
std::string hf_tensor_name(const std::string& logical, const std::string& model_type);

// config.json. Our own fields are kept whole under the key "gpt_moe", which transformers ignores.
nlohmann::ordered_json hf_config(const ModelConfig& c, const ModelFileInfo& info);

// The reverse, from a file of ours, or of transformers (qwen3_moe, mixtral). Errors name the file and the key that is
// missing, malformed or not supported.
ModelConfig read_hf_config(const std::string& path, ModelFileInfo& info, std::string& model_type);
