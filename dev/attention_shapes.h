// The shapes at which attention is measured, forward and backward, and which rungs are asked for at them.
#pragma once
#include <algorithm>

#include "dev/bench.h"

struct AttentionShape {
  std::string name;
  int64_t B, NH, NKV, T, HD;
};
inline const std::vector<AttentionShape> attention_shapes = {{"b4t1024h64", 4, 12, 12, 1024, 64},
                                                             {"b32t1024h64", 32, 12, 12, 1024, 64},
                                                             {"b8t4096h64", 8, 16, 16, 4096, 64},
                                                             {"b8t4096h128", 8, 16, 16, 4096, 128},
                                                             {"b4t8192h128", 4, 16, 16, 8192, 128}};
// Two query heads a key head; 193, 385 or 641 tokens: odd, and no whole number of tiles.
inline AttentionShape reduced_attention(AttentionShape s) { return {s.name, 2, 4, 2, s.T / 16 + 129, s.HD}; }

// By its number, or a name that begins with it; not as one of all.
inline bool is_asked_for(const bench::Lab& lab, const char* rung) {
  const auto& asked = lab.options.variants;
  return std::any_of(asked.begin(), asked.end(),
                     [&](const std::string& name) { return std::atoi(name.c_str()) == std::atoi(rung); });
}
