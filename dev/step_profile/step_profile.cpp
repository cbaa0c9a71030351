// Where the time of a training step goes: every op of the model between two events, summed by name, beside its floor (its
// operations at the rate of a large matrix product, or its bytes at the rate of a copy).
//
// The ops are launched one by one here, so that there is something to put events between. The last line compares with the
// step as training runs it, replayed from CUDA graphs; what the ops' sum has on top is the events' and the gaps'.
//
//   build/step_profile [--preset gpt124-8x2] [--batch-size 32] [--seq-len 1024] [--recompute act] [--quick]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

#include "dev/bench.h"
#include "moe/model.h"

namespace {
using namespace bench;
using Device = Gpu<bf16>;

// What one call of each op has to do. Ops that are not listed are too small to have a floor worth naming.
std::map<std::string, Work> work_of_ops(const ModelConfig& c, int64_t B, int64_t T, const Plan& plan) {
  constexpr double size = sizeof(bf16);
  double N = double(B * T), C = double(c.d_model), K = double(c.top_k), R = N * K, F = double(c.d_expert);
  double qkv = double(c.heads().qkv_width()), q = double(c.heads().q_width()), qk = double(c.heads().qk_width());
  double row = N * C * size, mlp = double(c.d_shared ? c.d_shared : c.d_dense);
  auto flops = [](double n) { return Work{n, 0}; };
  auto bytes = [](double n) { return Work{0, n}; };
  auto all = [&](Category category) { return double(plan.category_bytes(category)); };

  std::map<std::string, Work> work{
      {"embedding", bytes(2 * row)},
      {"norm 1", bytes(2 * row)},
      {"norm 2", bytes(4 * row)},
      {"final norm", bytes(2 * row)},
      {"norm 1 again", bytes(2 * row)},
      {"norm 1 backward", bytes(4 * row)},
      {"norm 2 backward", bytes(4 * row)},
      {"final norm backward", bytes(3 * row)},
      {"embedding backward", bytes(row)},
      {"qk-norm, rope", bytes(2 * N * qk * size)},
      {"qk-norm, rope backward", bytes((c.qk_norm ? 3 : 2) * N * qk * size)},
      {"router", bytes(row)},
      {"router backward", bytes(2 * row)},
      {"routing plan", bytes(3 * R * sizeof(int32_t))},
      {"gather x", bytes(2 * R * C * size)},
      {"gather dout", bytes(2 * R * C * size)},
      {"combine", bytes((K + 2) * row)},
      {"combine backward", bytes((K + 2) * row)},
      {"mlp swiglu", bytes(3 * N * mlp * size)},
      {"mlp swiglu backward", bytes(5 * N * mlp * size)},
      {"mlp add", bytes(3 * row)},
      {"shared expert add", bytes(3 * row)},
      {"shared expert dX add", bytes(3 * row)},
      {"global norm", bytes(all(Category::gradients))},
      {"adamw", bytes(2 * all(Category::optimizer) + all(Category::weights) + all(Category::gradients))},
      {"classifier", flops(6 * N * C * double(c.padded_vocab()))},
  };
  double attention = 2 * double(B * c.n_head) * double(T) * double(T) * double(c.head_dim);
  work["attention"] = flops(attention), work["attention backward"] = flops(2.5 * attention);
  for (const char* pass : {"", " dW", " dX"}) {
    work[std::string("qkv") + pass] = flops(2 * N * C * qkv);
    work[std::string("attention out") + pass] = flops(2 * N * q * C);
    work[std::string("mlp up") + pass] = flops(4 * N * C * mlp);
    work[std::string("mlp down") + pass] = flops(2 * N * C * mlp);
  }
  for (const char* name : {"experts up", "experts dW13", "experts dX"}) work[name] = flops(4 * R * C * F);
  for (const char* name : {"experts down", "experts down backward", "experts dW2"}) work[name] = flops(2 * R * C * F);
  return work;
}

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
    EventLog log(lab_.dev);
    for (int i = 0; i < 3; ++i) step();  // captures, warms up
    for (int i = 0; i < runs; ++i) log.mark(), step(), log.mark();
    std::vector<double> ms;
    for (int i = 0; i < runs; ++i) ms.push_back(log.ms(size_t(2 * i), size_t(2 * i + 1)));
    return percentiles(ms);
  }

  struct Op {
    int64_t calls = 0;       // in a step
    std::vector<double> ms;  // of all calls of a step, by step
  };
  std::map<std::string, Op> by_op(int runs) {
    EventLog log(lab_.dev);
    std::vector<std::string> names;
    model_.executor().observer = [&](const char* op, int) { names.push_back(op), log.mark(); };
    std::map<std::string, Op> ops;
    for (int i = -1; i < runs; ++i) {  // the first is not counted
      names.clear(), log.clear(), log.mark();
      step();
      std::map<std::string, std::pair<int64_t, double>> sums;
      for (size_t at = 0; at < names.size(); ++at)
        ++sums[names[at]].first, sums[names[at]].second += log.ms(at, at + 1);
      for (auto& [name, sum] : sums)
        if (i >= 0) ops[name].calls = sum.first, ops[name].ms.push_back(sum.second);
    }
    model_.executor().observer = nullptr;
    return ops;
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
  lab.copy_bandwidth(), lab.matmul_rate();
  int runs = lab.options.quick ? 5 : 20;

  Profile profile(lab, config, run);
  Timing whole = profile.whole(runs);
  auto ops = profile.by_op(runs);
  auto work = work_of_ops(config, run.B, run.T, profile.model().plan);

  struct Row {
    std::string op;
    int64_t calls;
    double ms, floor;
  };
  std::vector<Row> rows;
  double total = 0, total_floor = 0;
  for (auto& [op, sums] : ops) {
    auto found = work.find(op);
    double floor = found == work.end() ? 0 : double(sums.calls) * lab.floor_ms(found->second);
    if (op == "zero gradients")
      floor = lab.floor_ms({0, double(profile.model().plan.category_bytes(Category::gradients))});
    rows.push_back({op, sums.calls, percentiles(sums.ms).median, floor});
    total += rows.back().ms, total_floor += floor;
  }
  std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.ms > b.ms; });

  std::printf("%s, %lld x %lld tokens, recompute %s\n", name.c_str(), (long long)run.B, (long long)run.T,
              lab.options.own.at("recompute").c_str());
  std::printf("  %-24s %6s %10s %7s %10s %9s\n", "op", "calls", "ms", "share", "floor ms", "floor/ms");
  for (const Row& r : rows) {
    std::printf("  %-24s %6lld %10.3f %6.1f%%", r.op.c_str(), (long long)r.calls, r.ms, 100 * r.ms / total);
    if (r.floor > 0)
      std::printf(" %10.3f %8.1f%%\n", r.floor, 100 * r.floor / r.ms);
    else
      std::printf(" %10s\n", "-");
    Record record;
    record.set("bench", lab.bench()).set("shape", name).set("impl", "ours").set("variant", r.op).set("ms", r.ms);
    if (r.floor > 0) record.set("floor_ms", r.floor).set("percent_of_ceiling", 100 * r.floor / r.ms);
    lab.write(std::move(record));
  }
  double tokens_per_s = double(run.B * run.T) / whole.median * 1e3;
  double peak = double(profile.model().arena().allocated_bytes()) / double(size_t(1) << 30);
  std::printf("  %-24s %6s %10.3f %6.1f%% %10.3f %8.1f%%\n", "sum of the ops", "", total, 100.0, total_floor,
              100 * total_floor / total);
  std::printf("  %-24s %6s %10.3f %7s %10s  (%.0f tokens/s, arena %.2f GiB)\n", "step from graphs", "", whole.median,
              "", "", tokens_per_s, peak);
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
