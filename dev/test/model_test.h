// Helpers of test_gpt_moe.cu: the reference state, a model that is driven in a line, and comparisons in which NaN fails.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "llmc/gpu.h"
#include "llmc/safetensors.h"
#include "moe/model.h"

// Why tests of this device cannot run here; empty if they can.
template <class Device>
std::string device_problem() {
#ifdef GPT_MOE_CUDA
  if constexpr (std::is_base_of_v<GpuBase, Device>) return gpu_problem();
#endif
  return "";
}

// Tokens of a step, one micro-batch after the other, and the token to predict at each position.
struct Batch {
  std::vector<int32_t> tokens, targets;
};

// A random text of n tokens of a vocabulary of V; the targets are the tokens that follow.
inline Batch random_batch(int64_t n, int64_t V, uint64_t seed = 1) {
  Batch b;
  for (int64_t i = 0; i <= n; ++i) {
    int32_t token = int32_t(random_bits(seed, hash_name("tokens"), i) % V);
    if (i < n) b.tokens.push_back(token);
    if (i > 0) b.targets.push_back(token);
  }
  return b;
}

// ---- the reference state (dev/reference/README.md) ----

struct ReferenceConfig {
  std::string name, weights;  // weights: the name of the weight set
  ModelConfig model;
  RunOptions run;
  double learning_rate = 0;
  int steps = 0;
};

class Reference {
 public:
  static const Reference& get() {
    static const Reference reference("dev/reference/state.safetensors");
    return reference;
  }

  const std::vector<ReferenceConfig>& configs() const { return configs_; }
  const ReferenceConfig& config(const std::string& name) const {
    for (const ReferenceConfig& c : configs_)
      if (c.name == name) return c;
    fail("the reference state has no configuration ", name);
  }
  template <class T = double>
  std::vector<T> read(const std::string& key) const {
    const TensorView& view = file_.get(key);
    std::vector<T> values(view.elements);
    read_elements(key, view, 0, view.elements, values.data());
    return values;
  }
  Batch batch(const std::string& config) const {
    return {read<int32_t>(config + ".tokens"), read<int32_t>(config + ".targets")};
  }

 private:
  explicit Reference(const std::string& path) : file_(path) {
    for (const auto& j : nlohmann::json::parse(file_.metadata().at("configs"))) {
      ReferenceConfig c{j.at("name"), j.at("weights"), {}, {}, j.at("adamw").at("lr"), j.at("steps")};
      const auto& m = j.at("model");
      auto get = [&](const char* key, auto& value) { m.at(key).get_to(value); };
      get("n_layer", c.model.n_layer), get("d_model", c.model.d_model), get("n_head", c.model.n_head);
      get("n_kv_head", c.model.n_kv_head), get("head_dim", c.model.head_dim), get("vocab_size", c.model.vocab_size);
      get("n_expert", c.model.n_expert), get("top_k", c.model.top_k), get("d_expert", c.model.d_expert);
      get("d_shared", c.model.d_shared), get("dense_layers", c.model.dense_layers), get("d_dense", c.model.d_dense);
      get("qk_norm", c.model.qk_norm), get("tied", c.model.tied), get("norm_topk_prob", c.model.norm_topk_prob);
      get("route_scale", c.model.route_scale), get("aux_coef", c.model.aux_coef), get("z_coef", c.model.z_coef);
      get("bias_rate", c.model.bias_rate), get("capacity_factor", c.model.capacity_factor);
      get("rms_norm_eps", c.model.rms_norm_eps), get("rope_theta", c.model.rope_theta);
      c.model.gate = parse_gate(m.at("gate"));
      c.model.balance = parse_balance(m.at("balance"));
      c.model.balance_scope = parse_balance_scope(m.at("balance_scope"));
      const auto& a = j.at("adamw");
      c.run.B = j.at("batch_size"), c.run.T = j.at("seq_len"), c.run.micro_steps = j.at("micro_batches");
      c.run.adamw = {a.at("beta1"), a.at("beta2"), a.at("eps"), a.at("weight_decay")};
      c.run.rules.clip_norm = a.at("clip");
      configs_.push_back(std::move(c));
    }
  }

  SafetensorsFile file_;
  std::vector<ReferenceConfig> configs_;
};

// ---- comparisons ----

// |got - want| / |want| in the 2-norm; 0 where both are zero; infinity where a value is not finite or sizes differ.
template <class T>
double relative_error(std::span<const T> got, std::span<const double> want) {
  if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
    norm += want[i] * want[i];
  }
  if (difference == 0) return 0;
  double error = std::sqrt(difference / norm);
  return std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}

