// GPT-MoE: parameter table, forward, backward, update. Written once for every device.
//
//   embedding; per layer: RMSNorm -> attention -> residual -> RMSNorm -> MoE (or dense MLP) -> residual;
//   RMSNorm; lm_head.
//
// Kept for backward per layer: the two residual streams, qkv before norm and rotation, attention's output and
// log-sum-exp, the MoE layer's input and H (layer.h). What is cheap to make again from these is not kept.
#pragma once
#include <functional>
#include <memory>

#include "llmc/attention.h"
#include "llmc/classifier.h"
#include "llmc/embedding.h"
#include "llmc/global_norm.h"
#include "llmc/parameter_io.h"
#include "llmc/random.h"
#include "llmc/zero.h"
#include "moe/model_parameters.h"
#include "moe/model_state.h"

template <class Device>
class Model {
 public:
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;

  // Plans everything; allocates nothing.
  Model(Device& device, const ModelConfig& config, const RunOptions& options)
      : config(config), options(options), device_(device), x_(device, plan) {
    config.validate();
    graphs_.resize(program_slots + 2 * stage.slots);
    buffers_ = declare_parameters(table, plan, config, options);
    declare_state();
    if (options.train) {
      if (!parallel.alone())
        traffic_ = UpdateTraffic<Device>(table, parallel.comms.data(), options.grad_bucket, parallel.one_group());
      x_.begin(program_start, "start of a step"), start_step_ops();
      if (stage.alone()) x_.begin(program_micro, "micro-step"), micro_step_ops();
      if (!stage.alone()) plan_slots();
      x_.begin(program_update, "update"), update_ops();
    }
    if (options.evaluate) x_.begin(program_evaluate, "evaluation"), evaluate_ops();
    if (options.decode_positions) x_.begin(program_decode, "decoding"), decode_ops();
    plan.place();
  }

  const ModelConfig config;
  const RunOptions options;
  const Parallel& parallel = options.parallel;
  const Stage stage = stage_of(config, options);
  Plan plan;
  ParameterTable<Device> table;

  int64_t N() const { return options.B * options.T; }
  const Arena<Device>& arena() const { return *arena_; }
  Executor<Device>& executor() { return x_; }

  // Allocates what was planned and fills the constants. Weights are zero until initialise() or a checkpoint sets them.
  void allocate() {
    arena_ = std::make_unique<Arena<Device>>(device_, plan, options.separate_arena);
    x_.run_with(arena_.get());
    device_.status = status_;
    if constexpr (Device::has_graphs)
      if (pulls()) peers_.open(device_, arena_->base(), parallel[Group::ep], parallel.world->timeout());
    DeviceStatus no_fault;
    device_.to_device(status_, &no_fault, sizeof no_fault);
    std::vector<double> angles = rope_table(positions_held(), config.head_dim, config.rope_theta);
    std::vector<Acc> table_values(angles.begin(), angles.end());
    device_.to_device(rope_, table_values.data(), table_values.size() * sizeof(Acc));
    std::vector<int32_t> positions(N());
    for (int64_t n = 0; n < N(); ++n) positions[n] = int32_t(n % options.T);
    device_.to_device(positions_, positions.data(), positions.size() * sizeof(int32_t));
    for (int l = 0; l < config.n_layer; ++l)
      if (places_[l])
        device_.to_device(places_[l], options.expert_slots(config, l).place.data(), places_[l].info->bytes);
    if (options.train) {
      auto views = table.views();
      device_.to_device(views_, views.data(), views.size() * sizeof views[0]);
      auto first = table.first_partials();
      device_.to_device(first_partials_, first.data(), first.size() * sizeof first[0]);
      OutlierState none;
      device_.to_device(outliers_, &none, sizeof none);
    }
  }

  // Initial values: a function of (seed, logical name, logical index) alone.
  void initialise(uint64_t seed) {
    for (const Parameter& p : table.parameters()) {
      if (p.buffer < 0) continue;
      std::vector<Acc> values(p.rows * p.cols);
      double scale = p.init == Init::residual ? 0.02 / std::sqrt(2.0 * double(config.n_layer)) : 0.02;
      uint64_t stream = hash_name(p.name);
#pragma omp parallel for
      for (int64_t i = 0; i < int64_t(values.size()); ++i)
        values[i] = p.init == Init::zeros  ? Acc(0)
                    : p.init == Init::ones ? Acc(1)
                                           : Acc(scale * random_normal(seed, stream, i));
      write_parameter(p, values.data());
    }
  }

