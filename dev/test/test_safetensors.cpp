// safetensors: what is written is read back to the bit; what is not a sound file is refused in one line, whatever its
// bytes are (run under ASan and UBSan).
#include "llmc/safetensors.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include <nlohmann/json.hpp>

#include "dev/test/error_line.h"
#include "dev/test/temp_dir.h"
#include "llmc/random.h"

namespace {

constexpr DType kAllTypes[] = {DType::f64, DType::f32, DType::i32, DType::bf16, DType::u8};  // wider first

// A file of this header and this many bytes of data, whether they agree or not.
std::string file_of(const std::string& header, size_t data_bytes) {
  uint64_t length = header.size();
  std::string text(reinterpret_cast<const char*>(&length), 8);
  text += header;
  for (size_t i = 0; i < data_bytes; i++) text += char('a' + i % 26);
  return text;
}

SafetensorsContent parse(const std::string& file) {
  return parse_safetensors(std::as_bytes(std::span(file.data(), file.size())), "memory");
}

// A small sound file: two types, an empty tensor, a scalar, metadata.
std::string small_file() {
  return file_of(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
      R"("empty":{"dtype":"I64","shape":[0,5],"data_offsets":[24,24]},"s":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}} )",
      26);
}

// Touches every byte that the reader vouches for.
size_t checksum(const SafetensorsContent& content) {
  size_t sum = 0;
  for (const std::string& name : content.names) {
    const TensorView& view = content.tensors.at(name);
    for (size_t i = 0; i < view.bytes; i++) sum = sum * 31 + size_t(view.data[i]);
  }
  return sum;
}

std::vector<std::byte> random_bytes(size_t count, uint64_t stream) {
  std::vector<std::byte> bytes(count);
  for (size_t i = 0; i < count; i++) bytes[i] = std::byte(random_bits(9, stream, i));
  return bytes;
}

TEST(Safetensors, RoundTripOfEveryType) {
  TempDir dir;
  std::vector<TensorSpec> specs;
  for (DType d : kAllTypes)
    for (std::vector<int64_t> shape : {std::vector<int64_t>{}, {8}, {3, 8}, {2, 0, 8}, {1, 2, 3, 4}})
      specs.push_back({std::string(dtype_name(d)) + " \"\n\u00e9 " + std::to_string(specs.size()), d, shape});
  SafetensorsWriter writer(dir / "x.safetensors", specs, {{"who", "a \"test\""}});
  for (size_t i = 0; i < specs.size(); i++) {
    std::vector<std::byte> data = random_bytes(specs[i].bytes(), i);
    size_t first = data.size() / 3;  // in two pieces
    writer.append(specs[i].name, data.data(), first);
    writer.append(specs[i].name, data.data() + first, data.size() - first);
  }
  writer.finish();

  SafetensorsFile file(dir / "x.safetensors");
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"who", "a \"test\""}}));
  ASSERT_EQ(file.names().size(), specs.size());
  for (size_t i = 0; i < specs.size(); i++) {
    EXPECT_EQ(file.names()[i], specs[i].name);
    const TensorView& view = file.get(specs[i].name);
    EXPECT_TRUE(view.is(specs[i].dtype));
    EXPECT_EQ(view.shape, specs[i].shape);
    ASSERT_EQ(view.bytes, specs[i].bytes());
    std::vector<std::byte> data = random_bytes(specs[i].bytes(), i);
    EXPECT_TRUE(std::equal(data.begin(), data.end(), view.data));
    EXPECT_EQ(size_t(view.data - file.get(specs[0].name).data) % dtype_size(specs[i].dtype), 0u);
  }
  EXPECT_EQ(file.find("nothing"), nullptr);
  expect_refused([&] { file.get("nothing"); }, "x.safetensors: has no tensor \"nothing\"");
  uint64_t header;
  std::memcpy(&header, get_file(dir / "x.safetensors").data(), 8);
  EXPECT_EQ(header % 8, 0u);
}

