// The whole model: against the reference state, against finite differences, and against itself across recompute
// policies, dispatch, arenas, threads, micro-batches and number types. Run from the top of the repository.
#include <omp.h>

#include <tuple>

#include "dev/test/model_test.h"

// Skips a test whose device is not there, and says why.
#define NEEDS_DEVICE(Device) \
  if (std::string problem = device_problem<Device>(); !problem.empty()) GTEST_SKIP() << "no GPU: " << problem

namespace {

template <class T>
class OnDevice : public testing::Test {
 protected:
  void SetUp() override { NEEDS_DEVICE(T); }
};
#ifdef GPT_MOE_CUDA
using Devices = testing::Types<Cpu<float>, Cpu<bf16>, Gpu<float>, Gpu<bf16>>;
#else
using Devices = testing::Types<Cpu<float>, Cpu<bf16>>;
#endif

// A model with everything that can be switched on without contradiction: a dense layer, a shared expert, QK-norm.
ModelConfig small_model() {
  ModelConfig c;
  c.n_layer = 3, c.d_model = 32, c.n_head = 2, c.n_kv_head = 1, c.head_dim = 16, c.vocab_size = 70;
  c.n_expert = 4, c.top_k = 2, c.d_expert = 16, c.d_shared = 24, c.dense_layers = {1}, c.d_dense = 40;
  c.aux_coef = 0.1, c.z_coef = 0.01;
  return c;
}
ModelConfig small_sigmoid_model() {
  ModelConfig c = small_model();
  c.gate = Gate::sigmoid, c.route_scale = 1.5, c.norm_topk_prob = false;
  c.balance = Balance::bias, c.bias_rate = 0.01, c.capacity_factor = 0.9;
  c.tied = c.qk_norm = false;
  return c;
}
RunOptions small_run(int64_t B = 2, int64_t T = 12, int64_t micro_steps = 1) {
  RunOptions o;
  o.B = B, o.T = T, o.micro_steps = micro_steps;
  return o;
}
Batch small_batch(const RunOptions& o) { return random_batch(o.B * o.T * o.micro_steps, small_model().vocab_size); }

// ---- the reference state ----

const char* const reference_configs[] = {"softmax_renorm", "softmax_raw", "sigmoid_bias", "sigmoid_aux",
                                         "capacity",       "all_experts", "accumulate",   "dense_first"};

TEST(Reference, EveryConfigurationIsTested) {
  std::vector<std::string> names;
  for (const ReferenceConfig& c : Reference::get().configs()) names.push_back(c.name);
  EXPECT_EQ(names, std::vector<std::string>(std::begin(reference_configs), std::end(reference_configs)));
}

class ReferenceState : public testing::TestWithParam<const char*> {
 protected:
  template <class Device>
  void check(double bound) {
    const Reference& r = Reference::get();
    const ReferenceConfig& c = r.config(GetParam());
    RunOptions options = c.run;
    options.record_routing = true;
    TestModel<Device> m(c.model, options);
    m.load(c);
    Batch batch = r.batch(c.name);
    Comparison compare(bound);
    auto want = [&](const std::string& key) { return r.read(c.name + "." + key); };

    compare("logits", m.logits(batch), want("logits"));
    compare("evaluated loss", m.evaluate(batch), want("loss")[0]);

    StepStats stats = m.gradients(batch, c.learning_rate);
    compare("loss", stats.loss, want("loss")[0]);
    compare("aux_loss", stats.aux_loss, want("aux_loss")[0]);
    compare("z_loss", stats.z_loss, want("z_loss")[0]);
    for (const Parameter& p : m.parameters())
      compare("grad." + p.name, m.read(p, TestModel<Device>::State::grad), want("grad." + p.name));
    for (int64_t l = 0; l < c.model.n_layer; ++l) {
      if (c.model.is_dense(l)) continue;
      std::string key = c.name + ".top_k_index." + std::to_string(l);
      EXPECT_EQ(m.routing[l], r.read<int32_t>(key)) << key;
    }
    compare("grad_norm", m.update().grad_norm, want("grad_norm")[0]);

    std::vector<double> losses = {stats.loss};
    while (int(losses.size()) < c.steps) losses.push_back(m.step(batch, c.learning_rate).loss);
    compare("adamw_losses", losses, want("adamw_losses"));
    if (c.model.balance == Balance::bias)
      for (int64_t l = 0; l < c.model.n_layer; ++l)
        if (m.model.has_bias(l)) compare("adamw_bias", m.model.read_bias(l), want("adamw_bias." + std::to_string(l)));
    EXPECT_EQ(m.model.read_status().code, DeviceStatus::ok);
    compare.print(c.name + " " + dtype_name(dtype_of<typename Device::Real>()));
  }
};
TEST_P(ReferenceState, Double) { check<Cpu<double>>(1e-9); }
TEST_P(ReferenceState, Float) { check<Cpu<float>>(1e-5); }

// bf16 has 8 bits: this only shows that nothing is wrong by more than rounding. The choice of experts is the
// reference's, so that a flipped near-tie cannot hide an error.
template <class Device>
void check_bf16(const ReferenceConfig& c) {
  const Reference& r = Reference::get();
  RunOptions options = c.run;
  options.replay_routing = true;
  TestModel<Device> m(c.model, options);
  m.load(c);
  m.replay.resize(c.model.n_layer);
  for (int64_t l = 0; l < c.model.n_layer; ++l)
    if (!c.model.is_dense(l)) m.replay[l] = r.read<int32_t>(c.name + ".top_k_index." + std::to_string(l));
  StepStats stats = m.gradients(r.batch(c.name));
  Comparison loss(2e-2), gradient(5e-2);  // measured on the CPU: 1.1e-2 and 2.5e-2
  loss("loss", stats.loss, r.read(c.name + ".loss")[0]);
  loss("aux_loss", stats.aux_loss, r.read(c.name + ".aux_loss")[0]);
  loss("z_loss", stats.z_loss, r.read(c.name + ".z_loss")[0]);
  for (const Parameter& p : m.parameters())
    gradient("grad." + p.name, m.read(p, TestModel<Device>::State::grad), r.read(c.name + ".grad." + p.name));
  loss.print(c.name + " BF16"), gradient.print(c.name + " BF16");
}
TEST_P(ReferenceState, Bf16WithTheReferencesRouting) { check_bf16<Cpu<bf16>>(Reference::get().config(GetParam())); }
#ifdef GPT_MOE_CUDA
TEST_P(ReferenceState, GpuFloat) {
  NEEDS_DEVICE(Gpu<float>);
  check<Gpu<float>>(1e-5);
}
TEST_P(ReferenceState, GpuBf16WithTheReferencesRouting) {
  NEEDS_DEVICE(Gpu<bf16>);
  check_bf16<Gpu<bf16>>(Reference::get().config(GetParam()));
}
#endif
INSTANTIATE_TEST_SUITE_P(All, ReferenceState, testing::ValuesIn(reference_configs),
                         [](const auto& info) { return std::string(info.param); });

// ---- finite differences ----

// Gradients of the whole model in double against differences of the objective, with the choice of experts held fixed:
// for every tensor along a random direction, which moves all its entries at once, and along two entries alone.
void check_finite_differences(ModelConfig config, const std::string& what) {
  RunOptions options = small_run(2, 7);
  options.record_routing = true;
  TestModel<Cpu<double>> chooser(config, options);
  options.record_routing = false, options.replay_routing = true, options.evaluate = false;
  TestModel<Cpu<double>> m(config, options);
  Batch batch = small_batch(options);
  chooser.randomise(0.3), m.randomise(0.3);
  chooser.gradients(batch);
  m.replay = chooser.routing;

  auto objective = [&] {
    StepStats s = m.gradients(batch);
    return s.loss + s.aux_loss + s.z_loss;
  };
  objective();
  std::vector<std::vector<double>> gradients;
  for (const Parameter& p : m.parameters()) gradients.push_back(m.read(p, TestModel<Cpu<double>>::State::grad));
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Parameter& p = m.parameters()[i];
    const std::vector<double> weight = m.read(p), &gradient = gradients[i];
    double norm = 0;
    for (double g : gradient) norm += g * g;
    norm = std::sqrt(norm);
    for (int probe = 0; probe < 3; ++probe) {
      std::vector<double> direction(weight.size());
      if (probe == 0)
        for (size_t j = 0; j < weight.size(); ++j)
          direction[j] = random_normal(7, hash_name(p.name), j) / std::sqrt(double(weight.size()));
      else
        direction[random_bits(probe, hash_name(p.name), 0) % weight.size()] = 1;
      auto at = [&](double h) {
        std::vector<double> moved = weight;
        for (size_t j = 0; j < moved.size(); ++j) moved[j] += h * direction[j];
        m.write(p, moved);
        return objective();
      };
      const double h = 1e-3;  // differences of fourth order: the error is a few h^4
      double slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h), expected = 0;
      for (size_t j = 0; j < weight.size(); ++j) expected += gradient[j] * direction[j];
      // NaN fails.
      EXPECT_TRUE(std::abs(slope - expected) <= 1e-7 * norm + 1e-11)
          << what << ": " << p.name << " probe " << probe << ": " << slope << " and " << expected;
    }
    m.write(p, weight);
  }
}

