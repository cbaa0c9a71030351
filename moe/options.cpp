// The only file that includes CLI11, which compiles slowly.
#include "moe/options.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "llmc/gpu.h"

namespace {

struct Declared {  // options that fix the model, and those that say how its experts are balanced
  std::vector<CLI::Option*> model, balance;
  CLI::Option *val_data, *seq_len;
};

struct Names {  // options whose values are names, parsed after CLI11 is done
  std::string gate = "softmax", balance = "aux", scope = "microbatch";
};

// Declares every option on `app`, bound to o and names, with what they hold as defaults. Returns those that the caller
// wants to know more about.
Declared declare(CLI::App& app, Options& o, Names& names) {
  Declared declared;
  ModelConfig& m = o.model;
  const char* what_to_do =
      "What to do (default: train; with --checkpoint: evaluate it on --val-data, --hellaswag or both)";
  app.set_config("--config", "",
                 "read options from a TOML or INI file (the same names without --; the command line wins)")
      ->group(what_to_do);
  app.get_help_ptr()->group(what_to_do);
  app.allow_config_extras(CLI::config_extras_mode::error);
  app.option_defaults()->always_capture_default();
  auto group = [&](const char* name) { app.option_defaults()->group(name); };
  auto fixes_model = [&](CLI::Option* option) {
    declared.model.push_back(option);
    return option;
  };
  auto balances = [&](CLI::Option* option) { declared.balance.push_back(option); };

  group(what_to_do);
  app.add_flag("--memory-report", o.memory_report, "print the memory plan before anything is allocated");
  app.add_flag("--dry-run", o.dry_run, "stop after the checks and the report");
  app.add_option("--memory-profile", o.memory_profile,
                 "write what lives in memory when, over a step, to FILE (for ui.perfetto.dev), and print its summary");
  app.add_flag(
      "--profile", o.profile,
      "time the 4th to 8th step op by op, print where their time goes, and write --out/profile.json (likewise)");
  app.add_flag("--generate", o.generate, "continue --prompt with the model in --checkpoint");
  app.add_option("--export", o.export_format, "hf: write --checkpoint to --out as a Hugging Face model directory");
  app.add_option(
      "--logits", o.logits,
      "write the logits of --checkpoint for every token of --val-data to FILE (safetensors: tokens (W,T), targets "
      "(W,T), logits (W,T,V))");

  group("Model");
  fixes_model(app.add_option(
      "--preset", o.preset,
      "tiny, gpt124-8x2, olmoe-1b-7b-size, qwen3-30b-a3b, mixtral-8x7b; each dimension below overrides it"));
  fixes_model(app.add_option("--n-layer", m.n_layer, "layers"));
  fixes_model(app.add_option("--d-model", m.d_model, "model width"));
  fixes_model(app.add_option("--n-head", m.n_head, "query heads"));
  fixes_model(app.add_option("--n-kv-head", m.n_kv_head, "key/value heads"));
  fixes_model(app.add_option("--head-dim", m.head_dim, "head size"));
  fixes_model(app.add_option("--vocab-size", m.vocab_size, "ids of the tokenizer"));
  fixes_model(app.add_option("--n-expert", m.n_expert, "experts of a layer"));
  fixes_model(app.add_option("--top-k", m.top_k, "experts of a token"));
  fixes_model(app.add_option("--d-expert", m.d_expert, "hidden width of an expert"));
  fixes_model(app.add_option("--d-shared", m.d_shared, "hidden width of the shared expert; 0: none"));
  fixes_model(
      app.add_option("--dense-layers", m.dense_layers, "layers (from 0) with a dense MLP instead of experts, e.g. 0,1")
          ->delimiter(','));
  fixes_model(app.add_option("--d-dense", m.d_dense, "hidden width of dense layers"));
  fixes_model(app.add_option("--qk-norm", m.qk_norm, "RMSNorm on each query and key head"));
  fixes_model(app.add_option("--tied", m.tied, "embedding and head share one matrix"));
  fixes_model(app.add_option("--rope-theta", m.rope_theta, "base of the rotary frequencies"));
  fixes_model(app.add_option("--rms-norm-eps", m.rms_norm_eps, "epsilon of the norms"));

  group("Router and balance");
  fixes_model(app.add_option("--gate", names.gate, "softmax or sigmoid"));
  fixes_model(app.add_option("--norm-topk-prob", m.norm_topk_prob, "renormalise the gates over the chosen experts"));
  fixes_model(app.add_option("--route-scale", m.route_scale, "factor on sigmoid gates"));
  fixes_model(app.add_option("--capacity-factor", m.capacity_factor,
                             "an expert keeps ceil(c*N*K/E) rows of a micro-batch; 0: dropless"));
  balances(app.add_option("--balance", names.balance, "aux (loss), bias (selection bias, sigmoid only) or none"));
  balances(app.add_option("--balance-scope", names.scope,
                          "statistics over the microbatch (of all ranks) or over each sequence"));
  balances(
      app.add_option("--aux-coef", m.aux_coef, "coefficient of the balance loss (1 at balance, summed over layers)"));
  balances(app.add_option("--z-coef", m.z_coef, "coefficient of the router z-loss"));
  balances(app.add_option("--bias-rate", m.bias_rate, "step of the selection bias"));

  group("Data");
  app.add_option("--train-data", o.train_data, "token shards (.bin), a file or a glob");
  declared.val_data = app.add_option("--val-data", o.val_data, "token shards for validation; empty: none");
  app.add_option("--tokenizer-ranks", o.tokenizer_ranks,
                 "GPT-2 ranks, for models on GPT-2 tokens (data/get_gpt2_ranks.sh)");
  app.add_option("--batch-size", o.batch_size, "sequences of a micro-batch on each rank");
  declared.seq_len = app.add_option("--seq-len", o.seq_len,
                                    "tokens of a sequence; with --checkpoint by default those of its training");
  app.add_option("--total-batch-tokens", o.total_batch_tokens,
                 "tokens of a step, by accumulation; 0: batch-size * seq-len * dp");
  app.add_flag("--overfit-one-batch", o.overfit_one_batch, "train on the first batch again and again");

  group("Training");
  app.add_option("--steps", o.steps, "length of the schedule; 0: from --epochs");
  app.add_option("--epochs", o.epochs, "passes over the training data, where --steps is 0");
  app.add_option("--stop-after", o.stop_after, "end the run at this step without changing the schedule; 0: off");
  app.add_option("--lr", o.schedule.peak, "peak learning rate");
  app.add_option("--schedule", o.schedule_name, "cosine, linear, constant or wsd");
  app.add_option("--warmup-steps", o.schedule.warmup_steps, "steps of linear warm-up, at most half of all");
  app.add_option("--final-lr-fraction", o.schedule.final_fraction, "learning rate at the end, as a fraction of --lr");
  app.add_option("--wsd-decay-fraction", o.schedule.wsd_decay_fraction,
                 "wsd: part of the steps in which the rate falls");
  app.add_option("--beta1", o.adamw.beta1, "AdamW: decay of the first moment");
  app.add_option("--beta2", o.adamw.beta2, "AdamW: decay of the second moment");
  app.add_option("--adam-eps", o.adamw.eps, "AdamW: added to the root of the second moment");
  app.add_option("--weight-decay", o.adamw.weight_decay, "AdamW: on matrices only");
  app.add_option("--clip", o.rules.clip_norm, "largest norm of the gradient; 0: no clipping");
  app.add_option("--skip-loss-z", o.rules.skip_loss_z,
                 "skip updates whose loss is more standard deviations above the last 128; 0: never");
  app.add_option("--skip-norm-z", o.rules.skip_norm_z, "the same for the gradient norm");
  app.add_option("--seed", o.seed, "of initial weights, order of samples and generation")
      ->check([](const std::string& text) {
        uint64_t value;  // CLI11 would take -1 and numbers past the end
        auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        return error == std::errc() && end == text.data() + text.size()
                   ? ""
                   : "'" + text + "' is not a whole number from 0 to 2^64 - 1";
      });
  app.add_option("--device", o.device, "auto, cpu or cuda");
  app.add_option("--dtype", o.dtype, "bf16, fp32 or fp64; without it fp32 on cpu, bf16 on cuda")
      ->default_str("(device)");
  app.add_option(
         "--grad-dtype", o.grad_dtype,
         "bf16 or fp32 for gradients of bf16 weights; without it bf16 for a single micro-batch on one rank of a "
         "stage, fp32 otherwise")
      ->default_str("(layout)");

  group("Evaluation, sampling, checkpoints");
  app.add_option("--eval-every", o.eval_every, "evaluate all validation data every n steps; 0: only at the end");
  app.add_option("--hellaswag", o.hellaswag,
                 "multiple-choice questions (data/hellaswag.py) to answer at every evaluation, and at the end");
  app.add_option("--sample-every", o.sample_every, "print a sample every n steps; 0: never");
  app.add_option("--checkpoint-every", o.checkpoint_every, "save every n steps; 0: only at the end");
  app.add_option("--keep", o.keep, "newest checkpoints that stay; 0: all");
  app.add_option("--out", o.out, "directory of logs and checkpoints");
  app.add_option("--tensorboard", o.tensorboard, "directory that event files for TensorBoard go to");
  app.add_flag("--resume", o.resume, "go on from the newest checkpoint in --out");
  app.add_option("--init-from", o.init_from, "start from the weights of this checkpoint or Hugging Face directory");

  group("Memory");
  app.add_option("--recompute", o.recompute, "none, act, up, block, or auto (the cheapest that fits --memory-budget)");
  app.add_option("--memory-budget", o.memory_budget, "GiB the plan may take; 0: what the machine has free");
  app.add_option("--dispatch", o.dispatch, "zero_buffer, or materialized (for comparison)");
  app.add_option("--arena", o.arena,
                 "planned, or separate (every tensor its own allocation, poisoned after its last use)");

  group("Routing traces");
  app.add_option("--record-routing", o.record_routing, "write every top_k_index of the run to FILE");
  app.add_option("--replay-routing", o.replay_routing, "use the choices in FILE instead of the top-k");

  group("Generation");
  app.add_option("--checkpoint", o.checkpoint, "checkpoint or Hugging Face directory to load");
  app.add_option("--prompt", o.prompt, "text to continue");
  app.add_option("--max-new-tokens", o.max_new_tokens, "tokens to generate");
  app.add_option("--context", o.context, "tokens the model looks back at most; 0: the sequence length of its training");
  app.add_option("--temperature", o.sampler.temperature, "0: always the most probable token");
  app.add_option("--top-k-sampling", o.sampler.top_k, "sample among the k most probable; 0: all");
  app.add_option("--top-p", o.sampler.top_p, "sample among the most probable that sum to p");

  group("Processes");
  app.add_option("--dp", o.layout.dp, "ranks that share the batch");
  app.add_option("--ep", o.layout.ep, "ranks that share the experts");
  app.add_option("--etp", o.layout.etp, "ranks that share the width of an expert");
  app.add_option("--tp", o.layout.tp, "ranks that share heads, dense width and vocabulary");
  app.add_option("--pp", o.layout.pp, "ranks that share the layers");
  app.add_option("--world", o.world, "with --dry-run: processes to plan for");
  app.add_option(
      "--row-headroom", o.row_headroom,
      "rows that a rank's experts have memory for, over their share; what exceeds it comes in further passes");
  app.add_option("--placement", o.placement,
                 "which rank computes which expert: a text file of numbers, for every layer with experts, expert, and "
                 "rank of a token in its group of ep x etp: host * slots + slot; empty: in order");
  app.add_option("--extra-slots", o.extra_slots, "experts that a rank has memory for, over its share: for --placement");
  app.add_option("--shadow-slots", o.shadow_slots,
                 "and others, that no expert is placed in, for those that come and go within a step");
  app.add_option(
      "--transport", o.transport,
      "of tokens between ranks that share experts: pull (GPUs of one host fetch them from each other's memory), "
      "exchange, or auto (pull where it can be)");
  app.add_option(
      "--grad-bucket", o.grad_bucket,
      "elements of gradients that ranks exchange at a time, at least (whole attention or MLP parts of layers)");
  app.add_option("--comm-timeout", o.comm_timeout, "seconds to wait for another rank before the job ends");

  group("Debugging");
  app.add_flag("--plain-matmul", o.plain_matmul, "our own plain products instead of the matmul library");
  app.add_flag("--no-graphs", o.no_graphs, "cuda: launch op by op instead of replaying captured graphs (same bits)");
  app.add_option(
      "--experts", o.experts,
      "cuda: kernels of the expert products: auto, hopper, or portable (every GPU since Ampere; attention's too)");
  for (CLI::Option* option :
       app.get_options())  // an empty default would not be shown (CLI11 would open that of --config)
    if (option != app.get_config_ptr() && option->get_items_expected_max() > 0 && option->get_default_str().empty())
      option->default_str("(none)");
  return declared;
}

// Parses argv into o and names, and notes which of the declared options were given.
void parse(int argc, char** argv, Options& o, Names& names) {
  CLI::App app("gpt-moe: trains a GPT with mixture-of-experts layers", "train_gpt_moe");
  Declared declared = declare(app, o, names);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::fputs(app.help().c_str(), stdout);
    throw HelpShown();
  } catch (const CLI::ParseError& e) {
    std::string line = e.what();
    for (char& c : line)
      if (c == '\n') c = ' ';
    const std::string unknown = "INI was not able to parse ";
    if (line.starts_with(unknown)) line = "--config: no option is called '" + line.substr(unknown.size()) + "'";
    fail(line, " (see --help)");
  }
  auto given = [](const std::vector<CLI::Option*>& options, std::vector<std::string>& names) {
    for (CLI::Option* option : options)
      if (option->count() > 0) names.push_back(option->get_name());
  };
  given(declared.model, o.model_options_given);
  given(declared.balance, o.balance_options_given);
  o.val_data_given = declared.val_data->count() > 0, o.seq_len_given = declared.seq_len->count() > 0;
}

