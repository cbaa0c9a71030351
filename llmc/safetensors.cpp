#include "llmc/safetensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <unordered_set>
#include <utility>

#include <nlohmann/json.hpp>

#include "llmc/error.h"
#include "llmc/safetensors_common.h"

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian");

std::string shown(const std::string& name) {
  std::string text = json(name).dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() <= 200 ? text : text.substr(0, 200) + "...\"";
}

namespace {

constexpr size_t kMaxRank = 64;

// Bytes of an element, or 0 for a type that we do not know.
size_t element_size(const std::string& dtype) {
  static const std::unordered_map<std::string, size_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
      {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},     {"I32", 4},
      {"F32", 4},  {"U64", 8}, {"I64", 8}, {"F64", 8},     {"C64", 8}};
  auto it = sizes.find(dtype);
  return it == sizes.end() ? 0 : it->second;
}

// One entry of the header as it stands there, before anything is believed.
struct Entry {
  std::string name, dtype;
  std::vector<uint64_t> shape, offsets;
  bool has_dtype = false, has_shape = false, has_offsets = false;
};

// Receives the header token by token. The only shape accepted is {name: {key: string or [numbers]}}, so nothing nests,
// nothing is built that the file did not pay for byte by byte, and a repeated name cannot hide an earlier one.
class HeaderReader {
 public:
  using number_integer_t = json::number_integer_t;
  using number_unsigned_t = json::number_unsigned_t;
  using number_float_t = json::number_float_t;
  using string_t = json::string_t;
  using binary_t = json::binary_t;

  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;
  std::string problem;  // why parsing stopped

  bool start_object(size_t) {
    if (depth_ == 0) return ++depth_, true;
    if (depth_ != 1) return stop("an object where none belongs");
    depth_ = 2;
    if (!in_metadata_) entries.emplace_back().name = top_key_;
    return true;
  }
  bool end_object() {
    depth_--;
    if (depth_ != 1) return true;
    if (in_metadata_) return true;
    const Entry& e = entries.back();
    if (!e.has_dtype) return stop("no dtype");
    if (!e.has_shape) return stop("no shape");
    if (!e.has_offsets) return stop("no data_offsets");
    return true;
  }
  bool key(string_t& name) {
    if (depth_ == 1) {
      top_key_ = name;
      in_metadata_ = name == "__metadata__";
      return seen_.insert(name).second || stop("occurs twice");
    }
    key_ = name;
    if (in_metadata_) return metadata.emplace(name, "").second || stop("key " + shown(name) + " occurs twice");
    Entry& e = entries.back();
    bool* has = name == "dtype"          ? &e.has_dtype
                : name == "shape"        ? &e.has_shape
                : name == "data_offsets" ? &e.has_offsets
                                         : nullptr;
    if (!has) return stop("unknown key " + shown(name));
    if (*has) return stop("key " + shown(name) + " occurs twice");
    return *has = true;
  }
  bool start_array(size_t) {
    list_ = nullptr;
    if (depth_ == 2 && !in_metadata_ && key_ == "shape") list_ = &entries.back().shape;
    if (depth_ == 2 && !in_metadata_ && key_ == "data_offsets") list_ = &entries.back().offsets;
    if (!list_) return stop("a list where none belongs");
    depth_ = 3;
    return true;
  }
  bool end_array() {
    depth_ = 2;
    return true;
  }
  bool string(string_t& value) {
    if (depth_ == 2 && in_metadata_) return metadata[key_] = value, true;
    if (depth_ != 2 || key_ != "dtype") return stop("a string where none belongs");
    entries.back().dtype = value;
    return true;
  }
  bool number_unsigned(number_unsigned_t value) {
    if (depth_ != 3) return stop("a number where none belongs");
    if (list_->size() == kMaxRank) return stop("a list of more than " + std::to_string(kMaxRank) + " numbers");
    list_->push_back(value);
    return true;
  }
  bool number_integer(number_integer_t) { return stop("a negative number"); }
  bool number_float(number_float_t, const string_t&) { return stop("a number that is not an integer below 2^64"); }
  bool boolean(bool) { return stop("true or false where none belongs"); }
  bool null() { return stop("null where none belongs"); }
  bool binary(binary_t&) { return stop("binary data"); }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) {
    problem = "not JSON at byte " + std::to_string(position) + " of the header";
    return false;
  }

 private:
  bool stop(const std::string& what) {
    problem = depth_ == 0 ? what : in_metadata_ ? "__metadata__: " + what : "tensor " + shown(top_key_) + ": " + what;
    return false;
  }

  int depth_ = 0;  // 1: between names; 2: between keys of a tensor; 3: inside a list
  bool in_metadata_ = false;
  std::string top_key_, key_;
  std::vector<uint64_t>* list_ = nullptr;
  std::unordered_set<std::string> seen_;
};

