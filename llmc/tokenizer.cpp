#include "llmc/tokenizer.h"

#include <charconv>
#include <fstream>
#include <memory>
#include <queue>
#include <tuple>
#include <utility>

#include "llmc/error.h"

#ifdef GPT_MOE_PCRE2
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#endif

namespace {

constexpr int kRanks = 50256;
constexpr std::string_view kEndOfText = "<|endoftext|>";

// Strict base64: groups of four characters, '=' only at the very end. False if the text is anything else.
bool decode_base64(std::string_view text, std::string& bytes) {
  auto sextet = [](char c) -> int {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
  };
  bytes.clear();
  if (text.empty() || text.size() % 4 != 0) return false;
  size_t padding = text.ends_with("==") ? 2 : text.ends_with("=") ? 1 : 0;
  uint32_t group = 0;
  for (size_t i = 0; i < text.size(); i++) {
    bool pad = i >= text.size() - padding;
    int value = pad ? 0 : sextet(text[i]);
    if (value < 0) return false;
    group = group << 6 | uint32_t(value);
    if (i % 4 == 3) {
      for (int shift = 16; shift >= 0; shift -= 8) bytes.push_back(char(group >> shift & 0xFF));
      group = 0;
    }
  }
  bytes.resize(bytes.size() - padding);
  return true;
}

}  // namespace

Tokenizer Tokenizer::bytes() { return Tokenizer(kBytes); }
Tokenizer Tokenizer::gpt2(const std::string& ranks_path) { return read_ranks(ranks_path, true); }
Tokenizer Tokenizer::gpt2_subset(const std::string& ranks_path) { return read_ranks(ranks_path, false); }

Tokenizer Tokenizer::for_id(int tokenizer_id, const std::string& ranks_path) {
  if (tokenizer_id == kBytes) return bytes();
  if (tokenizer_id == kGpt2) return gpt2(ranks_path);
  fail("tokenizer ", tokenizer_id, " is unknown: 0 is GPT-2, 1 is bytes");
}

Tokenizer Tokenizer::read_ranks(const std::string& path, bool complete) {
  constexpr const char* remedy = ": fetch the file again with data/get_gpt2_ranks.sh";
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot open the GPT-2 ranks ", path, ": fetch them with data/get_gpt2_ranks.sh");

  Tokenizer t(kGpt2);
  t.ranks_path_ = path;
  t.tokens_.resize(kRanks);
  std::string line, token;
  int64_t number = 0;
  while (std::getline(file, line)) {
    number++;
    auto refuse = [&](const auto& what) { fail(path, " line ", number, ": ", what, remedy); };
    if (line.size() > 4096) refuse("not a list of ranks (the line is over 4096 bytes long)");
    size_t space = line.find(' ');
    if (space == std::string::npos) refuse("expected `base64 rank`");
    int32_t rank = -1;
    const char *first = line.data() + space + 1, *last = line.data() + line.size();
    auto [end, error] = std::from_chars(first, last, rank);
    if (error != std::errc() || end != last || rank < 0 || rank >= kRanks)
      refuse("the rank is not a number in 0..50255");
    if (!decode_base64(std::string_view(line).substr(0, space), token)) refuse("the token is not base64");
    if (!t.tokens_[size_t(rank)].empty()) refuse("this rank was given before");
    if (!t.ranks_.emplace(token, rank).second) refuse("this token was given before");
    t.tokens_[size_t(rank)] = token;
  }
  if (file.bad()) fail("cannot read ", path, remedy);
  for (int byte = 0; byte < 256; byte++) {  // merging starts from single bytes, so that no text is without an encoding
    if (!t.ranks_.contains(std::string(1, char(byte)))) fail(path, ": no rank for byte ", byte, remedy);
  }
  if (complete && t.ranks_.size() != kRanks) fail(path, ": ", t.ranks_.size(), " ranks, GPT-2 has ", kRanks, remedy);
  return t;
}

int32_t Tokenizer::rank_of(std::string_view token) const {
  auto found = ranks_.find(token);
  return found == ranks_.end() ? kNoRank : found->second;
}