void check_choice(const char* option, const std::string& value, std::initializer_list<const char*> choices) {
  std::string all;
  for (const char* c : choices) {
    if (value == c) return;
    all += std::string(all.empty() ? "" : ", ") + (*c ? c : "nothing");
  }
  fail(option, " '", value, "' is not one of ", all);
}

// Defaults of a preset beyond the model itself.
void apply_preset(Options& o) {
  o.model = preset(o.preset);
  o.schedule.peak = 3e-4;
  o.schedule.warmup_steps = 100;
  o.schedule.final_fraction = 0.1;
  if (o.preset == "tiny") {
    o.schedule.peak = 3e-3;
  } else {
    o.batch_size = 8, o.seq_len = 1024;
    o.train_data = o.val_data = "";
  }
}

// Settles what "auto" and the default dtype mean on this machine. A memory plan alone needs no GPU.
void choose_device(Options& o) {
#ifdef GPT_MOE_CUDA
  std::string problem = o.device == "cpu" ? "" : gpu_problem();
  bool plan_only = o.dry_run && o.device == "cuda";
  if (o.device == "auto") o.device = problem.empty() && o.dtype != "fp64" ? "cuda" : "cpu";
  if (o.device == "cuda" && !problem.empty() && !plan_only) fail("--device cuda: ", problem, "; use --device cpu");
  if (o.device == "cuda" && o.dtype == "fp64") fail("--dtype fp64: on the CPU only; use --device cpu");
#else
  if (o.device == "cuda") fail("--device cuda: this binary was built without CUDA; use --device cpu");
  o.device = "cpu";
#endif
  if (o.dtype.empty()) o.dtype = o.device == "cuda" ? "bf16" : "fp32";
}
}  // namespace