  // ---- parameters by logical rows: parameter_io.h ----
  using State = ParameterState;
  void write_parameter(const Parameter& p, const Acc* values) { parameter_io().write(p, values); }
  void write_state(const Parameter& p, State which, const Acc* values) { parameter_io().write(p, which, values); }
  std::vector<Acc> read_parameter(const Parameter& p, State which = State::weight) {
    return parameter_io().read(p, which);
  }
  bool has_bias(int64_t layer) const { return config.gate == Gate::sigmoid && !config.is_dense(layer); }
  // All ranks call it, whichever stage has the layer.
  std::vector<Acc> read_bias(int64_t layer) {
    std::vector<Acc> values(config.n_expert);
    if (bias_[layer] && parallel.stage_rank() == 0)
      device_.to_host(values.data(), bias_[layer], values.size() * sizeof(Acc));
    if (!parallel.alone()) parallel.host.all_reduce(values.data(), config.n_expert, "router bias");
    return values;
  }
  void write_bias(int64_t layer, const Acc* values) {
    if (bias_[layer]) device_.to_device(bias_[layer], values, size_t(config.n_expert) * sizeof(Acc));
  }
  OutlierState read_outliers() {
    OutlierState s;
    device_.to_host(&s, outliers_, sizeof s);
    return s;
  }
  void write_outliers(const OutlierState& s) { device_.to_device(outliers_, &s, sizeof s); }

  // ---- a step: set_params, start_step, (set_batch, micro_step) x micro_steps, update, then read ----
  // On a GPU none of these waits: inputs are staged, and the programs are put on the stream, as graphs once captured.
  void set_params(const StepParams& p) { device_.stage(params_, &p, sizeof p); }
  void set_batch(const int32_t* tokens, const int32_t* targets, int slot = 0) {
    device_.stage(slots_[slot].tokens, tokens, size_t(N()) * sizeof(int32_t));
    device_.stage(slots_[slot].targets, targets, size_t(N()) * sizeof(int32_t));
  }
  void start_step() { run(program_start, &Model::start_step_ops); }
  // last: of the step, whose gradients are complete then.
  void micro_step(bool last = true) {
    traffic_.idle = traffic_.overlap && !last;
    if (stage.alone()) return run(traffic_.idle ? program_more : program_micro, &Model::micro_step_ops);
    forward(0), backward(0);  // of this stage, with what its neighbours sent last
  }
  void update() { run(program_update, &Model::update_ops); }
  // A micro-step of a pipeline stage, in two parts (pipeline.h); slot: of the micro-batch. What comes from its neighbours and
  // goes to them, (n,C): the residual stream into the stage and out of it; the gradient of the latter, which backward makes
  // that of the former.
  void forward(int slot) { run(program_slots + 2 * slot, &Model::forward_ops, slot); }
  void backward(int slot) { run(program_slots + 2 * slot + 1, &Model::backward_ops, slot); }
  Tensor<Real> stage_input(int slot) const { return slots_[slot].input; }
  Tensor<Real> stage_output() const { return stage_output_; }
  Tensor<Real> stage_gradient() const { return stage_gradient_; }
  // Cross-entropy of the batch that was set, times params.loss_scale, left in read_stats().loss.
  void evaluate() { run(program_evaluate, &Model::evaluate_ops); }
  // What evaluate() leaves on the last stage: losses (N) with options.token_losses, logits (N, padded V) with .logits.
  Tensor<Acc> token_losses;
  Tensor<Real> logits;
  // The captured programs of a GPU, in the order of Program; null where none is.
  auto& graphs() { return graphs_; }
  // Logits (V) of one token at one position, against the cache of the positions before it.
  std::vector<float> decode(int32_t token, int32_t position) {
    device_.to_device(decode_token_, &token, sizeof token);
    device_.to_device(decode_position_, &position, sizeof position);
    run(program_decode, &Model::decode_ops);
    std::vector<Real> row(config.vocab_size);
    device_.to_host(row.data(), decode_logits_, row.size() * sizeof(Real));
    std::vector<float> logits(row.size());
    for (size_t i = 0; i < row.size(); ++i) logits[i] = float(row[i]);
    return logits;
  }

  // What a step leaves for the log.
  struct StepResults {
    StepStats stats;
    DeviceStatus status;
    std::vector<std::vector<int32_t>> load;  // by layer, as read_load
  };
  // Asks for the results of the work put on the device so far; the returned function waits for them, and is to be
  // called before the fourth such request that follows.
  std::function<StepResults()> fetch_results() {
    std::vector<std::pair<const void*, size_t>> pieces = {{stats_.data(), sizeof(StepStats)},
                                                          {status_.data(), sizeof(DeviceStatus)}};
    for (const auto& load : load_)
      if (load) pieces.push_back({load.data(), load.info->bytes});
    auto bytes = device_.fetch(pieces);
    return [this, bytes] {
      std::vector<char> all = bytes();
      const char* at = all.data();
      auto take = [&](void* to, size_t n) { std::memcpy(to, at, n), at += n; };
      StepResults r;
      take(&r.stats, sizeof r.stats), take(&r.status, sizeof r.status);
      for (const auto& load : load_) {
        r.load.emplace_back(load ? config.n_expert : 0);
        if (load) take(r.load.back().data(), load.info->bytes);
      }
      return r;
    };
  }

