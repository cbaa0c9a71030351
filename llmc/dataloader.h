// Token shards and the order in which training reads them.
//
// A shard is a .bin file of llm.c: a header of 256 int32, then `count` ids without gaps.
//   header[0], header[1]   20240520, 1: ids are uint16;  20240801, 7: ids are uint32
//   header[2]              count, the number of ids
//   header[3]              tokenizer: 0 GPT-2 or unknown (what llm.c writes), 1 bytes
// All little-endian. End-of-text precedes each document. Files are memory-mapped and never written.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

// The ids of one shard, in memory that somebody else owns.
struct ShardView {
  const void* ids = nullptr;  // (count) uint16 or uint32
  int64_t count = 0;
  bool wide = false;  // uint32
  int tokenizer_id = 0;

  int32_t operator[](int64_t i) const {
    return wide ? int32_t(static_cast<const uint32_t*>(ids)[i]) : int32_t(static_cast<const uint16_t*>(ids)[i]);
  }
};

// Reads a whole file's bytes (4-byte aligned) as a shard for a model with `vocab_size` ids. `path` is for messages.
// Errors, each one line that names the file: foreign (magic, version, tokenizer), truncated or too long for its count,
// a count below 1, a byte shard for a model with fewer than 257 ids, an id that the model or the tokenizer lacks.
ShardView parse_shard(std::span<const std::byte> file, const std::string& path, int vocab_size);

// Every shard that a glob matches ("data/kjv/kjv_train.bin", "fineweb/*_train_*.bin"), in order of the names' bytes.
class TokenShards {
 public:
  // Maps and checks every shard, every id included (one pass over the data, with all threads).
  // Errors: those of parse_shard; a glob without a match; a file that cannot be read; shards of different tokenizers.
  TokenShards(const std::string& glob, int vocab_size);

  const std::string& glob() const { return glob_; }
  int tokenizer_id() const { return views_[0].tokenizer_id; }
  int64_t tokens() const;                                           // of all shards together
  const std::vector<ShardView>& views() const { return views_; }    // (shards), at least one
  const std::vector<std::string>& paths() const { return paths_; }  // (shards)

 private:
  struct Unmap {
    size_t size;
    void operator()(void* address) const;
  };
  std::string glob_;
  std::vector<std::string> paths_;
  std::vector<std::unique_ptr<void, Unmap>> maps_;
  std::vector<ShardView> views_;
};

// Samples of seq_len inputs and the seq_len ids that follow them one by one, the targets. All functions are const and
// pure: any thread or process may ask for any sample at any time and gets the same ids.
class DataLoader {
 public:
  // seq_len >= 1. shuffle=false reads the shards from front to back, the same in every epoch.
  DataLoader(TokenShards shards, int seq_len, uint64_t seed, bool shuffle);

  const TokenShards& shards() const { return shards_; }

  // Training windows in an epoch: shard s of n ids has floor((n - 1) / seq_len), which do not overlap. May be 0.
  int64_t windows() const { return first_window_.back(); }

  // Training sample number `global_sample` >= 0 of the run, counted over all steps, micro-batches and ranks: a function
  // of that number and the seed only, so no layout changes what is read. Epoch e is the samples
  // [e * windows(), (e + 1) * windows()): every window of every shard once, in an order of its own.
  //   out  inputs (seq_len), targets (seq_len) int32
  // Errors: no shard is long enough for one window; a negative number.
  void sample(int64_t global_sample, int32_t* inputs, int32_t* targets) const;

  // Evaluation: consecutive windows in which every id but the first of each shard is a target exactly once. The last
  // window of a shard may be partial: its rest has input 0 and target -1, which the loss leaves out.
  int64_t eval_windows() const { return first_eval_window_.back(); }
  int64_t eval_targets() const;  // how many targets are not -1, over all windows
  void eval_sample(int64_t window, int32_t* inputs, int32_t* targets) const;  // window in [0, eval_windows())

 private:
  TokenShards shards_;
  int64_t seq_len_;
  uint64_t seed_;
  bool shuffle_;
  std::vector<int64_t> first_window_, first_eval_window_;  // (shards + 1) exclusive prefix sums of windows
};

// A permutation of [0, n) chosen by (seed, epoch): where `index` goes. n >= 1. Constant memory and time.
int64_t permuted(int64_t index, int64_t n, uint64_t seed, uint64_t epoch);
