// Choice of the next token.
#pragma once
#include <cstdint>
#include <span>

struct SamplerOptions {
  double temperature = 1;  // logits are divided by it; 0 takes the largest logit
  int64_t top_k = 0;       // only the top_k largest logits take part; 0 = all
  double top_p = 1;        // of those, only the fewest most probable whose probabilities sum to at least top_p
};

// Error unless temperature is finite and >= 0, top_k >= 0 and top_p in (0, 1].
void check_sampler(const SamplerOptions& options);

// logits (V), without vocabulary padding; uniform in [0, 1). Returns a token id in [0, V). A pure function: the same
// arguments give the same token. Equal logits are ordered by id, lower first (argmax, top-k and top-p alike).
// Errors: no logits, a logit that is NaN or infinite (named), options that check_sampler refuses, uniform outside [0, 1).
int32_t sample_token(std::span<const float> logits, const SamplerOptions& options, double uniform);