TEST(Safetensors, RowByRowThroughASmallBufferAndLargePieces) {
  TempDir dir;
  std::vector<std::byte> data = random_bytes(3'000'000, 1);
  SafetensorsWriter writer(dir / "x", {{"rows", DType::u8, {3000, 1000}}, {"whole", DType::u8, {3000, 1000}}});
  for (int row = 0; row < 3000; row++) writer.append("rows", data.data() + row * 1000, 1000);
  writer.append("whole", data.data(), data.size());
  writer.finish();
  SafetensorsFile file(dir / "x");
  for (const char* name : {"rows", "whole"}) EXPECT_EQ(std::memcmp(file.get(name).data, data.data(), data.size()), 0);
}

TEST(Safetensors, ReadsForeignTypesAndOrders) {
  // Tensors out of order in the header, unaligned header, types that we only carry.
  std::string text = file_of(
      R"({"b":{"shape":[3],"data_offsets":[5,11],"dtype":"F16"},"a":{"data_offsets":[0,5],"dtype":"BOOL","shape":[5]}})",
      11);
  SafetensorsContent content = parse(text);
  EXPECT_EQ(content.names, (std::vector<std::string>{"b", "a"}));
  EXPECT_EQ(content.tensors.at("b").data - content.tensors.at("a").data, 5);
  EXPECT_TRUE(content.metadata.empty());
  EXPECT_TRUE(parse(file_of("{}", 0)).names.empty());
  for (auto [name, size] : std::map<std::string, int>{{"I64", 8},
                                                      {"U64", 8},
                                                      {"C64", 8},
                                                      {"U32", 4},
                                                      {"I16", 2},
                                                      {"U16", 2},
                                                      {"I8", 1},
                                                      {"F8_E4M3", 1},
                                                      {"F8_E5M2", 1}}) {
    std::string header =
        "{\"t\":{\"dtype\":\"" + name + "\",\"shape\":[2],\"data_offsets\":[0," + std::to_string(2 * size) + "]}}";
    EXPECT_EQ(parse(file_of(header, size_t(2 * size))).tensors.at("t").bytes, size_t(2 * size));
  }
}

template <class Stored, class T>
std::vector<T> converted(const std::string& dtype, std::vector<Stored> stored, int64_t first, int64_t count) {
  std::vector<std::byte> unaligned(stored.size() * sizeof(Stored) + 1);
  std::memcpy(unaligned.data() + 1, stored.data(), stored.size() * sizeof(Stored));
  TensorView view{
      dtype, {int64_t(stored.size())}, unaligned.data() + 1, stored.size() * sizeof(Stored), int64_t(stored.size())};
  std::vector<T> out(size_t(std::max<int64_t>(count, 0)));
  read_elements("t", view, first, count, out.data());
  return out;
}

TEST(Safetensors, ReadElementsConverts) {
  using Doubles = std::vector<double>;
  using Floats = std::vector<float>;
  EXPECT_EQ((converted<double, double>("F64", {1, 0.1, 3}, 1, 2)), (Doubles{0.1, 3}));
  EXPECT_EQ((converted<double, float>("F64", {1, 0.1, 3}, 0, 3)), (Floats{1, 0.1f, 3}));
  EXPECT_EQ((converted<float, double>("F32", {1, 0.1f}, 1, 1)), (Doubles{double(0.1f)}));
  EXPECT_EQ((converted<bf16, float>("BF16", {bf16(1.5f), bf16(-2.0f)}, 0, 2)), (Floats{1.5f, -2}));
  EXPECT_EQ((converted<float, bf16>("F32", {0.1f}, 0, 1))[0].bits, bf16(0.1f).bits);
  EXPECT_EQ((converted<double, bf16>("F64", {0.1}, 0, 1))[0].bits, bf16(0.1f).bits);
  std::vector<uint16_t> half = {0x3C00, 0xC000, 0x7BFF, 0x0001, 0x03FF, 0x8000, 0x7C00, 0x2E66};
  EXPECT_EQ((converted<uint16_t, float>("F16", half, 0, 8)),
            (Floats{1, -2, 65504, 0x1p-24f, 1023 * 0x1p-24f, 0, INFINITY, 0.0999755859375f}));
  EXPECT_TRUE(std::isnan(converted<uint16_t, float>("F16", {0x7E00}, 0, 1)[0]));
  EXPECT_EQ((converted<int32_t, int32_t>("I32", {4, -5}, 1, 1)), (std::vector<int32_t>{-5}));
  EXPECT_EQ((converted<uint8_t, uint8_t>("U8", {4, 5}, 0, 0)), (std::vector<uint8_t>{}));
  expect_refused([] { converted<int32_t, float>("I32", {1}, 0, 1); }, "type I32 cannot be read as F32");
  expect_refused([] { converted<float, int32_t>("F32", {1}, 0, 1); }, "type F32 cannot be read as I32");
  constexpr int64_t huge = std::numeric_limits<int64_t>::max();
  for (auto [first, count] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {3, 0}, {2, 1}, {-1, 1}, {1, huge}, {huge, 1}, {0, -1}})
    expect_refused(
        [&, f = first, c = count] {
          float out;
          float stored[2] = {1, 2};
          read_elements("t", {"F32", {2}, reinterpret_cast<std::byte*>(stored), 8, 2}, f, c, &out);
        },
        "asked of 2");
}

