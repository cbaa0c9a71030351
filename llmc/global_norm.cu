// The gradient norm on the GPU, and the decision that follows from it: one block decides, so that nothing waits for the
// host.
#include "llmc/global_norm.h"

#include "llmc/cuda_views.cuh"

namespace {

template <class Device>
__global__ void __launch_bounds__(view_threads)
    norm_partials(float* partials, const ParameterView<Device>* views, int64_t n_views) {
  int64_t blocks = view_blocks(views, n_views);
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    const ParameterView<Device> p = views[view_of_block(views, n_views, b)];
    float sum = 0;
    auto add = [&]<int W>() {
      each_piece<W>(p, b, [&](int64_t at) {
        float g[W];
        load_gradient<W>(g, p, at);
#pragma unroll
        for (int i = 0; i < W; ++i) sum += g[i] * g[i];
      });
    };
    if (p.cols % 8 == 0)
      add.template operator()<8>();
    else
      add.template operator()<1>();
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[b] = sum;
  }
}

template <class Device>
__global__ void __launch_bounds__(1024)
    decide(StepStats* stats, OutlierState* outliers, const float* partials, const ParameterView<Device>* views,
           int64_t n_views, int64_t n_partials, UpdateRules rules) {
  __shared__ int bad;
  if (threadIdx.x == 0) bad = INT_MAX;
  __syncthreads();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double sum = 0;
  for (int64_t i = warp; i < n_views; i += 32) {  // a warp a tensor
    int64_t end = i + 1 < n_views ? views[i + 1].first_partial : n_partials;
    double tensor = 0;
    for (int64_t j = views[i].first_partial + lane; j < end; j += 32) tensor += double(partials[j]);
    tensor = warp_sum(tensor);
    if (lane > 0) continue;
    if (!isfinite(tensor)) atomicMin(&bad, int(i));
    sum += tensor;
  }
  sum = block_sum(sum);
  if (threadIdx.x > 0) return;
  if (bad != INT_MAX && stats->bad_tensor == -1) stats->bad_tensor = bad;
  decide_update(stats, outliers, sum, rules);
}

}  // namespace

template <class Device>
void global_norm_partials(Device& dev, typename Device::Acc* partials, const ParameterView<Device>* views,
                          int64_t n_views) {
  launch(dev, norm_partials<Device>, view_grid(dev), view_threads, 0, partials, views, n_views);
}

template <class Device>
void update_decision(Device& dev, StepStats* stats, OutlierState* outliers, const typename Device::Acc* partials,
                     const ParameterView<Device>* views, int64_t n_views, int64_t n_partials, UpdateRules rules) {
  launch(dev, decide<Device>, 1, 1024, 0, stats, outliers, partials, views, n_views, n_partials, rules);
}

#define INSTANTIATE(Real)                                                                                             \
  template void global_norm_partials(Gpu<Real>&, float*, const ParameterView<Gpu<Real>>*, int64_t);                   \
  template void update_decision(Gpu<Real>&, StepStats*, OutlierState*, const float*, const ParameterView<Gpu<Real>>*, \
                                int64_t, int64_t, UpdateRules);
INSTANTIATE(float)
INSTANTIATE(bf16)
