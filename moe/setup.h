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

// --recompute auto, and the check that the plan fits; returns options that do.
template <class Device>
RunOptions fit_memory(Device& dev, const Options& o, RunOptions run) {
  size_t available = available_memory();
  size_t budget =
      o.memory_budget > 0 ? std::max<size_t>(1, size_t(o.memory_budget * double(size_t(1) << 30))) : available;
  auto bytes = [&](const RunOptions& r) { return Model<Device>(dev, o.model, r).plan.arena_bytes(); };
  auto with = [&](const std::vector<Recompute>& policies) {
    RunOptions r = run;
    r.recompute = policies;
    return r;
  };
  if (o.recompute == "auto") {
    auto policies =
        choose_recompute(o.model.n_layer, budget, [&](const std::vector<Recompute>& p) { return bytes(with(p)); });
    if (policies.empty())
      fail("--recompute auto: even --recompute block needs ",
           readable_bytes(double(bytes(with(std::vector<Recompute>(o.model.n_layer, Recompute::block))))),
           ", more than the ", readable_bytes(double(budget)), " allowed; use a smaller --batch-size or --seq-len");
    run.recompute = policies;
    std::map<std::string, int> count;
    for (Recompute p : policies) ++count[name_of(p)];
    std::printf("recompute auto:");
    for (auto& [name, n] : count) std::printf(" %s x %d", name.c_str(), n);
    std::printf(" (plan %s of %s)\n", readable_bytes(double(bytes(run))).c_str(),
                readable_bytes(double(budget)).c_str());
  }
  if (o.dry_run || budget == 0 || bytes(run) <= budget) return run;
  size_t needed = bytes(run);
  std::string hint = "no batch size fits; choose a smaller model";
  for (RunOptions r = run; r.B >= 1; r.B /= 2) {
    bool found = false;
    for (Recompute p : {Recompute::act, Recompute::up, Recompute::block}) {
      r.recompute.assign(o.model.n_layer, p);
      size_t b = bytes(r);
      if (b > budget) continue;
      hint = "--batch-size " + std::to_string(r.B) + " --recompute " + name_of(p) + " would fit (" +
             readable_bytes(double(b)) + ")";
      found = true;
      break;
    }
    if (found) break;
  }
  fail("the run needs ", readable_bytes(double(needed)), " and ", readable_bytes(double(budget)),
       o.memory_budget > 0 ? " are allowed by --memory-budget" : " are free", "; ", hint);
}