  StepStats read_stats() {
    StepStats s;
    device_.to_host(&s, stats_, sizeof s);
    return s;
  }
  DeviceStatus read_status() {
    DeviceStatus s;
    device_.to_host(&s, status_, sizeof s);
    return s;
  }
  // Selections of each expert in the last step, (E); empty for a dense layer.
  std::vector<int32_t> read_load(int64_t layer) {
    std::vector<int32_t> load(load_[layer] ? config.n_expert : 0);
    if (!load.empty()) device_.to_host(load.data(), load_[layer], load.size() * sizeof(int32_t));
    return load;
  }
  // top_k_index of the last micro-step (record_routing) for this rank's tokens, or (N,K) to use in the next
  // (replay_routing) for all.
  std::vector<int32_t> read_routing(int64_t layer) {
    std::vector<int32_t> index(options.tokens() * config.top_k);
    device_.to_host(index.data(), record_[layer], index.size() * sizeof(int32_t));
    return index;
  }
  void set_replay(int64_t layer, const int32_t* index, int slot = 0) {
    const int64_t n = options.tokens() * config.top_k;
    device_.to_device(slots_[slot].replay[layer], index + parallel.here.tp * n, size_t(n) * sizeof(int32_t));
  }

 private:
  // program_more: a micro-step that is not the step's last, by the plan of program_micro.
  enum Program { program_start, program_micro, program_update, program_evaluate, program_decode, program_more };
  static constexpr int program_slots = program_more + 1;  // from here on: forward and backward of each slot

  using LayerSaved = ::LayerSaved<Device>;
  using Slot = ::Slot<Device>;
  using Pass = ::Pass<Device>;

  // Puts a program on the device: op by op, or as a graph that is captured the first time. Tests and profilers that
  // watch single ops, and the poison of a separate arena, need it op by op.
  template <class... Args>
  void run(int id, void (Model::*ops)(Args...), Args... args) {
    auto body = [&] { x_.begin(id == program_more ? program_micro : id), (this->*ops)(args...); };
    if constexpr (Device::has_graphs) {
      if (options.graphs && !options.separate_arena && !x_.observer) {
        if (!graphs_[id]) graphs_[id] = device_.capture(body);
        device_.launch(*graphs_[id]);
        return;
      }
    }
    body();
  }

  ParameterIo<Device> parameter_io() {
    return {device_, table, parallel.alone() ? nullptr : &parallel.host, parallel.layout.etp};
  }
  Tensor<Real> weight(int buffer) const { return buffer < 0 ? Tensor<Real>{} : table.buffer(buffer).weight; }
  // For the products' weight gradients, which can write.
  GradTensor<Device> product_grad(int buffer) const {
    return buffer < 0 ? GradTensor<Device>{} : table.buffer(buffer).grad;
  }
  // For ops that only add.
  GradTensor<Device> grad(int buffer) const {
    GradTensor<Device> g = product_grad(buffer);
    if (!g.add) fail("the gradient of ", table.buffer(buffer).name, " is to be written, by an op that adds");
    return g;
  }
  // Whether balance statistics are of the tokens of all ranks, and the loads that follow from them too.
  bool shared_statistics() const {
    return parallel.layout.stage_ranks() > 1 && config.balance == Balance::aux &&
           config.balance_scope == BalanceScope::microbatch;
  }
  bool pulls() const { return options.transport == Transport::pull; }
  int64_t positions_held() const { return std::max(options.T, options.decode_positions); }
  int64_t classifier_chunk(int64_t N) const {
    int64_t rows = Device::classifier_bytes / (vocabulary_.padded * int64_t(sizeof(Real)));
    return std::min(N, std::max<int64_t>(256, rows / 64 * 64));
  }