TEST(Safetensors, RefusesBadHeaders) {
  auto refused = [](const std::string& header, size_t data, const std::string& text) {
    expect_refused([&] { parse(file_of(header, data)); }, "memory: ", text);
  };
  auto tensor = [](const std::string& body) { return "{\"t\":{" + body + "}}"; };
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  EXPECT_NO_THROW(parse(file_of(tensor(good), 8)));

  for (uint64_t length :
       {uint64_t(100), uint64_t(100'000'001), uint64_t(1) << 40, uint64_t(1) << 63, ~uint64_t(0), ~uint64_t(0) - 7}) {
    std::string file = file_of(tensor(good), 8);
    std::memcpy(file.data(), &length, 8);
    expect_refused([&] { parse(file); }, "memory: ");
  }
  refused("", 0, "does not begin with {");
  refused(" {}", 0, "does not begin with {");
  refused("[]", 0, "does not begin with {");
  refused("{", 0, "not JSON at byte");
  refused("{}x", 0, "not JSON at byte");
  refused("{\"t\xff\":1}", 0, "not JSON at byte");
  refused("{\"" + std::string(100000, 'x'), 0, "not JSON at byte");
  refused("{\"" + std::string(100000, 'x') + "\":1}", 0, "a number where none belongs");
  refused("{\"a\\nb\":1}", 0, "\"a\\nb\"");
  refused("{\"t\":" + std::string(1'000'000, '[') + "}", 0, "a list where none belongs");
  std::string nested;
  for (int i = 0; i < 100'000; i++) nested += "{\"a\":";
  refused(nested, 0, "unknown key \"a\"");
  refused(R"({"t":{"dtype":{"dtype":{)", 0, "an object where none belongs");
  refused(tensor(R"("shape":)" + std::string(1'000'000, '[')), 0, "a list where none belongs");
  refused(tensor(R"("shape":[{"x":1}])"), 0, "an object where none belongs");
  refused("{\"t\":" + std::string("null}"), 0, "null");
  refused("{\"t\":\"x\"}", 0, "a string where none belongs");
  refused("{\"t\":true}", 0, "true or false");
  refused(R"({"__metadata__":{"a":{}}})", 0, "__metadata__: an object");
  refused(R"({"__metadata__":{"a":1}})", 0, "__metadata__: a number");
  refused(R"({"__metadata__":{"a":"1","a":"2"}})", 0, "occurs twice");
  refused(R"({"__metadata__":[]})", 0, "__metadata__: a list");
  refused("{\"t\":{" + good + "},\"t\":{" + good + "}}", 8, "tensor \"t\": occurs twice");
  refused(tensor(good + R"(,"dtype":"F32")"), 8, "key \"dtype\" occurs twice");
  refused(tensor(good + R"(,"more":"F32")"), 8, "unknown key \"more\"");
  refused(tensor(R"("shape":[2],"data_offsets":[0,8])"), 8, "no dtype");
  refused(tensor(R"("dtype":"F32","data_offsets":[0,8])"), 8, "no shape");
  refused(tensor(R"("dtype":"F32","shape":[2])"), 8, "no data_offsets");
  refused(tensor(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])"), 8, "unknown dtype \"F33\"");
  refused(tensor(R"("dtype":32,"shape":[2],"data_offsets":[0,8])"), 8, "a number where none belongs");
  refused(tensor(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), 8, "a negative number");
  refused(tensor(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), 8, "not an integer");
  refused(tensor(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8])"), 8, "not an integer");
  refused(tensor(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8])"), 8, "a dimension of");
  refused(tensor(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])"), 0, "can be counted");
  refused(tensor(R"("dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0])"), 0, "can be counted");
  std::string ones = "1";
  for (int i = 0; i < 64; i++) ones += ",1";
  refused(tensor(R"("dtype":"U8","shape":[)" + ones + R"(],"data_offsets":[0,1])"), 1, "more than 64");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), 8, "1 data_offsets");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), 8, "3 data_offsets");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), 8, "after its end");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615])"), 8, "of only 8");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8,16])"), 8, "truncated");
  refused(tensor(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), 8, "need 12");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[4,12])"), 12, "after a hole");
  refused(tensor(good), 9, "1 bytes after the last tensor");
  refused("{\"a\":{" + good + R"(},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})", 12, "inside another one");
  refused("{\"a\":{" + good + "},\"b\":{" + good + "}}", 8, "inside another one");
}

