// The classifier over the ranks' parts of the vocabulary on the GPU: a block a row of logits, once for its sums and once
// for its gradient.
#include "llmc/vocabulary.h"

#include "llmc/cuda_common.cuh"

namespace {

constexpr int threads = 512;

__global__ void number_rows(int32_t* rows, const int32_t* tokens, int64_t N, VocabularyPart part, DeviceStatus* status,
                            int layer) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= N) return;
  const int64_t id = tokens[n], row = id - part.first;
  if (id < 0 || id >= part.V) report_fault(status, layer, DeviceStatus::token_out_of_range, n, id);
  rows[n] = int32_t(id >= 0 && row >= 0 && row < part.rows ? row : part.padded - 1);
}

template <class Real, int W>
struct alignas(sizeof(Real) * W) Chunk {
  Real v[W];
};

// Maximum and sum as in streaming softmax.
template <class Real, int W>
__global__ void __launch_bounds__(threads)
    row_sums(float* sums, const Real* logits, const int32_t* targets, int64_t first, VocabularyPart part,
             DeviceStatus* status, int layer) {
  const Real* row = logits + int64_t(blockIdx.x) * part.padded;
  const auto* chunks = reinterpret_cast<const Chunk<Real, W>*>(row);
  const int64_t target = targets[blockIdx.x], here = target - part.first;
  float* out = sums + int64_t(blockIdx.x) * 3;
  const bool outside = target >= part.V || target < -1;
  if (outside && threadIdx.x == 0)
    report_fault(status, layer, DeviceStatus::token_out_of_range, first + blockIdx.x, target);
  if (outside || target < 0 || part.rows == 0) {
    if (threadIdx.x < 3) out[threadIdx.x] = 0;
    return;
  }
  const int rows = int(part.rows);
  float maximum = -INFINITY, sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i * W < rows; i += threads) {
    const Chunk<Real, W> c = chunks[i];
    float x[W], largest = maximum;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      x[j] = i * W + j < rows ? to_float(c.v[j]) : -INFINITY;
      largest = x[j] > largest ? x[j] : largest;
    }
    const float shift = largest == -INFINITY ? 0 : largest;  // -inf - -inf is not a number
    if (largest > maximum) sum *= __expf(maximum - shift);
#pragma unroll
    for (int j = 0; j < W; ++j) sum += __expf(x[j] - shift);
    maximum = largest;
  }
  const float all = block_max(maximum);
  const float total = block_sum(sum == 0 ? 0.0f : sum * __expf(maximum - all));
  if (threadIdx.x > 0) return;
  out[0] = all, out[1] = total, out[2] = here >= 0 && here < part.rows ? to_float(row[here]) : 0;
}

template <class Real, int W>
__global__ void __launch_bounds__(threads)
    finish_rows(float* losses, Real* logits, const float* sums, const int32_t* targets, const StepParams* params,
                int ranks, VocabularyPart part, bool gradient) {
  auto* chunks = reinterpret_cast<Chunk<Real, W>*>(logits + int64_t(blockIdx.x) * part.padded);
  const int64_t target = targets[blockIdx.x];
  const bool ignored = target < 0 || target >= part.V;
  auto of_rank = [&](int r) { return sums + (int64_t(r) * gridDim.x + blockIdx.x) * 3; };
  float maximum = of_rank(0)[0], sum = 0, at_target = 0;
  for (int r = 1; r < ranks; ++r)
    if (of_rank(r)[1] != 0 && of_rank(r)[0] > maximum) maximum = of_rank(r)[0];
  for (int r = 0; r < ranks; ++r) {
    if (of_rank(r)[1] != 0) sum += of_rank(r)[1] * __expf(of_rank(r)[0] - maximum);
    at_target += of_rank(r)[2];
  }
  if (threadIdx.x == 0) losses[blockIdx.x] = ignored ? 0 : logf(sum) + (maximum - at_target);
  if (!gradient) return;
  const float scale = float(params->loss_scale), factor = scale / sum;
  const int here = int(target - part.first), rows = ignored ? 0 : int(part.rows), n_chunks = int(part.padded / W);
#pragma unroll 4
  for (int i = threadIdx.x; i < n_chunks; i += threads) {
    Chunk<Real, W> c = chunks[i];
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const int v = i * W + j;
      float d = __expf(to_float(c.v[j]) - maximum) * factor;
      if (v == here) d -= scale;
      c.v[j] = from_float<Real>(v < rows ? d : 0);
    }
    chunks[i] = c;
  }
}

}  // namespace

template <class Device>
void vocabulary_rows(Device& dev, int32_t* rows, const int32_t* tokens, int64_t N, VocabularyPart part) {
  launch(dev, number_rows, dim3(unsigned(ceil_div(N, 256))), 256, 0, rows, tokens, N, part, dev.status, dev.layer);
}

template <class Device>
void cross_entropy_sums(Device& dev, typename Device::Acc* sums, const typename Device::Real* logits,
                        const int32_t* targets, int64_t first, int64_t n, VocabularyPart part) {
  using Real = typename Device::Real;
  auto kernel = packable<Real>(part.padded, logits) ? row_sums<Real, Pack<Real>::n> : row_sums<Real, 1>;
  launch(dev, kernel, dim3(unsigned(n)), threads, 0, sums, logits, targets, first, part, dev.status, dev.layer);
}

template <class Device>
void cross_entropy_of_part(Device& dev, typename Device::Acc* losses, typename Device::Real* logits,
                           const typename Device::Acc* sums, const int32_t* targets, const StepParams* params,
                           int64_t n, int ranks, VocabularyPart part, bool gradient) {
  using Real = typename Device::Real;
  auto kernel = packable<Real>(part.padded, logits) ? finish_rows<Real, Pack<Real>::n> : finish_rows<Real, 1>;
  launch(dev, kernel, dim3(unsigned(n)), threads, 0, losses, logits, sums, targets, params, ranks, part, gradient);
}

#define INSTANTIATE(Real)                                                                                              \
  template void vocabulary_rows(Gpu<Real>&, int32_t*, const int32_t*, int64_t, VocabularyPart);                        \
  template void cross_entropy_sums(Gpu<Real>&, float*, const Real*, const int32_t*, int64_t, int64_t, VocabularyPart); \
  template void cross_entropy_of_part(Gpu<Real>&, float*, Real*, const float*, const int32_t*, const StepParams*,      \
                                      int64_t, int, VocabularyPart, bool);
INSTANTIATE(float)
INSTANTIATE(bf16)