// Holds many tensors to one bound, and remembers the worst.
class Comparison {
 public:
  explicit Comparison(double bound) : bound_(bound) {}
  template <class T>
  void operator()(const std::string& name, const std::vector<T>& got, const std::vector<double>& want) {
    double error = relative_error<T>(got, want);
    EXPECT_LE(error, bound_) << name;
    if (!(error <= worst_)) worst_ = error, worst_name_ = name;
  }
  void operator()(const std::string& name, double got, double want) {
    (*this)(name, std::vector{got}, std::vector{want});
  }
  void print(const std::string& what) const {
    printf("%-24s worst error %.1e (%s)\n", what.c_str(), worst_, worst_name_.c_str());
  }

 private:
  double bound_, worst_ = -1;
  std::string worst_name_;
};

// Everything that a run computed, by name, as doubles, which hold every type exactly.
using Trace = std::vector<std::pair<std::string, std::vector<double>>>;

// The same names with the same bits, and no value that is not finite.
inline void expect_same_bits(const Trace& got, const Trace& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    const auto& [name, values] = want[i];
    ASSERT_EQ(got[i].first, name);
    ASSERT_EQ(got[i].second.size(), values.size()) << name;
    for (size_t j = 0; j < values.size(); ++j) {
      ASSERT_TRUE(std::isfinite(values[j])) << name << " [" << j << "]";
      ASSERT_EQ(std::bit_cast<uint64_t>(got[i].second[j]), std::bit_cast<uint64_t>(values[j]))
          << name << " [" << j << "]: " << got[i].second[j] << " and " << values[j];
    }
  }
}

// ---- a model under test ----

template <class Device>
class TestModel {
 public:
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  using State = typename Model<Device>::State;

  TestModel(const ModelConfig& config, const RunOptions& options) : model(device, config, options) { model.allocate(); }

  Device device;
  Model<Device> model;
  std::vector<std::vector<int32_t>> replay;   // by layer; the whole step's choices (replay_routing)
  std::vector<std::vector<int32_t>> routing;  // by layer; what the last step chose (record_routing)

  const std::vector<Parameter>& parameters() const { return model.table.parameters(); }
  const Parameter& parameter(const std::string& name) const {
    for (const Parameter& p : parameters())
      if (p.name == name) return p;
    fail("no parameter ", name);
  }
  std::vector<Acc> read(const Parameter& p, State which = State::weight) { return model.read_parameter(p, which); }
  void write(const Parameter& p, const std::vector<double>& values) {
    ASSERT_EQ(int64_t(values.size()), p.rows * p.cols) << p.name;
    model.write_parameter(p, std::vector<Acc>(values.begin(), values.end()).data());
  }
  void write_bias(int64_t layer, const std::vector<double>& values) {
    model.write_bias(layer, std::vector<Acc>(values.begin(), values.end()).data());
  }
  // The weights and biases of a configuration of the reference state.
  void load(const ReferenceConfig& c) {
    const Reference& r = Reference::get();
    for (const Parameter& p : parameters()) write(p, r.read("weights." + c.weights + "." + p.name));
    for (int64_t l = 0; l < c.model.n_layer; ++l)
      if (model.has_bias(l)) write_bias(l, r.read(c.name + ".bias." + std::to_string(l)));
  }
  // Weights large enough that routing, attention and gradients are far from trivial.
  void randomise(double scale, uint64_t seed = 1) {
    auto normal = [&](const std::string& name, int64_t n, double mean, double deviation) {
      std::vector<double> values(n);
      for (int64_t i = 0; i < n; ++i) values[i] = mean + deviation * random_normal(seed, hash_name(name), i);
      return values;
    };
    for (const Parameter& p : parameters()) write(p, normal(p.name, p.rows * p.cols, p.vector, p.vector ? 0.1 : scale));
    for (int64_t l = 0; l < model.config.n_layer; ++l)
      if (model.has_bias(l)) write_bias(l, normal("bias" + std::to_string(l), model.config.n_expert, 0, 0.1));
  }

  // The losses and gradients of a step; update() makes use of them.
  StepStats gradients(const Batch& batch, double learning_rate = 0) {
    set_params(learning_rate);
    model.start_step();
    int64_t layers = model.config.n_layer, slots = model.N() * model.config.top_k;
    routing.assign(layers, {});
    for (int64_t m = 0; m < model.options.micro_steps; ++m) {
      model.set_batch(batch.tokens.data() + m * model.N(), batch.targets.data() + m * model.N());
      for (int64_t l = 0; l < layers; ++l)
        if (model.options.replay_routing && !model.config.is_dense(l))
          model.set_replay(l, replay.at(l).data() + m * slots);
      model.micro_step();
      for (int64_t l = 0; l < layers; ++l) {
        if (!model.options.record_routing || model.config.is_dense(l)) continue;
        auto chosen = model.read_routing(l);
        routing[l].insert(routing[l].end(), chosen.begin(), chosen.end());
      }
    }
    return model.read_stats();
  }
  StepStats update() {
    ++steps_;
    model.update();
    return model.read_stats();
  }
  StepStats step(const Batch& batch, double learning_rate) {
    gradients(batch, learning_rate);
    return update();
  }

