// Event files byte by byte. dev/test/test_tensorboard.py reads those of a training run, with TensorBoard's own reader where it
// is installed.
#include "llmc/tensorboard.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "dev/test/error_line.h"
#include "dev/test/temp_dir.h"

namespace {

std::string from_hex(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); i += 2) out += char(std::stoi(std::string(text.substr(i, 2)), nullptr, 16));
  return out;
}

std::vector<std::string> files_in(const std::string& dir) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) names.push_back(entry.path().string());
  std::sort(names.begin(), names.end());
  return names;
}

// The data of each record, whose framing must be right.
std::vector<std::string> records_of(const std::string& path) {
  std::string text = get_file(path);
  std::vector<std::string> records;
  while (!text.empty()) {
    size_t size = 0;
    for (int i = 7; i >= 0; --i) size = size << 8 | uint8_t(text[size_t(i)]);
    std::string data = text.substr(12, size), whole = tfrecord(data);
    EXPECT_EQ(text.substr(0, whole.size()), whole);
    records.push_back(data);
    text.erase(0, whole.size());
  }
  return records;
}

TEST(TensorBoard, Crc32c) {  // RFC 3720, appendix B.4
  EXPECT_EQ(crc32c(""), 0u);
  EXPECT_EQ(crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62a8ab43u);
}

// As written by TensorBoard 2.21: record_writer.RecordWriter of Event(...).SerializeToString() of its compat.proto.
TEST(TensorBoard, TheBytesOfTensorBoard) {
  EventSummary summary;
  const std::vector<int32_t> load = {0, 200, 60, 40, 0}, none = {0, 0};
  summary.scalar("loss", 5.5).scalar("lr", 0).counts("expert_load/layer_0", load).counts("expert_load/layer_1", none);
  EXPECT_EQ(
      tfrecord(event(1700000000.25, 300, summary)),
      from_hex("a10000000000000002e3241b0900001040fc54d94110ac022a92010a0b0a046c6f7373150000b0400a090a026c7215000000"
               "000a780a136578706572745f6c6f61642f6c617965725f302a6109000000000000f03f110000000000001040190000000000"
               "c07240210000000000807b4029000000000000894032180000000000000040000000000000084000000000000010403a1800"
               "000000000069400000000000004e40000000000000444027cb81b4"));
}

TEST(TensorBoard, FilesOfARunThatIsResumed) {
  TempDir dir;
  const std::string out = dir / "a/b";  // created
  {
    EventWriter writer(out, 1);
    EXPECT_TRUE(writer.active());
    writer.write(1, EventSummary().scalar("loss", 2));
    EXPECT_EQ(records_of(files_in(out)[0]).size(), 3u);  // there at once
  }
  { EventWriter writer(out, 300); }  // in the same second
  const auto files = files_in(out);
  ASSERT_EQ(files.size(), 2u);
  const auto first = records_of(files[0]), second = records_of(files[1]);
  ASSERT_EQ(first.size(), 3u);
  ASSERT_EQ(second.size(), 2u);
  EXPECT_EQ(first[0].substr(9),
            "\x1a\x0d"
            "brain.Event:2");                                                     // after wall_time: file_version
  EXPECT_EQ(first[1].substr(9), from_hex("10013a020801"));                        // step 1, session_log {status START}
  EXPECT_EQ(second[1].substr(9), from_hex("10ac023a020801"));                     // step 300
  EXPECT_EQ(first[2].substr(9), from_hex("10012a0d0a0b0a046c6f73731500000040"));  // step 1, summary {loss 2}
}

TEST(TensorBoard, InactiveAndMoved) {
  EventWriter none;
  EXPECT_FALSE(none.active());
  none.write(1, EventSummary().scalar("loss", 1));
  TempDir dir;
  EventWriter writer;
  writer = EventWriter(dir.path(), 1);
  writer.write(1, EventSummary().scalar("loss", 1));
  EXPECT_EQ(records_of(files_in(dir.path())[0]).size(), 3u);
}

TEST(TensorBoard, ErrorsNameTheOption) {
  TempDir dir;
  put_file(dir / "file", "");
  expect_refused([&] { EventWriter(dir / "file", 1); }, "--tensorboard " + (dir / "file"));
  expect_refused([&] { EventWriter(dir / "file/below", 1); }, "--tensorboard " + (dir / "file/below"));
}

}  // namespace
