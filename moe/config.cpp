#include "moe/config.h"

#include <algorithm>
#include <cmath>

#include "llmc/swiglu.h"

bool ModelConfig::is_dense(int64_t layer) const {
  return std::find(dense_layers.begin(), dense_layers.end(), layer) != dense_layers.end();
}

int64_t ModelConfig::capacity(int64_t N) const {
  if (!(capacity_factor > 0)) return 0;
  return int64_t(std::min(1e15, std::ceil(capacity_factor * double(N) * double(top_k) / double(n_expert))));
}

RouterShape ModelConfig::router(int64_t B, int64_t T) const {
  bool aux = balance == Balance::aux;
  return {B * T,
          d_model,
          n_expert,
          top_k,
          balance_scope == BalanceScope::sequence ? B : 1,
          gate,
          norm_topk_prob,
          route_scale,
          aux ? aux_coef : 0.0,
          z_coef};
}

static int64_t count(const ModelConfig& c, int64_t experts, int64_t vocab_matrices) {
  int64_t n = vocab_matrices * c.vocab_size * c.d_model + c.d_model;
  for (int64_t l = 0; l < c.n_layer; ++l) {
    n += 2 * c.d_model + (c.heads().qkv_width() + c.heads().q_width()) * c.d_model + (c.qk_norm ? 2 * c.head_dim : 0);
    if (c.is_dense(l))
      n += 3 * c.d_model * c.d_dense;
    else
      n += c.n_expert * c.d_model + 3 * c.d_model * (experts * c.d_expert + c.d_shared);
  }
  return n;
}
int64_t ModelConfig::parameters() const { return count(*this, n_expert, tied ? 1 : 2); }
int64_t ModelConfig::active_parameters() const { return count(*this, top_k, 1); }

void ModelConfig::validate() const {
  auto positive = [](const char* option, int64_t value) {
    if (value <= 0) fail(option, " must be positive, not ", value);
    if (value > (int64_t(1) << 24)) fail(option, " ", value, " is absurd (more than 2^24)");
  };
  positive("--n-layer", n_layer), positive("--d-model", d_model), positive("--n-head", n_head);
  positive("--n-kv-head", n_kv_head), positive("--head-dim", head_dim), positive("--vocab-size", vocab_size);
  positive("--n-expert", n_expert), positive("--top-k", top_k), positive("--d-expert", d_expert);
  if (n_layer > 1024) fail("--n-layer ", n_layer, " is absurd (more than 1024)");
  if (n_head % n_kv_head) fail("--n-head ", n_head, " is not a multiple of --n-kv-head ", n_kv_head);
  if (head_dim % 2) fail("--head-dim ", head_dim, " is odd; rotary embedding pairs its values");
  if (head_dim > max_head_dim) fail("--head-dim ", head_dim, " is more than ", max_head_dim);
  if (top_k > n_expert) fail("--top-k ", top_k, " is larger than --n-expert ", n_expert);
  if (n_expert > 512) fail("--n-expert ", n_expert, " is more than the 512 that the kernels take");
  if (top_k > 16) fail("--top-k ", top_k, " is more than the 16 that the kernels take");
  auto width = [](const char* option, int64_t value) {
    if (value < 0 || value % swiglu_interleave) fail(option, " ", value, " is not a multiple of ", swiglu_interleave);
  };
  width("--d-expert", d_expert), width("--d-shared", d_shared), width("--d-dense", d_dense);
  for (int64_t l : dense_layers) {
    if (l < 0 || l >= n_layer) fail("--dense-layers names layer ", l, ", but there are ", n_layer, " (from 0)");
    if (d_dense == 0) fail("--dense-layers needs --d-dense, the width of a dense layer's MLP");
  }
  auto coefficient = [](const char* option, double value) {
    if (!(value >= 0) || !std::isfinite(value)) fail(option, " must be a finite number >= 0, not ", value);
  };
  coefficient("--aux-coef", aux_coef), coefficient("--z-coef", z_coef), coefficient("--bias-rate", bias_rate);
  coefficient("--capacity-factor", capacity_factor);
  if (!(route_scale > 0) || !std::isfinite(route_scale)) fail("--route-scale must be positive, not ", route_scale);
  if (!(rms_norm_eps > 0) || !(rope_theta > 1) || !std::isfinite(rms_norm_eps) || !std::isfinite(rope_theta))
    fail("--rms-norm-eps must be > 0 and --rope-theta > 1, both finite");
  if (gate == Gate::softmax && route_scale != 1)
    fail("--route-scale belongs to --gate sigmoid; softmax gates are not scaled");
  if (balance == Balance::bias && gate == Gate::softmax)
    fail("--balance bias moves the selection bias of --gate sigmoid; use --balance aux with --gate softmax");
  double C = double(d_model), attention = C * double(head_dim) * 2 * double(n_head + n_kv_head);
  double mlp = 3 * C * (double(n_expert) * double(d_expert) + double(d_shared) + double(d_dense));
  double total = 2 * double(vocab_size) * C + double(n_layer) * (attention + mlp);
  if (total > 1e15) fail("a model of ", total, " parameters is absurd (more than 1e15)");  // 64 bits count the rest
}

