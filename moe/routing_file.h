// Recorded routing: every top_k_index of a run, so that a second run can make the same choices. Replaying keeps a
// flipped near-tie from hiding an error when two runs are compared.
//   header  8 bytes "GPTMOERT", then int32: version 1, E, K, N (tokens of a micro-step), MoE layers
//   body    micro-step by micro-step, layer by layer: N*K indices, uint8 where E <= 256, else uint16
#pragma once
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

struct RoutingFileShape {
  int32_t E, K, N, layers;
  int64_t layer_values() const { return int64_t(N) * K; }
  int64_t value_bytes() const { return E <= 256 ? 1 : 2; }
};

// Writes a file anew. Errors (path and reason) on any failed write; close() must be called.
class RoutingWriter {
 public:
  RoutingWriter(const std::string& path, RoutingFileShape shape);
  ~RoutingWriter();
  void append(const std::vector<int32_t>& top_k_index);  // (N,K) of the next layer
  void close();

 private:
  std::string path_;
  RoutingFileShape shape_;
  std::FILE* file_;
};

// Reads one. Errors: a foreign or truncated file, another shape, an index outside [0,E), a micro-step past its end.
class RoutingReader {
 public:
  RoutingReader(const std::string& path, RoutingFileShape expected);
  ~RoutingReader();
  int64_t micro_steps() const { return micro_steps_; }
  std::vector<int32_t> read(int64_t micro_step, int64_t moe_layer);

 private:
  std::string path_;
  RoutingFileShape shape_;
  std::FILE* file_;
  int64_t micro_steps_ = 0;
};
