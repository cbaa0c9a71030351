// Tokenizers: text to ids and back. Two kinds, each with the number by which token shards and checkpoints know it:
//   0  gpt2   byte-pair encoding of GPT-2: 50257 ids, end-of-text 50256; its merge ranks are read from a file
//   1  bytes  id = byte value, end-of-text 256: 257 ids; built in, nothing to download
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

class Tokenizer {
 public:
  static constexpr int kGpt2 = 0, kBytes = 1;

  static Tokenizer bytes();

  // Ranks in tiktoken's format: one line a token, `base64 rank`, each of the ranks 0..50255 once. Where two neighbours
  // merge, the pair whose concatenation has the lowest rank goes first; the rank is also the id.
  // Errors: a missing file, a malformed line (named by file and number), a missing rank: run data/get_gpt2_ranks.sh.
  static Tokenizer gpt2(const std::string& ranks_path);

  // The same for a file that holds only some of the ranks, with every single byte among them. Encodes exactly only the
  // texts that the subset was made for: for tests, which need no download then.
  static Tokenizer gpt2_subset(const std::string& ranks_path);

  // The tokenizer with the given number; ranks_path is read for 0 only. Errors: an unknown number.
  static Tokenizer for_id(int tokenizer_id, const std::string& ranks_path);

  int id() const { return id_; }                                  // 0 or 1, as in header[3] of a shard
  int vocab_size() const { return id_ == kBytes ? 257 : 50257; }  // ids are 0 .. vocab_size() - 1
  int32_t eot() const { return vocab_size() - 1; }                // end-of-text; precedes each document
  std::string name() const { return id_ == kBytes ? "bytes" : "gpt2"; }

  // The ids of a text, which is taken literally: "<|endoftext|>" written in it is thirteen characters, never eot().
  // Equal to tiktoken's encode_ordinary. Errors (gpt2 only; bytes takes anything): text that is not valid UTF-8 is
  // refused with the offset of the first bad byte, rather than replaced, because it would not decode to itself;
  // a build without PCRE2.
  std::vector<int32_t> encode(std::string_view text) const;

  // What merging makes of single bytes, one for each id that is longer, by rank: the two parts that merge last. bytes has
  // none.
  std::vector<std::pair<std::string, std::string>> merges() const;

  // The bytes of the ids; eot() reads "<|endoftext|>". decode(encode(text)) == text. A gpt2 id may end inside a UTF-8
  // character, so only whole sequences are sure to be valid UTF-8. Errors: an id outside [0, vocab_size()).
  std::string decode(std::span<const int32_t> ids) const;

 private:
  explicit Tokenizer(int id) : id_(id) {}
  static Tokenizer read_ranks(const std::string& path, bool complete);
  void encode_piece(std::string_view piece, std::vector<int32_t>& ids) const;
  int32_t rank_of(std::string_view token) const;  // or kNoRank

  struct Hash {  // lets the map be searched with pieces of the text, without a std::string for each
    using is_transparent = void;
    size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
  };
  static constexpr int32_t kNoRank = INT32_MAX;

  int id_;
  std::string ranks_path_;                                                 // for messages; gpt2 only, as all below
  std::vector<std::string> tokens_;                                        // (50256) bytes of each id; "" if unknown
  std::unordered_map<std::string, int32_t, Hash, std::equal_to<>> ranks_;  // and back
};
