// The MoE layers at which layer, experts and router are measured: tokens of a micro-batch T, width d, expert width n,
// experts E, experts a token K. The first six are layers of known models or their finer cuts; blaze1-7 are the
// configurations of the MoEBlaze paper.
#pragma once
#include <string>
#include <vector>

#include "moe/experts.h"
#include "moe/router.h"

struct MoeShape {
  std::string name;
  int64_t T, d, n, E, K;

  int64_t rows() const { return T * K; }
  ExpertShape experts() const { return {T * K, K, E, d, n}; }
  RouterShape router() const { return {T, d, E, K, 1, Gate::softmax, true, 1.0, 0.01, 0.001}; }
};

inline const std::vector<MoeShape>& moe_shapes() {
  static const std::vector<MoeShape> all = {
      {"gpt124-8x2", 65536, 768, 2048, 8, 2},    {"olmoe-64x8", 32768, 2048, 1024, 64, 8},
      {"fine-128x8", 24576, 1536, 256, 128, 8},  {"fine-64x4", 24576, 1536, 512, 64, 4},
      {"qwen3-128x8", 32768, 2048, 768, 128, 8}, {"mixtral-8x2", 16384, 4096, 14336, 8, 2},
      {"blaze1", 65536, 512, 2048, 4, 1},        {"blaze2", 65536, 1024, 4096, 8, 2},
      {"blaze3", 65536, 1024, 4096, 16, 4},      {"blaze4", 32768, 2048, 8192, 16, 4},
      {"blaze5", 32768, 512, 2048, 16, 4},       {"blaze6", 16384, 1024, 4096, 16, 4},
      {"blaze7", 8192, 2048, 8192, 8, 4},
  };
  return all;
}

// Small enough for the CPU reference: few tokens (but more than a tile of rows for some expert), narrow matrices.
inline MoeShape reduced_moe(MoeShape s) {
  s.T = 768, s.d = s.d < 512 ? s.d : 512, s.n = s.n < 512 ? s.n : 512;
  return s;
}
