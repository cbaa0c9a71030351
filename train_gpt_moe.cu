// Trains a GPT with mixture-of-experts layers, or generates text with one. Options, the training loop, nothing else.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <memory>

#include "llmc/console.h"
#include "llmc/dataloader.h"
#include "llmc/gpu.h"
#include "llmc/logger.h"
#include "llmc/peak.h"
#include "moe/evaluate.h"
#include "moe/experts_hopper_kernels.h"
#include "moe/generate.h"
#include "moe/memory_profile.h"
#include "moe/model_files.h"
#include "moe/report.h"
#include "moe/routing_file.h"
#include "moe/setup.h"
#include "moe/step_log.h"
#include "moe/step_profile.h"
#include "moe/use.h"

namespace {

volatile std::sig_atomic_t stop_requested = 0;

// ---- training ----

template <class Device>
class Trainer {
 public:
  Trainer(Device& dev, const Options& o, const RunOptions& run, const ModelFileInfo& info)
      : o_(o),
        dev_(dev),
        model_(dev, o.model, run),
        info_(info),
        console_(STDOUT_FILENO, isatty(STDOUT_FILENO) && o.world == 1) {}
  const Parallel& parallel() const { return model_.parallel; }

  // Everything that can be refused is, before anything is written. known_tokenizer: info has that of an existing model.
  void open_data(bool known_tokenizer) {
    if (o_.train_data.empty()) fail("--train-data is needed: token shards (see data/)");
    train_ = std::make_unique<DataLoader>(TokenShards(o_.train_data, int(o_.model.vocab_size)), int(o_.seq_len),
                                          o_.seed, true);
    if (train_->windows() == 0)
      fail(o_.train_data, ": no shard holds the ", o_.seq_len + 1, " tokens of one sample; use a smaller --seq-len");
    if (!o_.val_data.empty()) {
      val_ = std::make_unique<DataLoader>(TokenShards(o_.val_data, int(o_.model.vocab_size)), int(o_.seq_len), o_.seed,
                                          false);
      if (val_->shards().tokenizer_id() != train_->shards().tokenizer_id())
        fail(o_.val_data, ": made with another tokenizer than ", o_.train_data);
      if (val_->eval_windows() == 0) fail(o_.val_data, ": holds no token to predict");
      if (auto known = tokenizer_of(val_->shards(), o_.model.vocab_size, o_.tokenizer_ranks))
        val_bytes_ = target_bytes(val_->shards(), *known);
    }
    int shards = train_->shards().tokenizer_id();  // 0: GPT-2, or not known
    check_tokenizer(o_.train_data, shards, known_tokenizer ? info_.tokenizer_id : -1);
    if (!known_tokenizer) info_.tokenizer_id = shards;
    const bool other = !known_tokenizer && shards == Tokenizer::kBytes;  // than that of the model we start from, if any
    if (other) info_.tokenizer_files.clear(), info_.token_ids.clear();
    if (info_.tokenizer_files.empty())
      if (auto known = tokenizer_of(train_->shards(), o_.model.vocab_size, o_.tokenizer_ranks))
        info_.tokenizer_files = make_tokenizer_files(*known);
    if (!o_.hellaswag.empty()) {
      questions_ = std::make_unique<MultipleChoice>(o_.hellaswag, int(o_.model.vocab_size));
      check_questions(*questions_, info_.tokenizer_id, o_.seq_len);
    }
    info_.seq_len = o_.seq_len;
    samples_per_step_ = o_.total_batch_tokens / o_.seq_len;
    total_steps_ = o_.steps;
    if (total_steps_ == 0)
      total_steps_ = std::max<int64_t>(1, int64_t(o_.epochs * double(train_->windows()) / double(samples_per_step_)));
    schedule_ = o_.schedule;
    schedule_.total_steps = total_steps_;
    schedule_.warmup_steps = std::min(schedule_.warmup_steps, total_steps_ / 2);
    check_schedule(schedule_);
    if (o_.sample_every) {
      tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::for_id(info_.tokenizer_id, o_.tokenizer_ranks));
      prompt_ = encode_prompt(*tokenizer_, o_.prompt, o_.model.vocab_size);
    }
    if (!o_.resume && exists_any(o_.out))
      fail("--out ", o_.out, " already holds a run; --resume goes on with it, another --out starts a new one");
    std::error_code no_file;
    if (!o_.resume && std::filesystem::file_size(o_.out + "/log.jsonl", no_file) > 0 && !no_file)
      fail("--out ", o_.out, " holds the log of a run that has no checkpoint; remove it or choose another --out");
    int moe_layers = 0;
    for (int64_t l = 0; l < o_.model.n_layer; ++l) moe_layers += !o_.model.is_dense(l);
    routing_shape_ = {int32_t(o_.model.n_expert), int32_t(o_.model.top_k), int32_t(model_.N()), moe_layers};
    if (!o_.replay_routing.empty()) {
      replay_ = std::make_unique<RoutingReader>(o_.replay_routing, routing_shape_);
      if (replay_->micro_steps() / (o_.micro_steps() * o_.layout.dp) < last_step())
        fail("--replay-routing ", o_.replay_routing, ": holds ", replay_->micro_steps(), " micro-steps; ", last_step(),
             " steps of ", o_.micro_steps() * o_.layout.dp, " are to be run");
    }
    if (!o_.record_routing.empty()) check_record_path();
  }

