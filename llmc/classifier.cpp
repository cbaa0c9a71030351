#include "llmc/classifier.h"

#include "llmc/cpu_math.h"

template <class Device>
void cross_entropy(Device& dev, typename Device::Acc* losses, typename Device::Real* logits, const int32_t* targets,
                   const StepParams* params, int64_t first, int64_t n, int64_t V, int64_t Vp, bool gradient) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  Acc scale = Acc(params->loss_scale);
#pragma omp parallel for
  for (int64_t i = 0; i < n; ++i) {
    Real* row = logits + i * Vp;
    int64_t target = targets[i];
    if (target >= V || target < -1) {
#pragma omp critical
      dev.fault(DeviceStatus::token_out_of_range, first + i, target);
      target = -1;
    }
    if (target < 0) {
      losses[i] = 0;
      if (gradient) std::fill_n(row, Vp, Real(0));
      continue;
    }
    Acc maximum = Acc(row[0]), sum = 0;
    for (int64_t v = 1; v < V; ++v) maximum = Acc(row[v]) > maximum ? Acc(row[v]) : maximum;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < V; ++v) sum += exp_of(Acc(row[v]) - maximum);
    losses[i] = std::log(sum) + (maximum - Acc(row[target]));
    if (!gradient) continue;
    Acc factor = scale / sum, at_target = exp_of(Acc(row[target]) - maximum) * factor - scale;
    for (int64_t v = 0; v < V; ++v) row[v] = Real(exp_of(Acc(row[v]) - maximum) * factor);
    row[target] = Real(at_target);
    std::fill(row + V, row + Vp, Real(0));
  }
}

template <class Device>
void loss_sum(Device&, StepStats* stats, const typename Device::Acc* losses, const StepParams* params, int64_t N) {
  double sum = 0;
  for (int64_t n = 0; n < N; ++n) sum += double(losses[n]);
  if (!std::isfinite(sum)) stats->bad_tensor = -2;
  stats->loss += sum * params->loss_scale;
}

#define INSTANTIATE(Real)                                                                                              \
  template void cross_entropy(Cpu<Real>&, Cpu<Real>::Acc*, Real*, const int32_t*, const StepParams*, int64_t, int64_t, \
                              int64_t, int64_t, bool);                                                                 \
  template void loss_sum(Cpu<Real>&, StepStats*, const Cpu<Real>::Acc*, const StepParams*, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
