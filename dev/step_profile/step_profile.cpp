// Where the time of a training step goes: every op of the model between two events, summed by name, beside its floor (its
// operations at the rate of a large matrix product, or its bytes at the rate of a copy).
//
// The ops are launched one by one here, so that there is something to put events between. The last line compares with the
// step as training runs it, replayed from CUDA graphs; what the ops' sum has on top is the events' and the gaps'.
//
//   build/step_profile [--preset gpt124-8x2] [--batch-size 32] [--seq-len 1024] [--recompute act] [--quick]
#include <cmath>
#include <cstdio>

#include "dev/bench.h"
#include "moe/model.h"
#include "moe/step_profile.h"

namespace {
using namespace bench;
using Device = Gpu<bf16>;

Recompute parse_recompute(const std::string& name) {
  for (Recompute r : {Recompute::none, Recompute::act, Recompute::up, Recompute::block})
    if (name == name_of(r)) return r;
  fail("--recompute '", name, "' is not one of none, act, up, block");
}

class Profile {
 public:
  Profile(Lab& lab, const ModelConfig& config, const RunOptions& run) : lab_(lab), model_(lab.dev, config, run) {
    model_.allocate();
    model_.initialise(1);
    std::vector<int32_t> tokens(model_.N()), targets(model_.N());
    for (int64_t n = 0; n < model_.N(); ++n) {
      tokens[n] = int32_t(random_bits(1, 1, n) % uint64_t(config.vocab_size));
      targets[n] = int32_t(random_bits(1, 2, n) % uint64_t(config.vocab_size));
    }
    model_.set_batch(tokens.data(), targets.data());
  }

  void step() {
    StepParams p;
    p.step = ++steps_, p.learning_rate = 1e-4, p.loss_scale = 1.0 / double(model_.N());
    model_.set_params(p);
    model_.start_step(), model_.micro_step(), model_.update();
  }

  // Milliseconds of a whole step as training runs it.
  Timing whole(int runs) {
    GpuEvents log(lab_.dev);
    for (int i = 0; i < 3; ++i) step();  // captures, warms up
    for (int i = 0; i < runs; ++i) log.mark(), step(), log.mark();
    std::vector<double> ms;
    for (int i = 0; i < runs; ++i) ms.push_back(log.ms(size_t(2 * i), size_t(2 * i + 1)));
    return percentiles(ms);
  }

  std::vector<TimedStep> by_op(int runs) {
    OpTimer<Device> timer(lab_.dev, model_.executor());
    std::vector<TimedStep> steps;
    for (int i = -1; i < runs; ++i) {  // the first is not counted
      timer.start();
      step();
      if (TimedStep timed = timer.finish(); i >= 0) steps.push_back(std::move(timed));
    }
    return steps;
  }

  Model<Device>& model() { return model_; }

 private:
  Lab& lab_;
  Model<Device> model_;
  int64_t steps_ = 0;
};

int run(int argc, char** argv) {
  Lab lab("step_profile",
          parse_options(argc, argv,
                        {{"preset", "gpt124-8x2"}, {"batch-size", "32"}, {"seq-len", "1024"}, {"recompute", "act"}}));
  if (lab.options.check_only || lab.options.list) return lab.exit_code();  // it measures: test_gpt_moe checks
  const std::string& name = lab.options.own.at("preset");
  ModelConfig config = preset(name);
  RunOptions run;
  run.B = lab.options.number("batch-size"), run.T = lab.options.number("seq-len");
  run.evaluate = run.wide_gradients = false;
  run.recompute.assign(size_t(config.n_layer), parse_recompute(lab.options.own.at("recompute")));
  const Ceilings ceilings{lab.matmul_rate(), lab.copy_bandwidth()};
  int runs = lab.options.quick ? 5 : 20;

  Profile profile(lab, config, run);
  Timing whole = profile.whole(runs);
  const auto steps = profile.by_op(runs);
  const Plan& plan = profile.model().plan;
  const auto times = op_times(steps, plan, OpWorks(config, run, plan, sizeof(bf16)), ceilings);

  std::printf("%s, %lld x %lld tokens, recompute %s\n", name.c_str(), (long long)run.B, (long long)run.T,
              lab.options.own.at("recompute").c_str());
  for (const std::string& line : op_table(times)) std::printf("%s\n", line.c_str());
  double total_floor = 0;
  for (const OpTime& t : times) {
    total_floor += t.floor_ms;
    Record record;
    record.set("bench", lab.bench()).set("shape", name).set("impl", "ours").set("variant", t.op).set("ms", t.ms);
    if (t.floor_ms > 0) record.set("floor_ms", t.floor_ms).set("percent_of_ceiling", 100 * t.floor_ms / t.ms);
    lab.write(std::move(record));
  }
  double tokens_per_s = double(run.B * run.T) / whole.median * 1e3;
  double peak = double(profile.model().arena().allocated_bytes()) / double(size_t(1) << 30);
  std::printf("  %-38s %6s %10.3f  (%.0f tokens/s, arena %.2f GiB)\n", "step from graphs", "", whole.median,
              tokens_per_s, peak);
  Record record;
  record.set("bench", lab.bench()).set("shape", name).set("impl", "ours").set("variant", "total");
  record.set("ms", whole.median).set("p10_ms", whole.p10).set("p90_ms", whole.p90).set("floor_ms", total_floor);
  record.set("percent_of_ceiling", 100 * total_floor / whole.median).set("tokens_per_s", tokens_per_s);
  lab.write(std::move(record.set("peak_GiB", peak)));
  double loss = profile.model().read_stats().loss;
  if (!std::isfinite(loss) || profile.model().read_status().code != DeviceStatus::ok)
    lab.fail_with("step_profile: the loss is not finite, or an op reported a fault");
  return lab.exit_code();
}
}  // namespace

int main(int argc, char** argv) {
  return guarded("step_profile", [&] { return run(argc, argv); });
}