  // source: the directory that weights come from; empty: none.
  void start(const std::string& source, const std::string& model_type) {
    if (!source.empty()) check_weights(model_, source, model_type);
    if (!parallel().alone()) parallel().host.barrier("start");  // nobody looks at --out any more
    size_t free_before = device_free_bytes(dev_);
    model_.allocate();
    print_device_memory(dev_, free_before, model_.arena().allocated_bytes());
    if (o_.resume) {
      const std::string& dir = source;
      require_complete(dir);
      TrainerState s = read_trainer_state(dir);
      if (s.seed != o_.seed)
        fail("--seed ", o_.seed, " differs from the run's ", s.seed, " (", dir,
             "/trainer.json); the order of samples would change");
      if (s.seq_len != o_.seq_len)
        fail("--seq-len ", o_.seq_len, " differs from the run's ", s.seq_len, "; the order of samples would change");
      if (s.total_steps != total_steps_)
        console_.line("note: the schedule had %lld steps, now %lld", (long long)s.total_steps, (long long)total_steps_);
      if (s.total_batch_tokens != o_.total_batch_tokens)
        console_.line("note: a step had %lld tokens, now %lld", (long long)s.total_batch_tokens,
                      (long long)o_.total_batch_tokens);
      if (s.dtype != model_files::torch_dtype<Device>())
        console_.line("note: the run was in %s, now %s", s.dtype.c_str(), model_files::torch_dtype<Device>());
      load_weights(model_, dir, model_type);
      load_optimizer(model_, dir);
      step_ = s.step, next_sample_ = s.next_sample;
      console_.line("resumed from %s", dir.c_str());
    } else if (!o_.init_from.empty()) {
      load_weights(model_, source, model_type);
    } else {
      model_.initialise(o_.seed);
    }
    if (o_.profile) {
      profiler_ = std::make_unique<StepProfiler<Device>>(dev_, model_.executor(), step_);
      if (last_step() < profiler_->first())
        fail("--profile times steps from the ", profiler_->warm_up + 1, "th on; ",
             std::max<int64_t>(0, last_step() - step_), " are to be run");
      if (std::filesystem::exists(profile_path())) Trace::check(profile_path());
    }
    peak_ = peak_flops(dev_);
    memory_bytes_ = int64_t(model_.arena().allocated_bytes());
    if (!parallel().alone()) {
      memory_bytes_ = parallel().host.max(memory_bytes_, "memory");
      agree();
    }
    if (parallel().lead()) {
      if (!o_.tensorboard.empty()) events_ = EventWriter(o_.tensorboard, step_ + 1);
      log_ = Logger(o_.out, o_.resume);
      write_memory_record(dev_, model_, o_.out + "/memory.json");
    }
    if (!o_.record_routing.empty()) record_ = std::make_unique<RoutingWriter>(o_.record_routing, routing_shape_);
    if (o_.resume) log_.truncate_after(step_);
    console_.line(
        "%lld parameters (%lld active) | %lld training windows of %lld tokens | %lld steps of %lld tokens | %s "
        "allocated | matmul peak %.0f GFLOP/s",
        (long long)o_.model.parameters(), (long long)o_.model.active_parameters(), (long long)train_->windows(),
        (long long)o_.seq_len, (long long)total_steps_, (long long)o_.total_batch_tokens,
        readable_bytes(double(model_.arena().allocated_bytes())).c_str(), peak_ * 1e-9);
    const double predicted = o_.recompute == "auto" ? recomputed_share(dev_, o_.model, model_.options) : 0;
    if (predicted > 0) {
      const double measured = watched("a trial step", [&] { return measured_recompute_share(dev_, model_); });
      console_.line("recomputation: %.1f %% more operations predicted, %.1f %% more time measured", 100 * predicted,
                    100 * measured);
    }
  }