  void declare_state() {
    const ModelConfig& c = config;
    auto bytes = [&]<class T>(Tensor<T>& t, const char* name, int64_t n) {
      t = plan.template persistent<T>(name, {n * int64_t(sizeof(T))}, Category::workspace);
    };
    if (pulls()) peers_.declare(plan);
    bytes(status_, "status", 1), bytes(params_, "params", 1), bytes(stats_, "stats", 1);
    slots_.resize(stage.slots);
    for (Slot& slot : slots_) {
      slot.tokens = plan.template persistent<int32_t>("tokens", {N()}, Category::workspace);
      slot.targets = plan.template persistent<int32_t>("targets", {N()}, Category::workspace);
      slot.replay.resize(c.n_layer), slot.arrived_rows.resize(c.n_layer);
      if (!stage.first())
        slot.input = plan.template persistent<Real>("input", {options.tokens(), c.d_model}, Category::saved);
    }
    auto passed = [&](const char* name) {
      return plan.template persistent<Real>(name, {options.tokens(), c.d_model}, Category::workspace);
    };
    if (!stage.last()) stage_output_ = passed("output");
    if (!stage.alone() && options.train) stage_gradient_ = passed("gradient");
    positions_ = plan.template persistent<int32_t>("positions", {N()}, Category::workspace);
    if (options.token_losses) token_losses = plan.template persistent<Acc>("token losses", {N()}, Category::workspace);
    if (options.logits)
      logits = plan.template persistent<Real>("logits", {N(), vocabulary_.padded}, Category::workspace);
    rope_ = plan.template persistent<Acc>("rope", {positions_held(), c.head_dim}, Category::workspace);
    load_.resize(c.n_layer), bias_.resize(c.n_layer), record_.resize(c.n_layer), places_.resize(c.n_layer);
    k_cache_.resize(c.n_layer), v_cache_.resize(c.n_layer);
    for (int l = 0; l < c.n_layer; ++l) {
      plan.set_place(l, c.is_dense(l) ? "mlp" : "moe");
      if (!c.is_dense(l)) {
        load_[l] = plan.template persistent<int32_t>("load", {c.n_expert}, Category::workspace);  // all stages'
        if (!stage.has(l)) continue;
        if (const ExpertRanks r = options.expert_ranks(c); r.ranks > 1)
          places_[l] = plan.template persistent<int32_t>("places of experts", {r.E, r.ranks}, Category::workspace);
        if (has_bias(l)) bias_[l] = plan.template persistent<Acc>("bias", {c.n_expert}, Category::optimizer);
        for (Slot& slot : slots_)
          if (options.replay_routing)
            slot.replay[l] =
                plan.template persistent<int32_t>("replay", {options.tokens(), c.top_k}, Category::workspace);
        if (options.record_routing)
          record_[l] = plan.template persistent<int32_t>("record", {options.tokens(), c.top_k}, Category::workspace);
      }
      if (options.decode_positions) {
        plan.set_place(l, "attention");
        k_cache_[l] = plan.template persistent<Real>("k_cache", {options.decode_positions, c.n_kv_head * c.head_dim},
                                                     Category::workspace);
        v_cache_[l] = plan.template persistent<Real>("v_cache", {options.decode_positions, c.n_kv_head * c.head_dim},
                                                     Category::workspace);
      }
    }
    plan.set_place(-1, "");
    if (options.train) {
      n_views_ = table.n_views();
      bytes(outliers_, "outliers", 1), bytes(views_, "views", n_views_);
      bytes(first_partials_, "first partials", int64_t(table.parameters().size()) + 1);
      partials_ = plan.template persistent<Acc>("norm partials", {table.partials()}, Category::workspace);
    }
    if (options.decode_positions) {
      decode_token_ = plan.template persistent<int32_t>("decode token", {1}, Category::workspace);
      decode_position_ = plan.template persistent<int32_t>("decode position", {1}, Category::workspace);
      decode_logits_ = plan.template persistent<Real>("decode logits", {c.padded_vocab()}, Category::workspace);
    }
  }

