// The classifier: logits and cross-entropy in chunks of tokens, so that the (N,V) logits never exist. Training turns
// the logits of a chunk into their gradient in place and finishes with the chunk before it starts the next.
#pragma once
#include "llmc/matmul.h"
#include "llmc/step.h"

// Of n rows of logits (n,Vp), columns [V,Vp) being padding: losses (n) Acc = logsumexp(row) - row[target], 0 where the
// target is -1 (ignored). With `gradient`, logits become (softmax - onehot) * params->loss_scale, 0 for ignored rows
// and padding. The maximum is subtracted first; sums are Acc.
// Errors: a target outside [-1,V) sets DeviceStatus::token_out_of_range; row 0 is token `first` of the micro-batch.
template <class Device>
void cross_entropy(Device& dev, typename Device::Acc* losses, typename Device::Real* logits, const int32_t* targets,
                   const StepParams* params, int64_t first, int64_t n, int64_t V, int64_t Vp, bool gradient);

// stats->loss += params->loss_scale * sum of losses (N), in a fixed order; a non-finite loss sets stats->bad_tensor -2.
template <class Device>
void loss_sum(Device& dev, StepStats* stats, const typename Device::Acc* losses, const StepParams* params, int64_t N);

// Losses (N) of x (N,C) through weight (Vp,C); with dx not null also dx (N,C) = and dweight (Vp,C) += in Acc. Each
// chunk adds to dweight by itself, so a caller that accumulates over micro-batches hands in a zeroed buffer.
//   scratch: classifier_scratch_bytes; chunk: tokens at a time
template <class Device>
void classifier(Device& dev, typename Device::Acc* losses, typename Device::Real* dx, typename Device::Acc* dweight,
                void* scratch, const typename Device::Real* x, const typename Device::Real* weight,
                const int32_t* targets, const StepParams* params, int64_t N, int64_t C, int64_t V, int64_t Vp,
                int64_t chunk) {
  using Real = typename Device::Real;
  Real* logits = static_cast<Real*>(scratch);  // (chunk, Vp), then what the products need
  size_t logits_bytes = (size_t(chunk * Vp) * sizeof(Real) + 255) / 256 * 256;
  void* product = static_cast<char*>(scratch) + logits_bytes;
  for (int64_t n0 = 0; n0 < N; n0 += chunk) {
    int64_t n = N - n0 < chunk ? N - n0 : chunk;
    matmul_forward(dev, logits, product, x + n0 * C, weight, n, C, Vp);
    cross_entropy(dev, losses + n0, logits, targets + n0, params, n0, n, V, Vp, dx != nullptr);
    if (!dx) continue;
    matmul_backward_input(dev, dx + n0 * C, product, logits, weight, n, C, Vp);
    matmul_backward_weight(dev, Grad<Device>{dweight, true}, product, logits, x + n0 * C, n, C, Vp);
  }
}
template <class Device>
size_t classifier_scratch_bytes(int64_t C, int64_t Vp, int64_t chunk) {
  return (size_t(chunk * Vp) * sizeof(typename Device::Real) + 255) / 256 * 256 +
         matmul_scratch_bytes<Device>(chunk, C, Vp);
}
