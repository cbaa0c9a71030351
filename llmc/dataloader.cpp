#include "llmc/dataloader.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "llmc/error.h"
#include "llmc/random.h"

static_assert(std::endian::native == std::endian::little, "shards are read in place, and they are little-endian");

namespace {

constexpr int64_t kHeaderInts = 256, kHeaderBytes = kHeaderInts * int64_t(sizeof(int32_t));

// The largest of the ids (count >= 1): one vectorised pass, because it runs over whole corpora.
template <class Id>
Id largest(const Id* ids, int64_t count) {
  Id result = 0;
#pragma omp parallel for simd reduction(max : result) schedule(static) if (count > 100000)
  for (int64_t i = 0; i < count; i++) result = std::max(result, ids[i]);
  return result;
}

template <class Id>
void check_ids(const Id* ids, int64_t count, int64_t limit, const std::string& path, const char* whose) {
  if (int64_t(largest(ids, count)) < limit) return;
  const Id* bad = std::find_if(ids, ids + count, [=](Id id) { return int64_t(id) >= limit; });
  fail(path, ": token ", bad - ids, " is id ", *bad, ", but the ", whose, " has ids 0 to ", limit - 1,
       ": give data of this model's tokenizer, or a larger vocabulary");
}

}  // namespace

ShardView parse_shard(std::span<const std::byte> file, const std::string& path, int vocab_size) {
  const int64_t size = int64_t(file.size());
  int32_t header[kHeaderInts] = {};
  if (size > 0) std::memcpy(header, file.data(), size_t(std::min(size, kHeaderBytes)));

  ShardView shard;
  if (size >= 8 && header[0] == 20240520 && header[1] == 1) {
    shard.wide = false;
  } else if (size >= 8 && header[0] == 20240801 && header[1] == 7) {
    shard.wide = true;
  } else {
    fail(path, ": not a token shard (it starts with ", header[0], ", ", header[1],
         "; expected 20240520, 1 or 20240801, 7): make shards with the scripts in data/");
  }
  if (size < kHeaderBytes) {
    fail(path, ": truncated: ", size, " bytes, the header alone is ", kHeaderBytes, ": copy or make it again");
  }
  shard.count = header[2];
  shard.tokenizer_id = header[3];
  if (shard.count < 1)
    fail(path, ": the header says ", shard.count, " tokens: an empty or damaged shard; make it again");
  const int64_t expected = kHeaderBytes + shard.count * (shard.wide ? 4 : 2);
  if (size != expected) {
    fail(path, size < expected ? ": truncated: " : ": damaged: ", size, " bytes, but its ", shard.count,
         " tokens make ", expected, ": copy or make it again");
  }
  if (shard.tokenizer_id != 0 && shard.tokenizer_id != 1) {
    fail(path, ": tokenizer ", shard.tokenizer_id, " is unknown (0 GPT-2, 1 bytes): make it again with data/");
  }
  const bool bytes = shard.tokenizer_id == 1;
  if (bytes && vocab_size < 257) {
    fail(path, ": a byte shard needs a model with at least 257 ids, not ", vocab_size, ": set --vocab-size 257");
  }

  shard.ids = file.data() + kHeaderBytes;
  const int64_t limit = bytes ? 257 : vocab_size;
  const char* whose = bytes ? "byte tokenizer" : "model";
  if (shard.wide) {
    check_ids(static_cast<const uint32_t*>(shard.ids), shard.count, limit, path, whose);
  } else {
    check_ids(static_cast<const uint16_t*>(shard.ids), shard.count, limit, path, whose);
  }
  return shard;
}

void TokenShards::Unmap::operator()(void* address) const { ::munmap(address, size); }

TokenShards::TokenShards(const std::string& glob, int vocab_size) : glob_(glob) {
  glob_t found = {};
  if (::glob(glob.c_str(), GLOB_TILDE, nullptr, &found) == 0) {
    paths_.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  }
  ::globfree(&found);
  if (paths_.empty()) fail("no file matches ", glob, ": check the path, or make the data with a script in data/");
  std::sort(paths_.begin(), paths_.end());  // glob() sorts by locale; the order of samples must not depend on that

  for (const std::string& path : paths_) {
    int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not block
    if (file < 0) fail("cannot open ", path, ": ", std::strerror(errno));
    struct stat status = {};
    const bool regular = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    const size_t size = size_t(status.st_size);
    void* address = regular && size > 0 ? ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0) : nullptr;
    const int error = errno;
    ::close(file);
    if (!regular) fail(path, ": not a regular file: give a glob that matches token shards only");
    if (address == MAP_FAILED) fail("cannot map ", path, ": ", std::strerror(error));
    if (address) maps_.emplace_back(address, Unmap{size});
    views_.push_back(parse_shard({static_cast<const std::byte*>(address), size}, path, vocab_size));
    if (views_.back().tokenizer_id != tokenizer_id()) {
      fail(path, ": tokenizer ", views_.back().tokenizer_id, ", but ", paths_[0], " has ", tokenizer_id(),
           ": one run reads shards of one tokenizer");
    }
  }
}