  // ---- the network ----
  TensorRanks<Device> tensor_ranks(const Pass& pass) {
    const int tp = parallel.layout.tp;
    return {x_, pass.N() / tp, config.d_model, tp, parallel.here.tp, parallel[Group::tp]};
  }
  // How this rank's tokens are grouped for balance statistics, and with whom it shares them.
  StatisticsRanks statistics_ranks(const Pass& pass, RouterShape& router) const {
    const int tp = parallel.layout.tp;
    const bool shares = pass.training && config.balance == Balance::aux;
    router.N /= tp;
    if (config.balance_scope == BalanceScope::microbatch) {
      if (!shares || !shared_statistics()) return {};
      router.ranks = parallel.layout.stage_ranks();
      return {parallel[Group::stage]};
    }
    router.G = std::max<int64_t>(1, pass.B / tp);
    if (!shares || pass.B % tp == 0) return {};
    router.ranks = tp / pass.B;  // a sequence is on several ranks
    return {parallel[Group::tp], pass.B, parallel.here.tp / router.ranks, parallel.here.tp % router.ranks == 0};
  }
  MoeLayer<Device> moe_layer(int l, const Pass& pass) {
    const auto& b = buffers_.layers[l];
    bool full = !pass.decoding;
    ExpertRanks ranks = options.expert_ranks(config);
    ranks.N = pass.N() / parallel.layout.tp;
    RouterShape router = config.router(pass.B, pass.T);
    const StatisticsRanks statistics = statistics_ranks(pass, router);
    ExpertShape experts = config.experts(ranks.N);
    const ExpertRows rows = expert_rows(ranks, options.row_headroom);
    experts.R = rows.a_pass, experts.E = ranks.slots(), experts.slots = ranks.M() * config.top_k;
    experts.F /= parallel.layout.etp;
    return {x_,
            router,
            {x_,
             experts,
             ranks.M(),
             rows.most,
             config.capacity(pass.N()),
             options.policy(l),
             options.dispatch,
             {weight(b.w13), weight(b.w2), product_grad(b.w13), product_grad(b.w2)},
             pulls() ? nullptr : &pass.slot.arrived_rows[l]},
            weight(b.router),
            grad(b.router),
            bias_[l],
            {weight(b.shared13), weight(b.shared2), product_grad(b.shared13), product_grad(b.shared2)},
            tensor_ranks(pass),
            config.d_shared / parallel.layout.tp,
            load_[l],
            full && pass.training ? pass.slot.replay[l] : Tensor<int32_t>{},
            full && pass.training ? record_[l] : Tensor<int32_t>{},
            stats_,
            params_,
            ranks,
            places_[l],
            parallel[Group::ep],
            statistics,
            pulls() && ranks.ranks > 1 ? &peers_ : nullptr};
  }
  DenseMlp<Device> dense_mlp(int l, const Pass& pass) {
    const auto& b = buffers_.layers[l];
    return {x_,
            {weight(b.w13), weight(b.w2), product_grad(b.w13), product_grad(b.w2)},
            tensor_ranks(pass),
            config.d_dense / parallel.layout.tp,
            options.policy(l)};
  }
  Tensor<char> product_scratch(int64_t N, int64_t IC, int64_t OC) {
    return x_.template tensor<char>("matmul.scratch", {int64_t(matmul_scratch_bytes<Device>(N, IC, OC))});
  }
  // qkv -> rotated queries and keys (N, (NH+NKV)*HD)
  Tensor<Real> rotate(int l, const Pass& pass, LayerSaved& s) {
    auto qk = x_.template tensor<Real>("qk", {pass.N(), heads_.qk_width()});
    x_.op("qk-norm, rope", qknorm_rope_forward<Device>, qk, s.qk_rstd, s.qkv, weight(buffers_.layers[l].q_norm),
          weight(buffers_.layers[l].k_norm), rope_, pass.positions, pass.N(), heads_, config.rms_norm_eps);
    return qk;
  }

  // Returns the residual stream after layer l. keep: backward reads s. recomputing: backward is making s again from
  // s.input (policy block); the output is not needed then.
  Tensor<Real> layer_forward(int l, const Pass& pass, LayerSaved& s, bool keep, bool recomputing) {
    const auto& b = buffers_.layers[l];
    const TensorRanks<Device> ranks = tensor_ranks(pass);
    int64_t N = pass.N(), n = ranks.n, C = config.d_model;
    const HeadShape heads = heads_;
    Category saved = keep ? Category::saved : Category::workspace;
    plan.set_place(l, "attention");
    auto normed = x_.template tensor<Real>("norm1", {n, C});
    s.rstd1 = x_.template tensor<Acc>("rstd1", {n}, saved);
    x_.op("norm 1", rmsnorm_forward<Device>, normed, s.rstd1, s.input, weight(b.norm1), n, C, config.rms_norm_eps);
    normed = ranks.gather("all norm1", normed);
    s.qkv = x_.template tensor<Real>("qkv", {N, heads.qkv_width()}, saved);
    x_.op("qkv", matmul_forward<Device>, s.qkv, product_scratch(N, C, heads.qkv_width()), normed, weight(b.qkv), N, C,
          heads.qkv_width());
    if (config.qk_norm) s.qk_rstd = x_.template tensor<Acc>("qk_rstd", {N, heads.n_head + heads.n_kv_head}, saved);
    auto qk = rotate(l, pass, s);
    s.o = x_.template tensor<Real>("o", {N, heads.q_width()}, saved);
    if (pass.decoding) {
      auto scratch = x_.template tensor<char>(
          "attention.scratch",
          {int64_t(attention_decode_scratch_bytes<Device>(options.decode_positions, heads.head_dim))});
      x_.op("attention", attention_decode<Device>, s.o, k_cache_[l], v_cache_[l], scratch, qk, s.qkv, pass.positions, N,
            options.decode_positions, heads);
    } else {
      s.lse = x_.template tensor<Acc>("attention.lse", {N, heads.n_head}, saved);
      auto scratch = x_.template tensor<char>("attention.scratch",
                                              {int64_t(attention_scratch_bytes<Device>(pass.B, pass.T, heads))});
      x_.op("attention", attention_forward<Device>, s.o, s.lse, scratch, qk, s.qkv, pass.B, pass.T, heads);
    }
    auto projected = x_.template tensor<Real>("projected", {N, C});
    x_.op("attention out", matmul_forward<Device>, projected, product_scratch(N, heads.q_width(), C), s.o, weight(b.o),
          N, heads.q_width(), C);
    projected = ranks.sum("own projected", projected);
    s.middle = x_.template tensor<Real>("middle", {n, C}, saved);

    plan.set_place(l, config.is_dense(l) ? "mlp" : "moe");
    s.x = x_.template tensor<Real>("x", {n, C}, saved);
    plan.set_place(l, "attention");
    s.rstd2 = x_.template tensor<Acc>("rstd2", {n}, saved);
    x_.op("norm 2", residual_rmsnorm_forward<Device>, s.middle, s.x, s.rstd2, s.input, projected, weight(b.norm2), n, C,
          config.rms_norm_eps);

    plan.set_place(l, config.is_dense(l) ? "mlp" : "moe");
    const bool leaves = l + 1 == stage.end && !stage.last();  // backward reads it where it goes
    Category out_category = pass.training && !leaves ? Category::saved : Category::workspace;
    if (!config.is_dense(l)) {
      return moe_layer(l, pass).forward(s.moe, s.x, s.middle, keep, out_category, recomputing);
    }
    auto y = dense_mlp(l, pass).forward(s.mlp, s.x, saved, recomputing);
    if (recomputing) return {};
    plan.set_place(l, "attention");
    auto out = x_.template tensor<Real>("residual", {n, C}, out_category);
    x_.op("mlp add", residual_add<Device>, out, s.middle, y, n * C);
    return out;
  }

