// Text generation with a key/value cache: one token in, one token out, at a cost that does not grow with the text.
#pragma once
#include "llmc/sampler.h"
#include "llmc/tokenizer.h"
#include "moe/model.h"

// Ids of the prompt, all of which the model must have.
inline std::vector<int32_t> encode_prompt(const Tokenizer& tokenizer, const std::string& prompt, int64_t vocab_size) {
  std::vector<int32_t> ids = tokenizer.encode(prompt);
  int32_t largest = tokenizer.eot();  // goes before every text
  for (int32_t id : ids) largest = std::max(largest, id);
  if (largest >= vocab_size)
    fail("the prompt needs token ", largest, ", but the model has ids 0 to ", vocab_size - 1,
         ": its tokenizer is another one");
  return ids;
}

// Continues `prompt` (ids; end-of-text goes before them) by up to max_new tokens, calling emit(id) for each. Token number
// i uses the uniform of (seed, "generate", i), so a seed repeats its text.
// The cache holds options.decode_positions tokens. When it is full, the last half of the context is read again from
// position 0: positions never exceed what the model was trained on, and the cost stays linear in the length.
template <class Device, class Emit>
void generate(Model<Device>& model, const std::vector<int32_t>& prompt, int32_t eot, int64_t max_new,
              const SamplerOptions& sampler, uint64_t seed, Emit emit) {
  int64_t window = model.options.decode_positions;
  std::vector<int32_t> context{eot};
  context.insert(context.end(), prompt.begin(), prompt.end());
  if (int64_t(context.size()) > window - 1)
    context.erase(context.begin(), context.end() - std::max<int64_t>(1, window / 2));
  int64_t position = 0;  // tokens of the context that are in the cache
  for (int64_t i = 0; i < max_new; ++i) {
    if (int64_t(context.size()) > window) {
      context.erase(context.begin(), context.end() - std::max<int64_t>(1, window / 2));
      position = 0;
    }
    std::vector<float> logits;
    for (; position < int64_t(context.size()); ++position) logits = model.decode(context[position], int32_t(position));
    int32_t next = sample_token(logits, sampler, random_uniform(seed, hash_name("generate"), uint64_t(i)));
    if (!emit(next)) return;
    context.push_back(next);
  }
}
