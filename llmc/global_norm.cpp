#include "llmc/global_norm.h"

#include "llmc/cpu_math.h"

template <class Device>
void global_norm_partials(Device&, typename Device::Acc* partials, const ParameterView<Device>* views,
                          int64_t n_views) {
  using Acc = typename Device::Acc;
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < n_views; ++i) {
    const ParameterView<Device>& p = views[i];
    for (int64_t r0 = 0; r0 < p.rows; r0 += norm_block_rows) {
      Acc sum = 0;
      for (int64_t row = r0; row < std::min(p.rows, r0 + norm_block_rows); ++row) {
        int64_t at = p.map(row) * p.cols;
        const Acc* second = p.second_grad ? static_cast<const Acc*>(p.second_grad.data) + at : nullptr;
        p.grad.visit([&](const auto* grad) {
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < p.cols; ++c) {
            Acc g = Acc(grad[at + c]) + (second ? second[c] : Acc(0));
            sum += g * g;
          }
        });
      }
      partials[p.first_partial + r0 / norm_block_rows] = sum;
    }
  }
}

namespace {
// Standard deviations that `value` lies above the mean of the window; 0 until the window is full.
double z_score(const double* window, int64_t count, double value) {
  if (count < OutlierState::window) return 0;
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < OutlierState::window; ++i) sum += window[i];
  double mean = sum / OutlierState::window;
  for (int64_t i = 0; i < OutlierState::window; ++i) squares += (window[i] - mean) * (window[i] - mean);
  double deviation = std::sqrt(squares / OutlierState::window);
  return deviation > 0 ? (value - mean) / deviation : 0;
}
}  // namespace

template <class Device>
void update_decision(Device&, StepStats* stats, OutlierState* outliers, const typename Device::Acc* partials,
                     const ParameterView<Device>* views, int64_t n_views, int64_t n_partials, UpdateRules rules) {
  double sum = 0;
  for (int64_t i = 0; i < n_views; ++i) {
    int64_t end = i + 1 < n_views ? views[i + 1].first_partial : n_partials;
    double tensor = 0;
    for (int64_t j = views[i].first_partial; j < end; ++j) tensor += double(partials[j]);
    if (!std::isfinite(tensor) && stats->bad_tensor == -1) stats->bad_tensor = int32_t(i);
    sum += tensor;
  }
  stats->grad_norm = std::sqrt(sum);
  stats->clip = rules.clip_norm > 0 && stats->grad_norm > rules.clip_norm ? rules.clip_norm / stats->grad_norm : 1.0;
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

#define INSTANTIATE(Real)                                                                                    \
  template void global_norm_partials(Cpu<Real>&, Cpu<Real>::Acc*, const ParameterView<Cpu<Real>>*, int64_t); \
  template void update_decision(Cpu<Real>&, StepStats*, OutlierState*, const Cpu<Real>::Acc*,                \
                                const ParameterView<Cpu<Real>>*, int64_t, int64_t, UpdateRules);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
