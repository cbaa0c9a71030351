// The router on the GPU. Two experts whose probabilities are within rounding may change places, so values are compared
// with the choice of Cpu<double> replayed, and the free choice where logits are well apart.
#include <gtest/gtest.h>

#include <set>

#include "dev/test/gpu_test.h"
#include "moe/router.h"

namespace {

template <class Real>
struct GpuRouter : GpuTest {};
TYPED_TEST_SUITE(GpuRouter, GpuReals);

struct Gpu16 : GpuTest {};

struct Options {
  RouterShape shape;
  bool bias = false;
  std::string text() const {
    return std::string(shape.gate == Gate::softmax ? "softmax" : "sigmoid") + (shape.norm_topk_prob ? " norm" : "") +
           (bias ? " bias" : "") + " N " + std::to_string(shape.N) + " C " + std::to_string(shape.C) + " E " +
           std::to_string(shape.E) + " K " + std::to_string(shape.K) + " G " + std::to_string(shape.G);
  }
};
// Every combination of gate, renormalisation, bias, and one group or `groups`.
std::vector<Options> all_options(int64_t N, int64_t C, int64_t E, int64_t K, int64_t groups) {
  std::vector<Options> all;
  for (Gate gate : {Gate::softmax, Gate::sigmoid})
    for (bool norm : {false, true})
      for (int64_t G : std::set<int64_t>{1, groups})
        for (bool bias : {false, true})
          if (gate == Gate::sigmoid || !bias) all.push_back({{N, C, E, K, G, gate, norm, 2.5, 0.3, 0.2}, bias});
  return all;
}

struct Inputs {
  std::vector<double> x, wg, bias;
  std::vector<int32_t> replay;
};
Inputs random_inputs(const Options& o) {
  const RouterShape& s = o.shape;
  return {random_values("x", s.N * s.C),
          random_values("wg", s.E * s.C, 1.5 / std::sqrt(double(s.C))),
          o.bias ? random_values("bias", s.E, 0.3) : std::vector<double>(),
          {}};
}

template <class D>
struct Routed {
  const typename D::Real *x, *wg;
  typename D::Acc *gates, *lse, *prob;
  int32_t *index, *count;
};
template <class D>
Routed<D> route(Buffers<D>& b, const RouterShape& s, const Inputs& in) {
  Routed<D> r{b.real(in.x),
              b.real(in.wg),
              b.out_acc("gates", s.N * s.K),
              b.out_acc("lse", s.N),
              b.out_acc("group_prob", s.G * s.E),
              b.out_int("index", s.N * s.K),
              b.out_int("group_count", s.G * s.E)};
  router_forward(b.dev, r.gates, r.index, r.lse, r.prob, r.count, b.scratch(router_scratch_bytes<D>(s)), r.x, r.wg,
                 in.bias.empty() ? nullptr : b.acc(in.bias), in.replay.empty() ? nullptr : b.upload(in.replay), s);
  return r;
}
std::vector<int32_t> choice(const RouterShape& s, const Inputs& in) {
  Cpu<double> dev;
  Buffers<Cpu<double>> b(dev);
  return b.read(route(b, s, in).index);
}

// All three ops. Every third slot was dropped.
template <class D>
void run_router(Buffers<D>& b, const RouterShape& s, const Inputs& in, double dgates_scale, Onto onto) {
  auto r = route(b, s, in);
  auto* params = b.params({.micro_step_scale = 0.5});
  balance_loss(b.dev, b.stats({{.loss = 1, .aux_loss = 0.25, .z_loss = 0.5}}),
               b.inout_int("load", random_ints("load", s.E, 1000)), r.prob, r.count, r.lse, params, s);
  auto dgates = random_values("dgates", s.N * s.K, dgates_scale);
  for (size_t slot = 1; slot < dgates.size(); slot += 3) dgates[slot] = 0;
  router_backward(b.dev, b.out("dx", s.N * s.C), b.grad("dwg", s.E * s.C, onto), b.scratch(router_scratch_bytes<D>(s)),
                  b.acc(dgates), r.gates, r.index, r.lse, r.count, r.x, r.wg, params, s);
}

template <class Real>
void check_router(int64_t N, int64_t C, int64_t E, int64_t K, int64_t groups) {
  int i = 0;
  for (const Options& o : all_options(N, C, E, K, groups)) {
    SCOPED_TRACE(o.text());
    Inputs in = random_inputs(o);
    in.replay = choice(o.shape, in);
    Onto onto = all_onto[i++ % 3];
    expect_calibrated<Real>([&](auto& b) { run_router(b, o.shape, in, 1, onto); });
  }
}

TYPED_TEST(GpuRouter, ReplaySmall) {
  check_router<TypeParam>(1, 8, 3, 2, 1);
  check_router<TypeParam>(6, 6, 3, 3, 3);
  check_router<TypeParam>(70, 37, 8, 2, 2);
  check_router<TypeParam>(5, 8, 128, 8, 5);
  for (Gate gate : {Gate::softmax, Gate::sigmoid}) {  // one expert; renormalised, its gate has no gradient
    RouterShape s{9, 8, 1, 1, 1, gate, gate == Gate::softmax, 2.5, 0.3, 0.2};
    expect_calibrated<TypeParam>([&](auto& b) { run_router(b, s, random_inputs({s}), 1, Onto::zeros); });
  }
}
TYPED_TEST(GpuRouter, Replay) {
  check_router<TypeParam>(140, 12, 9, 3, 2);
  check_router<TypeParam>(300, 133, 64, 6, 4);
  check_router<TypeParam>(510, 64, 128, 8, 2);
  check_router<TypeParam>(256, 768, 8, 2, 2);
  check_router<TypeParam>(200, 72, 64, 1, 1);
  check_router<TypeParam>(130, 40, 300, 5, 130);
  // Fewer experts than a padded number, and rows of more tiles than a ring has stages.
  check_router<TypeParam>(200, 264, 24, 4, 2);
  check_router<TypeParam>(130, 264, 60, 16, 2);
  check_router<TypeParam>(130, 328, 100, 8, 1);
}

// Each term of the gradient alone: none may hide behind a larger one.
TYPED_TEST(GpuRouter, EachTermOfTheGradientSmall) {
  for (int term = 0; term < 3; ++term)
    for (Options o : all_options(70, 16, 6, 2, 2)) {
      SCOPED_TRACE(o.text() + " term " + std::to_string(term));
      if (term != 1) o.shape.aux_coef = 0;
      if (term != 2) o.shape.z_coef = 0;
      Inputs in = random_inputs(o);
      in.replay = choice(o.shape, in);
      expect_calibrated<TypeParam>([&](auto& b) { run_router(b, o.shape, in, term == 0, Onto::zeros); });
    }
}

// The logits of a token are a permutation of steps of 1/16 around 0; the bias lifts every other expert above the rest.
template <class Real>
void check_free_choice(int64_t N, int64_t E, int64_t K) {
  for (Options o : all_options(N, E + 5, E, K, 1)) {
    SCOPED_TRACE(o.text());
    const RouterShape& s = o.shape;
    Inputs in = random_inputs(o);
    in.wg.assign(s.E * s.C, 0);
    for (int64_t e = 0; e < E; ++e) in.wg[e * s.C + e] = 1;
    for (int64_t e = 0; e < E && o.bias; ++e) in.bias[e] = e % 2 ? 2 : 0;
    Routing order = random_routing(N, E, E);
    for (int64_t i = 0; i < N * E; ++i) in.x[i / E * s.C + order.index[i]] = double(i % E - E / 2) / 16;
    expect_calibrated<Real>([&](auto& b) { run_router(b, s, in, 1, Onto::zeros); });
  }
}
TYPED_TEST(GpuRouter, FreeChoiceSmall) {
  check_free_choice<TypeParam>(1, 1, 1);
  check_free_choice<TypeParam>(7, 3, 2);
  check_free_choice<TypeParam>(33, 8, 8);
}
TYPED_TEST(GpuRouter, FreeChoice) {
  check_free_choice<TypeParam>(70, 3, 1);
  check_free_choice<TypeParam>(200, 8, 2);
  check_free_choice<TypeParam>(130, 64, 7);
  check_free_choice<TypeParam>(300, 128, 8);
}

TYPED_TEST(GpuRouter, TiesGoToTheLowerIndexSmall) {
  for (int64_t E : {8, 64, 128})
    for (const Options& o : all_options(5, 8, E, 4, 1)) {
      if (o.bias) continue;
      SCOPED_TRACE(o.text());
      Inputs in = random_inputs(o);
      std::fill(in.x.begin(), in.x.end(), 1);
      for (auto [first, second] : {std::pair<int64_t, int64_t>{1, E - 2}, {E - 3, 2}}) {  // two stand out, equal
        std::fill(in.wg.begin(), in.wg.end(), 0.25);
        for (int64_t e : {first, second}) std::fill_n(&in.wg[e * 8], 8, 0.5);
        for_each_kernel_choice(gpu<TypeParam>(), [&] {
          Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
          auto index = b.read(route(b, o.shape, in).index);
          for (int64_t n = 0; n < 5; ++n) {
            EXPECT_EQ(index[n * 4], std::min(first, second));
            EXPECT_EQ(index[n * 4 + 1], std::max(first, second));
            EXPECT_EQ(index[n * 4 + 2], 0);
            EXPECT_EQ(index[n * 4 + 3], std::min(first, second) == 1 ? 2 : 1);
          }
        });
      }
    }
}

TYPED_TEST(GpuRouter, NanGivesValidDistinctIndicesSmall) {
  for (const Options& o : all_options(20, 8, 5, 3, 2))
    for (bool weights : {false, true}) {
      SCOPED_TRACE(o.text());
      Inputs in = random_inputs(o);
      (weights ? in.wg[2 * 8] : in.x[7 * 8 + 1]) = std::numeric_limits<double>::quiet_NaN();
      Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
      auto r = route(b, o.shape, in);
      auto index = b.read(r.index);
      auto lse = b.read(r.lse);
      for (int64_t n = 0; n < 20; ++n) {
        std::set<int32_t> chosen(&index[n * 3], &index[n * 3] + 3);
        EXPECT_EQ(chosen.size(), 3u);
        EXPECT_TRUE(*chosen.begin() >= 0 && *chosen.rbegin() < 5);
        EXPECT_EQ(std::isnan(lse[n]), weights || n == 7) << n;
      }
    }
}

TYPED_TEST(GpuRouter, ReplayRefusesForeignExpertsSmall) {
  for (int32_t foreign : {9, -1, INT32_MAX, INT32_MIN}) {
    Options o{{140, 16, 9, 3, 2, Gate::softmax, true, 1, 0.3, 0.2}};
    Inputs in = random_inputs(o);
    in.replay = choice(o.shape, in);
    in.replay[3 * 100 + 1] = foreign;
    expect_calibrated<TypeParam>([&](auto& b) { route(b, o.shape, in); });
    Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
    auto r = route(b, o.shape, in);
    DeviceStatus status = b.status();
    EXPECT_EQ(status.code, DeviceStatus::expert_out_of_range);
    EXPECT_EQ(status.layer, 7);
    EXPECT_EQ(status.token, 100);
    EXPECT_EQ(status.value, foreign);
    for (int32_t e : b.read(r.index)) ASSERT_TRUE(e >= 0 && e < 9);
  }
}

// A replayed choice whose probability underflows: its gate is still the softmax over the chosen logits.
TYPED_TEST(GpuRouter, ReplayOfAnUnlikelyChoiceSmall) {
  RouterShape s{1, 1, 3, 2, 1, Gate::softmax, true, 1, 0, 0};
  for (std::vector<int32_t> replay : {std::vector<int32_t>{1, 2}, {1, 0}, {2, 1}}) {
    Inputs in{{1}, {904, 0, 1}, {}, replay};
    expect_calibrated<TypeParam>([&](auto& b) { route(b, s, in); });
  }
}

TYPED_TEST(GpuRouter, BiasUpdateSmall) {
  const std::vector<std::vector<int32_t>> loads = {
      {10, 2, 6, 6}, {1000000000, 1000000000, 1000000000, 1000000001}, {5}, random_ints("load", 128, 9)};
  for (const auto& load : loads)
    for (int32_t skip : {0, 1})
      expect_calibrated<TypeParam>([&](auto& b) {
        int64_t E = int64_t(load.size());
        auto* bias = b.inout_acc("bias", random_values("bias", E));
        router_bias_update(b.dev, bias, b.upload(load), b.stats({{.skip = skip}}), 0.25, E);
      });
}

TEST_F(Gpu16, RouterGradientIsRoundedOnceSmall) {
  Options o{{140, 40, 12, 3, 2, Gate::softmax, true, 1, 0.3, 0.2}};
  Inputs in = random_inputs(o);
  in.replay = choice(o.shape, in);
  const RouterShape& s = o.shape;
  expect_rounded_once(s.E * s.C, [&](auto& b, Grad<Gpu<bf16>> g) {
    auto r = route(b, s, in);
    router_backward(b.dev, b.out("dx", s.N * s.C), g, b.scratch(router_scratch_bytes<Gpu<bf16>>(s)),
                    b.acc("dgates", s.N * s.K), r.gates, r.index, r.lse, r.count, r.x, r.wg, b.params({}), s);
  });
}

}  // namespace