TEST(Safetensors, TruncatedAtEveryByte) {
  TempDir dir;
  std::string whole = small_file();
  ASSERT_EQ(parse(whole).names.size(), 3u);
  for (size_t n = 0; n < whole.size(); n++) {
    // A copy of exactly n bytes, so that a read past them is seen.
    std::vector<char> cut(whole.begin(), whole.begin() + ptrdiff_t(n));
    expect_refused([&] { parse_safetensors(std::as_bytes(std::span(cut)), "memory"); }, "memory: ");
  }
  for (size_t n : {size_t(0), size_t(7), size_t(50), whole.size() - 1}) {
    put_file(dir / "cut", whole.substr(0, n));
    expect_refused([&] { SafetensorsFile(dir / "cut"); }, dir / "cut");
  }
}

TEST(Safetensors, HundredThousandMutations) {
  const std::string whole = small_file();
  const std::string alphabet = "{}[]\",:0123456789-.eE tfn\\\x00\xff\n";
  int accepted = 0, refused = 0;
  uint64_t counter = 0;
  auto draw = [&](uint64_t below) { return random_bits(77, 1, counter++) % below; };
  for (int i = 0; i < 100'000; i++) {
    std::string text = whole;
    for (uint64_t edits = 1 + draw(4); edits > 0; edits--) {
      // Three edits of four hit the header, where they matter.
      size_t at = draw(4) ? draw(text.size() > 34 ? text.size() - 26 : text.size() + 1) : draw(text.size() + 1);
      switch (draw(5)) {
        case 0:
          if (at < text.size()) text[at] = char(draw(256));
          break;
        case 1:
          if (at < text.size()) text[at] = alphabet[draw(alphabet.size())];
          break;
        case 2:
          text.insert(at, 1, alphabet[draw(alphabet.size())]);
          break;
        case 3:
          text.erase(at, draw(8));
          break;
        default:
          text.insert(at, text.substr(draw(text.size() + 1), draw(40)));
      }
      // Half of the changed lengths are repaired, or nearly every mutation would fail at the first check.
      if (text.size() >= 34 && draw(2)) {
        uint64_t length = text.size() - 8 - 26;
        std::memcpy(text.data(), &length, 8);
      }
    }
    std::vector<char> exact(text.begin(), text.end());
    try {
      checksum(parse_safetensors(std::as_bytes(std::span(exact)), "memory"));
      accepted++;
    } catch (const Error& error) {
      ASSERT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
      refused++;
    }
  }
  EXPECT_GT(accepted, 100);  // changed names, metadata or data are still sound
  EXPECT_GT(refused, 10'000);
}

TEST(Safetensors, WriterRefusesMisuse) {
  TempDir dir;
  std::string path = dir / "x";
  float data[4] = {};
  auto open = [&](std::vector<TensorSpec> specs) { SafetensorsWriter(path, std::move(specs)); };
  expect_refused([&] { open({{"a", DType::f32, {1}}, {"a", DType::f32, {1}}}); }, path, "\"a\"", "twice");
  expect_refused([&] { open({{"__metadata__", DType::f32, {1}}}); }, "reserved");
  expect_refused([&] { open({{"a", DType::f32, {-1}}}); }, "negative");
  expect_refused([&] { open({{"a", DType::f32, {int64_t(1) << 40, int64_t(1) << 40}}}); }, "counted");
  expect_refused([&] { open({{"a", DType::u8, {3}}, {"b", DType::f32, {1}}}); }, "\"b\"", "unaligned");
  expect_refused([&] { SafetensorsWriter(dir / "no/x", {}); }, dir / "no/x: cannot create");
  EXPECT_FALSE(std::filesystem::exists(path));
  {
    SafetensorsWriter writer(path, {{"a", DType::f32, {2}}, {"z", DType::f32, {0}}, {"b", DType::f32, {1}}});
    expect_refused([&] { writer.append("b", data, 4); }, "\"b\" was given where \"a\" is due");
    writer.append("a", data, 4);
    expect_refused([&] { writer.append("a", data, 8); }, "12 bytes, but 8 were declared");
    expect_refused([&] { writer.finish(); }, "\"a\": only 4 of 8 bytes");
    writer.append("a", data, 4);
    expect_refused([&] { writer.append("a", data, 4); }, "where \"b\" is due");
    writer.append("b", data, 4);
    expect_refused([&] { writer.append("b", data, 4); }, "more bytes than were declared");
    EXPECT_TRUE(std::filesystem::exists(path));
  }
  EXPECT_FALSE(std::filesystem::exists(path));  // never finished
}

TEST(Safetensors, FullDiskIsAnErrorAndDevicesAreNotRemoved) {
  TempDir dir;
  std::filesystem::create_symlink("/dev/full", dir / "x");
  std::vector<std::byte> data(4 << 20);
  SafetensorsWriter writer(dir / "x", {{"a", DType::u8, {4 << 20}}});
  expect_refused([&] { writer.append("a", data.data(), data.size()); },
                 dir / "x: cannot write: No space left on device");
  EXPECT_TRUE(std::filesystem::exists("/dev/full"));
}

// The four tensors of the shard tests: 32 bytes each.
const std::vector<TensorSpec> kFour = {
    {"a", DType::f32, {8}}, {"b", DType::f32, {2, 4}}, {"c", DType::f32, {8}}, {"d", DType::f32, {4, 2}}};

void write_four(const std::string& dir, size_t shard_bytes) {
  SafetensorsShardedWriter writer(dir, "model", kFour, {{"step", "7"}}, shard_bytes);
  for (const TensorSpec& t : kFour) {
    std::vector<float> values(8, float(t.name[0]));
    for (int half = 0; half < 2; half++) writer.append(t.name, values.data() + 4 * half, 16);
  }
  writer.finish();
}

TEST(SafetensorsDir, ShardsRoundTrip) {
  for (auto [shard_bytes, shards] :
       std::vector<std::pair<size_t, size_t>>{{1000, 1}, {128, 1}, {127, 2}, {64, 2}, {40, 4}, {1, 4}}) {
    TempDir dir;
    write_four(dir.path(), shard_bytes);
    size_t files = 0;
    for (auto& entry : std::filesystem::directory_iterator(dir.path()))
      files += entry.path().extension() == ".safetensors";
    EXPECT_EQ(files, shards);
    EXPECT_EQ(std::filesystem::exists(dir / "model.safetensors.index.json"), shards > 1);
    SafetensorsDir read(dir.path(), "model");
    EXPECT_EQ(read.names(), (std::vector<std::string>{"a", "b", "c", "d"}));
    EXPECT_EQ(read.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"step", "7"}}));
    for (const TensorSpec& t : kFour) {
      std::vector<float> values(8);
      EXPECT_EQ(read.get(t.name).shape, t.shape);
      read_elements(t.name, read.get(t.name), 0, 8, values.data());
      EXPECT_EQ(values, std::vector<float>(8, float(t.name[0])));
    }
    EXPECT_EQ(read.find("e"), nullptr);
    expect_refused([&] { read.get("e"); }, "model*.safetensors: has no tensor \"e\"");
  }
}