float half_to_float(uint16_t h) {
  float sign = h & 0x8000 ? -1.0f : 1.0f;
  int exponent = (h >> 10) & 31;
  int mantissa = h & 1023;
  if (exponent == 0) return sign * std::ldexp(float(mantissa), -24);
  if (exponent == 31) return mantissa ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  return sign * std::ldexp(float(1024 + mantissa), exponent - 25);
}

// Reads `count` stored elements of type Stored, passing each through `convert`. memcpy: the data may be unaligned.
template <class Stored, class T, class Convert>
void convert_all(const std::byte* from, int64_t count, T* out, Convert convert) {
  for (int64_t i = 0; i < count; i++) {
    Stored value;
    std::memcpy(&value, from + i * int64_t(sizeof(Stored)), sizeof(Stored));
    out[i] = convert(value);
  }
}

}  // namespace

template <class T>
void read_elements(const std::string& name, const TensorView& view, int64_t first, int64_t count, T* out) {
  if (first < 0 || count < 0 || first > view.elements || count > view.elements - first)
    fail("tensor ", shown(name), ": elements ", first, " to ", first, " + ", count, " asked of ", view.elements);
  if (count == 0) return;  // an empty tensor may have no address
  const std::byte* from = view.data + size_t(first) * (view.bytes / size_t(view.elements));
  if (view.is(dtype_of<T>())) {
    std::memcpy(out, from, size_t(count) * sizeof(T));
    return;
  }
  if constexpr (!std::is_integral_v<T>) {
    auto narrow = [](auto x) {  // bf16 is made from float only
      if constexpr (std::is_same_v<T, bf16>)
        return bf16(float(x));
      else
        return T(x);
    };
    if (view.dtype == "F64") return convert_all<double>(from, count, out, narrow);
    if (view.dtype == "F32") return convert_all<float>(from, count, out, narrow);
    if (view.dtype == "BF16") return convert_all<bf16>(from, count, out, [&](bf16 x) { return narrow(float(x)); });
    if (view.dtype == "F16")
      return convert_all<uint16_t>(from, count, out, [&](uint16_t x) { return narrow(half_to_float(x)); });
  }
  fail("tensor ", shown(name), ": its type ", view.dtype, " cannot be read as ", dtype_name(dtype_of<T>()));
}

template void read_elements(const std::string&, const TensorView&, int64_t, int64_t, double*);
template void read_elements(const std::string&, const TensorView&, int64_t, int64_t, float*);
template void read_elements(const std::string&, const TensorView&, int64_t, int64_t, bf16*);
template void read_elements(const std::string&, const TensorView&, int64_t, int64_t, int32_t*);
template void read_elements(const std::string&, const TensorView&, int64_t, int64_t, uint8_t*);

