// Token shards and sample order: every window once an epoch in every layout, every target once in an evaluation, and
// shards that are damaged, foreign or of another vocabulary refused by name.
#include "llmc/dataloader.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>

#include "dev/test/error_line.h"
#include "llmc/random.h"

namespace {

using Ints = std::vector<int32_t>;

// The bytes of a shard: whatever header is wanted, whether it tells the truth or not.
std::vector<std::byte> shard_bytes(const Ints& ids, int tokenizer_id, bool wide, const Ints& first_of_header = {}) {
  Ints header(256, 0);
  header[0] = wide ? 20240801 : 20240520;
  header[1] = wide ? 7 : 1;
  header[2] = int32_t(ids.size());
  header[3] = tokenizer_id;
  std::copy(first_of_header.begin(), first_of_header.end(), header.begin());
  const size_t width = wide ? 4 : 2;
  std::vector<std::byte> bytes(1024 + ids.size() * width);
  std::memcpy(bytes.data(), header.data(), 1024);
  for (size_t i = 0; i < ids.size(); i++) std::memcpy(&bytes[1024 + i * width], &ids[i], width);  // little-endian
  return bytes;
}

// A folder of shards for one test.
struct Folder {
  std::string path = testing::TempDir() + "shards_" + std::to_string(::getpid()) + "/";
  Folder() { std::filesystem::create_directories(path); }
  ~Folder() { std::filesystem::remove_all(path); }
  std::string write(const std::string& name, const std::vector<std::byte>& bytes) const {
    std::ofstream(path + name, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), ssize_t(bytes.size()));
    return path + name;
  }
};

Ints counting(int first, int n) {
  Ints ids;
  for (int i = 0; i < n; i++) ids.push_back(first + i);
  return ids;
}

TEST(Shards, ReadsBothFormats) {
  Folder folder;
  const Ints ids = {50256, 0, 1, 65535, 7};
  folder.write("narrow.bin", shard_bytes(ids, 0, false));
  folder.write("wide.bin", shard_bytes({128255, 0, 1, 65535, 70000}, 0, true));
  const TokenShards narrow(folder.path + "narrow.bin", 65536), wide(folder.path + "wid*.bin", 128256);
  ASSERT_EQ(narrow.views().size(), 1u);
  EXPECT_EQ(narrow.views()[0].count, 5);
  EXPECT_EQ(narrow.tokenizer_id(), 0);
  EXPECT_EQ(wide.paths()[0], folder.path + "wide.bin");
  for (int i = 0; i < 5; i++) EXPECT_EQ(narrow.views()[0][i], ids[size_t(i)]);
  EXPECT_EQ(wide.views()[0][0], 128255);
  EXPECT_EQ(wide.views()[0][4], 70000);
}

TEST(Shards, GlobIsSortedByBytes) {
  Folder folder;
  for (const char* name : {"b_10.bin", "b_2.bin", "B_3.bin", "b_1.bin"})
    folder.write(name, shard_bytes({1, 2, 3}, 1, false));
  folder.write("notes.txt", {});
  const TokenShards shards(folder.path + "*.bin", 257);
  const std::vector<std::string> names = {"B_3.bin", "b_1.bin", "b_10.bin", "b_2.bin"};
  for (size_t i = 0; i < names.size(); i++) EXPECT_EQ(shards.paths()[i], folder.path + names[i]);
  EXPECT_EQ(shards.tokens(), 12);
}

