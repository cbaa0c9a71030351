#include "moe/evaluate.h"

#include <unistd.h>

#include <cmath>

std::optional<Tokenizer> tokenizer_of(int tokenizer_id, int64_t vocab_size, const std::string& ranks_path) {
  if (tokenizer_id == Tokenizer::kBytes) return Tokenizer::bytes();
  const bool gpt2 = vocab_size >= 50257 && vocab_size <= 50304;
  if (!gpt2 || access(ranks_path.c_str(), R_OK) != 0) return std::nullopt;
  return Tokenizer::gpt2(ranks_path);
}

std::optional<Tokenizer> tokenizer_of(const TokenShards& shards, int64_t vocab_size, const std::string& ranks_path) {
  for (const ShardView& view : shards.views())
    if (view.wide && shards.tokenizer_id() == Tokenizer::kGpt2) return std::nullopt;
  return tokenizer_of(shards.tokenizer_id(), vocab_size, ranks_path);
}

int64_t target_bytes(const TokenShards& shards, const Tokenizer& tokenizer) {
  std::vector<int64_t> bytes(size_t(tokenizer.vocab_size()), 0);
  for (int32_t id = 0; id < tokenizer.eot(); ++id)
    bytes[size_t(id)] = int64_t(tokenizer.decode(std::span(&id, 1)).size());
  int64_t sum = 0;
  for (const ShardView& shard : shards.views())
    for (int64_t i = 1; i < shard.count; ++i)
      if (shard[i] < tokenizer.eot()) sum += bytes[size_t(shard[i])];
  return sum;
}

double bits_per_byte(double loss, int64_t targets, int64_t bytes) {
  return loss * double(targets) / (std::log(2.0) * double(bytes));
}

void check_tokenizer(const std::string& path, int tokenizer, int model) {
  if (tokenizer != 0 && model >= 0 && tokenizer != model)
    fail(path, ": tokens of tokenizer ", tokenizer, ", but the model was trained on those of ", model,
         " (0 GPT-2, 1 bytes)");
}

void check_questions(const MultipleChoice& questions, int model_tokenizer, int64_t seq_len) {
  check_tokenizer(questions.path(), questions.tokenizer_id(), model_tokenizer);
  if (questions.longest() > seq_len)
    fail(questions.path(), ": the longest question with its answer has ", questions.longest() + 1,
         " tokens; --seq-len ", seq_len, " is too short, ", questions.longest(), " would do");
}