TEST(FiniteDifferences, EveryGateAndBalanceWithEveryOtherOption) {
  for (Gate gate : {Gate::softmax, Gate::sigmoid})
    for (bool norm_topk_prob : {true, false})
      for (BalanceScope scope : {BalanceScope::microbatch, BalanceScope::sequence})
        for (const char* variant : {"dense layer", "shared expert", "capacity", "untied"}) {
          ModelConfig c;
          c.n_layer = 2, c.d_model = 12, c.n_head = 2, c.n_kv_head = 1, c.head_dim = 6, c.vocab_size = 70;
          c.n_expert = 3, c.top_k = 2, c.d_expert = 8, c.qk_norm = norm_topk_prob, c.aux_coef = 0.5, c.z_coef = 0.1;
          c.gate = gate, c.norm_topk_prob = norm_topk_prob, c.balance_scope = scope;
          if (gate == Gate::sigmoid) c.route_scale = 1.5;
          if (variant == std::string("dense layer")) c.dense_layers = {0}, c.d_dense = 16;
          if (variant == std::string("shared expert")) c.d_shared = 16;
          if (variant == std::string("capacity")) c.capacity_factor = 0.8;
          if (variant == std::string("untied")) c.tied = false;
          check_finite_differences(c, std::string(name_of(gate)) + (norm_topk_prob ? " normalised " : " raw ") +
                                          name_of(scope) + " " + variant);
        }
}