TEST(SafetensorsDir, IndexIsWhatTransformersReads) {
  TempDir dir;
  write_four(dir.path(), 64);
  auto index = nlohmann::json::parse(get_file(dir / "model.safetensors.index.json"));
  EXPECT_EQ(index["metadata"]["total_size"], 128);
  EXPECT_EQ(index["weight_map"].size(), 4u);
  EXPECT_EQ(index["weight_map"]["b"], "model-00001-of-00002.safetensors");
  EXPECT_EQ(index["weight_map"]["c"], "model-00002-of-00002.safetensors");
}

TEST(SafetensorsDir, RefusesIncompleteAndAmbiguousSets) {
  TempDir empty;
  expect_refused([&] { SafetensorsDir(empty.path(), "model"); }, "model*.safetensors: no such file");
  expect_refused([&] { SafetensorsDir(empty / "none", "model"); }, empty / "none: cannot list");
  const std::string second = "model-00002-of-00002.safetensors", index = "model.safetensors.index.json";
  {
    TempDir dir;  // a shard missing, with the index and without it
    write_four(dir.path(), 64);
    std::filesystem::remove(dir / second);
    expect_refused([&] { SafetensorsDir(dir.path(), "model"); }, index, second);
    std::filesystem::remove(dir / index);
    expect_refused([&] { SafetensorsDir(dir.path(), "model"); }, dir.path(), second + " is missing");
  }
  {
    TempDir dir;  // no index, but all shards: fine; a second copy of a tensor: not
    write_four(dir.path(), 64);
    std::filesystem::remove(dir / index);
    EXPECT_EQ(SafetensorsDir(dir.path(), "model").names().size(), 4u);
    std::filesystem::copy_file(dir / second, dir / "model.safetensors");
    expect_refused([&] { SafetensorsDir(dir.path(), "model"); }, "tensor \"c\" is also in");
  }
  TempDir dir;
  write_four(dir.path(), 64);
  const std::string good = get_file(dir / index);
  auto with_index = [&](const std::string& text, const std::string& message) {
    put_file(dir / index, text);
    expect_refused([&] { SafetensorsDir(dir.path(), "model"); }, index, message);
  };
  with_index("{", "no object weight_map");
  with_index("[]", "no object weight_map");
  with_index(std::string(200'000, '['), "no object weight_map");
  with_index(R"({"weight_map":[]})", "no object weight_map");
  with_index(R"({"weight_map":{"a":1}})", "not a file name");
  with_index(R"({"weight_map":{"a":"../model.safetensors"}})", "not a plain file name");
  with_index(R"({"weight_map":{"a":""}})", "not a plain file name");
  with_index(R"({"weight_map":{"a":"model\u0000.safetensors"}})", "not a plain file name");
  with_index(R"({"weight_map":{"a":"model-00002-of-00002.safetensors"}})", "tensor \"a\" is not in");
  with_index(R"({"weight_map":{"q":"model-00002-of-00002.safetensors"}})", "tensor \"q\" is not in");
  put_file(dir / index, good);
  EXPECT_NO_THROW(SafetensorsDir(dir.path(), "model"));
  put_file(dir / second, "rubbish");
  expect_refused([&] { SafetensorsDir(dir.path(), "model"); }, dir / second);
}

TEST(SafetensorsDir, ShardedWriterRefusesMisuse) {
  TempDir dir;
  float data[8] = {};
  expect_refused(
      [&] {
        SafetensorsShardedWriter(dir.path(), "model", {{"a", DType::f32, {1}}, {"a", DType::f32, {1}}});
      },
      "occurs twice");
  {
    SafetensorsShardedWriter writer(dir.path(), "model", kFour, {}, 64);
    EXPECT_EQ(writer.shards(), 2u);
    writer.append("a", data, 32);
    expect_refused([&] { writer.append("x", data, 32); }, "was not declared");
    expect_refused([&] { writer.append("c", data, 32); }, "\"b\": only 0 of 32");
    expect_refused([&] { writer.finish(); }, "\"b\": only 0 of 32");
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
  SafetensorsShardedWriter nothing(dir.path(), "optimizer", {});
  nothing.finish();
  EXPECT_TRUE(SafetensorsDir(dir.path(), "optimizer").names().empty());
}

}  // namespace