  void train() {
    int64_t end = last_step();
    if (step_ >= end) {
      console_.line("nothing to do: %lld steps of %lld are done", (long long)step_, (long long)end);
      return;
    }
    int64_t saved = o_.resume ? step_ : -1;
    while (step_ < end && !stop()) {
      one_step();
      bool last = step_ == end;
      auto every = [&](int64_t n) { return n && step_ % n == 0; };
      const bool stopped = stop();
      if (last || stopped || every(o_.eval_every) || every(o_.sample_every) || every(o_.checkpoint_every)) report_all();
      if (!stopped && (last || every(o_.eval_every))) evaluate();
      if (o_.sample_every && !stopped && (last || every(o_.sample_every))) sample();
      if (every(o_.checkpoint_every)) save(), saved = step_;
    }
    report_all();
    if (profiler_) report_profile();
    if (saved != step_) save();
    if (record_) record_->close();
    if (stop() && step_ < end) console_.line("stopped by a signal after step %lld; --resume goes on", (long long)step_);
  }

 private:
  using Clock = std::chrono::steady_clock;

  // f(), in which this rank's GPU may wait for another rank's: too long ends the job.
  template <class F>
  auto watched(const char* what, F f) {
    if (parallel().alone()) return f();
    auto watch = parallel().world->watch(what);
    return f();
  }

  // Has a rank been asked to stop? All of them do then, after the same step.
  bool stop() const {
    const int32_t here = stop_requested;
    return parallel().alone() ? here : parallel().host.max(here, "stop requests");
  }

  int64_t last_step() const { return o_.stop_after ? std::min(o_.stop_after, total_steps_) : total_steps_; }

  // The record is created after --out, which may be to hold it.
  void check_record_path() const {
    namespace fs = std::filesystem;
    std::error_code error;
    fs::path path = fs::absolute(o_.record_routing).lexically_normal(),
             out = (fs::absolute(o_.out) / "").lexically_normal();
    if (routing_shape_.layers == 0) fail("--record-routing ", o_.record_routing, ": this model has no MoE layer");
    if (fs::is_directory(path, error)) fail("--record-routing ", o_.record_routing, ": is a directory");
    if (path.parent_path() / "" != out && access(path.parent_path().c_str(), W_OK | X_OK) != 0)
      fail("--record-routing ", o_.record_routing, ": ", errno_text());
  }

  // Ranks that were started with different options, or read different files, would train something that nobody asked for.
  void agree() {
    std::string all = o_.command_line + hf_config(o_.model, info_).dump();
    for (int64_t n : {step_, next_sample_, total_steps_, train_->windows(), val_ ? val_->eval_windows() : 0})
      all += ' ' + std::to_string(n);
    for (const auto& places : model_.options.places)
      for (int32_t place : places) all += ' ' + std::to_string(place);
    const uint64_t mine = hash_name(all);
    std::vector<uint64_t> hashes(o_.world);
    parallel().host.gather_host(hashes.data(), &mine, sizeof mine, "gather", "what ranks start from");
    for (int r = 1; r < o_.world; ++r)
      if (hashes[r] != hashes[0])
        fail("rank ", r, " starts from something else than rank 0: other options, another checkpoint or other data");
  }

  std::string profile_path() const { return o_.out + "/profile.json"; }

