#include <filesystem>
#include <unordered_set>
#include <utility>

#include <nlohmann/json.hpp>

#include "llmc/error.h"
#include "llmc/safetensors.h"
#include "llmc/safetensors_common.h"

namespace fs = std::filesystem;
using nlohmann::json;

size_t TensorSpec::bytes() const {
  int64_t elements;
  size_t total;
  if (!checked_bytes(shape, dtype_size(dtype), elements, total))
    fail("tensor ", shown(name), ": a negative dimension, or more elements than can be counted");
  return total;
}

namespace {

// A string as JSON; bytes that are not UTF-8, which JSON lacks, become U+FFFD.
std::string json_string(const std::string& text) {
  return json(text).dump(-1, ' ', false, json::error_handler_t::replace);
}

// The file's first bytes. Written by hand rather than from a json object: names keep their order.
std::string make_header(const std::string& path, const std::vector<TensorSpec>& tensors,
                        std::map<std::string, std::string> metadata) {
  metadata["format"] = "pt";
  std::string text = "{\"__metadata__\":" + json(metadata).dump(-1, ' ', false, json::error_handler_t::replace);
  std::unordered_set<std::string> seen;
  size_t offset = 0;
  for (const TensorSpec& t : tensors) {
    if (t.name == "__metadata__" || !seen.insert(t.name).second)
      fail(path, ": tensor name ", shown(t.name), " is reserved or occurs twice");
    if (offset % dtype_size(t.dtype) != 0)
      fail(path, ": tensor ", shown(t.name), " would start at byte ", offset, ", unaligned: declare wider types first");
    text += ',';
    text += json_string(t.name);
    text += ":{\"dtype\":\"";
    text += dtype_name(t.dtype);
    text += "\",\"shape\":";
    text += json(t.shape).dump();
    text += ",\"data_offsets\":[" + std::to_string(offset) + "," + std::to_string(offset + t.bytes()) + "]}";
    offset += t.bytes();
  }
  text += "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (text.size() > kMaxHeader) fail(path, ": ", tensors.size(), " tensors make a header of more than 100 MB");
  uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + text;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<TensorSpec> tensors,
                                     std::map<std::string, std::string> metadata)
    : path_(path),
      tensors_(std::move(tensors)),
      header_(make_header(path, tensors_, std::move(metadata))),
      file_(path) {
  file_.write(header_.data(), header_.size());
  skip_complete();
}

void SafetensorsWriter::skip_complete() {
  while (current_ < tensors_.size() && written_ == tensors_[current_].bytes()) {
    current_++;
    written_ = 0;
  }
}

void SafetensorsWriter::append(const std::string& name, const void* data, size_t bytes) {
  if (bytes == 0) return;  // of an empty tensor, wherever it stands
  if (current_ == tensors_.size()) fail(path_, ": tensor ", shown(name), ": more bytes than were declared");
  const TensorSpec& t = tensors_[current_];
  if (t.name != name) fail(path_, ": tensor ", shown(name), " was given where ", shown(t.name), " is due");
  if (bytes > t.bytes() - written_)
    fail(path_, ": tensor ", shown(name), ": ", written_ + bytes, " bytes, but ", t.bytes(), " were declared");
  file_.write(data, bytes);
  written_ += bytes;
  skip_complete();
}

void SafetensorsWriter::finish() {
  if (current_ < tensors_.size())
    fail(path_, ": tensor ", shown(tensors_[current_].name), ": only ", written_, " of ", tensors_[current_].bytes(),
         " bytes were given");
  file_.finish();
}

SafetensorsShardedWriter::SafetensorsShardedWriter(const std::string& dir, const std::string& prefix,
                                                   const std::vector<TensorSpec>& tensors,
                                                   const std::map<std::string, std::string>& metadata,
                                                   size_t shard_bytes)
    : dir_(dir), prefix_(prefix), metadata_(metadata) {
  shards_.emplace_back();
  size_t filled = 0;
  for (const TensorSpec& t : tensors) {
    if (!shards_.back().empty() && filled + t.bytes() > shard_bytes) {
      shards_.emplace_back();
      filled = 0;
    }
    shards_.back().push_back(t);
    filled += t.bytes();
    total_bytes_ += t.bytes();
    if (!shard_of_.emplace(t.name, shards_.size() - 1).second)
      fail((fs::path(dir) / prefix).string(), ": tensor name ", shown(t.name), " occurs twice");
  }
  if (shards_.size() > 99999) fail(dir, ": ", shards_.size(), " shards of ", shard_bytes, " bytes: make them larger");
  open_shard(0);
}

void SafetensorsShardedWriter::open_shard(size_t index) {
  std::string name = shards_.size() == 1 ? prefix_ + ".safetensors" : shard_name(prefix_, index, shards_.size());
  writer_ = std::make_unique<SafetensorsWriter>((fs::path(dir_) / name).string(), shards_[index], metadata_);
  current_ = index;
}

void SafetensorsShardedWriter::append(const std::string& name, const void* data, size_t bytes) {
  if (bytes == 0) return;
  auto it = shard_of_.find(name);
  if (it == shard_of_.end()) fail((fs::path(dir_) / prefix_).string(), ": tensor ", shown(name), " was not declared");
  while (current_ < it->second) {  // finish() notices what the shards passed over lack
    writer_->finish();
    open_shard(current_ + 1);
  }
  writer_->append(name, data, bytes);
}

void SafetensorsShardedWriter::finish() {
  for (writer_->finish(); current_ + 1 < shards_.size(); writer_->finish()) open_shard(current_ + 1);
  if (shards_.size() == 1) return;
  std::map<std::string, std::string> files;
  for (const auto& [tensor, shard] : shard_of_) files.emplace(tensor, shard_name(prefix_, shard, shards_.size()));
  json index = {{"metadata", {{"total_size", total_bytes_}}}, {"weight_map", files}};
  write_file_atomic((fs::path(dir_) / (prefix_ + ".safetensors.index.json")).string(),
                    index.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
}
