#include "llmc/adamw.h"

#include "llmc/cpu_math.h"

template <class Device>
void adamw(Device&, const ParameterView<Device>* views, const StepParams* params, const StepStats* stats,
           int64_t n_views, AdamWConfig config) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  if (stats->skip) return;
  Acc lr = Acc(params->learning_rate), clip = Acc(stats->clip);
  Acc b1 = Acc(config.beta1), b2 = Acc(config.beta2), eps = Acc(config.eps);
  Acc correct1 = Acc(1.0 / (1.0 - std::pow(config.beta1, double(params->step))));
  Acc correct2 = Acc(1.0 / (1.0 - std::pow(config.beta2, double(params->step))));
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < n_views; ++i) {
    const ParameterView<Device>& p = views[i];
    Acc decay = p.decay ? Acc(config.weight_decay) : Acc(0);
    for (int64_t row = 0; row < p.rows; ++row) {
      int64_t at = p.map(row) * p.cols;
      Acc *m = p.m + at, *v = p.v + at, *master = p.master + at;
      const Acc* second = p.second_grad ? static_cast<const Acc*>(p.second_grad.data) + at : nullptr;
      p.grad.visit([&](const auto* grad) {
        for (int64_t c = 0; c < p.cols; ++c) {
          Acc g = clip * (Acc(grad[at + c]) + (second ? second[c] : Acc(0)));
          m[c] = b1 * m[c] + (1 - b1) * g;
          v[c] = b2 * v[c] + (1 - b2) * g * g;
          master[c] -= lr * (m[c] * correct1 / (std::sqrt(v[c] * correct2) + eps) + decay * master[c]);
          if constexpr (!std::is_same_v<Real, Acc>) p.weight[at + c] = Real(master[c]);
        }
      });
    }
  }
}

#define INSTANTIATE(Real)                                                                                        \
  template void adamw(Cpu<Real>&, const ParameterView<Cpu<Real>>*, const StepParams*, const StepStats*, int64_t, \
                      AdamWConfig);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