  // Cross-entropy of the tokens of a step.
  double evaluate(const Batch& batch) {
    set_params(0);
    double loss = 0;
    for (int64_t m = 0; m < model.options.micro_steps; ++m) {
      model.set_batch(batch.tokens.data() + m * model.N(), batch.targets.data() + m * model.N());
      model.evaluate();
      loss += model.read_stats().loss;
    }
    return loss;
  }
  // Logits (tokens, V) of the full forward pass, read where the classifier leaves them in an evaluation. The tokens of a
  // micro-batch must fit in one chunk of the classifier.
  std::vector<double> logits(const Batch& batch) {
    int64_t V = model.config.vocab_size, Vp = model.config.padded_vocab();
    const TensorInfo* scratch = planned("classifier.scratch");
    EXPECT_LE(model.N(), 256);
    std::vector<double> result;
    model.executor().observer = [&](const std::string& op, int) {
      if (op != "classifier") return;
      std::vector<Real> values(model.N() * Vp);
      device.to_host(values.data(), scratch->data, values.size() * sizeof(Real));
      for (int64_t n = 0; n < model.N(); ++n)
        for (int64_t v = 0; v < V; ++v) result.push_back(double(Acc(values[n * Vp + v])));
    };
    evaluate(batch);
    model.executor().observer = nullptr;
    return result;
  }
  // Logits (V) of the last decode() in full precision.
  std::vector<double> decoded_logits() {
    std::vector<Real> row(model.config.vocab_size);
    device.to_host(row.data(), planned("decode logits")->data, row.size() * sizeof(Real));
    std::vector<double> result;
    for (int64_t v = 0; v < model.config.vocab_size; ++v) result.push_back(double(Acc(row[v])));
    return result;
  }

  // Weights, moments and biases as they are now.
  Trace state() {
    Trace trace;
    auto add = [&](const std::string& name, const auto& values) {
      trace.push_back({name, {values.begin(), values.end()}});
    };
    for (const Parameter& p : parameters()) {
      add(p.name, read(p)), add(p.name + " master", read(p, State::master));
      add(p.name + " m", read(p, State::m)), add(p.name + " v", read(p, State::v));
    }
    for (int64_t l = 0; l < model.config.n_layer; ++l)
      if (model.has_bias(l)) add("bias " + std::to_string(l), model.read_bias(l));
    return trace;
  }
  // All that some steps compute: losses, loads and gradients of each, the state that they leave, and then an evaluation
  // and, where decoding is planned, a few tokens of it.
  Trace run(const Batch& batch, int steps, double learning_rate = 1e-2) {
    Trace trace;
    for (int s = 0; s < steps; ++s) {
      std::string at = "step " + std::to_string(s) + " ";
      StepStats stats = step(batch, learning_rate);
      trace.push_back({at + "losses", {stats.loss, stats.aux_loss, stats.z_loss, stats.grad_norm, double(stats.skip)}});
      for (const Parameter& p : parameters()) {
        auto g = read(p, State::grad);
        trace.push_back({at + "gradient " + p.name, {g.begin(), g.end()}});
      }
      for (int64_t l = 0; l < model.config.n_layer; ++l) {
        auto load = model.read_load(l);
        trace.push_back({at + "load " + std::to_string(l), {load.begin(), load.end()}});
      }
    }
    for (auto& entry : state()) trace.push_back(std::move(entry));
    trace.push_back({"evaluated loss", {evaluate(batch)}});
    for (int32_t i = 0; i < model.options.decode_positions; ++i) {
      model.decode(batch.tokens[i], i);
      trace.push_back({"decoded logits " + std::to_string(i), decoded_logits()});
    }
    return trace;
  }

 private:
  void set_params(double learning_rate) {
    double micro_steps = double(model.options.micro_steps);
    model.set_params({learning_rate, steps_ + 1, 1 / (double(model.N()) * micro_steps), 1 / micro_steps});
  }
  // The last tensor of that name: of the evaluation, where training has one too.
  const TensorInfo* planned(const std::string& name) const {
    const TensorInfo* found = nullptr;
    for (const TensorInfo& t : model.plan.tensors())
      if (t.name == name) found = &t;
    if (!found) fail("no tensor ", name, " is planned");
    return found;
  }

  int64_t steps_ = 0;
};
