#include "llmc/multiple_choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "llmc/error.h"
#include "llmc/files.h"

MultipleChoice::MultipleChoice(const std::string& path, int vocab_size) : path_(path) {
  constexpr size_t header_bytes = 256 * sizeof(int32_t);
  constexpr uint16_t delimiter = 65535;
  const std::string file = read_file(path);
  int32_t header[256] = {};
  std::memcpy(header, file.data(), std::min(file.size(), header_bytes));
  if (header[0] != 20240522 || header[1] != 1)
    fail(path, ": not a file of multiple-choice questions (it starts with ", header[0], ", ", header[1],
         "; expected 20240522, 1): make one with data/hellaswag.py");
  if (file.size() < header_bytes) fail(path, ": truncated: ", file.size(), " bytes, the header alone is 1024");
  if (header[2] < 1 || header[2] > 65535)
    fail(path, ": the header says ", header[2], " examples: an empty or damaged file; make it again");
  tokenizer_id_ = header[4];
  if (tokenizer_id_ != 0 && tokenizer_id_ != 1)
    fail(path, ": tokenizer ", tokenizer_id_, " is unknown (0 GPT-2, 1 bytes): make it again with data/hellaswag.py");
  ids_.resize((file.size() - header_bytes) / sizeof(uint16_t));
  if (!ids_.empty()) std::memcpy(ids_.data(), file.data() + header_bytes, ids_.size() * sizeof(uint16_t));

  size_t at = 0;  // in ids_
  for (int32_t index = 0; index < header[2]; ++index) {
    const size_t begin = at;
    size_t end = ids_.size();
    auto damaged = [&](const auto&... what) { fail(path, ": example ", index, ": ", what..., ": make it again"); };
    auto take = [&](const char* what) {
      if (at >= end) damaged(end == ids_.size() ? "truncated: " : "damaged: it ends before ", what);
      return ids_[at++];
    };
    // Length and place of a list of ids.
    auto list = [&](const char* what) {
      const size_t length = take(what), first = at;
      if (length == 0) damaged("damaged: an empty ", what);
      if (length > end - at) damaged(end == ids_.size() ? "truncated: " : "damaged: it ends before ", what);
      at += length;
      for (size_t i = first; i < at; ++i)
        if (ids_[i] >= vocab_size)
          fail(path, ": example ", index, " has id ", ids_[i], ", but the model has ids 0 to ", vocab_size - 1,
               ": give questions in this model's tokens");
      return std::pair(first, length);
    };
    if (take("its start") != delimiter) damaged("damaged: it does not start with 65535");
    const size_t bytes = take("its size");
    if (bytes % sizeof(uint16_t) || begin + bytes / sizeof(uint16_t) > ids_.size())
      damaged("truncated: its ", bytes, " bytes are not all there");
    end = begin + bytes / sizeof(uint16_t);
    if (take("its index") != index) damaged("damaged: it calls itself ", ids_[at - 1]);
    const size_t label = take("the answer"), completions = take("the number of completions");
    if (completions < 2 || label >= completions)
      damaged("damaged: completion ", label, " of ", completions, " is said to be right");
    const auto [context, context_length] = list("context");
    examples_.push_back({rows_.size(), completions, label});
    for (size_t c = 0; c < completions; ++c) {
      const auto [completion, length] = list("completion");
      rows_.push_back({context, context_length, completion, length});
    }
    if (at != end) damaged("damaged: ", bytes, " bytes, but its lists make ", (at - begin) * sizeof(uint16_t));
  }
  if (at * sizeof(uint16_t) != file.size() - header_bytes)
    fail(path, ": damaged: more than its ", header[2], " examples: make it again");
}

int64_t MultipleChoice::longest() const {
  size_t longest = 0;
  for (const Row& r : rows_) longest = std::max(longest, r.context_length + r.length - 1);
  return int64_t(longest);
}

void MultipleChoice::row(int64_t r, int64_t T, int32_t* inputs, int32_t* targets) const {
  const Row& row = rows_[size_t(r)];
  std::fill_n(inputs, T, 0), std::fill_n(targets, T, -1);
  auto id = [&](size_t i) {
    return int32_t(i < row.context_length ? ids_[row.context + i] : ids_[row.completion + i - row.context_length]);
  };
  for (size_t i = 0; i + 1 < row.context_length + row.length; ++i) {
    inputs[i] = id(i);
    if (i + 1 >= row.context_length) targets[i] = id(i + 1);
  }
}

int64_t MultipleChoice::correct(std::span<const double> sums) const {
  int64_t right = 0;
  for (const Example& e : examples_) {
    auto average = [&](size_t c) { return sums[e.first_row + c] / double(rows_[e.first_row + c].length); };
    size_t answer = 0;
    bool finite = true;
    for (size_t c = 0; c < e.completions; ++c) {
      finite &= std::isfinite(average(c));
      if (average(c) < average(answer)) answer = c;
    }
    right += finite && answer == e.label;
  }
  return right;
}
