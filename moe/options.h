// Everything that can be asked for on the command line or in a --config file.
#pragma once
#include <string>
#include <vector>

#include "llmc/sampler.h"
#include "llmc/schedule.h"
#include "moe/layout.h"
#include "moe/model.h"

struct Options {
  // What to do; none of these: train, or with --checkpoint evaluate it.
  bool memory_report = false, dry_run = false, generate = false, profile = false;
  std::string memory_profile;  // FILE
  std::string export_format;   // "hf"
  std::string logits;          // file to write
  // Model
  std::string preset = "tiny";
  ModelConfig model;
  // Which of the options that fix the model, and that say how its experts are balanced, the user wrote.
  std::vector<std::string> model_options_given, balance_options_given;
  // Data
  std::string train_data = "data/kjv/kjv_train.bin", val_data = "data/kjv/kjv_val.bin";
  std::string tokenizer_ranks = "data/gpt2.tiktoken";
  int64_t batch_size = 16, seq_len = 256, total_batch_tokens = 0;  // 0: batch_size * seq_len
  bool overfit_one_batch = false;
  bool val_data_given = false, seq_len_given = false;
  // Training
  int64_t steps = 0, stop_after = 0;  // 0 steps: by epochs
  double epochs = 1;
  uint64_t seed = 42;
  std::string device = "auto", dtype;  // parse_options leaves "cpu" or "cuda", and a dtype
  std::string schedule_name = "cosine";
  Schedule schedule;
  AdamWConfig adamw;
  UpdateRules rules;
  std::string grad_dtype;  // empty: by the rule of RunOptions
  // Evaluation, sampling, checkpoints
  int64_t eval_every = 0, sample_every = 0, checkpoint_every = 0, keep = 2;
  std::string out = "runs/default", init_from, tensorboard, hellaswag;
  bool resume = false;
  // Memory
  std::string recompute = "act", dispatch = "zero_buffer", arena = "planned";
  double memory_budget = 0;  // GiB; 0: what the machine has free
  // Routing traces
  std::string record_routing, replay_routing;
  // Generation
  std::string checkpoint, prompt;
  int64_t max_new_tokens = 256, context = 0;  // 0: the sequence length of training
  SamplerOptions sampler;
  // Processes
  Layout layout;
  int world = 1;              // processes of the job
  int local_ranks = 1;        // of them on this host
  double comm_timeout = 600;  // seconds
  double row_headroom = 1.5;  // as in RunOptions
  int64_t extra_slots = 0, shadow_slots = 0;
  std::string placement;  // path of the places of the experts
  int64_t grad_bucket = RunOptions().grad_bucket;
  std::string transport = "auto";
  std::string command_line;
  bool plain_matmul = false, no_graphs = false;
  std::string experts = "auto";

  // The option that says what is done with --checkpoint, which is then not trained; null: training.
  const char* use() const {
    return generate                 ? "--generate"
           : !export_format.empty() ? "--export"
           : !logits.empty()        ? "--logits"
           : !checkpoint.empty()    ? "--checkpoint"
                                    : nullptr;
  }
  // Tokens that all ranks together take at a time, and how often they do in a step.
  int64_t micro_batch_tokens() const { return batch_size * seq_len * layout.dp; }
  int64_t micro_steps() const { return total_batch_tokens / micro_batch_tokens(); }
};

// What parse_options throws after it has shown the help.
struct HelpShown {};

// Parses argv; `processes`: of the job. --help prints the grouped help and throws HelpShown. Errors: anything unknown, malformed or contradictory, one line.
Options parse_options(int argc, char** argv, int processes = 1);

// Refuses processes that this model, which may be that of a checkpoint, cannot be cut over.
void check_processes(const Options& o);