// ---- the same bits ----

template <class Device>
Trace two_steps(const ModelConfig& config, const RunOptions& options) {
  TestModel<Device> m(config, options);
  m.randomise(0.2);
  return m.run(small_batch(options), 2);
}

using Policies = std::vector<Recompute>;
const std::vector<Policies> all_policies = {
    {Recompute::none, Recompute::none, Recompute::none}, {Recompute::act, Recompute::act, Recompute::act},
    {Recompute::up, Recompute::up, Recompute::up},       {Recompute::block, Recompute::block, Recompute::block},
    {Recompute::up, Recompute::none, Recompute::block},  {Recompute::block, Recompute::up, Recompute::none},
    {Recompute::none, Recompute::block, Recompute::act}};

template <class T>
class SameBits : public OnDevice<T> {};
TYPED_TEST_SUITE(SameBits, Devices);

// The default run of each model, and everything that must not change a bit of it. A separate arena poisons a tensor at
// the end of its life, so that an op that reads a dead tensor shows.
TYPED_TEST(SameBits, WhateverThePolicyDispatchAndArena) {
  for (const ModelConfig& config : {small_model(), small_sigmoid_model()}) {
    RunOptions o = small_run(2, 12, 2);
    o.decode_positions = 5;
    Trace want = two_steps<TypeParam>(config, o);
    for (const Policies& policies : all_policies)
      for (Dispatch dispatch : {Dispatch::zero_buffer, Dispatch::materialized})
        for (bool separate : {false, true}) {
          o.recompute = policies, o.dispatch = dispatch, o.separate_arena = separate;
          SCOPED_TRACE(std::string(name_of(config.gate)) + " " + name_of(policies[0]) + " " + name_of(policies[1]) +
                       " " + name_of(policies[2]) + " " + name_of(dispatch) + (separate ? " separate" : " planned"));
          expect_same_bits(two_steps<TypeParam>(config, o), want);
        }
  }
}

// With one micro-step products write gradients, here over NaN. With two they add to zeros: the first of the two, alone,
// is the same step.
TYPED_TEST(SameBits, WhetherGradientsAreWrittenOrAddedToZeros) {
  using M = TestModel<TypeParam>;
  auto steps = [](M& m, int64_t* poisoned) {
    m.randomise(0.2);
    for (const auto& b : m.model.table.buffers())
      if (const TensorInfo* g = b.grad.tensor(); g && !b.grad.add)
        m.device.fill_byte(g->data, 0xFF, g->bytes), ++*poisoned;
    const RunOptions o = small_run();
    const Batch batch = small_batch(o);
    Trace trace;
    for (int step = 0; step < 2; ++step) {
      m.model.set_params({1e-2, step + 1, 1 / double(o.B * o.T), 1});
      m.model.start_step();
      m.model.set_batch(batch.tokens.data(), batch.targets.data());
      m.model.micro_step(), m.model.update();
      for (const Parameter& p : m.parameters()) {
        std::vector<double> values;
        for (auto g : m.read(p, M::State::grad)) values.push_back(double(g) + 0.0);  // zeros without a sign
        trace.push_back({"step " + std::to_string(step) + " gradient " + p.name, values});
      }
    }
    for (auto& entry : m.state()) trace.push_back(std::move(entry));
    return trace;
  };
  for (const ModelConfig& config : {small_model(), small_sigmoid_model()})
    for (const Policies& policies : {all_policies[1], all_policies[3], all_policies[4]})
      for (bool separate : {false, true})
        for (bool wide : {false, true}) {
          SCOPED_TRACE(std::string(name_of(config.gate)) + " " + name_of(policies[0]) +
                       (separate ? " separate" : " planned") + (wide ? " wide" : " narrow"));
          RunOptions o = small_run();
          o.recompute = policies, o.separate_arena = separate, o.wide_gradients = wide;
          M writes(config, o);
          o.micro_steps = 2;
          M adds(config, o);
          int64_t written = 0, none = 0;
          Trace got = steps(writes, &written);
          expect_same_bits(got, steps(adds, &none));
          EXPECT_EQ(none, 0);
          // qkv, o_proj, w13 and w2 of three layers; w13 and w2 of the shared experts of two
          EXPECT_EQ(written, 3 * 4 + 2 * 2);
        }
}