SafetensorsContent parse_safetensors(std::span<const std::byte> file, const std::string& path) {
  if (file.size() < 8) fail(path, ": not a safetensors file: ", file.size(), " bytes, fewer than the 8 of its length");
  uint64_t header_bytes;
  std::memcpy(&header_bytes, file.data(), 8);
  if (header_bytes > kMaxHeader)
    fail(path, ": not a safetensors file: a header of ", header_bytes, " bytes (at most ", kMaxHeader, ")");
  if (header_bytes > file.size() - 8)
    fail(path, ": truncated: the header has ", header_bytes, " bytes, the file ", file.size());
  const char* text = reinterpret_cast<const char*>(file.data() + 8);
  if (header_bytes == 0 || text[0] != '{') fail(path, ": not a safetensors file: its header does not begin with {");

  HeaderReader reader;
  if (!json::sax_parse(text, text + header_bytes, &reader)) fail(path, ": bad header: ", reader.problem);

  std::span<const std::byte> data = file.subspan(8 + header_bytes);
  SafetensorsContent content;
  content.metadata = std::move(reader.metadata);
  struct Range {
    uint64_t begin, end;
    size_t entry;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < reader.entries.size(); i++) {
    const Entry& e = reader.entries[i];
    TensorView view;
    view.dtype = e.dtype;
    size_t element = element_size(e.dtype);
    if (element == 0) fail(path, ": tensor ", shown(e.name), ": unknown dtype ", shown(e.dtype));
    for (uint64_t d : e.shape) {
      if (d > uint64_t(std::numeric_limits<int64_t>::max()))
        fail(path, ": tensor ", shown(e.name), ": a dimension of ", d);
      view.shape.push_back(int64_t(d));
    }
    if (!checked_bytes(view.shape, element, view.elements, view.bytes))
      fail(path, ": tensor ", shown(e.name), ": its shape has more elements than can be counted");
    if (e.offsets.size() != 2)
      fail(path, ": tensor ", shown(e.name), ": ", e.offsets.size(), " data_offsets instead of 2");
    uint64_t begin = e.offsets[0], end = e.offsets[1];
    if (begin > end) fail(path, ": tensor ", shown(e.name), ": begins at ", begin, ", after its end ", end);
    if (end > data.size())
      fail(path, ": tensor ", shown(e.name), ": ends at byte ", end, " of only ", data.size(), ": truncated file?");
    if (end - begin != view.bytes)
      fail(path, ": tensor ", shown(e.name), ": ", end - begin, " bytes, but its dtype and shape need ", view.bytes);
    view.data = data.data() + begin;
    ranges.push_back({begin, end, i});
    content.names.push_back(e.name);
    content.tensors.emplace(e.name, std::move(view));
  }

  // The format wants the tensors to tile the data, which rules out overlaps, holes and a cut or padded end at once.
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  uint64_t covered = 0;
  for (const Range& r : ranges) {
    const std::string& name = reader.entries[r.entry].name;
    if (r.begin < covered) fail(path, ": tensor ", shown(name), ": begins at ", r.begin, ", inside another one");
    if (r.begin > covered)
      fail(path, ": tensor ", shown(name), ": begins at ", r.begin, ", after a hole from ", covered);
    covered = r.end;
  }
  if (covered != data.size()) fail(path, ": ", data.size() - covered, " bytes after the last tensor belong to none");
  return content;
}

SafetensorsFile::SafetensorsFile(const std::string& path)
    : path_(path), file_(path), content_(parse_safetensors(file_.bytes(), path)) {}

const TensorView* SafetensorsFile::find(const std::string& name) const {
  auto it = content_.tensors.find(name);
  return it == content_.tensors.end() ? nullptr : &it->second;
}

const TensorView& SafetensorsFile::get(const std::string& name) const {
  const TensorView* view = find(name);
  if (!view) fail(path_, ": has no tensor ", shown(name));
  return *view;
}

