// The MoE layer as other programs call it (library/gpt_moe.h), on a GPU: at most twice as far from double precision as the CPU
// in the same type, and the same bits again.
#include "dev/test/gpu_test.h"
#include "dev/test/library_test.h"

namespace {

using GpuLibrary = GpuTest;

double apart(const LayerValues::Values& a, const LayerValues::Values& truth) {
  double squares = 0, of = 0;
  for (size_t i = 0; i < truth.size(); ++i) squares += std::pow(a[i] - truth[i], 2), of += truth[i] * truth[i];
  return std::sqrt(squares / of);
}

template <class Real>
void as_good_as_the_cpu(moe::LayerConfig c) {
  Cpu<double> exact;
  Cpu<Real> cpu;
  LayerValues truth(c), on_cpu(c), on_gpu(c), again(c);
  run_layer(exact, c, truth), run_layer(cpu, c, on_cpu);
  c.place = moe::Place::cuda;
  run_layer(gpu<Real>(), c, on_gpu), run_layer(gpu<Real>(), c, again);
  ASSERT_EQ(on_gpu.load, truth.load) << "a tie was broken: choose other inputs";
  using V = LayerValues;
  for (auto part : {&V::out, &V::dx, &V::d_router, &V::d_w13, &V::d_w2, &V::losses}) {
    EXPECT_LE(apart(on_gpu.*part, truth.*part), 2 * apart(on_cpu.*part, truth.*part) + 1e-6);
    EXPECT_EQ(on_gpu.*part, again.*part);
  }
}

moe::LayerConfig small() {
  moe::LayerConfig c;
  c.tokens = 200, c.d_model = 128, c.d_expert = 64, c.n_expert = 8, c.top_k = 2, c.aux_coef = 0.01, c.z_coef = 0.001;
  return c;
}

TEST_F(GpuLibrary, Small) {
  as_good_as_the_cpu<bf16>(small());
  as_good_as_the_cpu<float>(small());
}
TEST_F(GpuLibrary, WrittenGradientsOfTheWeightsTypeSmall) {
  moe::LayerConfig c = small();
  c.wide_gradients = c.add_gradients = false;
  c.recompute = moe::Recompute::up;
  as_good_as_the_cpu<bf16>(c);
}

}  // namespace