TYPED_TEST(SameBits, RunAfterRunAndOnOneThreadOrTwo) {
  const int threads = omp_get_max_threads();
  for (const ModelConfig& config : {small_model(), small_sigmoid_model()}) {
    RunOptions o = small_run(2, 300);  // several tiles of everything
    omp_set_num_threads(1);
    Trace want = two_steps<TypeParam>(config, o);
    omp_set_num_threads(2);
    expect_same_bits(two_steps<TypeParam>(config, o), want);
  }
  omp_set_num_threads(threads);
}

TYPED_TEST(SameBits, WhenRoutingIsReplayed) {
  for (const ModelConfig& config : {small_model(), small_sigmoid_model()}) {
    RunOptions o = small_run(2, 12, 2);
    o.record_routing = true;
    TestModel<TypeParam> recorder(config, o);
    recorder.randomise(0.2);
    Trace want = recorder.run(small_batch(o), 1);
    auto replay = recorder.routing;
    auto replayed = [&](Recompute policy) {
      o.record_routing = false, o.replay_routing = true, o.recompute.assign(config.n_layer, policy);
      TestModel<TypeParam> replayer(config, o);
      replayer.randomise(0.2);
      replayer.replay = replay;
      return replayer.run(small_batch(o), 1);
    };
    expect_same_bits(replayed(Recompute::act), want);
    for (auto& layer : replay)
      for (int32_t& e : layer) e = (e + 1) % int32_t(config.n_expert);  // not what the router would choose
    expect_same_bits(replayed(Recompute::block), replayed(Recompute::act));
  }
}

#ifdef GPT_MOE_CUDA
// ---- graphs ----

template <class T>
class Graphs : public OnDevice<T> {};
using Gpus = testing::Types<Gpu<float>, Gpu<bf16>>;
TYPED_TEST_SUITE(Graphs, Gpus);

TYPED_TEST(Graphs, GiveTheBitsOfLaunchingOpByOp) {
  for (const ModelConfig& config : {small_model(), small_sigmoid_model()}) {
    RunOptions o = small_run(2, 70, 2);
    o.decode_positions = 5;
    Trace want = two_steps<TypeParam>(config, o);
    o.graphs = false;
    expect_same_bits(two_steps<TypeParam>(config, o), want);
  }
}

// Nothing in a captured step waits for the host: kernels, memsets and copies within the device only.
TYPED_TEST(Graphs, KeepTheHostOut) {
  for (Dispatch dispatch : {Dispatch::zero_buffer, Dispatch::materialized})
    for (const ModelConfig& config : {small_model(), small_sigmoid_model()}) {
      RunOptions o = small_run(2, 12, 2);
      o.dispatch = dispatch, o.record_routing = true;
      TestModel<TypeParam> m(config, o);
      m.randomise(0.2);
      m.step(small_batch(o), 1e-3);
      int captured = 0;
      for (const auto& graph : m.model.graphs()) {
        if (!graph) continue;
        ++captured;
        auto nodes = GpuBase::nodes(*graph);
        EXPECT_FALSE(nodes.empty());
        for (const std::string& kind : nodes)
          EXPECT_TRUE(kind == "kernel" || kind == "memset" || kind == "copy" || kind == "empty") << kind;
      }
      EXPECT_EQ(captured, 3);  // start, micro-step, update
    }
}
#endif

