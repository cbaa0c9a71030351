// Tokenizers: GPT-2 ids equal to tiktoken's on the committed strings, round trips, and refusal of what is malformed.
#include "llmc/tokenizer.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "dev/test/error_line.h"
#include "llmc/random.h"

namespace {

const std::string kFixtures = "dev/test/fixtures/";
const std::string kSubset = kFixtures + "gpt2_subset.tiktoken";
const std::string kAllRanks = "data/gpt2.tiktoken";

std::string slurp(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A rank file of the given text, removed with the object.
struct RankFile {
  std::string path = testing::TempDir() + "ranks_" + std::to_string(::getpid()) + ".tiktoken";
  explicit RankFile(const std::string& text) { std::ofstream(path, std::ios::binary) << text; }
  ~RankFile() { std::filesystem::remove(path); }
};

// Every text of the fixture has tiktoken's ids, and they decode to the text.
void expect_fixture_ids(const Tokenizer& gpt2) {
  std::ifstream file(kFixtures + "gpt2_strings.json");
  const nlohmann::json rows = nlohmann::json::parse(file);
  ASSERT_GE(rows.size(), 80u);
  for (const auto& row : rows) {
    const std::string text = row["text"];
    const std::vector<int32_t> ids = row["ids"];
    EXPECT_EQ(gpt2.decode(ids), text);
#ifdef GPT_MOE_PCRE2
    EXPECT_EQ(gpt2.encode(text), ids) << row["text"].dump(-1, ' ', true);
#endif
  }
}

TEST(ByteTokenizer, EveryByteIsItsOwnId) {
  const Tokenizer t = Tokenizer::bytes();
  EXPECT_EQ(t.id(), 1);
  EXPECT_EQ(t.name(), "bytes");
  EXPECT_EQ(t.vocab_size(), 257);
  EXPECT_EQ(t.eot(), 256);
  std::string all;
  std::vector<int32_t> ids;
  for (int i = 0; i < 256; i++) all.push_back(char(i)), ids.push_back(i);
  EXPECT_EQ(t.encode(all), ids);  // also what is not UTF-8
  EXPECT_EQ(t.decode(ids), all);
  EXPECT_EQ(t.decode(std::vector<int32_t>{256, 104, 105}), "<|endoftext|>hi");
  expect_refused([&] { t.decode(std::vector<int32_t>{257}); }, "257", "0 to 256");
  expect_refused([&] { t.decode(std::vector<int32_t>{-1}); }, "-1");
}

TEST(Tokenizer, ForId) {
  EXPECT_EQ(Tokenizer::for_id(1, "no such file").id(), 1);
  expect_refused([] { Tokenizer::for_id(0, "no such file"); }, "no such file", "data/get_gpt2_ranks.sh");
  expect_refused([] { Tokenizer::for_id(2, kSubset); }, "tokenizer 2");
}

TEST(Gpt2Tokenizer, EqualsTiktokenWithTheSubset) {
  const Tokenizer t = Tokenizer::gpt2_subset(kSubset);
  EXPECT_EQ(t.id(), 0);
  EXPECT_EQ(t.name(), "gpt2");
  EXPECT_EQ(t.vocab_size(), 50257);
  EXPECT_EQ(t.eot(), 50256);
  expect_fixture_ids(t);
}

// What needs all of GPT-2's ranks: a file that the repository does not hold and data/get_gpt2_ranks.sh fetches from the
// network. Without it these are skipped by name; all else about GPT-2 tokens is tested with the subset in fixtures.
class AllRanks : public testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(kAllRanks)) GTEST_SKIP() << kAllRanks << " is not there (data/get_gpt2_ranks.sh)";
  }
};

TEST_F(AllRanks, EqualsTiktoken) {
  const Tokenizer t = Tokenizer::gpt2(kAllRanks);
  expect_fixture_ids(t);
  std::vector<int32_t> every(50257);
  for (int i = 0; i < 50257; i++) every[size_t(i)] = i;
  EXPECT_GT(t.decode(every).size(), 300000u);
}

TEST(Gpt2Tokenizer, EndOfTextInTheTextIsText) {
  const Tokenizer t = Tokenizer::gpt2_subset(kSubset);
  EXPECT_EQ(t.decode(std::vector<int32_t>{50256}), "<|endoftext|>");
#ifdef GPT_MOE_PCRE2
  for (int32_t id : t.encode("<|endoftext|>")) EXPECT_NE(id, t.eot());
#endif
}

TEST(Gpt2Tokenizer, RefusesIdsWithoutBytes) {
  const Tokenizer t = Tokenizer::gpt2_subset(kSubset);
  expect_refused([&] { t.decode(std::vector<int32_t>{50257}); }, "50257");
  expect_refused([&] { t.decode(std::vector<int32_t>{-7}); }, "-7");
  expect_refused([&] { t.decode(std::vector<int32_t>{50255}); }, "50255", kSubset);  // " gazed": not in the subset
}

