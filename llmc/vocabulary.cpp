#include "llmc/vocabulary.h"

#include "llmc/cpu_math.h"

template <class Device>
void vocabulary_rows(Device& dev, int32_t* rows, const int32_t* tokens, int64_t N, VocabularyPart part) {
  for (int64_t n = 0; n < N; ++n) {
    const int64_t id = tokens[n], row = id - part.first;
    if (id < 0 || id >= part.V) dev.fault(DeviceStatus::token_out_of_range, n, id);
    rows[n] = int32_t(id >= 0 && row >= 0 && row < part.rows ? row : part.padded - 1);
  }
}

template <class Device>
void cross_entropy_sums(Device& dev, typename Device::Acc* sums, const typename Device::Real* logits,
                        const int32_t* targets, int64_t first, int64_t n, VocabularyPart part) {
  using Acc = typename Device::Acc;
#pragma omp parallel for
  for (int64_t i = 0; i < n; ++i) {
    const auto* row = logits + i * part.padded;
    Acc* out = sums + i * 3;
    const int64_t target = targets[i], here = target - part.first;
    std::fill_n(out, 3, Acc(0));
    if (target >= part.V || target < -1) {
#pragma omp critical
      dev.fault(DeviceStatus::token_out_of_range, first + i, target);
      continue;
    }
    if (target < 0 || part.rows == 0) continue;
    Acc maximum = Acc(row[0]), sum = 0;
    for (int64_t v = 1; v < part.rows; ++v) maximum = Acc(row[v]) > maximum ? Acc(row[v]) : maximum;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < part.rows; ++v) sum += exp_of(Acc(row[v]) - maximum);
    out[0] = maximum, out[1] = sum;
    if (here >= 0 && here < part.rows) out[2] = Acc(row[here]);
  }
}

template <class Device>
void cross_entropy_of_part(Device&, typename Device::Acc* losses, typename Device::Real* logits,
                           const typename Device::Acc* sums, const int32_t* targets, const StepParams* params,
                           int64_t n, int ranks, VocabularyPart part, bool gradient) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  const Acc scale = Acc(params->loss_scale);
#pragma omp parallel for
  for (int64_t i = 0; i < n; ++i) {
    Real* row = logits + i * part.padded;
    const int64_t target = targets[i], here = target - part.first;
    if (target < 0 || target >= part.V) {
      losses[i] = 0;
      if (gradient) std::fill_n(row, part.padded, Real(0));
      continue;
    }
    auto of_rank = [&](int r) { return sums + (r * n + i) * 3; };
    Acc maximum = of_rank(0)[0], sum = 0, at_target = 0;
    for (int r = 1; r < ranks; ++r)
      if (of_rank(r)[1] != 0 && of_rank(r)[0] > maximum) maximum = of_rank(r)[0];
    for (int r = 0; r < ranks; ++r) {
      if (of_rank(r)[1] != 0) sum += of_rank(r)[1] * exp_of(of_rank(r)[0] - maximum);
      at_target += of_rank(r)[2];
    }
    losses[i] = std::log(sum) + (maximum - at_target);
    if (!gradient) continue;
    const Acc factor = scale / sum;
    for (int64_t v = 0; v < part.rows; ++v)
      row[v] = Real(exp_of(Acc(row[v]) - maximum) * factor - (v == here ? scale : Acc(0)));
    std::fill(row + part.rows, row + part.padded, Real(0));
  }
}

#define INSTANTIATE(Real)                                                                                        \
  template void vocabulary_rows(Cpu<Real>&, int32_t*, const int32_t*, int64_t, VocabularyPart);                  \
  template void cross_entropy_sums(Cpu<Real>&, Cpu<Real>::Acc*, const Real*, const int32_t*, int64_t, int64_t,   \
                                   VocabularyPart);                                                              \
  template void cross_entropy_of_part(Cpu<Real>&, Cpu<Real>::Acc*, Real*, const Cpu<Real>::Acc*, const int32_t*, \
                                      const StepParams*, int64_t, int, VocabularyPart, bool);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
