// AdamW (Loshchilov and Hutter 2019, algorithm 2), all tensors in one call.
#pragma once
#include "llmc/parameters.h"
#include "llmc/step.h"

struct AdamWConfig {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
};

// For every element of every view, with g = clip * (grad + second_grad) and t = params->step:
//   m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
//   master -= lr * ( (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps) + decay * master );  weight = master rounded to Real
// views are neighbours in table order, with their first_block. Weight decay only where the view says so. Does nothing
// where stats->skip is set.
template <class Device>
void adamw(Device& dev, const ParameterView<Device>* views, const StepParams* params, const StepStats* stats,
           int64_t n_views, AdamWConfig config);
