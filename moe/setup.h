// From the user's options to a run that is possible: the plan's options, the model of an existing checkpoint, and a
// memory plan that fits.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>

#include "llmc/files.h"
#include "llmc/gpu.h"
#include "moe/hf.h"
#include "moe/op_work.h"
#include "moe/options.h"
#include "moe/report.h"
#include "moe/step_log.h"

// Whether programs are to be captured: the exchange of tokens reads its counts on the host.
inline bool graphs_possible(const Options& o, Transport t) {
  return !o.no_graphs && (o.layout.ep * o.layout.etp == 1 || t == Transport::pull);
}

// --placement.
inline void place_experts(const Options& o, RunOptions& run) {
  const ExpertRanks ranks = run.expert_ranks(o.model);
  int64_t with_experts = 0;
  for (int64_t l = 0; l < o.model.n_layer; ++l) with_experts += !o.model.is_dense(l);
  auto places = read_places(o.placement, with_experts, ranks.E * ranks.ranks);
  auto next = places.begin();
  run.places.resize(o.model.n_layer);
  for (int64_t l = 0; l < o.model.n_layer; ++l) {
    if (o.model.is_dense(l)) continue;
    run.places[l] = std::move(*next++);
    run.expert_slots(o.model, l)
        .validate("--placement " + o.placement + ": layer " + std::to_string(l), ranks.slots() - run.shadow_slots);
  }
}

// The plan's options out of the user's.
inline RunOptions run_options(const Options& o) {
  RunOptions r;
  r.B = o.batch_size, r.T = o.seq_len, r.micro_steps = o.micro_steps();
  r.evaluate = !o.val_data.empty() || !o.hellaswag.empty(), r.token_losses = !o.hellaswag.empty();
  r.decode_positions = o.sample_every ? (o.context ? o.context : o.seq_len) : 0;
  r.wide_gradients = o.grad_dtype.empty() ? o.micro_steps() > 1 || o.layout.stage_ranks() > 1 : o.grad_dtype == "fp32";
  r.dispatch = o.dispatch == "materialized" ? Dispatch::materialized : Dispatch::zero_buffer;
  r.separate_arena = o.arena == "separate";
  r.transport = o.transport == "pull" ? Transport::pull : Transport::exchange;  // choose_transport() settles "auto"
  r.graphs = graphs_possible(o, r.transport);
  r.record_routing = !o.record_routing.empty(), r.replay_routing = !o.replay_routing.empty();
  r.adamw = o.adamw, r.rules = o.rules;
  r.row_headroom = o.row_headroom, r.grad_bucket = o.grad_bucket;
  r.parallel.layout = o.layout, r.parallel.here = place(o.layout, 0);
  r.extra_slots = o.extra_slots, r.shadow_slots = o.shadow_slots;
  if (!o.placement.empty()) place_experts(o, r);
  for (Recompute p : {Recompute::none, Recompute::act, Recompute::up, Recompute::block})
    if (o.recompute == name_of(p)) r.recompute.assign(o.model.n_layer, p);
  return r;
}

// How tokens get to their experts, and why so. Called by all ranks of a job. (A plan alone takes "auto" for exchange: the
// two need nearly the same memory.)
template <class Device>
void choose_transport(Device& dev, const Options& o, RunOptions& run) {
  if (o.layout.ep * o.layout.etp == 1) return;
  std::string why = o.transport == "exchange" ? "as asked for" : o.transport == "pull" ? "" : "on the CPU";
  if constexpr (std::is_base_of_v<GpuBase, Device>)
    if (const Parallel& p = run.parallel; o.transport != "exchange") {
      if (o.arena == "separate")
        why = "--arena separate";
      else
        why = PeerMemory::problem(dev, *p.world, p[Group::ep], p.host);
    }
  if (o.transport == "pull" && !why.empty()) fail("--transport pull: ", why, "; use auto or exchange");
  run.transport = why.empty() ? Transport::pull : Transport::exchange;
  run.graphs = graphs_possible(o, run.transport);
  std::printf("tokens to experts: %s\n", why.empty() ? "pull" : ("exchange (" + why + ")").c_str());
}