int64_t TokenShards::tokens() const {
  int64_t sum = 0;
  for (const ShardView& shard : views_) sum += shard.count;
  return sum;
}

DataLoader::DataLoader(TokenShards shards, int seq_len, uint64_t seed, bool shuffle)
    : shards_(std::move(shards)), seq_len_(seq_len), seed_(seed), shuffle_(shuffle) {
  if (seq_len < 1) fail("sequence length ", seq_len, ": it must be at least 1");
  first_window_ = first_eval_window_ = {0};
  for (const ShardView& shard : shards_.views()) {
    first_window_.push_back(first_window_.back() + (shard.count - 1) / seq_len_);
    first_eval_window_.push_back(first_eval_window_.back() + (shard.count - 1 + seq_len_ - 1) / seq_len_);
  }
}

// The shard that holds a window, given the prefix sums: the last one whose first window is not beyond it.
static size_t shard_of(const std::vector<int64_t>& first_window, int64_t window) {
  return size_t(std::upper_bound(first_window.begin(), first_window.end(), window) - first_window.begin()) - 1;
}

void DataLoader::sample(int64_t global_sample, int32_t* inputs, int32_t* targets) const {
  const int64_t n = windows();
  if (n == 0) {
    fail(shards_.glob(), ": no shard has the ", seq_len_ + 1,
         " tokens of one training window: give more data or a smaller "
         "--seq-len");
  }
  if (global_sample < 0) fail("training sample ", global_sample, " does not exist: samples count from 0");
  const int64_t epoch = global_sample / n, position = global_sample % n;
  const int64_t window = shuffle_ ? permuted(position, n, seed_, uint64_t(epoch)) : position;
  const size_t s = shard_of(first_window_, window);
  const ShardView& shard = shards_.views()[s];
  const int64_t start = (window - first_window_[s]) * seq_len_;
  for (int64_t t = 0; t < seq_len_; t++) {
    inputs[t] = shard[start + t];
    targets[t] = shard[start + t + 1];
  }
}

int64_t DataLoader::eval_targets() const { return shards_.tokens() - int64_t(shards_.views().size()); }

void DataLoader::eval_sample(int64_t window, int32_t* inputs, int32_t* targets) const {
  if (window < 0 || window >= eval_windows()) {
    fail("evaluation window ", window, " does not exist: ", shards_.glob(), " has ", eval_windows());
  }
  const size_t s = shard_of(first_eval_window_, window);
  const ShardView& shard = shards_.views()[s];
  const int64_t start = (window - first_eval_window_[s]) * seq_len_;
  for (int64_t t = 0; t < seq_len_; t++) {
    const bool inside = start + t + 1 < shard.count;
    inputs[t] = inside ? shard[start + t] : 0;
    targets[t] = inside ? shard[start + t + 1] : -1;
  }
}

// A Feistel network permutes the numbers of 2h bits, whatever its round function is; values that land outside [0, n)
// go round again until they are inside, which keeps it a permutation of [0, n) (cycle walking). 4^h < 4n, so that takes
// fewer than four rounds on average.
int64_t permuted(int64_t index, int64_t n, uint64_t seed, uint64_t epoch) {
  const uint64_t key = random_bits(seed, hash_name("order of training windows"), epoch);
  const int h = std::max(1, (int(std::bit_width(uint64_t(n - 1))) + 1) / 2);
  const uint64_t mask = (uint64_t(1) << h) - 1;
  uint64_t x = uint64_t(index);
  do {
    uint64_t left = x >> h, right = x & mask;
    for (uint64_t round = 0; round < 6; round++) {
      left = std::exchange(right, left ^ (random_bits(key, round, right) & mask));
    }
    x = left << h | right;
  } while (x >= uint64_t(n));
  return int64_t(x);
}