#ifdef GPT_MOE_PCRE2
TEST(Gpt2Tokenizer, RefusesInvalidUtf8WithItsOffset) {
  const Tokenizer t = Tokenizer::gpt2_subset(kSubset);
  for (const char* bad : {"\x80", "\xC0\x80", "\xFF", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82", "\xC3("}) {
    expect_refused([&] { t.encode(std::string("some text ") + bad); }, "UTF-8", "byte 10");
  }
}

TEST(Gpt2Tokenizer, RandomTextComesBack) {
  const Tokenizer t = Tokenizer::gpt2_subset(kSubset);
  for (uint64_t n = 0; n < 2000; n++) {
    std::string text;
    for (uint64_t i = 0; i < 1 + n % 50; i++) {
      uint64_t bits = random_bits(7, n, i);
      uint32_t c = uint32_t(bits >> 8) & ((1u << (7 + bits % 15)) - 1);  // 7 to 21 bits: short and long encodings alike
      if (c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) c = ' ';
      if (c < 0x80) {
        text += char(c);
      } else if (c < 0x800) {
        text += {char(0xC0 | c >> 6), char(0x80 | (c & 63))};
      } else if (c < 0x10000) {
        text += {char(0xE0 | c >> 12), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
      } else {
        text += {char(0xF0 | c >> 18), char(0x80 | (c >> 12 & 63)), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
      }
    }
    EXPECT_EQ(t.decode(t.encode(text)), text) << n;
  }
}

TEST(Gpt2Tokenizer, LongPiecesAreNotQuadratic) {  // a quadratic merge of these would take minutes
  const Tokenizer t = Tokenizer::gpt2_subset(kSubset);
  for (const char* unit : {"a", " ", "é", "=-", "x1", "\n "}) {
    std::string text;
    while (text.size() < 300000) text += unit;
    EXPECT_EQ(t.decode(t.encode(text)), text);
  }
}
#endif

TEST(Tokenizer, BytesHaveNoMerges) { EXPECT_TRUE(Tokenizer::bytes().merges().empty()); }

// The merges of GPT-2's own list: its first three, and each is what its id spells.
TEST_F(AllRanks, Merges) {
  const Tokenizer t = Tokenizer::gpt2(kAllRanks);
  const auto merges = t.merges();
  ASSERT_EQ(merges.size(), 50000u);
  EXPECT_EQ(merges[0], (std::pair<std::string, std::string>(" ", "t")));
  EXPECT_EQ(merges[1], (std::pair<std::string, std::string>(" ", "a")));
  EXPECT_EQ(merges[2], (std::pair<std::string, std::string>("h", "e")));
  for (size_t i = 0; i < merges.size(); ++i)
    EXPECT_EQ(merges[i].first + merges[i].second, t.decode(std::vector<int32_t>{int32_t(256 + i)}));
}

TEST(Gpt2Ranks, RefusesMalformedFiles) {
  auto refused = [](const std::string& text, const auto&... texts) {
    RankFile file(text);
    expect_refused([&] { Tokenizer::gpt2(file.path); }, file.path, "data/get_gpt2_ranks.sh", texts...);
    expect_refused([&] { Tokenizer::gpt2_subset(file.path); }, file.path, "data/get_gpt2_ranks.sh", texts...);
  };
  refused("", "byte 0");
  refused("IQ== 0\nIg== 1\n", "byte 0");
  refused("IQ== 0\n\n", "line 2");
  refused("IQ==\n", "line 1");
  refused("IQ== \n", "line 1");
  refused("IQ== x\n", "line 1");
  refused("IQ== 1x\n", "line 1");
  refused("IQ== 0 0\n", "line 1");
  refused("IQ== -1\n", "line 1");
  refused("IQ== 50256\n", "line 1");
  refused("IQ== 99999999999999999999\n", "line 1");
  refused(" 5\n", "line 1", "base64");
  refused("IQ= 0\n", "line 1", "base64");
  refused("IQ=a 0\n", "line 1", "base64");
  refused("==== 0\n", "line 1", "base64");
  refused("I\xC3== 0\n", "line 1", "base64");
  refused("IQ== 0\nIQ== 1\n", "line 2", "token");
  refused("IQ== 0\nIg== 0\n", "line 2", "rank");
  refused(std::string(100000, 'A'), "line 1");
  refused("<!DOCTYPE html>\n<html>\n", "line 1");
  refused(std::string("IQ== 0\r\n"), "line 1");

  // A file that lost its end or one line is not taken for all of GPT-2's ranks.
  expect_refused([] { Tokenizer::gpt2(kSubset); }, kSubset, "50256", "data/get_gpt2_ranks.sh");
  expect_refused([] { Tokenizer::gpt2(testing::TempDir()); }, testing::TempDir());
}

TEST(Gpt2Ranks, SurvivesRandomDamage) {
  const std::string good = slurp(kSubset);
  ASSERT_GT(good.size(), 10000u);
  int refusals = 0;
  for (uint64_t n = 0; n < 300; n++) {
    std::string text = good;
    for (uint64_t i = 0; i < 1 + n % 4; i++) {
      uint64_t bits = random_bits(11, n, i);
      size_t at = bits % text.size();
      if (bits >> 61 == 0) text.resize(at);
      if (bits >> 61 == 1) text.erase(at, 1 + (bits >> 32) % 9);
      if (bits >> 61 > 1) text[at] = char(bits >> 40);
      if (text.empty()) break;
    }
    RankFile file(text);
    const std::string line = error_line([&] { Tokenizer::gpt2_subset(file.path); });
    if (line.empty()) continue;  // damage can spell another token or rank, which only the full file's checks can tell
    refusals++;
    EXPECT_NE(line.find(file.path), std::string::npos) << line;
  }
  EXPECT_GT(refusals, 100);
}

}  // namespace