  // What --profile has found: a stop signal may have come before the first step that it times.
  void report_profile() {
    const auto profiler = std::move(profiler_);
    const auto& steps = profiler->steps();
    if (steps.empty()) return console_.line("profile: stopped before the first step to be timed");
    if (!parallel().lead()) return;
    const Ceilings ceilings{peak_, copy_bandwidth(dev_)};
    const OpWorks works(model_.config, model_.options, model_.plan, sizeof(typename Device::Real));
    const auto times = op_times(steps, model_.plan, works, ceilings);
    console_.line("profile: steps %lld to %lld, op by op, medians | ceilings: matmul %.1f GFLOP/s, copy %.1f GB/s",
                  (long long)profiler->first(), (long long)profiler->first() + (long long)steps.size() - 1,
                  1e-9 * ceilings.flops_per_s, 1e-9 * ceilings.bytes_per_s);
    for (const std::string& line : op_table(times)) console_.line("%s", line.c_str());
    console_.line("  %-38s %6s %10.3f", "the step before, as training runs", "", plain_ms_);
    try {
      write_profile(profile_path(), steps, profiler->first(), model_.plan, works, ceilings, times,
                    "rank 0 of " + std::to_string(o_.world) + ", " + Device::name + " " + o_.dtype);
      console_.line("wrote %s", profile_path().c_str());
    } catch (const Error& e) {  // a full disk: no reason to end the run here
      console_.line("no profile is written: %s", e.what());
    }
  }

  // Puts a step on the device, and reports the one before it: the device always has the next step to go on with.
  void one_step() {
    const bool profiled = profiler_ && profiler_->due(step_ + 1);
    if (profiled) report_all();
    StepParams p;
    p.step = step_ + 1;
    p.learning_rate = learning_rate(schedule_, step_);
    p.loss_scale = 1.0 / double(o_.total_batch_tokens);
    p.micro_step_scale = 1.0 / double(o_.micro_steps() * o_.layout.stage_ranks());
    if (pending_.empty()) step_began_ = Clock::now();
    if (profiled) profiler_->begin();
    auto note = [&](const char* what) {
      if (profiled) profiler_->note(what);
    };
    watched("the start of a step", [&] { model_.set_params(p), model_.start_step(); });
    std::vector<int32_t> tokens(model_.N()), targets(model_.N());
    const int64_t all = step_ * o_.micro_steps() * o_.layout.dp;  // micro-batches taken before
    // Of the micro-batches that all ranks take in this step, those of this rank.
    auto micro = [&](int64_t i) { return i * o_.layout.dp + parallel().here.dp; };
    auto begin = [&](int64_t i) {
      for (int64_t b = 0; b < o_.batch_size; ++b) {
        int64_t sample = (o_.overfit_one_batch ? 0 : next_sample_) + micro(i) * o_.batch_size + b;
        train_->sample(sample, &tokens[b * o_.seq_len], &targets[b * o_.seq_len]);
      }
      model_.set_batch(tokens.data(), targets.data(), model_.stage.slot(i));
      routing(all + micro(i), true, model_.stage.slot(i));
      note("batch");
    };
    auto guarded = [&](auto f) { watched("a micro-step", f); };
    if (!model_.stage.alone()) run_pipeline(model_, begin, guarded, [&] { note("pass activations"); });
    for (int64_t i = 0; i < (model_.stage.alone() ? o_.micro_steps() : 0); ++i)
      guarded([&] {
        begin(i);
        model_.micro_step(i + 1 == o_.micro_steps());
        routing(all + micro(i), false, 0);
      });
    watched("an update", [&] {
      model_.update();
      if (profiled) profiler_->end();
    });
    ++step_;
    next_sample_ += samples_per_step_;
    pending_.push_back({step_, p.learning_rate, model_.fetch_results(), Clock::now()});
    while (pending_.size() > 1) report_step();
    if (profiled && profiler_->done()) report_all(), report_profile();
  }