TEST(Shards, RefusesWhatIsNoShardOfThisModel) {
  Folder folder;
  const Ints ids = counting(0, 100);
  auto refused = [&](const std::vector<std::byte>& bytes, int vocab_size, const auto&... texts) {
    const std::string path = folder.write("shard.bin", bytes);
    expect_refused([&] { TokenShards(path, vocab_size); }, path, texts...);
    expect_refused([&] { parse_shard(bytes, path, vocab_size); }, path, texts...);
  };
  auto cut = [](std::vector<std::byte> bytes, size_t size) { return bytes.resize(size), bytes; };

  for (bool wide : {false, true}) {
    const auto good = shard_bytes(ids, 0, wide);
    for (size_t size : {size_t(8), size_t(1000), size_t(1023)}) refused(cut(good, size), 300, "truncated");
    for (size_t size : {size_t(1024), good.size() - 1}) refused(cut(good, size), 300, "truncated");
    for (size_t size : {size_t(0), size_t(1), size_t(7)}) refused(cut(good, size), 300, "not a token shard");
    refused(cut(good, good.size() + 1), 300, "damaged");
    refused(shard_bytes(ids, 0, wide, {20240521}), 300, "not a token shard", "20240521");
    refused(shard_bytes(ids, 0, wide, {wide ? 20240520 : 20240801}), 300, "not a token shard");
    refused(shard_bytes(ids, 0, wide, {wide ? 20240801 : 20240520, 2}), 300, "not a token shard");
    const int magic = wide ? 20240801 : 20240520, version = wide ? 7 : 1;
    refused(shard_bytes(ids, 0, wide, {magic, version, INT32_MAX}), 300, "truncated", "2147483647");
    refused(shard_bytes(ids, 0, wide, {magic, version, -1}), 300, "-1 tokens");
    refused(shard_bytes(ids, 0, wide, {magic, version, INT32_MIN}), 300, "tokens");
    refused(shard_bytes(ids, 0, wide, {magic, version, 0}), 300, "0 tokens");
    refused(shard_bytes(ids, 0, wide, {magic, version, 99}), 300, "damaged");
    refused(shard_bytes(ids, 2, wide), 300, "tokenizer 2");
    refused(shard_bytes(ids, -1, wide), 300, "tokenizer -1");
    refused(good, 99, "token 99 is id 99", "0 to 98");               // an id that the model lacks
    refused(shard_bytes(ids, 1, wide), 256, "257", "--vocab-size");  // a byte shard for a smaller model
    refused(shard_bytes({256, 65, 257}, 1, wide), 50304, "token 2 is id 257", "byte tokenizer");
  }
  refused(shard_bytes({1, 2, -1}, 0, true), INT32_MAX, "token 2 is id 4294967295");

  // A GPT-2 or unknown shard is accepted by any model whose vocabulary covers its ids; bytes by any of 257 or more.
  parse_shard(shard_bytes(ids, 0, false), "good", 100);
  parse_shard(shard_bytes({256, 0, 255}, 1, false), "good", 257);
  parse_shard(shard_bytes({256, 0, 255}, 1, true), "good", 50304);
}

TEST(Shards, RefusesFilesThatCannotBeRead) {
  Folder folder;
  expect_refused([&] { TokenShards(folder.path + "*.bin", 257); }, folder.path + "*.bin", "no file matches");
  expect_refused([&] { TokenShards("", 257); }, "no file matches");
  std::filesystem::create_directory(folder.path + "sub.bin");
  expect_refused([&] { TokenShards(folder.path + "*.bin", 257); }, folder.path + "sub.bin", "not a regular file");
}

TEST(Shards, RefusesShardsOfTwoTokenizers) {
  Folder folder;
  folder.write("a.bin", shard_bytes({1, 2, 3}, 1, false));
  const std::string other = folder.write("b.bin", shard_bytes({1, 2, 3}, 0, false));
  expect_refused([&] { TokenShards(folder.path + "*.bin", 257); }, other, folder.path + "a.bin");
}

