// Cross-entropy on the GPU: a block a row of logits. The row is read once, into shared memory where it fits, with a
// running maximum and sum (as in streaming softmax); then the gradient is written over the logits.
#include "llmc/classifier.h"

#include "llmc/cuda_common.cuh"

namespace {

constexpr int threads = 512;

template <class Real, int W>
__global__ void __launch_bounds__(threads)
    cross_entropy_rows(float* losses, Real* logits, const int32_t* targets, const StepParams* params, int64_t first,
                       int V, int Vp, bool gradient, bool in_shared, DeviceStatus* status, int layer) {
  struct alignas(sizeof(Real) * W) Chunk {
    Real v[W];
  };
  extern __shared__ __align__(16) unsigned char shared[];
  Chunk* held = reinterpret_cast<Chunk*>(shared);
  Real* row = logits + int64_t(blockIdx.x) * Vp;
  Chunk* chunks = reinterpret_cast<Chunk*>(row);
  int n_chunks = Vp / W;
  int target = targets[blockIdx.x];
  if (target >= V || target < -1) {
    if (threadIdx.x == 0) report_fault(status, layer, DeviceStatus::token_out_of_range, first + blockIdx.x, target);
    target = -1;
  }
  if (target < 0) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0;
    if (!gradient) return;
    Chunk zero;
    for (int j = 0; j < W; ++j) zero.v[j] = from_float<Real>(0);
    for (int i = threadIdx.x; i < n_chunks; i += threads) chunks[i] = zero;
    return;
  }
  float maximum = -INFINITY, sum = 0;
  constexpr int batch = 4;  // loads in flight
  for (int i0 = threadIdx.x; i0 < n_chunks; i0 += batch * threads) {
    Chunk c[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b)
      if (i0 + b * threads < n_chunks) c[b] = chunks[i0 + b * threads];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      int i = i0 + b * threads;
      if (i >= n_chunks) break;
      if (in_shared) held[i] = c[b];
      float x[W], largest = maximum;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        x[j] = i * W + j < V ? to_float(c[b].v[j]) : -INFINITY;
        largest = x[j] > largest ? x[j] : largest;
      }
      float shift = largest == -INFINITY ? 0 : largest;  // -inf - -inf is not a number
      if (largest > maximum) sum *= __expf(maximum - shift);
#pragma unroll
      for (int j = 0; j < W; ++j) sum += __expf(x[j] - shift);
      maximum = largest;
    }
  }
  float at_target = to_float(row[target]);  // before anybody overwrites it
  float all = block_max(maximum);
  float total = block_sum(sum == 0 ? 0.0f : sum * __expf(maximum - all));
  if (threadIdx.x == 0) losses[blockIdx.x] = logf(total) + (all - at_target);
  if (!gradient) return;
  float scale = float(params->loss_scale), factor = scale / total;
#pragma unroll 4
  for (int i = threadIdx.x; i < n_chunks; i += threads) {
    Chunk c = in_shared ? held[i] : chunks[i];
#pragma unroll
    for (int j = 0; j < W; ++j) {
      int v = i * W + j;
      float d = __expf(to_float(c.v[j]) - all) * factor;
      if (v == target) d -= scale;
      c.v[j] = from_float<Real>(v < V ? d : 0);
    }
    chunks[i] = c;
  }
}

__global__ void __launch_bounds__(1024)
    sum_losses(StepStats* stats, const float* losses, const StepParams* params, int64_t N) {
  double sum = 0;
  for (int64_t n = threadIdx.x; n < N; n += 1024) sum += double(losses[n]);
  sum = block_sum(sum);
  if (threadIdx.x > 0) return;
  if (!isfinite(sum)) stats->bad_tensor = -2;
  stats->loss += sum * params->loss_scale;
}

}  // namespace

template <class Device>
void cross_entropy(Device& dev, typename Device::Acc* losses, typename Device::Real* logits, const int32_t* targets,
                   const StepParams* params, int64_t first, int64_t n, int64_t V, int64_t Vp, bool gradient) {
  using Real = typename Device::Real;
  size_t bytes = size_t(Vp) * sizeof(Real);
  bool in_shared = gradient && bytes <= 112 * 1024;  // two blocks a multiprocessor of Hopper
  auto kernel = packable<Real>(Vp, logits) ? cross_entropy_rows<Real, Pack<Real>::n> : cross_entropy_rows<Real, 1>;
  if (in_shared && dev.shared_bytes_per_block < bytes + 1024)  // the reductions have some too
    in_shared = false;
  launch(dev, kernel, dim3(unsigned(n)), threads, in_shared ? bytes : 0, losses, logits, targets, params, first, int(V),
         int(Vp), gradient, in_shared, dev.status, dev.layer);
}

template <class Device>
void loss_sum(Device& dev, StepStats* stats, const typename Device::Acc* losses, const StepParams* params, int64_t N) {
  launch(dev, sum_losses, 1, 1024, 0, stats, losses, params, N);
}

#define INSTANTIATE(Real)                                                                                              \
  template void cross_entropy(Gpu<Real>&, float*, Real*, const int32_t*, const StepParams*, int64_t, int64_t, int64_t, \
                              int64_t, bool);                                                                          \
  template void loss_sum(Gpu<Real>&, StepStats*, const float*, const StepParams*, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