// A gradient that one call writes may be kept in bf16: it is the wide one, rounded once. (A tied embedding is the sum of
// two, of which one stays wide.)
TEST(Gradients, NarrowOnesAreTheWideOnesRounded) {
  ModelConfig config = small_sigmoid_model();
  RunOptions o = small_run();
  TestModel<Cpu<bf16>> wide(config, o);
  o.wide_gradients = false;
  TestModel<Cpu<bf16>> narrow(config, o);
  wide.randomise(0.2), narrow.randomise(0.2);
  wide.gradients(small_batch(o)), narrow.gradients(small_batch(o));
  EXPECT_LT(narrow.model.plan.category_bytes(Category::gradients), wide.model.plan.category_bytes(Category::gradients));
  for (const Parameter& p : wide.parameters()) {
    auto want = wide.read(p, TestModel<Cpu<bf16>>::State::grad),
         got = narrow.read(p, TestModel<Cpu<bf16>>::State::grad);
    const auto& b = narrow.model.table.buffer(p.buffer);
    for (size_t i = 0; i < want.size(); ++i)
      ASSERT_EQ(got[i], b.grad.narrow ? float(bf16(want[i])) : want[i]) << p.name;
  }
}

// Four sequences at once, or in two or four micro-batches: the same step up to rounding, where the balance loss is a
// matter of each sequence.
TEST(Accumulation, IsTheSameStepAsOneLargeMicroBatch) {
  for (ModelConfig config : {small_model(), small_sigmoid_model()}) {
    config.balance_scope = BalanceScope::sequence, config.capacity_factor = 0;
    TestModel<Cpu<double>> whole(config, small_run(4, 12, 1));
    whole.randomise(0.2);
    Batch batch = small_batch(whole.model.options);
    Trace want = whole.run(batch, 3, 1e-3);
    for (int64_t micro_steps : {2, 4}) {
      TestModel<Cpu<double>> parts(config, small_run(4 / micro_steps, 12, micro_steps));
      parts.randomise(0.2);
      Trace got = parts.run(batch, 3, 1e-3);
      ASSERT_EQ(got.size(), want.size());
      for (size_t i = 0; i < want.size(); ++i)
        EXPECT_LE(relative_error<double>(got[i].second, want[i].second), 1e-9)
            << want[i].first << ", " << micro_steps << " micro-steps";
    }
  }
}

// ---- memory ----

template <class Device>
void check_allocation(const ModelConfig& config, RunOptions o) {
  TestModel<Device> planned(config, o);
  const Plan& plan = planned.model.plan;
  EXPECT_EQ(planned.model.arena().allocated_bytes(), plan.arena_bytes());
  size_t by_category = 0, sum = 0;
  for (int c = 0; c < n_category; ++c) by_category += plan.category_bytes(Category(c));
  EXPECT_EQ(by_category, plan.arena_bytes());

  // No two tensors that are alive at once share a byte.
  const auto& tensors = plan.tensors();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorInfo& a = tensors[i];
    sum += a.bytes;
    EXPECT_TRUE(a.persistent || a.first >= 0) << a.name << " is planned and never used";
    EXPECT_EQ(a.offset % Plan::alignment, 0u);
    ASSERT_LE(a.offset + a.bytes, plan.arena_bytes()) << a.name;
    ASSERT_GE(a.offset, a.persistent ? 0 : plan.persistent_bytes()) << a.name;
    for (size_t j = 0; j < i; ++j) {
      const TensorInfo& b = tensors[j];
      bool together = a.persistent || b.persistent || (a.first <= b.last && b.first <= a.last);
      bool apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
      ASSERT_TRUE(!together || apart) << a.name << " and " << b.name;
    }
  }
  o.separate_arena = true;
  TestModel<Device> separate(config, o);
  EXPECT_EQ(separate.model.arena().allocated_bytes(), sum);

  // What the parameter table says each category holds; rows that pad a buffer have no optimizer state.
  size_t values = 0, tied = 0, biases = 0;
  for (const auto& b : planned.model.table.buffers())
    values += b.rows * b.cols, tied += b.second_grad.tensor() ? b.rows * b.cols : 0;
  for (int64_t l = 0; l < config.n_layer; ++l) biases += planned.model.has_bias(l) ? config.n_expert : 0;
  size_t real = sizeof(typename Device::Real), acc = sizeof(typename Device::Acc);
  EXPECT_EQ(plan.category_bytes(Category::weights), values * real);
  EXPECT_EQ(plan.category_bytes(Category::gradients), o.train ? (values + tied) * acc : 0);
  EXPECT_EQ(plan.category_bytes(Category::optimizer),
            (o.train ? size_t(config.parameters()) * (real == acc ? 2 : 3) * acc : 0) + biases * acc);
}

#ifdef GPT_MOE_CUDA
TEST(Memory, AllocatedAsPlannedOnTheGpu) {
  NEEDS_DEVICE(Gpu<bf16>);
  RunOptions o = small_run(2, 12, 2);
  check_allocation<Gpu<bf16>>(small_model(), o);
  check_allocation<Gpu<float>>(small_sigmoid_model(), o);
}
#endif

