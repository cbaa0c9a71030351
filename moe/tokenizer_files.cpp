#include "moe/tokenizer_files.h"

#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "llmc/files.h"

using nlohmann::ordered_json;

namespace {

// The character that stands for a byte in tokenizer.json, as GPT-2 has it: printable bytes of Latin-1 are themselves,
// the others are the characters from U+0100 on.
std::string byte_character(int byte) {
  auto printable = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 255 && b != 173); };
  int code = byte;
  if (!printable(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += !printable(b);
  }
  if (code < 128) return std::string(1, char(code));
  return {char(0xC0 | code >> 6), char(0x80 | (code & 63))};
}

}  // namespace

TokenizerFiles read_tokenizer_files(const std::string& dir) {
  TokenizerFiles files;
  std::error_code error;
  for (const char* name :
       {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"})
    if (const std::string path = dir + "/" + name; std::filesystem::is_regular_file(path, error))
      files[name] = read_file(path);
  return files;
}

TokenizerFiles make_tokenizer_files(const Tokenizer& tokenizer) {
  std::string characters[256];
  for (int b = 0; b < 256; ++b) characters[b] = byte_character(b);
  auto spelled = [&](const std::string& bytes) {
    std::string text;
    for (char c : bytes) text += characters[uint8_t(c)];
    return text;
  };
  const std::string end = tokenizer.decode(std::array{tokenizer.eot()});
  nlohmann::json ids;  // not ordered: such an object looks through all its keys for every new one
  for (int32_t id = 0; id < tokenizer.eot(); ++id) ids[spelled(tokenizer.decode(std::array{id}))] = id;
  ids[end] = tokenizer.eot();
  ordered_json merges = ordered_json::array();
  for (const auto& [left, right] : tokenizer.merges()) merges.push_back(spelled(left) + " " + spelled(right));
  const bool words = tokenizer.id() == Tokenizer::kGpt2;  // GPT-2 cuts a text into words first
  ordered_json j{
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens",
       {{{"id", tokenizer.eot()},
         {"content", end},
         {"single_word", false},
         {"lstrip", false},
         {"rstrip", false},
         {"normalized", false},
         {"special", true}}}},
      {"normalizer", nullptr},
      {"pre_tokenizer",
       {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", words}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", words}}},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        {"vocab", std::move(ids)},
        {"merges", std::move(merges)}}}};
  ordered_json config{{"tokenizer_class", "PreTrainedTokenizerFast"},
                      {"bos_token", end},
                      {"eos_token", end},
                      {"clean_up_tokenization_spaces", false}};
  return {{"tokenizer.json", j.dump() + "\n"}, {"tokenizer_config.json", config.dump(2) + "\n"}};
}
