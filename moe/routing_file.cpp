#include "moe/routing_file.h"

#include <cstring>

#include "llmc/error.h"
#include "llmc/files.h"

namespace {
constexpr char magic[8] = {'G', 'P', 'T', 'M', 'O', 'E', 'R', 'T'};
constexpr int64_t header_bytes = 8 + 5 * 4;
}  // namespace

RoutingWriter::RoutingWriter(const std::string& path, RoutingFileShape shape)
    : path_(path), shape_(shape), file_(std::fopen(path.c_str(), "wb")) {
  if (!file_) fail("--record-routing ", path, ": ", errno_text());
  int32_t header[5] = {1, shape.E, shape.K, shape.N, shape.layers};
  if (std::fwrite(magic, 1, 8, file_) != 8 || std::fwrite(header, 4, 5, file_) != 5) fail(path, ": ", errno_text());
}
RoutingWriter::~RoutingWriter() {
  if (file_) std::fclose(file_);
}
void RoutingWriter::append(const std::vector<int32_t>& index) {
  std::vector<uint8_t> bytes(index.size() * shape_.value_bytes());
  for (size_t i = 0; i < index.size(); ++i) {
    bytes[i * shape_.value_bytes()] = uint8_t(index[i]);
    if (shape_.value_bytes() == 2) bytes[2 * i + 1] = uint8_t(index[i] >> 8);
  }
  if (std::fwrite(bytes.data(), 1, bytes.size(), file_) != bytes.size()) fail(path_, ": ", errno_text());
}
void RoutingWriter::close() {
  int error = std::fclose(file_);
  file_ = nullptr;
  if (error) fail(path_, ": ", errno_text());
}

RoutingReader::RoutingReader(const std::string& path, RoutingFileShape expected)
    : path_(path), shape_(expected), file_(std::fopen(path.c_str(), "rb")) {
  if (!file_) fail("--replay-routing ", path, ": ", errno_text());
  if (expected.layers == 0) fail("--replay-routing ", path, ": this model has no MoE layer");
  char start[8];
  int32_t h[5];
  if (std::fread(start, 1, 8, file_) != 8 || std::memcmp(start, magic, 8) || std::fread(h, 4, 5, file_) != 5 ||
      h[0] != 1)
    fail(path, ": not a routing file of this program (magic GPTMOERT, version 1)");
  if (h[1] != expected.E || h[2] != expected.K || h[3] != expected.N || h[4] != expected.layers)
    fail(path, ": recorded with E ", h[1], ", K ", h[2], ", N ", h[3], ", ", h[4], " MoE layers; this run has E ",
         expected.E, ", K ", expected.K, ", N ", expected.N, ", ", expected.layers);
  std::fseek(file_, 0, SEEK_END);
  int64_t body = std::ftell(file_) - header_bytes, step = shape_.layer_values() * shape_.value_bytes() * shape_.layers;
  if (body % step)
    fail(path, ": truncated: ", body, " bytes of choices are not a multiple of the ", step, " of a micro-step");
  micro_steps_ = body / step;
  for (int64_t m = 0; m < micro_steps_; ++m)  // a bad value is found before the run, not in its middle
    for (int64_t l = 0; l < shape_.layers; ++l) read(m, l);
}
RoutingReader::~RoutingReader() {
  if (file_) std::fclose(file_);
}
std::vector<int32_t> RoutingReader::read(int64_t micro_step, int64_t layer) {
  if (micro_step < 0 || micro_step >= micro_steps_)
    fail(path_, ": holds ", micro_steps_, " micro-steps; number ", micro_step, " was asked for");
  int64_t bytes = shape_.layer_values() * shape_.value_bytes();
  std::vector<uint8_t> raw(bytes);
  if (std::fseek(file_, header_bytes + (micro_step * shape_.layers + layer) * bytes, SEEK_SET) ||
      std::fread(raw.data(), 1, raw.size(), file_) != raw.size())
    fail(path_, ": ", errno_text());
  std::vector<int32_t> index(shape_.layer_values());
  for (size_t i = 0; i < index.size(); ++i) {
    index[i] = shape_.value_bytes() == 1 ? raw[i] : raw[2 * i] | raw[2 * i + 1] << 8;
    if (index[i] >= shape_.E)
      fail(path_, ": micro-step ", micro_step, ", layer ", layer, ": expert ", index[i], " of ", shape_.E);
  }
  return index;
}
