// Multiple-choice questions (HellaSwag, MMLU) in llm.c's format, and how a model answers them: each completion gets the
// average loss of its tokens after the context, and the lowest average is the answer, the first of equals.
//
// A file is a header of 256 int32, then a stream of uint16, all little-endian:
//   header[0], header[1]   20240522, 1
//   header[2]              number of examples, at most 65535
//   header[3]              bytes of the longest example
//   header[4]              tokenizer: 0 GPT-2 or unknown (what llm.c writes), 1 bytes
//   an example:  65535, its bytes, its index, the right completion, number of completions,
//                length and ids of the context, then length and ids of each completion
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

class MultipleChoice {
 public:
  // Reads and checks a whole file, every id included, for a model with `vocab_size` ids. Errors, each one line with the
  // file and the example: foreign, truncated, something left over, an example that contradicts itself, an unknown id.
  MultipleChoice(const std::string& path, int vocab_size);

  const std::string& path() const { return path_; }
  int tokenizer_id() const { return tokenizer_id_; }
  int64_t examples() const { return int64_t(examples_.size()); }
  int64_t rows() const { return int64_t(rows_.size()); }  // completions of all examples, one after another
  int64_t longest() const;                                // ids that a row needs as inputs, at most

  // Row r as a model takes it: inputs (T), the context and the completion but for its last id, then zeros; targets (T),
  // the ids of the completion where they are predicted, -1 elsewhere. T >= longest().
  void row(int64_t r, int64_t T, int32_t* inputs, int32_t* targets) const;

  // How many examples are answered rightly, given the sum of each row's losses (rows()). An example with a sum that is
  // not finite is not.
  int64_t correct(std::span<const double> sums) const;

 private:
  struct Row {  // places in ids_
    size_t context, context_length, completion, length;
  };
  struct Example {
    size_t first_row, completions, label;
  };
  std::string path_;
  int tokenizer_id_ = 0;
  std::vector<uint16_t> ids_;  // the stream
  std::vector<Row> rows_;
  std::vector<Example> examples_;
};
