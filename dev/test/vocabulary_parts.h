// The vocabulary over ranks, as tests of several backends cut it: every rank's part, and matrices and logits of a part out of
// those of the whole.
#pragma once
#include <limits>
#include <vector>

#include "moe/tensor_parallel.h"

inline std::vector<VocabularyPart> parts_of(int64_t V, int ranks) {
  std::vector<VocabularyPart> parts;
  ModelConfig config;
  config.vocab_size = V;
  for (int r = 0; r < ranks; ++r) parts.push_back(vocabulary_part(config, ranks, r));
  return parts;
}

// Columns of a part out of (n,V), those of padding `pad`.
template <class T>
std::vector<T> columns_of(const std::vector<T>& whole, int64_t n, const VocabularyPart& part, T pad) {
  std::vector<T> out(size_t(n * part.padded), pad);
  for (int64_t i = 0; i < n; ++i)
    std::copy_n(whole.data() + i * part.V + part.first, part.rows, out.data() + i * part.padded);
  return out;
}
