// The norm of the whole gradient, and what follows from it: clipping, and whether the update happens at all. All of it
// is decided on the device, from values that every rank has.
#pragma once
#include "llmc/parameters.h"
#include "llmc/step.h"

// partials (n_partials) Acc: sum of squares of each block of 64 logical rows of each view, at view.first_partial.
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

// Sums partials in table order; writes stats->grad_norm, clip = min(1, clip_norm / norm), bad_tensor (index of the
// first view whose partials are not finite), skip, and the z-scores; updates the detector (a skipped outlier enters its
// window, a NaN does not).
template <class Device>
void update_decision(Device& dev, StepStats* stats, OutlierState* outliers, const typename Device::Acc* partials,
                     const ParameterView<Device>* views, int64_t n_views, int64_t n_partials, UpdateRules rules);