Options parse_options(int argc, char** argv, int processes) {
  // Twice: the first pass finds the preset, whose values are the defaults of the second.
  Options first;
  Names ignored;
  parse(argc, argv, first, ignored);
  Options o;
  Names names;
  o.preset = first.preset;
  apply_preset(o);
  names.gate = name_of(o.model.gate), names.balance = name_of(o.model.balance),
  names.scope = name_of(o.model.balance_scope);
  parse(argc, argv, o, names);

  o.model.gate = parse_gate(names.gate), o.model.balance = parse_balance(names.balance);
  o.model.balance_scope = parse_balance_scope(names.scope);
  o.model.validate();
  auto positive = [](const char* option, int64_t v) {
    if (v <= 0) fail(option, " must be positive, not ", v);
    if (v > (int64_t(1) << 40)) fail(option, " ", v, " is absurd (more than 2^40)");
  };
  auto not_negative = [](const char* option, int64_t v) {
    if (v < 0) fail(option, " must not be negative, not ", v);
    if (v > (int64_t(1) << 40)) fail(option, " ", v, " is absurd (more than 2^40)");
  };
  auto finite = [](const char* option, double v) {
    if (!std::isfinite(v)) fail(option, " must be a finite number, not ", v);
  };
  positive("--batch-size", o.batch_size), positive("--seq-len", o.seq_len);
  if (double(o.batch_size) * double(o.seq_len) * double(o.model.top_k) >= double(int64_t(1) << 31))
    fail("--batch-size ", o.batch_size, " x --seq-len ", o.seq_len, " x --top-k ", o.model.top_k,
         " rows pass 2^31; use smaller micro-batches (--total-batch-tokens accumulates)");
  not_negative("--total-batch-tokens", o.total_batch_tokens), not_negative("--steps", o.steps),
      not_negative("--stop-after", o.stop_after);
  not_negative("--eval-every", o.eval_every), not_negative("--sample-every", o.sample_every);
  not_negative("--checkpoint-every", o.checkpoint_every), not_negative("--keep", o.keep),
      not_negative("--context", o.context);
  positive("--max-new-tokens", o.max_new_tokens), positive("--grad-bucket", o.grad_bucket);
  if (o.layout.dp < 1) fail("--dp must be positive, not ", o.layout.dp);
  if (o.total_batch_tokens == 0) o.total_batch_tokens = o.micro_batch_tokens();
  if (o.total_batch_tokens % o.micro_batch_tokens())
    fail("--total-batch-tokens ", o.total_batch_tokens, " is not a multiple of --batch-size ", o.batch_size,
         " x --seq-len ", o.seq_len, o.layout.dp > 1 ? " x --dp " + std::to_string(o.layout.dp) : "");
  not_negative("--extra-slots", o.extra_slots), not_negative("--shadow-slots", o.shadow_slots);
  if (!(o.epochs > 0 && o.epochs <= 1e6)) fail("--epochs must be positive (at most 1e6), not ", o.epochs);
  if (!(o.memory_budget >= 0 && o.memory_budget <= 1e9))
    fail("--memory-budget is in GiB: not negative, at most 1e9, not ", o.memory_budget);
  if (!(o.adamw.beta1 >= 0 && o.adamw.beta1 < 1 && o.adamw.beta2 >= 0 && o.adamw.beta2 < 1))
    fail("--beta1 and --beta2 must be in [0, 1)");
  if (!(o.adamw.eps > 0) || !(o.adamw.weight_decay >= 0))
    fail("--adam-eps must be positive and --weight-decay not negative");
  finite("--adam-eps", o.adamw.eps), finite("--weight-decay", o.adamw.weight_decay);
  if (!(o.rules.clip_norm >= 0 && o.rules.skip_loss_z >= 0 && o.rules.skip_norm_z >= 0))
    fail("--clip, --skip-loss-z and --skip-norm-z must not be negative");
  o.schedule.kind = parse_schedule_kind(o.schedule_name);
  check_sampler(o.sampler);
  check_choice("--device", o.device, {"auto", "cpu", "cuda"});
  check_choice("--dtype", o.dtype, {"", "bf16", "fp32", "fp64"});
  check_choice("--grad-dtype", o.grad_dtype, {"", "bf16", "fp32"});
  check_choice("--recompute", o.recompute, {"none", "act", "up", "block", "auto"});
  check_choice("--dispatch", o.dispatch, {"zero_buffer", "materialized"});
  check_choice("--arena", o.arena, {"planned", "separate"});
  check_choice("--export", o.export_format, {"", "hf"});
  check_choice("--transport", o.transport, {"auto", "exchange", "pull"});
  check_choice("--experts", o.experts, {"auto", "hopper", "portable"});
  choose_device(o);
  if (o.experts == "hopper" && (o.device != "cuda" || o.dtype != "bf16"))
    fail("--experts hopper: those kernels are for --device cuda --dtype bf16, and this is ", o.device, " ", o.dtype);
  if (o.transport == "pull" && o.device != "cuda")
    fail("--transport pull is for GPUs, which fetch from each other's memory; on the CPU use exchange");
  if (o.transport == "pull" && o.arena == "separate")
    fail("--transport pull maps a GPU's one arena, and --arena separate has none; use --transport exchange");
  if (!o.grad_dtype.empty() && o.dtype != "bf16")
    fail("--grad-dtype is for --dtype bf16; gradients of ", o.dtype, " weights are ", o.dtype);
  if (o.grad_dtype == "bf16" && o.dtype == "bf16" && o.micro_steps() > 1)
    fail("--grad-dtype bf16 would round a gradient once a micro-batch; with ", o.micro_steps(),
         " micro-batches a step use fp32");
  if (o.world != 1 && !o.dry_run) fail("--world belongs to --dry-run; mpirun or RANK and WORLD_SIZE start processes");
  if (processes > 1 && o.world != 1 && o.world != processes)
    fail("--world ", o.world, ", but ", processes, " processes run");
  if (processes > 1) o.world = processes;
  if (o.use() && (o.world > 1 || o.layout != Layout{} || !o.placement.empty() || o.extra_slots || o.shadow_slots))
    fail(o.use(), " runs as a single process");
  if (!(o.row_headroom > 0 && o.row_headroom <= 1e6))
    fail("--row-headroom must be positive (at most 1e6), not ", o.row_headroom);
  if (o.world > 1) {
    if (o.sample_every) fail("--sample-every: several processes do not generate; use --generate with a checkpoint");
    if (!o.record_routing.empty()) fail("--record-routing records a single process");
  }
  if (o.resume && !o.init_from.empty())
    fail(
        "--resume and --init-from exclude each other: the first goes on with --out, the second starts anew from other "
        "weights");
  if (o.resume && !o.record_routing.empty())
    fail("--record-routing records a run from its first step; it cannot go on with --resume");
  if (!o.record_routing.empty() && !o.replay_routing.empty())
    fail("--record-routing and --replay-routing exclude each other");
  if (int(o.generate) + int(!o.export_format.empty()) + int(!o.logits.empty()) > 1)
    fail("--generate, --export and --logits exclude each other");
  if ((o.dry_run || o.memory_report) && o.use())
    fail("--dry-run and --memory-report belong to training, not to ", o.use());
  for (auto [option, given] : {std::pair{"--profile", o.profile}, {"--memory-profile", !o.memory_profile.empty()}}) {
    if (given && o.use()) fail(option, " belongs to training, not to ", o.use());
    if (given && o.arena == "separate") fail(option, " is of the planned arena; leave --arena separate out");
  }
  if (o.profile && o.dry_run) fail("--profile times steps, and --dry-run stops before the first");
  if (o.out.empty()) fail("--out must name a directory");
  if (o.use() && o.checkpoint.empty()) fail(o.use(), " needs --checkpoint DIR");
  if (o.use() && !o.val_data_given) o.val_data = "";  // the default is for training on the default corpus
  const bool evaluates = o.use() && !o.generate && o.export_format.empty() && o.logits.empty();
  if (!o.logits.empty() && o.val_data.empty()) fail("--logits needs --val-data: the tokens to look at");
  if (!o.hellaswag.empty() && o.use() && !evaluates)
    fail("--hellaswag belongs to training and to evaluating --checkpoint, not to ", o.use());
  if (evaluates && o.val_data.empty() && o.hellaswag.empty())
    fail(
        "--checkpoint by itself is evaluated: give --val-data, --hellaswag or both (or --generate, --export, "
        "--logits)");
  return o;
}