namespace {
struct Preset {
  const char* name;
  ModelConfig config;
};

ModelConfig model(int64_t L, int64_t C, int64_t NH, int64_t NKV, int64_t HD, int64_t V, int64_t E, int64_t K,
                  int64_t F) {
  ModelConfig c;
  c.n_layer = L, c.d_model = C, c.n_head = NH, c.n_kv_head = NKV, c.head_dim = HD, c.vocab_size = V;
  c.n_expert = E, c.top_k = K, c.d_expert = F;
  return c;
}

const std::vector<Preset>& presets() {
  static const std::vector<Preset> all = [] {
    std::vector<Preset> p;
    p.push_back({"tiny", model(4, 128, 4, 2, 64, 257, 8, 2, 128)});

    ModelConfig gpt = model(12, 768, 12, 12, 64, 50257, 8, 2, 2048);
    gpt.qk_norm = gpt.tied = false;
    p.push_back({"gpt124-8x2", gpt});

    ModelConfig olmoe = model(16, 2048, 16, 16, 128, 50304, 64, 8, 1024);
    olmoe.tied = olmoe.norm_topk_prob = false;
    olmoe.aux_coef = 0.01 / 16, olmoe.z_coef = 0.001 / 16, olmoe.rms_norm_eps = 1e-5;
    p.push_back({"olmoe-1b-7b-size", olmoe});

    ModelConfig qwen = model(48, 2048, 32, 4, 128, 151936, 128, 8, 768);
    qwen.tied = false;
    qwen.aux_coef = 0.001 * 8 / 48, qwen.z_coef = 0, qwen.rope_theta = 1e6;
    p.push_back({"qwen3-30b-a3b", qwen});

    ModelConfig mixtral = model(32, 4096, 32, 8, 128, 32000, 8, 2, 14336);
    mixtral.qk_norm = mixtral.tied = false;
    mixtral.aux_coef = 0.02 * 2 / 32, mixtral.z_coef = 0, mixtral.rope_theta = 1e6, mixtral.rms_norm_eps = 1e-5;
    p.push_back({"mixtral-8x7b", mixtral});
    return p;
  }();
  return all;
}

template <class T>
T parse(const char* option, const std::string& s, std::initializer_list<T> all) {
  std::string choices;
  for (T t : all) {
    if (s == name_of(t)) return t;
    choices += std::string(choices.empty() ? "" : ", ") + name_of(t);
  }
  fail(option, " '", s, "' is not one of ", choices);
}
}  // namespace

ModelConfig preset(const std::string& name) {
  std::string known;
  for (const Preset& p : presets()) {
    if (p.name == name) return p.config;
    known += std::string(known.empty() ? "" : ", ") + p.name;
  }
  fail("--preset '", name, "' is not known; choose one of ", known);
}

std::string preset_of(const ModelConfig& c) {
  for (Preset p : presets()) {
    p.config.balance = c.balance, p.config.balance_scope = c.balance_scope;
    p.config.aux_coef = c.aux_coef, p.config.z_coef = c.z_coef, p.config.bias_rate = c.bias_rate;
    if (p.config == c) return p.name;
  }
  return "";
}

const char* name_of(Gate g) { return g == Gate::softmax ? "softmax" : "sigmoid"; }
const char* name_of(Balance b) { return b == Balance::aux ? "aux" : b == Balance::bias ? "bias" : "none"; }
const char* name_of(BalanceScope s) { return s == BalanceScope::microbatch ? "microbatch" : "sequence"; }
Gate parse_gate(const std::string& s) { return parse("--gate", s, {Gate::softmax, Gate::sigmoid}); }
Balance parse_balance(const std::string& s) {
  return parse("--balance", s, {Balance::aux, Balance::bias, Balance::none});
}
BalanceScope parse_balance_scope(const std::string& s) {
  return parse("--balance-scope", s, {BalanceScope::microbatch, BalanceScope::sequence});
}