TEST(Memory, AllocatedAsPlannedToTheByte) {
  for (const ModelConfig& config : {small_model(), small_sigmoid_model()})
    for (const Policies& policies : {Policies{}, all_policies[3], all_policies[4]}) {
      RunOptions o = small_run(2, 12, 2);
      o.recompute = policies, o.decode_positions = 20, o.record_routing = o.replay_routing = true;
      check_allocation<Cpu<bf16>>(config, o);
      o.dispatch = Dispatch::materialized;
      check_allocation<Cpu<float>>(config, o);
      o.train = o.record_routing = o.replay_routing = false;
      check_allocation<Cpu<double>>(config, o);
    }
}

// Bytes that a layer's MoE keeps for the backward pass under each policy, by the formulas of the documentation.
TEST(Memory, SavedByAMoeLayer) {
  ModelConfig c = small_model();
  c.d_shared = 0;
  RunOptions o = small_run(3, 12);
  size_t N = o.B * o.T, C = c.d_model, K = c.top_k, F = c.d_expert, E = c.n_expert, R = N * K;
  size_t metadata =
      4 * (3 * R + (E + 1) + E) + 4 * (R + N);  // top_k_index, row_slot, slot_row; offsets, counts; gates, lse
  const std::pair<Recompute, size_t> saved[] = {{Recompute::none, 2 * N * C + 6 * N * K * F},
                                                {Recompute::act, 2 * N * C + 4 * N * K * F},
                                                {Recompute::up, 2 * N * C},
                                                {Recompute::block, 0}};
  for (auto [policy, bytes] : saved)
    for (Dispatch dispatch : {Dispatch::zero_buffer, Dispatch::materialized}) {
      SCOPED_TRACE(std::string(name_of(policy)) + " " + name_of(dispatch));
      bool kept = policy != Recompute::block;
      o.recompute.assign(c.n_layer, policy), o.dispatch = dispatch;
      Cpu<bf16> device;
      Model<Cpu<bf16>> model(device, c, o);
      for (int layer : {0, 2}) {
        EXPECT_EQ(model.plan.layer_bytes(layer, "moe", Category::saved),
                  bytes + (kept && dispatch == Dispatch::materialized ? 2 * R * C : 0));
        EXPECT_EQ(model.plan.layer_bytes(layer, "moe", Category::metadata), kept ? metadata : 0);
      }
    }
}

// H of a MoE layer is planned once, for the pass whose H the backward pass reads.
TEST(Memory, HOnlyWhereABackwardPassReadsIt) {
  for (Recompute policy : {Recompute::none, Recompute::act, Recompute::up, Recompute::block})
    for (bool train : {true, false}) {
      RunOptions o = small_run();
      o.recompute.assign(3, policy), o.decode_positions = 5, o.train = train;
      Cpu<bf16> device;
      Model<Cpu<bf16>> model(device, small_model(), o);
      const auto& tensors = model.plan.tensors();
      auto planned = std::count_if(tensors.begin(), tensors.end(), [](const TensorInfo& t) { return t.name == "h"; });
      EXPECT_EQ(planned, train ? 2 : 0) << name_of(policy);  // two of the three layers have experts
    }
}

// What is alive while the classifier runs, between forward and backward, is what the report calls saved or metadata.
TEST(Memory, SavedIsWhatLivesFromForwardToBackward) {
  for (const ModelConfig& config : {small_model(), small_sigmoid_model()})
    for (const Policies& policies : all_policies)
      for (Dispatch dispatch : {Dispatch::zero_buffer, Dispatch::materialized}) {
        RunOptions o = small_run();
        o.recompute = policies, o.dispatch = dispatch;
        Cpu<bf16> device;
        Model<Cpu<bf16>> model(device, config, o);
        const auto& tensors = model.plan.tensors();
        auto losses =
            std::find_if(tensors.begin(), tensors.end(), [](const TensorInfo& t) { return t.name == "losses"; });
        ASSERT_NE(losses, tensors.end());
        int64_t classifier = losses->first;
        for (const TensorInfo& t : tensors) {
          if (t.persistent || t.name == "final rstd") continue;  // the latter belongs to the head itself
          bool saved = t.category == Category::saved || t.category == Category::metadata;
          EXPECT_EQ(t.first < classifier && t.last > classifier, saved) << t.name << " of layer " << t.layer;
        }
      }
}

TEST(Memory, OfALargeModelIsPlannedWithoutAllocating) {
  RunOptions o = small_run(1, 4096);
  Cpu<bf16> device;
  Model<Cpu<bf16>> model(device, preset("qwen3-30b-a3b"), o);
  EXPECT_EQ(model.plan.layer_bytes(0, "moe", Category::saved), 117440512u);
}

// ---- initial values ----

