// Multiple-choice questions: the format, its damages, rows for a model, and which answer counts.
#include "llmc/multiple_choice.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "error_line.h"
#include "temp_dir.h"

namespace {

using Ids = std::vector<uint16_t>;

// An example as the format has it: its lists are the context and then the completions.
Ids example(uint16_t index, uint16_t label, const std::vector<Ids>& lists) {
  Ids stream{65535, 0, index, label, uint16_t(lists.size() - 1)};
  for (const Ids& list : lists) {
    stream.push_back(uint16_t(list.size()));
    stream.insert(stream.end(), list.begin(), list.end());
  }
  stream[1] = uint16_t(2 * stream.size());
  return stream;
}

std::string file_of(const std::vector<Ids>& examples, std::vector<int32_t> header = {}) {
  if (header.empty()) header = {20240522, 1, int32_t(examples.size()), 100, 0};
  header.resize(256);
  std::string bytes(reinterpret_cast<const char*>(header.data()), 1024);
  for (const Ids& e : examples) bytes.append(reinterpret_cast<const char*>(e.data()), 2 * e.size());
  return bytes;
}

const std::vector<Ids> good = {example(0, 2, {{1, 2, 3}, {4}, {5, 6}, {7, 8, 9}, {1}}),
                               example(1, 0, {{9}, {8, 7}, {6}, {5}, {4}})};

class Questions : public ::testing::Test {
 protected:
  MultipleChoice read(const std::string& bytes, int vocab_size = 10) {
    put_file(path_, bytes);
    return MultipleChoice(path_, vocab_size);
  }
  template <class... Texts>
  void refused(const std::string& bytes, const Texts&... texts) {
    expect_refused([&] { read(bytes); }, path_, texts...);
  }
  TempDir dir_;
  const std::string path_ = dir_ / "questions.bin";
};

TEST_F(Questions, Rows) {
  const MultipleChoice q = read(file_of(good, {20240522, 1, 2, 40, 1}));
  EXPECT_EQ(q.examples(), 2);
  EXPECT_EQ(q.rows(), 8);
  EXPECT_EQ(q.longest(), 5);
  EXPECT_EQ(q.tokenizer_id(), 1);
  std::vector<int32_t> in(6), out(6);
  q.row(2, 6, in.data(), out.data());
  EXPECT_EQ(in, (std::vector<int32_t>{1, 2, 3, 7, 8, 0}));
  EXPECT_EQ(out, (std::vector<int32_t>{-1, -1, 7, 8, 9, -1}));
  q.row(5, 6, in.data(), out.data());
  EXPECT_EQ(in, (std::vector<int32_t>{9, 0, 0, 0, 0, 0}));
  EXPECT_EQ(out, (std::vector<int32_t>{6, -1, -1, -1, -1, -1}));
}

TEST_F(Questions, TheLowestAverageIsTheAnswer) {
  const MultipleChoice q = read(file_of(good));
  const double inf = std::numeric_limits<double>::infinity();
  // lengths 1 2 3 1 and 2 1 1 1
  EXPECT_EQ(q.correct(std::vector<double>{3, 4, 5.7, 2, 1.9, 1, 2, 2}), 2);  // not the lowest sums, 2 and 1
  EXPECT_EQ(q.correct(std::vector<double>{3, 4, 6.3, 2, 2.1, 1, 2, 2}), 0);
  EXPECT_EQ(q.correct(std::vector<double>{3, 2, 3, 5, 2, 1, 1, 1}), 1);  // of equals the first
  EXPECT_EQ(q.correct(std::vector<double>{3, 4, 3, NAN, 1, 1, 1, inf}), 0);
}

TEST_F(Questions, ForeignAndTruncated) {
  const std::string whole = file_of(good);
  for (const std::string& bytes : {std::string(), std::string("{\"ctx\": 1}"), whole.substr(0, 3)})
    refused(bytes, "not a file of multiple-choice questions", "data/hellaswag.py");
  refused(file_of(good, {20240520, 1, 2, 100, 0}), "20240520");
  refused(file_of(good, {20240522, 2, 2, 100, 0}), "20240522, 2");
  for (size_t size = 8; size < 1024; size += 100) refused(whole.substr(0, size), "truncated");
  for (size_t size = 1024; size < whole.size(); ++size) refused(whole.substr(0, size), "example", "make it again");
  refused(whole + "x", "more than its 2 examples");
  refused(whole + "xy", "more than its 2 examples");
  refused(file_of(good, {20240522, 1, 3, 100, 0}), "example 2", "truncated");
  for (int32_t count : {0, -1, 65536}) refused(file_of(good, {20240522, 1, count, 100, 0}), "examples");
  refused(file_of(good, {20240522, 1, 2, 100, 7}), "tokenizer 7");
  expect_refused([&] { MultipleChoice(dir_ / "none", 10); }, dir_ / "none");
}

TEST_F(Questions, ExamplesThatContradictThemselves) {
  auto changed = [&](size_t place, uint16_t value) {
    std::vector<Ids> examples = good;
    examples[1][place] = value;
    return file_of(examples);
  };
  refused(changed(0, 7), "example 1", "65535");
  refused(changed(1, 8), "example 1", "damaged");
  refused(changed(1, 27), "example 1");
  refused(changed(2, 5), "example 1", "calls itself 5");
  refused(changed(3, 4), "example 1", "completion 4 of 4");
  refused(changed(4, 1), "example 1", "of 1");
  refused(changed(4, 5), "example 1", "truncated: completion");
  std::vector<Ids> examples = good;
  examples[0][4] = 5;
  refused(file_of(examples), "example 0", "ends before completion");
  refused(changed(5, 0), "example 1", "empty context");
  refused(changed(7, 0), "example 1", "empty completion");
  refused(changed(7, 60000), "example 1");
  refused(changed(6, 10), "example 1 has id 10", "0 to 9");
}

}  // namespace