  // dres (n,C) enters as the gradient of the layer's output and leaves as that of its input.
  void layer_backward(int l, const Pass& pass, LayerSaved& s, Tensor<Real> dres) {
    const auto& b = buffers_.layers[l];
    const TensorRanks<Device> ranks = tensor_ranks(pass);
    int64_t N = pass.N(), n = ranks.n, C = config.d_model;
    const HeadShape heads = heads_;
    if (options.policy(l) == Recompute::block) {
      Recomputing again(x_);
      layer_forward(l, pass, s, false, true);
    }

    plan.set_place(l, config.is_dense(l) ? "mlp" : "moe");
    auto dx = config.is_dense(l) ? dense_mlp(l, pass).backward(s.mlp, s.x, dres)
                                 : moe_layer(l, pass).backward(s.moe, s.x, dres);
    norm_backward("norm 2 backward", dres, b.norm2, dx, dres, s.middle, s.rstd2, n);

    plan.set_place(l, "attention");
    // Here, because the next kernels deal out their work as multiprocessors become free; those of experts deal it out
    // beforehand, and would wait for those that the exchange takes.
    if (traffic_.overlap) traffic_.exchange(x_, b.norm2);
    auto dout = ranks.gather("all d residual", dres);
    auto d_o = x_.template tensor<Real>("do", {N, heads.q_width()});
    auto scratch = product_scratch(N, heads.q_width(), C);
    x_.op("attention out dW", matmul_backward_weight<Device>, product_grad(b.o), scratch, dout, s.o, N, heads.q_width(),
          C);
    x_.op("attention out dX", matmul_backward_input<Device>, d_o, scratch, dout, weight(b.o), N, heads.q_width(), C);
    auto qk = rotate(l, pass, s);
    auto dqkv = x_.template tensor<Real>("dqkv", {N, heads.qkv_width()});
    auto attention_scratch = x_.template tensor<char>(
        "attention.scratch", {int64_t(attention_scratch_bytes<Device>(pass.B, pass.T, heads))});
    x_.op("attention backward", attention_backward<Device>, dqkv, attention_scratch, d_o, s.o, s.lse, qk, s.qkv, pass.B,
          pass.T, heads);
    auto rope_scratch =
        x_.template tensor<char>("rope.scratch", {int64_t(qknorm_rope_backward_scratch_bytes<Device>(N, heads))});
    x_.op("qk-norm, rope backward", qknorm_rope_backward<Device>, dqkv, grad(b.q_norm), grad(b.k_norm), rope_scratch,
          s.qkv, s.qk_rstd, weight(b.q_norm), weight(b.k_norm), rope_, pass.positions, N, heads);
    auto normed = x_.template tensor<Real>("norm1", {n, C});
    auto rstd = x_.template tensor<Acc>("rstd1", {n});
    x_.op("norm 1 again", rmsnorm_forward<Device>, normed, rstd, s.input, weight(b.norm1), n, C, config.rms_norm_eps);
    normed = ranks.gather("all norm1", normed);
    scratch = product_scratch(N, C, heads.qkv_width());
    x_.op("qkv dW", matmul_backward_weight<Device>, product_grad(b.qkv), scratch, dqkv, normed, N, C,
          heads.qkv_width());
    auto dnormed = x_.template tensor<Real>("dnorm1", {N, C});
    x_.op("qkv dX", matmul_backward_input<Device>, dnormed, scratch, dqkv, weight(b.qkv), N, C, heads.qkv_width());
    dnormed = ranks.sum("own dnorm1", dnormed);
    norm_backward("norm 1 backward", dres, b.norm1, dnormed, dres, s.input, s.rstd1, n);
  }

