#include "moe/op_work.h"

#include <algorithm>
#include <set>

#include "moe/tensor_parallel.h"

double OpWork::floor_ms(double flops_per_s, double bytes_per_s) const {
  return 1e3 * std::max(flops / flops_per_s, bytes / bytes_per_s);
}

OpWorks::OpWorks(const ModelConfig& c, const RunOptions& run, const Plan& plan, size_t real_bytes)
    : config_(c), plan_(plan), N_(double(run.B * run.T)), C_(double(c.d_model)), tp_(run.parallel.layout.tp) {
  const ExpertRanks ranks = run.expert_ranks(c);
  const HeadShape heads = c.heads(tp_);
  const double real = double(real_bytes), n = N_ / tp_, R = double(ranks.share()),
               F = double(c.d_expert / run.parallel.layout.etp), E = double(c.n_expert), row = C_ * real;
  const double vocabulary = double(vocabulary_part(c, tp_, run.parallel.here.tp).padded);

  // Causal: half of the T x T scores, in two products forward and five backward.
  const double attention = 2 * N_ * double(run.T) * double(heads.q_width());
  flops_ = {{"attention", attention},
            {"attention backward", 2.5 * attention},
            {"router", 2 * n * C_ * E},
            {"router backward", 4 * n * C_ * E}};
  flops_["classifier"] = 6 * N_ * C_ * vocabulary;  // logits, and the gradients of both factors
  for (const char* pass : {"", " dW", " dX"}) {
    flops_[std::string("qkv") + pass] = 2 * N_ * C_ * double(heads.qkv_width());
    flops_[std::string("attention out") + pass] = 2 * N_ * C_ * double(heads.q_width());
  }
  for (const char* name : {"experts up", "experts dW13", "experts dX"}) flops_[name] = 4 * R * C_ * F;
  for (const char* name : {"experts down", "experts down backward", "experts dW2"}) flops_[name] = 2 * R * C_ * F;

  // What reads some rows of a tensor alone, or finds its tensors in a table.
  bytes_ = {{"embedding", 2 * N_ * row}, {"embedding backward", N_ * row}, {"gather", 2 * R * row}};
  const double optimizer = double(plan.category_bytes(Category::optimizer)),
               weights = double(plan.category_bytes(Category::weights)),
               gradients = double(plan.category_bytes(Category::gradients));
  if (run.parallel.alone()) {
    bytes_["global norm"] = gradients;
    bytes_["adamw"] = 2 * optimizer + weights + gradients;
  } else {  // of the rows that are at home here: moments, master weights, sums of gradients, all of 4 bytes or of 8
    const double wide = real_bytes == 8 ? 8 : 4, elements = optimizer / (3 * wide);
    bytes_["global norm"] = elements * wide;
    bytes_["adamw"] = 2 * optimizer + elements * (wide + real);
  }
}

double OpWorks::mlp_flops(const std::string& op, int layer) const {
  const double width = double((config_.is_dense(layer) ? config_.d_dense : config_.d_shared) / tp_);
  if (op == "mlp up" || op == "mlp up dW" || op == "mlp up dX") return 4 * N_ * C_ * width;
  if (op == "mlp down" || op == "mlp down dW" || op == "mlp down dX") return 2 * N_ * C_ * width;
  return 0;
}

OpWork OpWorks::operator()(const PlannedOp& op) const {
  const std::string name = op.name;
  if (op.extra || communicates(name)) return {};
  auto in = [&](const std::map<std::string, double>& table, double otherwise) {
    auto found = table.find(name);
    return found == table.end() ? otherwise : found->second;
  };
  return {in(flops_, op.layer >= 0 ? mlp_flops(name, op.layer) : 0), in(bytes_, double(op.bytes))};
}

OpWorks::Operations OpWorks::operations() const {
  Operations sum;
  const auto& programs = plan_.programs();
  int slots = 0;  // a pipeline stage's: each has the same ops
  for (size_t p = 0; p < programs.size(); ++p) {
    if (programs[p].name == "evaluation" || programs[p].name == "decoding") continue;
    slots += programs[p].name == "backward";
    const int64_t end = p + 1 < programs.size() ? programs[p + 1].first : plan_.ticks();
    for (int64_t t = programs[p].first; t < end; ++t) {
      const PlannedOp& op = plan_.ops()[size_t(t)];
      (op.recomputing ? sum.recomputed : sum.step) += (*this)(op).flops;
    }
  }
  if (slots > 0) sum.step /= slots, sum.recomputed /= slots;
  return sum;
}

bool communicates(const std::string& op) {
  static const std::set<std::string> names{
      "gather tokens", "sum partial rows", "gather choices",     "sum statistics", "to experts",
      "from experts",  "gate gradients",   "fetch tokens",       "fetch sums",     "fetch gate gradients",
      "meet",          "sum over ranks",   "exchange gradients", "return weights", "pass activations"};
  return names.contains(op);
}