TEST(InitialValues, DependOnSeedAndNameAlone) {
  ModelConfig config = small_model(), other = config;
  other.n_layer = 4, other.n_expert = 6, other.vocab_size = 90, other.dense_layers = {1, 3}, other.tied = false;
  other.n_head = 4, other.gate = Gate::sigmoid;  // more rows in q_proj, more columns in o_proj
  TestModel<Cpu<float>> m(config, small_run()), again(config, small_run(5, 9, 3)), different(other, small_run()),
      seed2(config, small_run());
  TestModel<Cpu<double>> wide(config, small_run());
  TestModel<Cpu<bf16>> narrow(config, small_run());
  m.model.initialise(1), again.model.initialise(1), different.model.initialise(1), wide.model.initialise(1),
      narrow.model.initialise(1);
  seed2.model.initialise(2);
  for (const Parameter& p : m.parameters()) {
    std::vector<float> w = m.read(p);
    EXPECT_EQ(again.read(p), w) << p.name << " changed with the batch";
    EXPECT_EQ(narrow.read(p, TestModel<Cpu<bf16>>::State::master), w) << p.name;
    std::vector<float> rounded = narrow.read(p);
    std::vector<double> exact = wide.read(p);
    ASSERT_EQ(rounded.size(), w.size());
    const Parameter& q = different.parameter(p.name);
    std::vector<float> v = different.read(q);
    double squares = 0, sum = 0, scale = p.init == Init::residual ? 0.02 / std::sqrt(2.0 * 3) : 0.02;
    for (size_t i = 0; i < w.size(); ++i) {
      ASSERT_EQ(w[i], float(exact[i])) << p.name;
      ASSERT_EQ(rounded[i], float(bf16(w[i]))) << p.name;
      ASSERT_EQ(exact[i], p.vector ? 1 : scale * random_normal(1, hash_name(p.name), i)) << p.name;
      // The other model has more rows here and there, and 4 layers, which only scale the residual outputs.
      if (p.cols == q.cols) {
        ASSERT_NEAR(v[i], w[i] * (p.init == Init::residual ? std::sqrt(3.0 / 4.0) : 1), 1e-8) << p.name;
      }
      sum += w[i], squares += w[i] * w[i];
    }
    if (p.vector) continue;
    double n = double(w.size());
    EXPECT_NE(seed2.read(p), w) << p.name;
    EXPECT_LT(std::abs(sum / n), 5 * scale / std::sqrt(n)) << p.name;
    EXPECT_NEAR(std::sqrt(squares / n), scale, 5 * scale / std::sqrt(2 * n)) << p.name;
  }
}

// ---- training and decoding ----

template <class T>
class Training : public OnDevice<T> {};
TYPED_TEST_SUITE(Training, Devices);

TYPED_TEST(Training, LearnsASmallBatchByHeart) {
  for (ModelConfig config : {small_model(), small_sigmoid_model()}) {
    config.d_model = 64, config.capacity_factor = 0;
    TestModel<TypeParam> m(config, small_run(2, 16));
    m.model.initialise(1);
    Batch batch = small_batch(m.model.options);
    double first = m.step(batch, 1e-2).loss, last = first;
    int steps = 1;
    while (last >= 0.05 && steps < 300) last = m.step(batch, 1e-2).loss, ++steps;
    EXPECT_NEAR(first, std::log(double(config.vocab_size)), 0.2);
    EXPECT_LT(last, 0.05);
    printf("loss %.3f -> %.3f in %d steps\n", first, last, steps);
  }
}

// A sequence fed token by token through the key/value cache gives the logits of the full forward pass. (With a capacity
// it does not: a token alone is never dropped.)
template <class Device>
void check_decode(double bound) {
  for (const ReferenceConfig& c : Reference::get().configs()) {
    if (c.model.capacity_factor) continue;
    RunOptions o = c.run;
    o.decode_positions = o.T + 3;
    TestModel<Device> m(c.model, o);
    m.load(c);
    Batch batch = Reference::get().batch(c.name);
    std::vector<double> want = m.logits(batch), got;
    for (size_t n = 0; n < batch.tokens.size(); ++n) {
      std::vector<float> rounded = m.model.decode(batch.tokens[n], int32_t(n % o.T));
      std::vector<double> row = m.decoded_logits();
      EXPECT_EQ(rounded, std::vector<float>(row.begin(), row.end()));
      got.insert(got.end(), row.begin(), row.end());
    }
    EXPECT_LE(relative_error<double>(got, want), bound) << c.name;
  }
}
TEST(Decode, EqualsTheFullForwardPass) { check_decode<Cpu<double>>(1e-10); }
#ifdef GPT_MOE_CUDA
TEST(Decode, EqualsTheFullForwardPassOnTheGpu) {
  NEEDS_DEVICE(Gpu<float>);
  check_decode<Gpu<float>>(1e-5);
}
#endif

