// Tensor parallelism: ranks share the tokens of a micro-batch and the matrices of attention, of dense MLPs and of the
// vocabulary (Shoeybi et al. 2019; the residual stream cut by tokens: Korthikanti et al. 2022).
//
// Rank r has the residual stream of the tokens [r*n, (r+1)*n) of N = ranks * n. Norms, residual adds, the router and what
// experts return are about these. A product whose rows are cut (qkv, gate and up, the vocabulary) reads all tokens, which
// gather() collects; one whose columns are cut (attention out, down) makes a part of every token's sum, and sum() leaves
// each rank the sums of its tokens. Backward, the gradient of the one is the other. What was gathered is not kept:
// backward gathers it again. One rank: nothing happens.
#pragma once
#include <algorithm>

#include "llmc/embedding.h"
#include "llmc/plan.h"
#include "llmc/vocabulary.h"
#include "moe/config.h"

// The ids of the vocabulary that are a rank's: ceil(V / ranks) of them, the last ranks' fewer.
inline VocabularyPart vocabulary_part(const ModelConfig& c, int ranks, int rank) {
  const int64_t V = c.vocab_size, share = (V + ranks - 1) / ranks, first = rank * share;
  if (ranks == 1) return {0, V, c.padded_vocab(), V};
  return {first, std::clamp<int64_t>(V - first, 0, share), (share + 64) / 64 * 64, V};
}

template <class Device>
struct TensorRanks {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  Executor<Device>& x;
  int64_t n, C;  // tokens of a rank, width of the residual stream
  int ranks = 1, rank = 0;
  Comm comm = {};

  int64_t N() const { return ranks * n; }

  // The rows (N,C) of all ranks.
  Tensor<Real> gather(const char* name, Tensor<Real> own) const {
    if (ranks == 1) return own;
    auto all = x.template tensor<Real>(name, {N(), C});
    x.op("gather tokens", gather_rows, comm, all, own, n * C);
    return all;
  }
  // The sum (n,C) over the ranks' partial (N,C), of this rank's tokens.
  Tensor<Real> sum(const char* name, Tensor<Real> partial, Category category = Category::workspace) const {
    if (ranks == 1) return partial;
    auto own = x.template tensor<Real>(name, {n, C}, category);
    x.op("sum partial rows", sum_rows, comm, own, partial, n * C);
    return own;
  }

  // ---- the vocabulary: ids of tokens (N), table (padded,C) ----

  // The residual stream (n,C).
  Tensor<Real> embedding(Tensor<int32_t> tokens, Tensor<Real> table, VocabularyPart part, Category category) const {
    auto out = x.template tensor<Real>(ranks == 1 ? "residual" : "embedding", {N(), C},
                                       ranks == 1 ? category : Category::workspace);
    x.op("embedding", embedding_forward<Device>, out, rows_of(tokens, part), table, N(), C,
         ranks == 1 ? part.V : part.padded);
    return sum("residual", out, category);
  }
  void embedding_backward(GradTensor<Device> dtable, Tensor<int32_t> tokens, Tensor<Real> dres,
                          VocabularyPart part) const {
    auto rows = rows_of(tokens, part);
    auto dout = gather("d embedding", dres);
    auto scratch = x.template tensor<char>("embedding.scratch",
                                           {int64_t(embedding_backward_scratch_bytes<Device>(N(), C, part.rows))});
    x.op("embedding backward", ::embedding_backward<Device>, dtable, scratch, rows, dout, N(), C, part.rows);
  }
  // stats->loss += that of this rank's tokens; losses (N), if not null, keeps those of all. With dweight the gradient
  // (n,C) of normed (n,C) is returned.
  Tensor<Real> classifier(Tensor<StepStats> stats, Tensor<Acc> losses, Tensor<Acc> dweight, Tensor<Real> normed,
                          Tensor<Real> weight, Tensor<int32_t> targets, Tensor<StepParams> params, VocabularyPart part,
                          int64_t chunk) const {
    auto all = gather("all final norm", normed);
    if (!losses) losses = x.template tensor<Acc>("losses", {N()});
    const size_t bytes = ranks == 1 ? classifier_scratch_bytes<Device>(C, part.padded, chunk)
                                    : shared_classifier_scratch_bytes<Device>(C, part.padded, chunk, ranks);
    auto scratch = x.template tensor<char>("classifier.scratch", {int64_t(bytes)});
    Tensor<Real> dall;
    if (dweight) dall = x.template tensor<Real>("d final norm", {N(), C});
    if (ranks == 1)
      x.op("classifier", ::classifier<Device>, losses, dall, dweight, scratch, all, weight, targets, params, N(), C,
           part.V, part.padded, chunk);
    else
      x.op("classifier", shared_classifier<Device>, comm, losses, dall, dweight, scratch, all, weight, targets, params,
           N(), C, chunk, part);
    x.op("loss", own_loss, stats, losses, params, rank * n, n);
    return dweight ? sum("own d final norm", dall) : dall;
  }

 private:
  Tensor<int32_t> rows_of(Tensor<int32_t> tokens, VocabularyPart part) const {
    if (ranks == 1) return tokens;
    auto rows = x.template tensor<int32_t>("vocabulary rows", {N()});
    x.op("vocabulary rows", vocabulary_rows<Device>, rows, tokens, N(), part);
    return rows;
  }
  static void gather_rows(Device&, const Comm& comm, Real* all, const Real* own, int64_t elements) {
    comm.all_gather(all, own, elements, "tokens");
  }
  static void sum_rows(Device&, const Comm& comm, Real* own, const Real* partial, int64_t elements) {
    comm.reduce_scatter(own, partial, elements, "partial sums of tokens");
  }
  static void own_loss(Device& dev, StepStats* stats, const Acc* losses, const StepParams* params, int64_t first,
                       int64_t n) {
    loss_sum(dev, stats, losses + first, params, n);
  }
};
