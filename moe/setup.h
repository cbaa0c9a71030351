// From the user's options to a run that is possible: the plan's options, the model of an existing checkpoint, and a
// memory plan that fits.
#pragma once
#include <cstdio>
#include <map>

#include "moe/hf.h"
#include "moe/options.h"
#include "moe/report.h"

// The plan's options out of the user's.
inline RunOptions run_options(const Options& o) {
  RunOptions r;
  r.B = o.batch_size, r.T = o.seq_len, r.micro_steps = o.micro_steps();
  r.evaluate = !o.val_data.empty();
  r.decode_positions = o.sample_every ? (o.context ? o.context : o.seq_len) : 0;
  r.wide_gradients = o.grad_dtype.empty() ? o.micro_steps() > 1 : o.grad_dtype == "fp32";
  r.dispatch = o.dispatch == "materialized" ? Dispatch::materialized : Dispatch::zero_buffer;
  r.separate_arena = o.arena == "separate";
  r.graphs = !o.no_graphs;
  r.record_routing = !o.record_routing.empty(), r.replay_routing = !o.replay_routing.empty();
  r.adamw = o.adamw, r.rules = o.rules;
  for (Recompute p : {Recompute::none, Recompute::act, Recompute::up, Recompute::block})
    if (o.recompute == name_of(p)) r.recompute.assign(o.model.n_layer, p);
  return r;
}

// The model of a checkpoint or Hugging Face directory. What the command line says about the architecture must agree; how
// experts are balanced it may change, option by option.
inline ModelConfig model_of(const std::string& dir, const Options& o, ModelFileInfo& info, std::string& model_type) {
  ModelConfig c = read_hf_config(dir + "/config.json", info, model_type), asked = o.model;
  for (const std::string& name : o.balance_options_given) {
    if (name == "--balance") c.balance = asked.balance;
    if (name == "--balance-scope") c.balance_scope = asked.balance_scope;
    if (name == "--aux-coef") c.aux_coef = asked.aux_coef;
    if (name == "--z-coef") c.z_coef = asked.z_coef;
    if (name == "--bias-rate") c.bias_rate = asked.bias_rate;
  }
  asked.balance = c.balance, asked.balance_scope = c.balance_scope;
  asked.aux_coef = c.aux_coef, asked.z_coef = c.z_coef, asked.bias_rate = c.bias_rate;
  if (!o.model_options_given.empty() && c != asked) {
    std::string given;
    for (const std::string& name : o.model_options_given) given += " " + name;
    fail("the options", given, " do not describe the model in ", dir,
         " (see its config.json); leave them out to use that model");
  }
  c.validate();
  return c;
}

// Bytes that a run with these options would allocate.
template <class Device>
size_t bytes_of(Device& dev, const ModelConfig& model, const RunOptions& run) {
  Plan plan = Model<Device>(dev, model, run).plan;
  return run.separate_arena ? plan.separate_bytes() : plan.arena_bytes();
}

// Bytes that this device can still give; 0: not known.
template <class Device>
size_t free_bytes(Device& dev) {
  if constexpr (requires { dev.memory(); })
    return dev.stream ? dev.memory().free : 0;
  else
    return available_memory();
}
// Bytes that a run may allocate; 0: not known.
template <class Device>
size_t budget_of(Device& dev, const Options& o) {
  if (o.memory_budget > 0) return std::max<size_t>(1, size_t(o.memory_budget * double(size_t(1) << 30)));
  return free_bytes(dev);
}

// --recompute auto: sets the cheapest policies that fit, and says which.
template <class Device>
void choose_policies(Device& dev, const Options& o, RunOptions& run) {
  if (o.recompute != "auto") return;
  size_t budget = budget_of(dev, o), least = 0;
  if (budget == 0) fail("--recompute auto: this machine does not say how much memory is free; give --memory-budget");
  auto policies = choose_recompute(o.model.n_layer, budget, [&](const std::vector<Recompute>& p) {
    run.recompute = p;
    size_t bytes = bytes_of(dev, o.model, run);
    least = least ? std::min(least, bytes) : bytes;
    return bytes;
  });
  if (policies.empty())
    fail("--recompute auto: even --recompute block needs ", readable_bytes(double(least)), ", more than the ",
         readable_bytes(double(budget)), " allowed; use a smaller --batch-size or --seq-len");
  run.recompute = policies;
  std::map<std::string, int> count;
  for (Recompute p : policies) ++count[name_of(p)];
  std::printf("recompute auto:");
  for (auto& [name, n] : count) std::printf(" %s x %d", name.c_str(), n);
  std::printf(" (plan %s of %s)\n", readable_bytes(double(bytes_of(dev, o.model, run))).c_str(),
              readable_bytes(double(budget)).c_str());
}

// Refuses a run that does not fit, naming the nearest setting that does.
template <class Device>
void check_memory(Device& dev, const Options& o, const RunOptions& run) {
  size_t budget = budget_of(dev, o), needed = bytes_of(dev, o.model, run);
  if (budget == 0 || needed <= budget) return;
  std::string hint;
  for (RunOptions r = run; r.B >= 1 && hint.empty(); r.B /= 2)
    for (Recompute p : {Recompute::act, Recompute::up, Recompute::block}) {
      r.recompute.assign(o.model.n_layer, p);
      size_t bytes = bytes_of(dev, o.model, r);
      if (bytes > budget) continue;
      hint = "--batch-size " + std::to_string(r.B) + " --recompute " + name_of(p) + " would fit (" +
             readable_bytes(double(bytes)) + ")";
      break;
    }
  fail("the run needs ", readable_bytes(double(needed)), " and ", readable_bytes(double(budget)),
       o.memory_budget > 0 ? " are allowed by --memory-budget" : " are free", "; ",
       hint.empty() ? "no batch size fits; choose a smaller model" : hint);
}