// ---- bad input and bad numbers ----

template <class Device>
void check_faults() {
  ModelConfig config = small_model();
  RunOptions o = small_run();
  auto status_of = [&](bool replay, auto spoil) {
    o.replay_routing = replay;
    TestModel<Device> m(config, o);
    m.randomise(0.2);
    m.replay.assign(config.n_layer, std::vector<int32_t>(o.B * o.T * config.top_k));
    for (auto& layer : m.replay)
      for (size_t slot = 0; slot < layer.size(); ++slot) layer[slot] = int32_t(slot % config.n_expert);
    Batch batch = small_batch(o);
    spoil(m, batch);
    m.gradients(batch);
    return m.model.read_status();
  };
  auto expect = [](DeviceStatus s, DeviceStatus::Code code, int layer, int64_t token, int64_t value) {
    EXPECT_EQ(std::tuple(int(s.code), s.layer, s.token, s.value), std::tuple(int(code), layer, token, value));
  };
  int64_t V = config.vocab_size;
  EXPECT_EQ(status_of(true, [](auto&, auto&) {}).code, DeviceStatus::ok);
  expect(status_of(false, [&](auto&, Batch& b) { b.tokens[5] = int32_t(V); }), DeviceStatus::token_out_of_range, -1, 5,
         V);
  expect(status_of(false, [&](auto&, Batch& b) { b.tokens[7] = -2; }), DeviceStatus::token_out_of_range, -1, 7, -2);
  expect(status_of(false, [&](auto&, Batch& b) { b.targets[9] = int32_t(V); }), DeviceStatus::token_out_of_range, -1, 9,
         V);
  expect(status_of(true, [](auto& m, auto&) { m.replay[2][2 * 11 + 1] = 4; }), DeviceStatus::expert_out_of_range, 2, 11,
         4);
  expect(status_of(true, [](auto& m, auto&) { m.replay[0][2 * 3] = -1; }), DeviceStatus::expert_out_of_range, 0, 3, -1);
}
template <class T>
class Faults : public OnDevice<T> {};
TYPED_TEST_SUITE(Faults, Devices);
TYPED_TEST(Faults, NameLayerTokenAndValue) { check_faults<TypeParam>(); }

template <class T>
class BadNumbers : public OnDevice<T> {};
TYPED_TEST_SUITE(BadNumbers, Devices);

// A NaN or Inf, in a gradient or in the loss, is named and skips the update; the next step is as if it had not been.
TYPED_TEST(BadNumbers, SkipTheUpdateAndNameTheTensor) {
  using Acc = typename TypeParam::Acc;
  ModelConfig config = small_sigmoid_model();
  RunOptions o = small_run();
  TestModel<TypeParam> m(config, o), twin(config, o);
  m.randomise(0.2), twin.randomise(0.2);
  Batch batch = small_batch(o);
  m.step(batch, 1e-2), twin.step(batch, 1e-2);  // moments that are not zero

  const Acc bad_values[] = {std::numeric_limits<Acc>::quiet_NaN(), std::numeric_limits<Acc>::infinity()};
  for (size_t i = 0; i < m.parameters().size(); ++i) {
    const Parameter& p = m.parameters()[i];
    Trace before = m.state();
    m.gradients(batch, 1e-2);
    Acc* grad = m.model.table.buffer(p.buffer).grad.wide;
    m.device.to_device(grad + p.map(p.rows - 1) * p.cols + p.cols / 2, &bad_values[i % 2], sizeof(Acc));
    StepStats stats = m.update();
    EXPECT_EQ(stats.skip, 1) << p.name;
    EXPECT_EQ(stats.bad_tensor, int32_t(i)) << p.name;
    expect_same_bits(m.state(), before);
  }
  const Parameter& p = m.parameter("model.layers.2.self_attn.v_proj.weight");
  std::vector<Acc> weight = m.read(p), spoilt = weight;
  spoilt[3] = bad_values[0];
  m.model.write_parameter(p, spoilt.data());
  StepStats stats = m.step(batch, 1e-2);
  EXPECT_EQ(stats.skip, 1);
  EXPECT_EQ(stats.bad_tensor, -2);
  EXPECT_TRUE(std::isnan(stats.loss));
  EXPECT_EQ(m.model.read_status().code, DeviceStatus::ok);
  m.model.write_parameter(p, weight.data());
  if constexpr (std::is_same_v<typename TypeParam::Real, Acc>) {  // of bf16 that has set the master copy too
    expect_same_bits(m.state(), twin.state());
  }
}

}  // namespace