  // Waits for the oldest step that has not been reported.
  void report_step() {
    auto pending = std::move(pending_.front());
    pending_.pop_front();
    auto results = watched("step", pending.results);
    check_status(pending.step, results.status);
    StepReport r;
    r.step = pending.step, r.total_steps = total_steps_, r.learning_rate = pending.learning_rate;
    r.stats = results.stats;
    const auto now = Clock::now(), ended = Device::has_graphs ? now : pending.put;
    r.milliseconds = std::chrono::duration<double, std::milli>(ended - step_began_).count();
    step_began_ = ended;
    if (profiler_ && r.step < profiler_->first()) plain_ms_ = r.milliseconds;
    r.tokens_per_s = double(o_.total_batch_tokens) / r.milliseconds * 1e3;
    r.mfu = r.tokens_per_s * training_flops_per_token(o_.model, o_.seq_len) / (peak_ * o_.world);
    r.memory_bytes = size_t(memory_bytes_);
    r.expert_load = std::move(results.load);
    r.skipped = skip_reason(r.stats);
    log_.train(r.step, r.stats.loss, r.learning_rate, r.stats.grad_norm);
    log_.record(step_record(r));
    if (events_.active()) events_.write(r.step, step_event(r));
    // A terminal may be slower than steps are.
    const bool due =
        console_.terminal() ? now - shown_ > std::chrono::milliseconds(100) : r.step == 1 || r.step % 10 == 0;
    if (due || r.step == last_step() || !r.skipped.empty()) {
      shown_ = now;
      console_.progress(step_line(r, console_.terminal() ? last_step() : 0));
    }
  }
  void report_all() {
    while (!pending_.empty()) report_step();
  }

  // Hands the recorded choices of a micro-step to the model before it, or takes them from it afterwards.
  void routing(int64_t micro_step, bool before, int slot) {
    if (before ? !replay_ : !record_) return;
    int64_t moe_layer = 0;
    for (int64_t l = 0; l < o_.model.n_layer; ++l) {
      if (o_.model.is_dense(l)) continue;
      if (before && model_.stage.has(l))
        model_.set_replay(l, replay_->read(micro_step, moe_layer).data(), slot);
      else if (!before)
        record_->append(model_.read_routing(l));
      ++moe_layer;
    }
  }

  std::string skip_reason(const StepStats& s) {
    if (s.bad_tensor != -2) bad_weight_.clear();
    if (s.bad_tensor == -2) {
      if (bad_weight_.empty()) bad_weight_ = find_bad_weight();
      return "the loss is not finite (" + bad_weight_ + ")";
    }
    if (s.bad_tensor >= 0) return "the gradient of " + model_.table.parameters()[s.bad_tensor].name + " is not finite";
    if (s.skip) return "outlier (loss z " + format_number(s.loss_z) + ", norm z " + format_number(s.norm_z) + ")";
    return "";
  }

  // Where a loss that is not finite may come from.
  std::string find_bad_weight() {
    std::string bad;
    for (const Parameter& p : model_.table.parameters())  // all of them: ranks read together
      for (auto value : model_.read_parameter(p))
        if (!std::isfinite(value) && bad.empty()) bad = "nor is the weight " + p.name;
    return bad.empty() ? "all weights are" : bad;
  }

  void check_status(int64_t step, const DeviceStatus& s) {
    if (s.code == DeviceStatus::ok) return;
    if (s.code == DeviceStatus::peer_late)  // without cleaning up, which would wait for that rank again
      parallel().world->abort("train_gpt_moe: step " + std::to_string(step) + ": waited " + std::to_string(s.token) +
                              " s on the GPU for rank " + std::to_string(s.value) + " in layer " +
                              std::to_string(s.layer) + ": is it gone? (--comm-timeout)");
    fail("step ", step, ": ", s.code == DeviceStatus::token_out_of_range ? "token id " : "expert index ", s.value,
         " is out of range", s.layer >= 0 ? " in layer " + std::to_string(s.layer) : std::string(), " at token ",
         s.token, " of the micro-batch");
  }