// Whatever the bytes, either one line names the file, or the result lies inside the bytes. AddressSanitizer watches the
// rest: every buffer is exactly as large as the file would be.
TEST(Shards, SurvivesAHundredThousandRandomFiles) {
  int accepted = 0;
  for (uint64_t n = 0; n < 100000; n++) {
    uint64_t draws = 0;
    auto random = [&](uint64_t below) { return random_bits(3, n, draws++) % below; };
    const bool wide = random(2);
    Ints ids(1 + random(20));
    for (int32_t& id : ids) id = int32_t(random(260));
    std::vector<std::byte> bytes = shard_bytes(ids, int(random(2)), wide);
    const uint64_t kind = random(8);
    if (kind == 0) {  // noise from the first byte on
      bytes.resize(random(3000));
      for (std::byte& b : bytes) b = std::byte(random(256));
    } else if (kind < 4) {  // one of the header's first ints replaced
      const uint64_t bits = random(UINT64_MAX);
      const int32_t value = random(2) ? int32_t(bits) : int32_t(bits % 50) - 25;
      std::memcpy(&bytes[4 * random(5)], &value, 4);
    } else if (kind == 4) {  // the wrong length
      bytes.resize(random(bytes.size() + 40));
    } else if (kind < 7) {  // some byte replaced
      bytes[random(bytes.size())] = std::byte(random(256));
    }
    bytes = std::vector<std::byte>(bytes);  // no spare capacity
    const int vocab_size = random(2) ? 257 : int(1 + random(300));
    const std::string line = error_line([&] {
      const ShardView shard = parse_shard(bytes, "some/shard.bin", vocab_size);
      ASSERT_EQ(1024 + size_t(shard.count) * (shard.wide ? 4 : 2), bytes.size());
      ASSERT_EQ(shard.ids, bytes.data() + 1024);
      for (int64_t i = 0; i < shard.count; i++) ASSERT_LT(uint32_t(shard[i]), uint32_t(vocab_size));
      accepted++;
    });
    ASSERT_TRUE(line.empty() || line.starts_with("some/shard.bin: ")) << line;
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_LT(accepted, 90000);
}

TEST(Permutation, IsABijectionOfItsOwnForEverySeedAndEpoch) {
  for (int64_t n : {1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 4096, 100003}) {
    std::vector<int64_t> first, other_epoch, other_seed;
    std::vector<bool> seen(size_t(n), false);
    for (int64_t i = 0; i < n; i++) {
      const int64_t j = permuted(i, n, 1, 0);
      ASSERT_TRUE(j >= 0 && j < n);
      ASSERT_FALSE(seen[size_t(j)]) << n << " " << i;
      seen[size_t(j)] = true;
      first.push_back(j);
      other_epoch.push_back(permuted(i, n, 1, 1));
      other_seed.push_back(permuted(i, n, 2, 0));
    }
    if (n < 16) continue;
    EXPECT_NE(first, other_epoch);
    EXPECT_NE(first, other_seed);
  }
  // Large domains, where only constant memory is possible: in range, and no two of some thousand alike.
  const int64_t huge = (int64_t(1) << 40) + 12345;
  std::set<int64_t> images;
  for (int64_t i = 0; i < 5000; i++) images.insert(permuted(huge - 1 - i, huge, 9, 3));
  EXPECT_EQ(images.size(), 5000u);
  EXPECT_GE(*images.begin(), 0);
  EXPECT_LT(*images.rbegin(), huge);
}

TEST(Permutation, LooksRandom) {
  // Mean displacement of a random permutation is n/3; neighbours stay neighbours about twice in n.
  const int64_t n = 20000;
  double distance = 0;
  int neighbours = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t j = permuted(i, n, 5, 2);
    distance += std::abs(double(j - i)) / double(n);
    if (i > 0) neighbours += std::abs(j - permuted(i - 1, n, 5, 2)) == 1;
  }
  EXPECT_NEAR(distance / double(n), 1.0 / 3, 0.01);
  EXPECT_LE(neighbours, 20);
}

// Three shards in which every id occurs once, so that an id says where it was read; both widths, uneven ends.
struct LoaderTest : testing::Test {
  Folder folder;
  const int T = 8;
  std::vector<Ints> shards = {counting(0, 83), counting(1000, 8), counting(2000, 401)};
  std::string glob = folder.path + "*.bin";
  LoaderTest() {
    for (size_t s = 0; s < shards.size(); s++) {
      folder.write(std::to_string(s) + ".bin", shard_bytes(shards[s], 0, s == 2));
    }
  }
  DataLoader loader(bool shuffle, uint64_t seed = 42) const {
    return DataLoader(TokenShards(glob, 3000), T, seed, shuffle);
  }
};

TEST_F(LoaderTest, EveryEpochReadsEveryWindowOnce) {
  const DataLoader loader = this->loader(true);
  ASSERT_EQ(loader.windows(), 82 / 8 + 7 / 8 + 400 / 8);
  std::vector<Ints> orders;
  for (int64_t epoch = 0; epoch < 4; epoch++) {
    std::multiset<int32_t> read;
    Ints order;
    for (int64_t i = 0; i < loader.windows(); i++) {
      Ints inputs(size_t(T), -9), targets(size_t(T), -9);
      loader.sample(epoch * loader.windows() + i, inputs.data(), targets.data());
      for (int t = 0; t < T; t++) {
        EXPECT_EQ(targets[size_t(t)], inputs[size_t(t)] + 1);  // ids count up, so this is "the next id of the shard"
        EXPECT_EQ(inputs[size_t(t)], inputs[0] + t);
      }
      read.insert(inputs.begin(), inputs.end());
      order.push_back(inputs[0]);
    }
    std::multiset<int32_t> expected;
    for (const Ints& shard : shards) {
      expected.insert(shard.begin(), shard.begin() + ptrdiff_t((shard.size() - 1) / size_t(T) * size_t(T)));
    }
    EXPECT_EQ(read, expected);
    for (const Ints& earlier : orders) EXPECT_NE(order, earlier);
    orders.push_back(order);
  }
}