namespace {

namespace fs = std::filesystem;

// n of "PREFIX-00001-of-0000n.safetensors", or 0 if the name is not of that form.
size_t shard_count(const std::string& name, const std::string& prefix) {
  const std::string tail = ".safetensors";
  if (name.size() != prefix.size() + 15 + tail.size()) return 0;
  std::string middle = name.substr(prefix.size(), 15);  // -00001-of-0000n
  for (size_t i : {1, 2, 3, 4, 5, 10, 11, 12, 13, 14})
    if (middle[i] < '0' || middle[i] > '9') return 0;
  if (middle[0] != '-' || middle.substr(6, 4) != "-of-") return 0;
  return size_t(std::stoul(middle.substr(10)));
}

// tensor -> file of an index, checked: file names are plain names, so that none leads out of the directory.
std::map<std::string, std::string> read_index(const std::string& path) {
  json index = json::parse(read_file(path, kMaxHeader), nullptr, false);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
    fail(path, ": not an index of safetensors shards: it has no object weight_map");
  std::map<std::string, std::string> files;
  for (auto& [tensor, file] : index["weight_map"].items()) {
    if (!file.is_string()) fail(path, ": weight_map of ", shown(tensor), " is not a file name");
    std::string name = file.get<std::string>();
    if (name.empty() || name.find('/') != std::string::npos || name.find('\0') != std::string::npos)
      fail(path, ": ", shown(name), " is not a plain file name");
    files.emplace(tensor, name);
  }
  return files;
}

}  // namespace

SafetensorsDir::SafetensorsDir(const std::string& dir, const std::string& prefix)
    : where_((fs::path(dir) / (prefix + "*.safetensors")).string()) {
  std::error_code error;
  std::vector<std::string> found;  // sorted, so that the order of names() does not depend on the file system
  for (fs::directory_iterator it(dir, error), end; !error && it != end; it.increment(error)) {
    std::string name = it->path().filename().string();
    if (name.starts_with(prefix) && name.ends_with(".safetensors")) found.push_back(name);
  }
  if (error) fail(dir, ": cannot list: ", error.message());
  std::sort(found.begin(), found.end());
  auto exists = [&](const std::string& name) { return std::binary_search(found.begin(), found.end(), name); };

  std::string index_path = (fs::path(dir) / (prefix + ".safetensors.index.json")).string();
  std::map<std::string, std::string> index;
  if (fs::exists(index_path)) index = read_index(index_path);
  for (const auto& [tensor, file] : index)
    if (!exists(file)) fail(index_path, ": names ", shown(file), ", which is not there: copy the missing file");
  for (const std::string& name : found) {
    size_t count = shard_count(name, prefix);
    for (size_t i = 0; i < count; i++)
      if (!exists(shard_name(prefix, i, count)))
        fail(dir, ": ", shard_name(prefix, i, count), " is missing beside ", name, ": copy the missing file");
  }
  if (found.empty()) fail(where_, ": no such file");

  std::unordered_map<std::string, const SafetensorsFile*> owner;
  for (const std::string& name : found) {
    files_.push_back(std::make_unique<SafetensorsFile>((fs::path(dir) / name).string()));
    const SafetensorsFile* file = files_.back().get();
    for (const std::string& tensor : file->names()) {
      auto [it, fresh] = owner.emplace(tensor, file);
      if (!fresh) fail(file->path(), ": tensor ", shown(tensor), " is also in ", it->second->path());
      names_.push_back(tensor);
      tensors_.emplace(tensor, file->find(tensor));
    }
  }
  for (const auto& [tensor, file] : index) {
    auto it = owner.find(tensor);
    if (it == owner.end() || fs::path(it->second->path()).filename() != file)
      fail(index_path, ": tensor ", shown(tensor), " is not in ", shown(file), " as it says");
  }
}

const TensorView* SafetensorsDir::find(const std::string& name) const {
  auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : it->second;
}

const TensorView& SafetensorsDir::get(const std::string& name) const {
  const TensorView* view = find(name);
  if (!view) fail(where_, ": has no tensor ", shown(name));
  return *view;
}