  void evaluate() {
    auto begin = Clock::now();
    auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
    auto asked_to_stop = [&] { return bool(stop()); };
    auto watch = [&](const char* what, auto f) { watched(what, f); };
    if (val_) {
      auto loss = validation_loss(model_, *val_, asked_to_stop, watch);
      if (!loss) return;
      check_status(step_, model_.read_status());
      const int64_t targets = val_->eval_targets();
      log_.validation(step_, *loss);
      nlohmann::ordered_json record{{"step", step_}, {"val_loss", *loss}};
      char bits[40] = "";
      if (val_bytes_) {
        const double value = bits_per_byte(*loss, targets, val_bytes_);
        record["val_bits_per_byte"] = value;
        std::snprintf(bits, sizeof bits, " | %.4f bits a byte", value);
      }
      log_.record(record);
      events_.write(step_, EventSummary().scalar("val_loss", *loss));
      console_.line("step %5lld/%lld | val_loss %.9g over %lld tokens in %.1f s%s", (long long)step_,
                    (long long)total_steps_, *loss, (long long)targets, seconds(), bits);
    }
    if (!questions_) return;
    begin = Clock::now();
    auto correct = correct_answers(model_, *questions_, asked_to_stop, watch);
    if (!correct) return;
    check_status(step_, model_.read_status());
    const double accuracy = double(*correct) / double(questions_->examples());
    log_.eval(step_, accuracy);
    log_.record({{"step", step_}, {"hellaswag", accuracy}});
    events_.write(step_, EventSummary().scalar("hellaswag", accuracy));
    console_.line("step %5lld/%lld | HellaSwag %lld/%lld = %.4f in %.1f s", (long long)step_, (long long)total_steps_,
                  (long long)*correct, (long long)questions_->examples(), accuracy, seconds());
  }

  void sample() {
    std::vector<int32_t> ids;
    try {
      generate(model_, prompt_, tokenizer_->eot(), o_.max_new_tokens, o_.sampler, o_.seed, [&](int32_t id) {
        ids.push_back(id);
        return id < tokenizer_->eot();
      });
    } catch (const Error& e) {  // logits that are not finite: no reason to end the run here
      console_.line("no sample at step %lld: %s", (long long)step_, e.what());
      return;
    }
    if (!ids.empty() && ids.back() >= tokenizer_->eot()) ids.pop_back();
    console_.line("--- sample at step %lld\n%s%s\n---", (long long)step_, o_.prompt.c_str(),
                  tokenizer_->decode(ids).c_str());
  }

  void save() {
    TrainerState s{step_, next_sample_, o_.seed, total_steps_, o_.total_batch_tokens, o_.seq_len};
    std::string dir = save_checkpoint(model_, o_.out, s, info_, o_.keep);
    console_.line("saved %s", dir.c_str());
  }

  const Options& o_;
  Device& dev_;
  Model<Device> model_;
  ModelFileInfo info_;
  Console console_;
  std::unique_ptr<DataLoader> train_, val_;
  std::unique_ptr<MultipleChoice> questions_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<int32_t> prompt_;
  RoutingFileShape routing_shape_{};
  std::string bad_weight_;
  std::unique_ptr<RoutingReader> replay_;
  std::unique_ptr<RoutingWriter> record_;
  Logger log_;
  EventWriter events_;
  Schedule schedule_;
  int64_t total_steps_ = 0, samples_per_step_ = 0, step_ = 0, next_sample_ = 0;
  struct Pending {
    int64_t step;
    double learning_rate;
    std::function<typename Model<Device>::StepResults()> results;
    Clock::time_point put;  // on the device, which without graphs means done
  };
  std::deque<Pending> pending_;
  Clock::time_point step_began_, shown_;
  double peak_ = 1;
  std::unique_ptr<StepProfiler<Device>> profiler_;  // until it has reported
  double plain_ms_ = 0;                             // of the step before the first that it times
  int64_t val_bytes_ = 0;                           // of text in the validation data; 0: not known
  int64_t memory_bytes_ = 0;                        // of the rank that has most
};

// ---- what to do ----

