// The safetensors format: u64 little-endian header length, a JSON header padded with spaces, then the tensors' bytes.
//   {"__metadata__": {"format": "pt"}, "NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
// Offsets count from the end of the header. The tensors tile the data: no holes, no overlaps, nothing left over.
// The reader treats a file as hostile: every number is checked before it is used, and what does not hold throws Error
// with one line naming the file, the tensor and what is wrong.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "llmc/files.h"
#include "llmc/types.h"

// A tensor of an open file. `data` points into the file's mapping and lives as long as the file object; it need not be
// aligned to the element (other people's headers are not always padded): read it with memcpy or read_elements().
struct TensorView {
  std::string dtype;           // the file's spelling: F64, F32, BF16, F16, I64, I32, U8, BOOL, ...
  std::vector<int64_t> shape;  // outermost first, row-major; empty for a scalar
  const std::byte* data = nullptr;
  size_t bytes = 0;      // elements * size of an element
  int64_t elements = 0;  // product of shape
  bool is(DType d) const { return dtype == dtype_name(d); }
};

// Converts elements [first, first + count) of `view` to T. T = double, float, bf16: from F64, F32, F16 or BF16, rounded
// to nearest (F64 to bf16 by way of float); T = int32_t: from I32; T = uint8_t: from U8. Any other pair is an Error, and
// so is a range outside the tensor. `name` is for the error line.
template <class T>
void read_elements(const std::string& name, const TensorView& view, int64_t first, int64_t count, T* out);

struct SafetensorsContent {
  std::map<std::string, std::string> metadata;  // without "format" being required
  std::vector<std::string> names;               // in the order of the header
  std::unordered_map<std::string, TensorView> tensors;
};

// Parses and checks a whole file held in memory; the views point into `file`. `path` is for error lines only.
SafetensorsContent parse_safetensors(std::span<const std::byte> file, const std::string& path);

// One file, mapped.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);
  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return content_.metadata; }
  const std::vector<std::string>& names() const { return content_.names; }
  const TensorView* find(const std::string& name) const;  // nullptr: no such tensor
  const TensorView& get(const std::string& name) const;   // Error: no such tensor

 private:
  std::string path_;
  MappedFile file_;
  SafetensorsContent content_;
};

// All DIR/PREFIX*.safetensors as one set of tensors: a single file or the shards of a large checkpoint. Errors: no such
// file; a shard that DIR/PREFIX.safetensors.index.json or the "-of-0000N" of the other shards' names calls for is
// missing (it is named); a tensor that the index promises is not in its shard; a name that occurs in two files.
class SafetensorsDir {
 public:
  SafetensorsDir(const std::string& dir, const std::string& prefix);  // prefix: "model" or "optimizer"
  const std::vector<std::string>& names() const { return names_; }    // file by file, in the order of the headers
  const TensorView* find(const std::string& name) const;              // nullptr: no such tensor
  const TensorView& get(const std::string& name) const;               // Error: no such tensor
  const std::map<std::string, std::string>& metadata() const { return files_.front()->metadata(); }  // first file's

 private:
  std::string where_;  // DIR/PREFIX*.safetensors, for error lines
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::vector<std::string> names_;
  std::unordered_map<std::string, const TensorView*> tensors_;
};

// What a writer is told of a tensor before any data is written.
struct TensorSpec {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  size_t bytes() const;
};

// Writes one file in one pass: the header when constructed, then the tensors' bytes in declared order, each in as many
// pieces as the caller likes. "format": "pt" is always in the metadata. Errors: a name twice; a tensor that would not
// start at a multiple of its element size (declare wider types first); pieces out of order or too long; finish() with
// bytes missing; any failed write, with path and reason. Without a successful finish() the destructor removes the file.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::string& path, std::vector<TensorSpec> tensors,
                    std::map<std::string, std::string> metadata = {});
  void append(const std::string& name, const void* data, size_t bytes);
  void finish();  // every tensor must be complete; flush and fsync

 private:
  void skip_complete();  // moves on to the next tensor that still lacks bytes

  std::string path_;
  std::vector<TensorSpec> tensors_;
  std::string header_;  // made, and so checked, before the file is created
  size_t current_ = 0;  // index of the tensor being written
  size_t written_ = 0;  // bytes of it so far
  OutputFile file_;
};

// The same over DIR: one PREFIX.safetensors if the tensors fit in shard_bytes, else PREFIX-0000i-of-0000n.safetensors,
// filled in declared order, with PREFIX.safetensors.index.json as transformers reads it. A tensor is never split: one
// larger than shard_bytes has a shard of its own.
class SafetensorsShardedWriter {
 public:
  SafetensorsShardedWriter(const std::string& dir, const std::string& prefix, const std::vector<TensorSpec>& tensors,
                           const std::map<std::string, std::string>& metadata = {},
                           size_t shard_bytes = size_t(4) << 30);
  void append(const std::string& name, const void* data, size_t bytes);
  void finish();
  size_t shards() const { return shards_.size(); }

 private:
  void open_shard(size_t index);

  std::string dir_, prefix_;
  std::map<std::string, std::string> metadata_;
  std::vector<std::vector<TensorSpec>> shards_;
  std::unordered_map<std::string, size_t> shard_of_;
  size_t total_bytes_ = 0;
  size_t current_ = 0;  // index of the shard being written
  std::unique_ptr<SafetensorsWriter> writer_;
};
