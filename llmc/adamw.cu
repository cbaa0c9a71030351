// AdamW on the GPU: one launch for all parameters, or some.
#include "llmc/adamw.h"

#include "llmc/cuda_views.cuh"

namespace {

struct Coefficients {
  float lr, clip, b1, b2, correct1, correct2, eps;
};

template <int W, class Device>
__device__ void update_block(const ParameterView<Device>& p, int64_t b, const Coefficients& k, float decay) {
  using Real = typename Device::Real;
  each_piece<W>(p, b, [&](int64_t at) {
    float g[W];
    load_gradient<W>(g, p, at);
    auto m = load_piece<W>(p.m + at), v = load_piece<W>(p.v + at), master = load_piece<W>(p.master + at);
    PieceOf<Real, W> weight;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      float gi = k.clip * g[i];
      m.v[i] = k.b1 * m.v[i] + (1 - k.b1) * gi;
      v.v[i] = k.b2 * v.v[i] + (1 - k.b2) * gi * gi;
      float step = m.v[i] * k.correct1 / (sqrtf(v.v[i] * k.correct2) + k.eps) + decay * master.v[i];
      master.v[i] -= k.lr * step;
      weight.v[i] = from_float<Real>(master.v[i]);
    }
    store_piece<W>(p.m + at, m), store_piece<W>(p.v + at, v), store_piece<W>(p.master + at, master);
    if constexpr (!std::is_same_v<Real, float>) store_piece<W>(p.weight + at, weight);
  });
}

template <class Device>
__global__ void __launch_bounds__(view_threads)
    adamw_kernel(const ParameterView<Device>* views, const StepParams* params, const StepStats* stats, int64_t n_views,
                 AdamWConfig config) {
  if (stats->skip) return;
  Coefficients k;
  k.lr = float(params->learning_rate), k.clip = float(stats->clip);
  k.b1 = float(config.beta1), k.b2 = float(config.beta2), k.eps = float(config.eps);
  k.correct1 = float(1.0 / (1.0 - pow(config.beta1, double(params->step))));
  k.correct2 = float(1.0 / (1.0 - pow(config.beta2, double(params->step))));
  if (n_views == 0) return;
  int64_t blocks = view_blocks(views, n_views);
  for (int64_t b = views[0].first_block + blockIdx.x; b < blocks; b += gridDim.x) {
    const ParameterView<Device> p = views[view_of_block(views, n_views, b)];
    float decay = p.decay ? float(config.weight_decay) : 0.0f;
    if (p.cols % 4 == 0)
      update_block<4>(p, b, k, decay);
    else
      update_block<1>(p, b, k, decay);
  }
}

}  // namespace

template <class Device>
void adamw(Device& dev, const ParameterView<Device>* views, const StepParams* params, const StepStats* stats,
           int64_t n_views, AdamWConfig config) {
  launch(dev, adamw_kernel<Device>, view_grid(dev), view_threads, 0, views, params, stats, n_views, config);
}

template void adamw(Gpu<float>&, const ParameterView<Gpu<float>>*, const StepParams*, const StepStats*, int64_t,
                    AdamWConfig);
template void adamw(Gpu<bf16>&, const ParameterView<Gpu<bf16>>*, const StepParams*, const StepStats*, int64_t,
                    AdamWConfig);