// Byte-pair merging of one piece: the pair of neighbours with the lowest rank merges, the leftmost of equals first,
// until no pair has a rank. A queue of candidate pairs makes that n log n for a piece of n bytes; a text without a
// space (a long line of dashes, Chinese) is one piece.
void Tokenizer::encode_piece(std::string_view piece, std::vector<int32_t>& ids) const {
  if (int32_t whole = rank_of(piece); whole != kNoRank) {
    ids.push_back(whole);
    return;
  }
  const size_t n = piece.size();
  std::vector<size_t> next(n + 1), previous(n + 1);  // the part at i is piece[i, next[i]); next[i] == 0: merged away
  for (size_t i = 0; i <= n; i++) next[i] = i + 1, previous[i] = i - 1;

  using Pair = std::tuple<int32_t, size_t, size_t>;  // rank of the concatenation, its start, its end
  std::priority_queue<Pair, std::vector<Pair>, std::greater<>> queue;
  auto consider = [&](size_t left) {
    size_t right = next[left];
    if (right >= n) return;
    int32_t rank = rank_of(piece.substr(left, next[right] - left));
    if (rank != kNoRank) queue.emplace(rank, left, next[right]);
  };
  for (size_t i = 0; i + 1 < n; i++) consider(i);
  while (!queue.empty()) {
    auto [rank, left, end] = queue.top();
    queue.pop();
    // A queued pair is stale once either of its parts has merged with something else.
    if (next[left] == 0 || next[left] >= n || next[next[left]] != end) continue;
    next[std::exchange(next[left], end)] = 0;
    previous[end] = left;
    consider(left);
    if (left > 0) consider(previous[left]);
  }
  for (size_t i = 0; i < n; i = next[i]) ids.push_back(rank_of(piece.substr(i, next[i] - i)));
}

#ifdef GPT_MOE_PCRE2
// GPT-2 cuts a text into pieces before merging: contractions, words, numbers and punctuation, each with the space
// before it, and white space, of which a run leaves its last space to the word that follows. The published expression,
//   '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// is written here with \s spelled out, because PCRE2's \s also has U+180E, which Unicode no longer counts as a space.
static const pcre2_code* gpt2_expression() {
  static const auto code = [] {
    const std::string space = R"(\t-\r\x{85}\p{Z})";  // inside brackets
    const std::string pattern = R"('(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^)" + space + R"(\p{L}\p{N}]++|[)" +
                                space + "]+(?![^" + space + "])|[" + space + "]++";
    int error = 0;
    size_t offset = 0;
    pcre2_code* compiled = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                         PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
    if (!compiled) fail("PCRE2 refuses GPT-2's expression (error ", error, "): it was built without Unicode support");
    return std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)>(compiled, pcre2_code_free);
  }();
  return code.get();
}
#endif

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  if (id_ == kBytes) {
    ids.reserve(text.size());
    for (char c : text) ids.push_back(uint8_t(c));
    return ids;
  }
#ifdef GPT_MOE_PCRE2
  const pcre2_code* code = gpt2_expression();
  std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(code, nullptr), pcre2_match_data_free);
  uint32_t options = 0;  // the first match checks that the whole text is UTF-8, the others need not
  for (size_t at = 0; at < text.size();) {
    int result =
        pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at, options, match.get(), nullptr);
    if (result <= PCRE2_ERROR_UTF8_ERR1 && result >= PCRE2_ERROR_UTF8_ERR21) {
      fail("the text is not valid UTF-8 at byte ", pcre2_get_startchar(match.get()),
           ": GPT-2's tokenizer needs UTF-8; convert the text (iconv -t UTF-8), or use a model over bytes");
    }
    const size_t* range = pcre2_get_ovector_pointer(match.get());
    // Every character belongs to one of the alternatives, so a match starts where the last one ended.
    if (result < 0 || range[0] != at || range[1] <= at) fail("PCRE2 error ", result, " at byte ", at, " of the text");
    encode_piece(text.substr(at, range[1] - at), ids);
    at = range[1];
    options = PCRE2_NO_UTF_CHECK;
  }
  return ids;
#else
  fail("encoding with GPT-2's tokenizer needs PCRE2, which this build lacks: install libpcre2-dev and build again");
#endif
}

std::vector<std::pair<std::string, std::string>> Tokenizer::merges() const {
  std::vector<std::pair<std::string, std::string>> result;
  for (int32_t rank = 0; rank < int32_t(tokens_.size()); rank++) {
    const std::string& token = tokens_[size_t(rank)];
    if (token.size() < 2) continue;
    std::vector<std::string> parts;
    for (char c : token) parts.emplace_back(1, c);
    while (parts.size() > 2) {  // as if ids from this one on did not exist yet
      int32_t lowest = kNoRank;
      size_t at = 0;
      for (size_t i = 0; i + 1 < parts.size(); i++)
        if (int32_t r = rank_of(parts[i] + parts[i + 1]); r < lowest) lowest = r, at = i;
      if (lowest >= rank) fail(ranks_path_, ": id ", rank, " is no merge of ids before it");
      parts[at] += parts[at + 1];
      parts.erase(parts.begin() + int64_t(at) + 1);
    }
    result.emplace_back(parts[0], parts[1]);
  }
  return result;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) {
      fail("cannot decode id ", id, ": the ", name(), " tokenizer has ids 0 to ", vocab_size() - 1);
    }
    if (id == eot()) {
      text += kEndOfText;
    } else if (id_ == kBytes) {
      text += char(id);
    } else if (tokens_[size_t(id)].empty()) {
      fail("cannot decode id ", id, ": ", ranks_path_, " is a subset of the ranks without it");
    } else {
      text += tokens_[size_t(id)];
    }
  }
  return text;
}
