// What changes from step to step lives in device memory, so that a captured graph can be replayed: the host writes
// StepParams before a step, the device decides (clip, skip) and writes StepStats, the host reads them afterwards.
#pragma once
#include <cstdint>

struct StepParams {
  double learning_rate = 0;
  int64_t step = 0;       // 1 for the first update: AdamW's bias correction
  double loss_scale = 1;  // 1 / tokens of the global batch
  // 1 / micro-steps of the global batch, of every rank by itself: balance and z losses are averaged over them.
  double micro_step_scale = 1;
};

struct StepStats {
  // sums over the micro-steps of a step; zeroed by the first
  double loss = 0;                  // cross-entropy, divided by the global token count
  double aux_loss = 0, z_loss = 0;  // as they enter the objective: coefficient included, summed over layers
  // decided by update_decision()
  double grad_norm = 0;           // before clipping
  double clip = 1;                // factor on every gradient
  int32_t skip = 0;               // 1: weights, moments and bias stay as they are
  int32_t bad_tensor = -1;        // first table entry whose gradient has a NaN or Inf; -2: the loss itself; -1: none
  double loss_z = 0, norm_z = 0;  // z-scores of the outlier detector
};

// *stats as at the start of a step: no losses yet, nothing bad.
template <class Device>
void reset_stats(Device& dev, StepStats* stats);

// to (n) += from, in Acc.
template <class Device>
void add_to(Device& dev, typename Device::Acc* to, const typename Device::Acc* from, int64_t n);