template <class Device>
void train_main(Options o, Device& dev, World& world) {
  if (!o.init_from.empty()) o.init_from = checkpoint_directory("--init-from", o.init_from);
  std::string source = o.resume ? find_latest(o.out) : o.init_from, model_type;
  ModelFileInfo info;
  if (!source.empty()) o.model = model_of(source, o, info, model_type);
  check_processes(o);
  check_limits<Device>(o.model, o.batch_size, o.seq_len);
  RunOptions run = run_options(o);
  if (o.world > 1 && o.dry_run) {
    std::fputs(describe(o.layout, o.model).c_str(), stdout);
    choose_stage(dev, o, run);
  } else {
    run.parallel = open_parallel(world, dev, o.layout);
    choose_transport(dev, o, run);
    choose_policies(dev, o, run);
  }
  print_policies(dev, o, run);
  if (o.memory_report || o.dry_run) print_report(dev, o, run);
  if (!o.memory_profile.empty() && world.rank() == 0) {
    std::fputs(memory_profile(dev, o.model, run, o.memory_profile).c_str(), stdout);
    std::printf("wrote %s (open it in ui.perfetto.dev or chrome://tracing)\n", o.memory_profile.c_str());
    std::fflush(stdout);
  }
  if (o.dry_run) return;
  check_memory(dev, o, run);
  Trainer<Device> trainer(dev, o, run, info);
  trainer.open_data(info.own);
  trainer.start(source, model_type);
  trainer.train();
}

template <class Device>
void run(const Options& o, Device&& dev, World& world) {
  dev.plain_matmul = o.plain_matmul;
  auto stop = [] { return bool(stop_requested); };
  if (o.generate)
    generate_main(o, dev, stop);
  else if (!o.export_format.empty())
    export_main(o, dev);
  else if (o.use())
    evaluate_main(o, dev, stop);
  else
    train_main(o, dev, world);
}

void run_on_gpu(const Options& o, World& world) {
#ifdef GPT_MOE_CUDA
  auto with = [&]<class Device>(Device&& dev) {
    dev.portable = o.experts == "portable";
    if (o.experts == "hopper" && !dev.gpu_name.empty()) hopper::require(dev, o.model.experts(1));
    run(o, std::forward<Device>(dev), world);
  };
  bool planning = o.dry_run && !gpu_problem().empty();  // a plan alone needs no GPU
  if (o.dtype == "fp32")
    with(Gpu<float>(planning, world.local_rank()));
  else
    with(Gpu<bf16>(planning, world.local_rank()));
#else
  (void)o, (void)world;  // parse_options refuses --device cuda
#endif
}

}  // namespace

// One line, whatever a file's name or content put into it.
std::string one_line(std::string text) {
  for (char& c : text)
    if ((c >= 0 && c < ' ') || c == 127) c = '?';
  return "train_gpt_moe: " + text;
}

// The value of --comm-timeout before anything else is parsed: the processes meet first. Nonsense is refused later.
double comm_timeout_of(int argc, char** argv) {
  const std::string option = "--comm-timeout";
  for (int i = 1; i < argc; ++i) {
    const std::string text = argv[i];
    const char* value = text == option && i + 1 < argc   ? argv[i + 1]
                        : text.starts_with(option + "=") ? argv[i] + option.size() + 1
                                                         : nullptr;
    if (const double seconds = value ? std::atof(value) : 0; seconds > 0) return seconds;
  }
  return Options().comm_timeout;
}

int main(int argc, char** argv) {
  std::unique_ptr<World> world;
  auto end = [&](const std::string& line) {
    if (world && world->size() > 1) world->abort(line);  // every rank ends
    std::fprintf(stderr, "%s\n", line.c_str());
    return 1;
  };
  try {
    world = std::make_unique<World>(comm_timeout_of(argc, argv));
    if (world->rank() > 0 && !std::freopen("/dev/null", "w", stdout)) fail("/dev/null: ", errno_text());
    Options o = parse_options(argc, argv, world->size());
    world->set_timeout(o.comm_timeout);
    o.local_ranks = world->local_size();
    for (int i = 1; i < argc; ++i) o.command_line += std::string(argv[i]) + '\n';
    for (int signal : {SIGINT, SIGTERM, SIGUSR1}) std::signal(signal, [](int) { stop_requested = 1; });
    if (o.device == "cuda")
      run_on_gpu(o, *world);
    else if (o.dtype == "fp32")
      run(o, Cpu<float>(), *world);
    else if (o.dtype == "bf16")
      run(o, Cpu<bf16>(), *world);
    else
      run(o, Cpu<double>(), *world);
    return 0;
  } catch (const HelpShown&) { return 0; } catch (const std::bad_alloc&) {
    return end("train_gpt_moe: out of memory; --memory-report --dry-run shows what a run needs");
  } catch (const std::exception& e) { return end(one_line(e.what())); }
}