TEST_F(LoaderTest, WithoutShuffleReadsFrontToBack) {
  const DataLoader loader = this->loader(false);
  for (int64_t g = 0; g < 3 * loader.windows(); g++) {
    Ints inputs(size_t(T), 0), targets(size_t(T), 0);
    loader.sample(g, inputs.data(), targets.data());
    const int64_t w = g % loader.windows();
    EXPECT_EQ(inputs[0], w < 10 ? 8 * w : 2000 + 8 * (w - 10));
  }
}

TEST_F(LoaderTest, OrderDoesNotDependOnTheSplitOfBatches) {
  // The samples of 6 steps of 12 sequences: by one process in one go; by 3 ranks of micro-batches of 2, the ranks' work
  // taken in reverse; and by a second loader that starts at step 4, as a resumed run does.
  const DataLoader loader = this->loader(true), resumed = this->loader(true);
  auto read = [&](const DataLoader& from, int64_t g) {
    Ints both(size_t(2 * T), 0);
    from.sample(g, both.data(), both.data() + T);
    return both;
  };
  std::vector<Ints> whole(72), split(72);
  for (int64_t g = 0; g < 72; g++) whole[size_t(g)] = read(loader, g);
  for (int rank = 2; rank >= 0; rank--) {
    for (int64_t step = 0; step < 6; step++) {
      for (int micro = 1; micro >= 0; micro--) {
        for (int b = 0; b < 2; b++) {
          const int64_t g = step * 12 + micro * 6 + rank * 2 + b;
          split[size_t(g)] = read(step >= 4 ? resumed : loader, g);
        }
      }
    }
  }
  EXPECT_EQ(whole, split);
  std::vector<Ints> other_seed;
  const DataLoader other = this->loader(true, 43);
  for (int64_t g = 0; g < 72; g++) other_seed.push_back(read(other, g));
  EXPECT_NE(whole, other_seed);
}

TEST_F(LoaderTest, EvaluationCoversEveryTargetOnce) {
  for (int seq_len : {1, 2, 3, 7, 8, 82, 400, 401, 1000}) {
    const DataLoader loader(TokenShards(glob, 3000), seq_len, 1, true);
    EXPECT_EQ(loader.eval_targets(), 82 + 7 + 400);
    std::multiset<int32_t> seen, expected;
    for (const Ints& shard : shards) expected.insert(shard.begin() + 1, shard.end());
    for (int64_t w = 0; w < loader.eval_windows(); w++) {
      Ints inputs(size_t(seq_len), -9), targets(size_t(seq_len), -9);
      loader.eval_sample(w, inputs.data(), targets.data());
      EXPECT_NE(targets[0], -1);  // no window is empty
      for (size_t t = 0; t < targets.size(); t++) {
        if (targets[t] == -1) {
          EXPECT_EQ(inputs[t], 0);
        } else {
          EXPECT_EQ(inputs[t] + 1, targets[t]);
          seen.insert(targets[t]);
        }
        EXPECT_FALSE(t > 0 && targets[t - 1] == -1 && targets[t] != -1);  // padding is at the end only
      }
    }
    EXPECT_EQ(seen, expected) << seq_len;
  }
}

TEST_F(LoaderTest, RefusesWhatDoesNotExist) {
  Ints inputs(1000, 0), targets(1000, 0);
  const DataLoader loader = this->loader(true);
  expect_refused([&] { loader.sample(-1, inputs.data(), targets.data()); }, "-1");
  expect_refused([&] { loader.eval_sample(-1, inputs.data(), targets.data()); }, "-1");
  expect_refused([&] { loader.eval_sample(loader.eval_windows(), inputs.data(), targets.data()); }, glob);
  expect_refused([&] { DataLoader(TokenShards(glob, 3000), 0, 1, true); }, "sequence length 0");
  const DataLoader too_long(TokenShards(glob, 3000), 401, 1, true);
  EXPECT_EQ(too_long.windows(), 0);
  expect_refused([&] { too_long.sample(0, inputs.data(), targets.data()); }, glob, "402", "--seq-len");
}

TEST(Loader, AShardOfOneTokenHasNothingToPredict) {
  Folder folder;
  folder.write("one.bin", shard_bytes({256}, 1, false));
  const DataLoader loader(TokenShards(folder.path + "one.bin", 257), 4, 1, true);
  EXPECT_EQ(loader.windows(), 0);
  EXPECT_EQ(loader.eval_windows(), 0);
  EXPECT_EQ(loader.eval_targets(), 0);
}

}  // namespace
