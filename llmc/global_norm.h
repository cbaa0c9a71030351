// The norm of the whole gradient, and what follows from it: clipping, and whether the update happens at all. All of it
// is decided on the device, from values that every rank has.
#pragma once
#include <cmath>

#include "llmc/parameters.h"
#include "llmc/step.h"

// partials (n_partials) Acc: sum of squares of each block of 64 logical rows of each view, at view.first_partial. Blocks
// that no view has are left alone.
template <class Device>
void global_norm_partials(Device& dev, typename Device::Acc* partials, const ParameterView<Device>* views,
                          int64_t n_views);

// The outlier detector: a window of the last losses and gradient norms. Checkpointed, so that a resumed run decides as
// the uninterrupted one would.
struct OutlierState {
  static constexpr int64_t window = 128;
  int64_t count = 0;  // values seen; decisions start once the window is full
  double loss[window] = {}, norm[window] = {};
};

struct UpdateRules {
  double clip_norm = 1;    // 0: no clipping
  double skip_loss_z = 0;  // skip the update where the loss is more standard deviations above the window; 0: never
  double skip_norm_z = 0;  // likewise the gradient norm
};

// Sums partials in table order, those of tensor i being [first_partials[i], first_partials[i + 1]) (n_tensors + 1 values);
// writes stats->grad_norm, clip = min(1, clip_norm / norm), bad_tensor (index of the first tensor whose partials are not
// finite; -2 where the loss is not), skip, and the z-scores; updates the detector (a skipped outlier enters its window, a
// NaN does not).
template <class Device>
void update_decision(Device& dev, StepStats* stats, OutlierState* outliers, const typename Device::Acc* partials,
                     const int64_t* first_partials, int64_t n_tensors, UpdateRules rules);

// What follows from the norm, for update_decision() of every device: clip factor, skip, the detector's z-scores and its
// next state. sum: of squares; stats->bad_tensor is set.
HOST_DEVICE inline double z_score(const double* window, int64_t count, double value) {
  if (count < OutlierState::window) return 0;  // decisions start once the window is full
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < OutlierState::window; ++i) sum += window[i];
  double mean = sum / OutlierState::window;
  for (int64_t i = 0; i < OutlierState::window; ++i) squares += (window[i] - mean) * (window[i] - mean);
  double deviation = std::sqrt(squares / OutlierState::window);
  return deviation > 0 ? (value - mean) / deviation : 0;
}
HOST_DEVICE inline void decide_update(StepStats* stats, OutlierState* outliers, double sum, const UpdateRules& rules) {
  stats->grad_norm = std::sqrt(sum);
  stats->clip = rules.clip_norm > 0 && stats->grad_norm > rules.clip_norm ? rules.clip_norm / stats->grad_norm : 1.0;
  if (!std::isfinite(stats->loss)) stats->bad_tensor = -2;
  stats->skip = stats->bad_tensor != -1;
  stats->loss_z = stats->norm_z = 0;
  if (stats->skip) return;
  stats->loss_z = z_score(outliers->loss, outliers->count, stats->loss);
  stats->norm_z = z_score(outliers->norm, outliers->count, stats->grad_norm);
  if (rules.skip_loss_z > 0 && stats->loss_z > rules.skip_loss_z) stats->skip = 1;
  if (rules.skip_norm_z > 0 && stats->norm_z > rules.skip_norm_z) stats->skip = 1;
  int64_t at = outliers->count++ % OutlierState::window;
  outliers->loss[at] = stats->loss;
  outliers->norm[at] = stats->grad_norm;
}
