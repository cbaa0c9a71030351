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

template <class Device>
void update_decision(Device&, StepStats* stats, OutlierState* outliers, const typename Device::Acc* partials,
                     const int64_t* first_partials, int64_t n_tensors, UpdateRules rules) {
  double sum = 0;
  for (int64_t i = 0; i < n_tensors; ++i) {
    double tensor = 0;
    for (int64_t j = first_partials[i]; j < first_partials[i + 1]; ++j) tensor += double(partials[j]);
    if (!std::isfinite(tensor) && stats->bad_tensor == -1) stats->bad_tensor = int32_t(i);
    sum += tensor;
  }
  decide_update(stats, outliers, sum, rules);
}

#define INSTANTIATE(Real)                                                                                              \
  template void global_norm_partials(Cpu<Real>&, Cpu<Real>::Acc*, const ParameterView<Cpu<Real>>*, int64_t);           \
  template void update_decision(Cpu<Real>&, StepStats*, OutlierState*, const Cpu<Real>::Acc*, const int64_t*, int64_t, \
                                UpdateRules);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
