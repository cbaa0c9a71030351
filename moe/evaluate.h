// What a model is worth: its loss on validation data, in nats a token and bits a byte of text, and its answers to
// multiple-choice questions; and its logits, for comparison with other programs.
#pragma once
#include <unistd.h>

#include <optional>

#include "llmc/dataloader.h"
#include "llmc/multiple_choice.h"
#include "llmc/safetensors.h"
#include "llmc/tokenizer.h"
#include "moe/model.h"
#include "moe/pipeline.h"

// The tokenizer of that number, if it is known for sure: bytes; or GPT-2 where the vocabulary is GPT-2's (up to padding)
// and the file of its ranks is there, since what has no tokenizer's number counts as GPT-2's.
std::optional<Tokenizer> tokenizer_of(int tokenizer_id, int64_t vocab_size, const std::string& ranks_path);
// That of shards, whose ids are 16 bits wide then.
std::optional<Tokenizer> tokenizer_of(const TokenShards& shards, int64_t vocab_size, const std::string& ranks_path);

// Bytes of text that the targets of an evaluation spell (DataLoader::eval_sample); end-of-text is none.
int64_t target_bytes(const TokenShards& shards, const Tokenizer& tokenizer);

// Bits a byte of text, given the mean loss of `targets` ids in nats.
double bits_per_byte(double loss, int64_t targets, int64_t bytes);

// Refuses a file of another tokenizer's tokens than the model was trained on: numbers of tokenizers, of a file 0 also where
// it is not known, of a model -1.
void check_tokenizer(const std::string& path, int tokenizer, int model);

// Refuses questions that this model cannot be asked: other tokens than it was trained on, or more than seq_len of them.
// model_tokenizer: -1 if it is not known.
void check_questions(const MultipleChoice& questions, int model_tokenizer, int64_t seq_len);

// Evaluates `rows` sequences of T tokens in batches, which the ranks of a job share out, and calls f(first row) after each
// of this rank's; fill(row, inputs, targets) makes a sequence. False where stop() ended it. All ranks call it.
//   watched("what", f): calls f, in which the host may wait for its GPU
template <class Device, class Fill, class Stop, class Watched, class F>
bool evaluate_rows(Model<Device>& model, int64_t rows, Fill fill, Stop stop, Watched watched, F f) {
  const int64_t B = model.options.B, T = model.options.T;
  StepParams p;
  p.loss_scale = 1;
  model.set_params(p);
  std::vector<int32_t> tokens(model.N()), targets(model.N());
  for (int64_t first = 0; first < rows; first += B * model.parallel.layout.dp) {
    if (stop()) return false;
    const int64_t row = first + model.parallel.here.dp * B;
    for (int64_t b = 0; b < B; ++b) {
      int32_t *in = &tokens[b * T], *out = &targets[b * T];
      if (row + b < rows)
        fill(row + b, in, out);
      else
        std::fill_n(in, T, 0), std::fill_n(out, T, -1);
    }
    model.set_batch(tokens.data(), targets.data());
    watched("evaluation", [&] {
      evaluate_stages(model);
      f(row);
    });
  }
  return true;
}

// A tensor of the model, in host memory.
template <class Device, class T>
std::vector<T> values_of(Model<Device>& model, Tensor<T> tensor) {
  std::vector<T> values(tensor.size());
  model.executor().device.to_host(values.data(), tensor, values.size() * sizeof(T));
  return values;
}

// Mean loss of all validation targets, in nats; nothing where stop() ended it. All ranks call it, all get it.
template <class Device, class Stop, class Watched>
std::optional<double> validation_loss(Model<Device>& model, const DataLoader& data, Stop stop, Watched watched) {
  double sum = 0;
  auto fill = [&](int64_t w, int32_t* in, int32_t* out) { data.eval_sample(w, in, out); };
  if (!evaluate_rows(model, data.eval_windows(), fill, stop, watched, [&](int64_t) { sum += model.read_stats().loss; }))
    return std::nullopt;
  if (!model.parallel.alone()) sum = model.parallel.host.sum(sum, "validation loss");
  return sum / double(data.eval_targets());
}

// How many questions are answered rightly; nothing where stop() ended it. The model's options have token_losses. All
// ranks call it, all get it.
template <class Device, class Stop, class Watched>
std::optional<int64_t> correct_answers(Model<Device>& model, const MultipleChoice& questions, Stop stop,
                                       Watched watched) {
  const int64_t B = model.options.B, T = model.options.T;
  std::vector<double> sums(size_t(questions.rows()), 0.0);
  auto fill = [&](int64_t r, int32_t* in, int32_t* out) { questions.row(r, T, in, out); };
  auto add = [&](int64_t row) {
    if (model.parallel.here.tp > 0) return;  // of ranks that share tokens all have the same losses
    const auto losses = values_of(model, model.token_losses);
    for (int64_t n = 0; n < B * T; ++n)
      if (row + n / T < questions.rows()) sums[size_t(row + n / T)] += double(losses[n]);
  };
  if (!evaluate_rows(model, questions.rows(), fill, stop, watched, add)) return std::nullopt;
  if (!model.parallel.alone()) model.parallel.host.all_reduce(sums.data(), questions.rows(), "losses of completions");
  return questions.correct(sums);
}

// Writes what a model makes of validation data, window by window (DataLoader::eval_sample), as safetensors: logits
// (W,T,V) F32, tokens (W,T) I32, targets (W,T) I32. False where stop() ended it, and then nothing is written. A single
// process; the model's options have logits. Errors: a file that exists or cannot be written.
template <class Device, class Stop>
bool write_logits(Model<Device>& model, const DataLoader& data, const std::string& path, Stop stop) {
  const int64_t T = model.options.T, V = model.config.vocab_size, W = data.eval_windows();
  std::vector<int32_t> inputs(size_t(W * T)), targets(inputs.size());
  for (int64_t w = 0; w < W; ++w) data.eval_sample(w, &inputs[size_t(w * T)], &targets[size_t(w * T)]);
  if (access(path.c_str(), F_OK) == 0) fail("--logits ", path, ": exists; remove it or choose another name");
  SafetensorsWriter file(
      path, {{"tokens", DType::i32, {W, T}}, {"targets", DType::i32, {W, T}}, {"logits", DType::f32, {W, T, V}}});
  file.append("tokens", inputs.data(), inputs.size() * sizeof(int32_t));
  file.append("targets", targets.data(), targets.size() * sizeof(int32_t));
  auto fill = [&](int64_t w, int32_t* in, int32_t* out) { data.eval_sample(w, in, out); };
  auto watched = [](const char*, auto f) { f(); };
  std::vector<float> row(size_t(V), 0.0f);
  auto append = [&](int64_t first) {
    const auto logits = values_of(model, model.logits);
    const size_t padded = logits.size() / size_t(model.N());
    for (int64_t n = 0; n < std::min(model.N(), (W - first) * T); ++n) {
      for (int64_t v = 0; v < V; ++v) row[size_t(v)] = float(logits[size_t(n) * padded + size_t(v)]);
      file.append("logits", row.data(), row.size() * sizeof(float));
    }
  };
  if (!evaluate_rows(model, W, fill, stop, watched, append)) return false;
  file.finish();
  return true;
}