// The model of a checkpoint or Hugging Face directory. What the command line says about the architecture must agree; how
// experts are balanced it may change, option by option.
inline ModelConfig model_of(const std::string& dir, const Options& o, ModelFileInfo& info, std::string& model_type) {
  ModelConfig c = read_hf_config(dir + "/config.json", info, model_type), asked = o.model;
  info.tokenizer_files = read_tokenizer_files(dir);
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

// Free bytes of a GPU, as its driver counts them; 0 on a CPU.
template <class Device>
size_t device_free_bytes(Device& dev) {
  if constexpr (std::is_base_of_v<GpuBase, Device>) return dev.memory().free;
  return 0;
}

// Bytes that this device can still give; 0: not known.
template <class Device>
size_t free_bytes(Device& dev) {
  if constexpr (std::is_base_of_v<GpuBase, Device>) {
    const size_t reserve = size_t(256) << 20;  // for what the driver loads later, and rounds up
    size_t free = dev.stream ? dev.memory().free : 0;
    return free > reserve ? free - reserve : std::min<size_t>(free, 1);
  } else {
    return available_memory();
  }
}
// Bytes that a run may allocate; 0: not known.
template <class Device>
size_t budget_of(Device& dev, const Options& o) {
  if (o.memory_budget > 0) return std::max<size_t>(1, size_t(o.memory_budget * double(size_t(1) << 30)));
  const int sharing = std::is_base_of_v<GpuBase, Device> ? 1 : o.local_ranks;  // a host's memory
  return free_bytes(dev) / size_t(sharing);
}

// What the kernels of this device cannot do, said before anything is allocated.
template <class Device>
void check_limits(const ModelConfig& c, int64_t B, int64_t T) {
  if constexpr (std::is_base_of_v<GpuBase, Device>) {
    constexpr bool tensor_cores = std::is_same_v<typename Device::Real, bf16>;
    const int64_t sizes[] = {16, 32, 64, 96, 128};
    if (tensor_cores && std::find(std::begin(sizes), std::end(sizes), c.head_dim) == std::end(sizes))
      fail("--head-dim ", c.head_dim,
           ": attention in bf16 on the GPU takes 16, 32, 64, 96 or 128; --dtype fp32 takes any");
    int64_t width = c.d_model % (tensor_cores ? 8 : 4) ? 1024 : tensor_cores ? 8192 : 4096;
    if (c.d_model > width) fail("--d-model ", c.d_model, ": norms on the GPU take rows of at most ", width);
    const RouterShape router = c.router(B, T);
    if (router.N / router.G > 65535 * 64)
      fail("--batch-size ", B, " x --seq-len ", T, ": at most ", 65535 * 64,
           " tokens of a micro-batch share balance statistics on the GPU; take a smaller batch, or --balance-scope "
           "sequence");
  }
}

// Operations that backward repeats under these policies, as a share of those of the step itself.
template <class Device>
double recomputed_share(Device& dev, const ModelConfig& c, const RunOptions& run) {
  const Plan plan = Model<Device>(dev, c, run).plan;
  return OpWorks(c, run, plan, sizeof(typename Device::Real)).operations().share();
}

// --recompute auto: sets the cheapest policies that fit, for the layers of this rank's stage (and, in a job that runs, for
// all others as their ranks do).
template <class Device>
void choose_policies(Device& dev, const Options& o, RunOptions& run) {
  if (o.recompute != "auto") return;
  size_t budget = budget_of(dev, o), least = 0;
  if (budget == 0) fail("--recompute auto: this machine does not say how much memory is free; give --memory-budget");
  const Stage stage = stage_of(o.model, run);
  run.recompute.resize(o.model.n_layer, Recompute::none);
  auto policies = choose_recompute(stage.end - stage.begin, budget, [&](const std::vector<Recompute>& p) {
    std::copy(p.begin(), p.end(), run.recompute.begin() + stage.begin);
    size_t bytes = bytes_of(dev, o.model, run);
    least = least ? std::min(least, bytes) : bytes;
    return bytes;
  });
  if (policies.empty())
    fail("--recompute auto: even --recompute block needs ", readable_bytes(double(least)), ", more than the ",
         readable_bytes(double(budget)), " allowed; use a smaller --batch-size or --seq-len");
  std::copy(policies.begin(), policies.end(), run.recompute.begin() + stage.begin);
  if (!run.parallel.alone() && run.parallel.world)  // what the tightest rank needs: ranks send each other the same
    for (Recompute& p : run.recompute) p = Recompute(run.parallel.host.max(int32_t(p), "recompute policies"));
}

// What --recompute auto has come to.
template <class Device>
void print_policies(Device& dev, const Options& o, const RunOptions& run) {
  if (o.recompute != "auto") return;
  std::map<std::string, int> count;
  for (Recompute p : run.recompute) ++count[name_of(p)];
  std::printf("recompute auto:");
  for (auto& [name, n] : count) std::printf(" %s x %d", name.c_str(), n);
  std::printf(" (plan %s of %s); predicted cost: %.1f %% more operations\n",
              readable_bytes(double(bytes_of(dev, o.model, run))).c_str(),
              readable_bytes(double(budget_of(dev, o))).c_str(), 100 * recomputed_share(dev, o.model, run));
}

// For a job that is only planned: its policies, and the first rank of the stage that needs most memory (of a tensor that
// two stages share another rank may be home to 64 rows more); where experts are placed, whichever rank does.
template <class Device>
void choose_stage(Device& dev, const Options& o, RunOptions& run) {
  size_t most = 0;
  Place fullest;
  for (int rank = 0; rank < o.layout.world(); rank += o.placement.empty() ? o.layout.stage_ranks() : 1) {
    run.parallel.here = place(o.layout, rank);
    choose_policies(dev, o, run);
    const size_t bytes = bytes_of(dev, o.model, run);
    if (bytes > most) most = bytes, fullest = run.parallel.here;
  }
  run.parallel.here = fullest;
}

// The memory report of a run, beside that of the other dispatch.
template <class Device>
void print_report(Device& dev, const Options& o, const RunOptions& run) {
  RunOptions other = run;
  other.dispatch = other_dispatch(run.dispatch);
  auto summary = [&](const RunOptions& r) { return summarize(Model<Device>(dev, o.model, r).plan, o.model); };
  std::fputs(memory_report(summary(run), summary(other), o.model, run, sizeof(typename Device::Real)).c_str(), stdout);
  std::fflush(stdout);
}

// The same of a run that has begun, as a file.
template <class Device>
void write_memory_record(Device& dev, const Model<Device>& model, const std::string& path) {
  RunOptions other = model.options;
  other.dispatch = other_dispatch(other.dispatch);
  auto record =
      memory_record(summarize(model.plan, model.config),
                    summarize(Model<Device>(dev, model.config, other).plan, model.config), model.config, model.options);
  write_file_atomic(path, record.dump(1) + '\n');
}

// Refuses a run that does not fit, with its report, naming the nearest setting that does.
template <class Device>
void check_memory(Device& dev, const Options& o, const RunOptions& run) {
  size_t budget = budget_of(dev, o), needed = bytes_of(dev, o.model, run), free = free_bytes(dev);
  if (std::is_base_of_v<GpuBase, Device> && free) budget = std::min(budget, free);
  if (budget == 0 || needed <= budget) return;
  std::string hint;
  for (RunOptions r = run; r.B >= 1 && hint.empty(); r.B /= 2)
    for (Recompute p : {Recompute::act, Recompute::up, Recompute::block}) {
      const int tp = o.layout.tp;  // which cannot cut any batch (check_processes)
      if (r.B * r.T % tp || (r.B % tp && tp % r.B)) continue;
      r.recompute.assign(o.model.n_layer, p);
      size_t bytes = bytes_of(dev, o.model, r);
      if (bytes > budget) continue;
      hint = "--batch-size " + std::to_string(r.B) + " --recompute " + name_of(p) + " would fit (" +
             readable_bytes(double(bytes)) + ")";
      break;
    }
  print_report(dev, o, run);
  fail("the run needs ", readable_bytes(double(needed)), " and ", readable_bytes(double(budget)),
       o.memory_budget > 0 && budget != free ? " are allowed by --memory-budget" : " are free", "; ",
       hint.empty() ? "no batch size fits; choose a smaller model" : hint);
}

// Where a GPU's memory went, the plan beside what the driver says; nothing on a CPU. before: free bytes before the
// tensors were allocated.
template <class Device>
void print_device_memory(Device& dev, size_t before, size_t planned) {
  if constexpr (std::is_base_of_v<GpuBase, Device>) {
    auto now = dev.memory();
    size_t taken = before > now.free ? before - now.free : 0;
    std::printf("%s: context and libraries %s | tensors %s planned, %s by the driver | %s of %s free\n",
                dev.gpu_name.c_str(), readable_bytes(double(dev.context_bytes)).c_str(),
                readable_bytes(double(planned)).c_str(), readable_bytes(double(taken)).c_str(),
                readable_bytes(double(now.free)).c_str(), readable_bytes(double(now.total)).c_str());
  }
}

// Share of a micro-step's time that recomputation takes, measured op by op on a micro-batch of zeros. Leaves nothing
// that the start of a step does not reset.
template <class Device>
double measured_recompute_share(Device& dev, Model<Device>& model) {
  using Clock = std::chrono::steady_clock;
  std::vector<int32_t> zeros(model.N(), 0);
  StepParams p;
  p.step = 1, p.loss_scale = 1.0 / double(model.N());
  double recomputed = 0, total = 0;
  for (int round = 0; round < 2; ++round) {  // the first warms up
    recomputed = total = 0;
    model.set_params(p);
    model.set_batch(zeros.data(), zeros.data());
    dev.synchronize();
    auto last = Clock::now();
    model.executor().observer = [&](const char*, int) {
      dev.synchronize();
      auto now = Clock::now();
      double seconds = std::chrono::duration<double>(now - last).count();
      total += seconds;
      if (model.executor().recomputing) recomputed += seconds;
      last = now;
    };
    model.start_step();
    total = 0;
    model.micro_step();
    model.executor().observer = nullptr;
  }
  return recomputed / (total - recomputed);
}