void check_processes(const Options& o) {
  o.layout.validate(o.world, o.model);
  const auto& [dp, tp, pp, ep, etp] = o.layout;
  const int64_t B = o.batch_size, T = o.seq_len, ranks = int64_t(ep) * etp;
  if (o.transport == "pull" && ranks == 1)
    fail("--transport pull: with --ep 1 --etp 1 no token leaves its rank; leave it out");
  if (ranks == 1 && (!o.placement.empty() || o.extra_slots || o.shadow_slots))
    fail(
        "--placement, --extra-slots and --shadow-slots: with --ep 1 --etp 1 every rank has all experts; leave them "
        "out");
  if (const int64_t E = o.model.n_expert, more = E - E / ep;
      o.extra_slots > more || o.shadow_slots > more - o.extra_slots)
    fail("--extra-slots ", o.extra_slots, " and --shadow-slots ", o.shadow_slots, ": a rank with ", E / ep, " of the ",
         E, " experts has no use for more than ", more);
  for (auto [option, n] : {std::pair{"--ep", ep}, {"--etp", etp}, {"--tp", tp}})
    if (n > 1 && o.model.capacity_factor > 0)
      fail("--capacity-factor counts the rows of an expert on one rank; with ", option, " ", n, " nothing is dropped");
  if (B * T % tp) fail("--tp ", tp, " does not divide the ", B * T, " tokens of --batch-size ", B, " x --seq-len ", T);
  if (tp > 1 && o.model.balance_scope == BalanceScope::sequence && B % tp && tp % B)
    fail("--balance-scope sequence: of --tp ", tp, " and --batch-size ", B, " one must divide the other");
  if (double(ranks) / tp * double(B) * double(T) * double(std::max(o.model.top_k, ranks)) >= double(int64_t(1) << 31))
    fail("--ep ", ep, " x --etp ", etp, " x --batch-size ", B, " x --seq-len ", T,
         " tokens reach a rank at most, which pass 2^31 rows; use smaller micro-batches");
}
