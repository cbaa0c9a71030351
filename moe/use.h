// What is done with a model that is not to be trained: it continues a prompt, is exported, or evaluated. stop(): has the
// user asked to end? Errors: a checkpoint that does not fit the options, or the device; as of the functions called.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

#include "llmc/dataloader.h"
#include "moe/evaluate.h"
#include "moe/generate.h"
#include "moe/model_files.h"
#include "moe/report.h"
#include "moe/setup.h"

// DIR itself, or the newest checkpoint of a run's --out directory.
inline std::string checkpoint_directory(const char* option, const std::string& dir) {
  if (dir.ends_with(".tmp") || dir.ends_with(".tmp/")) require_complete(dir);  // which says that it is not
  if (access((dir + "/config.json").c_str(), R_OK) == 0) return dir;
  if (!exists_any(dir)) fail(option, " ", dir, ": no config.json there, and no checkpoint of a run either");
  return find_latest(dir);
}

// A model loaded from --checkpoint, not to be trained. choose(run, config) says what of it is needed, before it is loaded.
template <class Device, class Choose>
std::unique_ptr<Model<Device>> load_for_use(Options& o, Device& dev, ModelFileInfo& info, Choose choose) {
  o.checkpoint = checkpoint_directory("--checkpoint", o.checkpoint);
  std::string model_type;
  ModelConfig config = model_of(o.checkpoint, o, info, model_type);
  RunOptions run;
  run.B = run.T = 1, run.train = run.evaluate = false;
  choose(run, config);
  check_limits<Device>(config, run.B, run.T);
  auto model = std::make_unique<Model<Device>>(dev, config, run);
  check_weights(*model, o.checkpoint, model_type);
  if (size_t available = free_bytes(dev); available && model->plan.arena_bytes() > available)
    fail("the model needs ", readable_bytes(double(model->plan.arena_bytes())), " and ",
         readable_bytes(double(available)), " are free");
  model->allocate();
  load_weights(*model, o.checkpoint, model_type);
  return model;
}

// Continues --prompt on standard output.
template <class Device, class Stop>
void generate_main(Options o, Device& dev, Stop stop) {
  ModelFileInfo info;
  auto model = load_for_use(o, dev, info, [&](RunOptions& run, const ModelConfig&) {
    run.decode_positions = o.context ? o.context : std::clamp<int64_t>(info.seq_len, 2, 4096);
  });
  Tokenizer tokenizer = Tokenizer::for_id(info.tokenizer_id, o.tokenizer_ranks);
  std::vector<int32_t> prompt = encode_prompt(tokenizer, o.prompt, model->config.vocab_size);
  std::fputs(o.prompt.c_str(), stdout);
  generate(*model, prompt, tokenizer.eot(), o.max_new_tokens, o.sampler, o.seed, [&](int32_t id) {
    if (id == tokenizer.eot())
      std::fputs("\n", stdout);  // a document ends, the next begins
    else if (id < tokenizer.vocab_size())
      std::fputs(tokenizer.decode(std::span(&id, 1)).c_str(), stdout);
    std::fflush(stdout);
    return !stop();
  });
  std::fputs("\n", stdout);
}

// Writes it to --out as transformers reads it.
template <class Device>
void export_main(Options o, Device& dev) {
  ModelFileInfo info;
  auto model = load_for_use(o, dev, info, [](RunOptions& run, const ModelConfig&) { run.decode_positions = 2; });
  std::string reason;
  if (hf_model_type(model->config, &reason) == "gpt_moe")
    fail("--export hf: no Hugging Face class expresses ", reason, "; the checkpoint can only be used here");
  std::error_code error;
  if (std::filesystem::exists(o.out, error) && !std::filesystem::is_empty(o.out, error))
    fail("--export hf: ", o.out, " is not an empty directory; choose another --out");
  std::filesystem::create_directories(o.out, error);
  if (error) fail(o.out, ": cannot create: ", error.message());
  if (info.own && info.tokenizer_files.empty())  // of before checkpoints had them
    if (auto known = tokenizer_of(info.tokenizer_id, model->config.vocab_size, o.tokenizer_ranks))
      info.tokenizer_files = make_tokenizer_files(*known);
  write_model(*model, o.out, info);
  std::printf("wrote %s (%s)\n", o.out.c_str(), hf_model_type(model->config).c_str());
}

// --checkpoint by itself: validation loss, answers to questions; with --logits: the logits of the validation data.
template <class Device, class Stop>
void evaluate_main(Options o, Device& dev, Stop stop) {
  ModelFileInfo info;
  std::unique_ptr<DataLoader> data;
  std::unique_ptr<MultipleChoice> questions;
  auto watched = [](const char*, auto f) { f(); };
  auto model = load_for_use(o, dev, info, [&](RunOptions& run, const ModelConfig& config) {
    if (!o.seq_len_given && info.seq_len > 0) o.seq_len = std::min<int64_t>(info.seq_len, 4096);
    run.B = o.batch_size, run.T = o.seq_len, run.evaluate = true;
    run.logits = !o.logits.empty(), run.token_losses = !o.hellaswag.empty();
    if (!o.val_data.empty()) {
      data =
          std::make_unique<DataLoader>(TokenShards(o.val_data, int(config.vocab_size)), int(o.seq_len), o.seed, false);
      check_tokenizer(o.val_data, data->shards().tokenizer_id(), info.own ? info.tokenizer_id : -1);
      if (data->eval_windows() == 0) fail(o.val_data, ": holds no token to predict");
    }
    if (o.hellaswag.empty()) return;
    questions = std::make_unique<MultipleChoice>(o.hellaswag, int(config.vocab_size));
    check_questions(*questions, info.own ? info.tokenizer_id : -1, o.seq_len);
  });
  if (!o.logits.empty()) {
    if (!write_logits(*model, *data, o.logits, stop)) fail("--logits ", o.logits, ": stopped by a signal");
    std::printf("wrote %s: logits of %lld windows of %lld tokens\n", o.logits.c_str(), (long long)data->eval_windows(),
                (long long)o.seq_len);
    return;
  }
  if (data) {
    auto loss = validation_loss(*model, *data, stop, watched);
    if (!loss) return;
    std::printf("val_loss %.9g over %lld tokens", *loss, (long long)data->eval_targets());
    if (auto known = tokenizer_of(data->shards(), model->config.vocab_size, o.tokenizer_ranks))
      std::printf(" | %.9g bits a byte",
                  bits_per_byte(*loss, data->eval_targets(), target_bytes(data->shards(), *known)));
    std::printf("\n");
  }
  if (!questions) return;
  if (auto correct = correct_answers(*model, *questions, stop, watched))
    std::printf("HellaSwag %lld/%lld = %.4f\n", (long long)*correct, (long long)questions->examples(),
                double(*correct) / double(questions->examples()));
}