  void norm_backward(const char* name, Tensor<Real> dx, int buffer, Tensor<Real> dout, Tensor<Real> dresidual,
                     Tensor<Real> input, Tensor<Acc> rstd, int64_t N) {
    auto scratch =
        x_.template tensor<char>("norm.scratch", {int64_t(rmsnorm_backward_scratch_bytes<Device>(N, config.d_model))});
    x_.op(name, rmsnorm_backward<Device>, dx, grad(buffer), scratch, dout, dresidual, input, weight(buffer), rstd, N,
          config.d_model);
  }

  // Embedding and layers, those of this stage; returns the residual stream after the last.
  Tensor<Real> trunk(const Pass& pass, std::vector<LayerSaved>& saved) {
    plan.set_place(-1, "");
    auto residual = pass.slot.input;
    if (stage.first())
      residual = tensor_ranks(pass).embedding(pass.tokens, weight(buffers_.embedding), vocabulary_,
                                              pass.training ? Category::saved : Category::workspace);
    saved.resize(config.n_layer);
    for (int l = int(stage.begin); l < stage.end; ++l) {
      saved[l].input = residual;
      residual = layer_forward(l, pass, saved[l], pass.training && options.policy(l) != Recompute::block, false);
    }
    plan.set_place(-1, "");
    if (!stage.last()) x_.op("stage output", copy, stage_output_, residual, int64_t(stage_output_.info->bytes));
    return residual;
  }

  // Final norm, head and cross-entropy. Training: returns the gradient of the residual stream.
  Tensor<Real> head(const Pass& pass, Tensor<Real> residual) {
    const TensorRanks<Device> ranks = tensor_ranks(pass);
    int64_t n = ranks.n, C = config.d_model, elements = vocabulary_.padded * C;
    auto normed = x_.template tensor<Real>("final norm", {n, C});
    auto rstd = x_.template tensor<Acc>("final rstd", {n});
    x_.op("final norm", rmsnorm_forward<Device>, normed, rstd, residual, weight(buffers_.norm), n, C,
          config.rms_norm_eps);
    Tensor<Acc> dweight, dhead;
    if (pass.training) {
      const auto& b = table.buffer(buffers_.head);
      dhead = dweight = config.tied ? b.second_grad.wide : b.grad.wide;
      if (options.micro_steps > 1) {  // a micro-batch's contribution is finished before it is added
        dweight = x_.template tensor<Acc>("head gradient", {vocabulary_.padded, C});
        x_.op("zero head gradient", zero, dweight, elements * int64_t(sizeof(Acc)));
      }
    }
    if (logits && !pass.training)
      x_.op("logits", matmul_forward<Device>, logits, product_scratch(n, C, vocabulary_.padded), normed,
            weight(buffers_.head), n, C, vocabulary_.padded);
    auto dnormed =
        ranks.classifier(stats_, pass.training ? Tensor<Acc>{} : token_losses, dweight, normed, weight(buffers_.head),
                         pass.slot.targets, params_, vocabulary_, classifier_chunk(pass.N()));
    if (!pass.training) return {};
    if (dweight.info != dhead.info) x_.op("add head gradient", add_to<Device>, dhead, dweight, elements);
    auto dres = stage_gradient_ ? stage_gradient_ : x_.template tensor<Real>("d residual", {n, C});
    norm_backward("final norm backward", dres, buffers_.norm, dnormed, {}, residual, rstd, n);
    return dres;
  }

  // ---- the programs ----
  void start_step_ops() {
    for (const auto& b : table.buffers())
      for (const GradTensor<Device>& g : {b.grad, b.second_grad})
        if (TensorInfo* t = g.tensor(); t && g.add) x_.op("zero gradients", zero, Tensor<char>{t}, int64_t(t->bytes));
    for (const auto& load : load_)
      if (load) x_.op("zero load", zero, load, int64_t(config.n_expert * sizeof(int32_t)));
    x_.op("zero stats", reset_stats<Device>, stats_);
  }

  void plan_slots() {
    for (int slot = 0, id = program_slots; slot < stage.slots; ++slot) {
      x_.begin(id++, "forward"), forward_ops(slot);
      x_.begin(id++, "backward"), backward_ops(slot);
    }
    x_.interleave(program_slots, program_slots + 2 * stage.slots - 1);
  }
  Pass training_pass(int slot) {
    return {options.B, options.T, true, false, slots_[slot], slots_[slot].tokens, positions_};
  }
  void micro_step_ops() { forward_ops(0), backward_ops(0); }
  void forward_ops(int slot) { slots_[slot].residual = trunk(training_pass(slot), slots_[slot].saved); }
  // The head's forward pass included: what it leaves is read at once.
  void backward_ops(int slot) {
    Pass pass = training_pass(slot);
    auto dres = stage.last() ? head(pass, pass.slot.residual) : stage_gradient_;
    for (int l = int(stage.end) - 1; l >= stage.begin; --l) layer_backward(l, pass, pass.slot.saved[l], dres);
    plan.set_place(-1, "");
    if (stage.first()) tensor_ranks(pass).embedding_backward(grad(buffers_.embedding), pass.tokens, dres, vocabulary_);
    if (traffic_.overlap) traffic_.finish_exchange(x_);
  }

