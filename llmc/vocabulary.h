// Embedding and classifier where ranks share the vocabulary (Shoeybi et al. 2019, section 3): each has some rows of the
// matrix, and sees all tokens.
//
// Embedding: a rank looks up the tokens whose rows it has, and a row of zeros for the others, so that the sum over the
// ranks is the look-up; its gradient adds up the positions of its own tokens. Both are the ops of embedding.h on tokens
// renumbered by vocabulary_rows(). Classifier: of every token the ranks exchange three numbers instead of logits.
#pragma once
#include "llmc/classifier.h"
#include "llmc/comm.h"

// Ids [first, first + rows) of the V in all are rows [0, rows) of this rank's matrix of `padded` rows. padded > rows, and
// the rows from `rows` on are zero; `padded` is the same on every rank.
struct VocabularyPart {
  int64_t first, rows, padded, V;
};

// rows (N) int32 = the rows of tokens (N) in this rank's matrix; padded - 1 for those of other ranks.
// Errors: a token outside [0,V) sets DeviceStatus::token_out_of_range and counts as another rank's.
template <class Device>
void vocabulary_rows(Device& dev, int32_t* rows, const int32_t* tokens, int64_t N, VocabularyPart part);

// Of n rows of this rank's logits (n,padded), sums (n,3) Acc: the maximum, the sum of exp(logit - maximum), and the logit
// of the target. 0 for a target of another rank, for both sums of a rank without rows, and all of an ignored row (target
// -1). Errors: a target outside [-1,V) sets DeviceStatus::token_out_of_range; row 0 is token `first` of the micro-batch.
template <class Device>
void cross_entropy_sums(Device& dev, typename Device::Acc* sums, const typename Device::Real* logits,
                        const int32_t* targets, int64_t first, int64_t n, VocabularyPart part);

// losses and gradient as cross_entropy() makes them of whole rows, from sums (ranks,n,3), put together in the order of the
// ranks: the same losses on every rank, and the gradient of its own logits.
template <class Device>
void cross_entropy_of_part(Device& dev, typename Device::Acc* losses, typename Device::Real* logits,
                           const typename Device::Acc* sums, const int32_t* targets, const StepParams* params,
                           int64_t n, int ranks, VocabularyPart part, bool gradient);

// As classifier(), with weight and dweight (padded,C) of this rank. losses (N) are the same on every rank; dx (N,C) is
// the part of the gradient that comes from this rank's logits: the gradient is the sum over the ranks.
//   scratch: shared_classifier_scratch_bytes; chunk: tokens at a time, the same on every rank
template <class Device>
void shared_classifier(Device& dev, const Comm& comm, typename Device::Acc* losses, typename Device::Real* dx,
                       typename Device::Acc* dweight, void* scratch, const typename Device::Real* x,
                       const typename Device::Real* weight, const int32_t* targets, const StepParams* params, int64_t N,
                       int64_t C, int64_t chunk, VocabularyPart part) {
  using Acc = typename Device::Acc;
  using Real = typename Device::Real;
  const int64_t Vp = part.padded;
  const size_t classifier_bytes = classifier_scratch_bytes<Device>(C, Vp, chunk);
  Real* logits = static_cast<Real*>(scratch);
  void* product = static_cast<char*>(scratch) + classifier_bytes - matmul_scratch_bytes<Device>(chunk, C, Vp);
  Acc* sums = reinterpret_cast<Acc*>(static_cast<char*>(scratch) + (classifier_bytes + 255) / 256 * 256);
  for (int64_t n0 = 0; n0 < N; n0 += chunk) {
    const int64_t n = N - n0 < chunk ? N - n0 : chunk;
    Acc* own = sums + comm.rank() * n * 3;
    matmul_forward(dev, logits, product, x + n0 * C, weight, n, C, Vp);
    cross_entropy_sums(dev, own, logits, targets + n0, n0, n, part);
    comm.all_gather(sums, own, n * 3, "sums of the classifier");
    cross_entropy_of_part(dev, losses + n0, logits, sums, targets + n0, params, n, comm.size(), part, dx != nullptr);
    if (!dx) continue;
    matmul_backward_input(dev, dx + n0 * C, product, logits, weight, n, C, Vp);
    matmul_backward_weight(dev, Grad<Device>{dweight, true}, product, logits, x + n0 * C, n, C, Vp);
  }
}
template <class Device>
size_t shared_classifier_scratch_bytes(int64_t C, int64_t Vp, int64_t chunk, int ranks) {
  return (classifier_scratch_bytes<Device>(C, Vp, chunk) + 255) / 256 * 256 +
         size_t(ranks * chunk * 3) * sizeof(typename Device::Acc);
}