  void update_ops() {
    if (!traffic_.overlap) traffic_.finish_exchange(x_);
    if (!parallel.alone()) x_.op("zero partials", zero, partials_, int64_t(partials_.size() * sizeof(Acc)));
    x_.op("global norm", global_norm_partials<Device>, partials_, views_, n_views_);
    if (!parallel.alone()) x_.op("sum over ranks", sum_over_ranks, this);
    x_.op("update decision", update_decision<Device>, stats_, outliers_, partials_, first_partials_,
          int64_t(table.parameters().size()), options.rules);
    traffic_.step(x_, views_, n_views_, params_, stats_, options.adamw);
    if (config.balance == Balance::bias)
      for (int l = 0; l < config.n_layer; ++l)
        if (bias_[l])
          x_.op("router bias", router_bias_update<Device>, bias_[l], load_[l], stats_, config.bias_rate,
                config.n_expert);
  }

  void evaluate_ops() {
    Pass pass{options.B, options.T, false, false, slots_[0], slots_[0].tokens, positions_};
    x_.op("zero stats", reset_stats<Device>, stats_);
    std::vector<LayerSaved> saved;
    auto residual = trunk(pass, saved);
    if (stage.last()) head(pass, residual);
  }

  void decode_ops() {
    Pass pass{1, 1, false, true, slots_[0], decode_token_, decode_position_};
    int64_t C = config.d_model, Vp = config.padded_vocab();
    std::vector<LayerSaved> saved;
    auto residual = trunk(pass, saved);
    auto normed = x_.template tensor<Real>("final norm", {1, C});
    auto rstd = x_.template tensor<Acc>("final rstd", {1});
    x_.op("final norm", rmsnorm_forward<Device>, normed, rstd, residual, weight(buffers_.norm), 1, C,
          config.rms_norm_eps);
    x_.op("head", matmul_forward<Device>, decode_logits_, product_scratch(1, C, Vp), normed, weight(buffers_.head), 1,
          C, Vp);
  }

  static void zero(Device& dev, void* p, int64_t bytes) { dev.zero(p, size_t(bytes)); }
  static void copy(Device& dev, void* to, const void* from, int64_t bytes) { dev.copy(to, from, size_t(bytes)); }
  // Losses, partials of the norm (each has one rank that is home to its rows, the others hold 0), loads of the experts.
  static void sum_over_ranks(Device&, Model* m) {
    const Comm& world = m->parallel[Group::world];
    static_assert(offsetof(StepStats, z_loss) == 2 * sizeof(double));  // loss, aux_loss and z_loss are neighbours
    world.together([&] {
      world.all_reduce(&m->stats_.data()->loss, 3, "losses");
      world.all_reduce(m->partials_.data(), m->partials_.size(), "norm of the gradient");
    });
    auto sum_loads = [&](Group g, auto of_layer) {
      m->parallel[g].together([&] {
        for (int64_t l = 0; l < m->config.n_layer; ++l)
          if (const auto& load = m->load_[l]; load && of_layer(l))
            m->parallel[g].all_reduce(load.data(), load.size(), "load of the experts");
      });
    };
    if (!m->shared_statistics()) sum_loads(Group::stage, [&](int64_t l) { return m->stage.has(l); });
    if (!m->stage.alone()) sum_loads(Group::pp, [](int64_t) { return true; });  // 0 where another stage has the layer
  }

  Device& device_;
  Executor<Device> x_;
  std::unique_ptr<Arena<Device>> arena_;
  PeerMemory peers_;  // closes before the arena goes
  std::vector<typename Device::Graph> graphs_;
  ModelBuffers buffers_;
  const HeadShape heads_ = config.heads(options.parallel.layout.tp);  // of this rank
  const VocabularyPart vocabulary_ =
      vocabulary_part(config, options.parallel.layout.tp, options.parallel.here.tp);  // likewise
  Tensor<DeviceStatus> status_;
  Tensor<StepParams> params_;
  Tensor<StepStats> stats_;
  Tensor<OutlierState> outliers_;
  Tensor<ParameterView<Device>> views_;
  int64_t n_views_ = 0;
  Tensor<int64_t> first_partials_;
  UpdateTraffic<Device> traffic_;
  Tensor<Acc> partials_, rope_;
  Tensor<int32_t> positions_, decode_token_, decode_position_;
  Tensor<Real> decode_logits_, stage_output_, stage_gradient_;
  std::vector<Slot> slots_;
  std::vector<Tensor<int32_t>> load_, record_, places_;
  std::vector<Tensor<Acc>> bias_;
  std::vector<Tensor<Real>> k_cache_, v_cache_;
};
