// The router against its formulas, one token at a time; gradients with the choice held fixed; balance.
#include <gtest/gtest.h>

#include <set>

#include "dev/test/op_test.h"
#include "moe/router.h"

namespace {

template <class Real>
struct Router : ::testing::Test {};
TYPED_TEST_SUITE(Router, AllReals);

constexpr double kMicroScale = 0.5;

struct Options {
  RouterShape shape;
  bool bias = false;
  std::string text() const {
    return std::string(shape.gate == Gate::softmax ? "softmax" : "sigmoid") + (shape.norm_topk_prob ? " norm" : "") +
           (bias ? " bias" : "") + " G " + std::to_string(shape.G);
  }
};
// Every combination of gate, renormalisation, scope and bias; groups are no multiple of the block of 64 tokens.
std::vector<Options> all_options(int64_t N, int64_t C, int64_t E, int64_t K) {
  std::vector<Options> all;
  for (Gate gate : {Gate::softmax, Gate::sigmoid})
    for (bool norm : {false, true})
      for (int64_t G : {1, 2})
        for (bool bias : {false, true})
          if (gate == Gate::sigmoid || !bias) all.push_back({{N, C, E, K, G, gate, norm, 2.5, 0.3, 0.2}, bias});
  return all;
}

template <class Real>
struct RouterRun {
  using Acc = typename Cpu<Real>::Acc;
  Options o;
  DeviceStatus status;
  Cpu<Real> dev;
  std::vector<Real> x, wg;
  std::vector<Acc> bias, gates, lse, prob, dgates;
  std::vector<int32_t> index, count, load, replay;
  StepStats stats;
  StepParams params{.micro_step_scale = kMicroScale};
  std::vector<Real> dx;
  std::vector<Acc> dwg;
  explicit RouterRun(const Options& o) : o(o) {
    const RouterShape& s = o.shape;
    x = random_tensor<Real>("x", s.N * s.C), wg = random_tensor<Real>("wg", s.E * s.C, 1.5 / std::sqrt(s.C));
    if (o.bias) bias = random_tensor<Acc>("bias", s.E, 0.3);
    dgates = random_tensor<Acc>("dgates", s.N * s.K);
    load.assign(s.E, 0);
    forward();
  }
  void forward() {
    const RouterShape& s = o.shape;
    dev.status = &status;
    gates = poisoned<Acc>(s.N * s.K), lse = poisoned<Acc>(s.N), prob = poisoned<Acc>(s.G * s.E);
    index.assign(s.N * s.K, -77), count.assign(s.G * s.E, -77);
    Scratch scratch(router_scratch_bytes<Cpu<Real>>(s));
    router_forward(dev, gates.data(), index.data(), lse.data(), prob.data(), count.data(), scratch, x.data(), wg.data(),
                   o.bias ? bias.data() : nullptr, replay.empty() ? nullptr : replay.data(), s);
  }
  void losses() { balance_loss(dev, &stats, load.data(), prob.data(), count.data(), lse.data(), &params, o.shape); }
  void backward(Grad<Cpu<Real>> g) {
    dx = poisoned<Real>(o.shape.N * o.shape.C);
    Scratch scratch(router_scratch_bytes<Cpu<Real>>(o.shape));
    router_backward(dev, dx.data(), g, scratch, dgates.data(), gates.data(), index.data(), lse.data(), count.data(),
                    x.data(), wg.data(), &params, o.shape);
  }
  void backward() {
    dwg.assign(o.shape.E * o.shape.C, Acc(0));
    backward({dwg.data(), true});
  }
};

// The formulas of router.h in double; `chosen` not empty: the choice to use.
struct Literal {
  std::vector<double> gates, lse, prob;
  std::vector<int32_t> index, count;
  double aux = 0, z = 0;
  Literal(const Options& o, const std::vector<double>& x, const std::vector<double>& wg,
          const std::vector<double>& bias, const std::vector<int32_t>& chosen) {
    const RouterShape& r = o.shape;
    prob.assign(r.G * r.E, 0), count.assign(r.G * r.E, 0);
    for (int64_t n = 0; n < r.N; ++n) {
      std::vector<double> s(r.E, 0.0), p(r.E), share(r.E);
      double exps = 0, total = 0, chosen_sum = 0;
      for (int64_t e = 0; e < r.E; ++e) {
        for (int64_t c = 0; c < r.C; ++c) s[e] += x[n * r.C + c] * wg[e * r.C + c];
        exps += std::exp(s[e]);
      }
      lse.push_back(std::log(exps));
      for (int64_t e = 0; e < r.E; ++e)
        total += p[e] = r.gate == Gate::softmax ? std::exp(s[e]) / exps : 1 / (1 + std::exp(-s[e]));
      for (int64_t e = 0; e < r.E; ++e) share[e] = p[e] / total;
      std::vector<int32_t> order(r.E);
      for (int32_t e = 0; e < r.E; ++e) order[e] = e;
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        return p[a] + (bias.empty() ? 0 : bias[a]) > p[b] + (bias.empty() ? 0 : bias[b]);
      });
      if (!chosen.empty()) std::copy_n(&chosen[n * r.K], r.K, order.begin());
      for (int64_t k = 0; k < r.K; ++k) chosen_sum += p[order[k]];
      for (int64_t k = 0; k < r.K; ++k) {
        index.push_back(order[k]);
        double scale = r.gate == Gate::sigmoid ? 2.5 : 1;
        gates.push_back(scale * p[order[k]] / (r.norm_topk_prob ? chosen_sum : 1));
        ++count[n / (r.N / r.G) * r.E + order[k]];
      }
      for (int64_t e = 0; e < r.E; ++e) prob[n / (r.N / r.G) * r.E + e] += share[e];
      z += kMicroScale * r.z_coef * lse.back() * lse.back() / r.N;
    }
    double tokens = double(r.N) / r.G;
    for (int64_t i = 0; i < r.G * r.E; ++i)
      aux += kMicroScale * r.aux_coef * r.E * (count[i] / (tokens * r.K)) * (prob[i] / tokens) / r.G;
  }
};

TYPED_TEST(Router, ForwardAndLossesAreTheFormulas) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  for (const Options& o : all_options(140, 12, 9, 3)) {
    RouterRun<Real> run(o);
    run.stats = {.aux_loss = 10, .z_loss = 20};
    std::fill(run.load.begin(), run.load.end(), 1000);
    run.losses();
    Literal expected(o, converted<double>(run.x), converted<double>(run.wg), converted<double>(run.bias), {});
    EXPECT_EQ(run.index, expected.index) << o.text();
    EXPECT_EQ(run.count, expected.count) << o.text();
    EXPECT_CLOSE(run.gates, expected.gates, tolerance<Acc>()) << o.text();
    EXPECT_CLOSE(run.lse, expected.lse, tolerance<Acc>()) << o.text();
    EXPECT_CLOSE(run.prob, expected.prob, tolerance<Acc>()) << o.text();
    EXPECT_NEAR(run.stats.aux_loss - 10, expected.aux, 1e-6 * expected.aux) << o.text();
    EXPECT_NEAR(run.stats.z_loss - 20, expected.z, 1e-6 * expected.z) << o.text();
    for (int64_t e = 0; e < o.shape.E; ++e) {
      int64_t selections = 1000;
      for (int64_t g = 0; g < o.shape.G; ++g) selections += run.count[g * o.shape.E + e];
      EXPECT_EQ(run.load[e], selections);
    }
  }
}

TEST(Gradients, Router) {
  for (Options o : all_options(70, 5, 6, 2))
    for (bool dropped : {false, true}) {
      RouterRun<double> run(o);
      if (dropped)  // dropped slots hand in 0, and gates are not normalised again
        for (size_t slot = 0; slot < run.dgates.size(); slot += 3) run.dgates[slot] = 0;
      run.backward();
      auto x = run.x, wg = run.wg;
      auto objective = [&] {
        Literal at(o, x, wg, run.bias, run.index);
        return weighted_sum(at.gates, run.dgates) + at.aux + at.z;
      };
      EXPECT_LT(gradient_error(x, run.dx, objective, 60), gradient_limit) << o.text();
      EXPECT_LT(gradient_error(wg, run.dwg, objective), gradient_limit) << o.text();
    }
  // Each loss alone: no term may hide behind a larger one.
  for (int term = 0; term < 3; ++term)
    for (Options o : all_options(70, 5, 6, 2)) {
      if (term != 1) o.shape.aux_coef = 0;
      if (term != 2) o.shape.z_coef = 0;
      RouterRun<double> run(o);
      if (term != 0) std::fill(run.dgates.begin(), run.dgates.end(), 0);
      run.backward();
      auto wg = run.wg;
      auto objective = [&] {
        Literal at(o, run.x, wg, run.bias, run.index);
        return weighted_sum(at.gates, run.dgates) + at.aux + at.z;
      };
      EXPECT_LT(gradient_error(wg, run.dwg, objective), gradient_limit) << o.text() << " term " << term;
    }
}

TYPED_TEST(Router, BackwardMatchesDoubleAndAccumulates) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  for (const Options& o : all_options(140, 12, 9, 3)) {
    RouterRun<Real> run(o);
    RouterRun<double> reference(o);
    run.backward(), reference.backward();
    EXPECT_CLOSE(run.dx, reference.dx, tolerance<Real>(2)) << o.text();
    EXPECT_CLOSE(run.dwg, reference.dwg, tolerance<Acc>(2)) << o.text();
    expect_accumulates<Real>(o.shape.E * o.shape.C, [&](Grad<Cpu<Real>> g) { run.backward(g); });
  }
}

TYPED_TEST(Router, RenormalisedSoftmaxGatesAreTheSoftmaxOfTheChosenLogits) {
  using Real = TypeParam;
  Options o{{50, 8, 7, 3, 1, Gate::softmax, true, 1, 0, 0}};
  RouterRun<Real> run(o);
  std::vector<double> expected;
  for (int64_t n = 0; n < o.shape.N; ++n) {
    double exps[3], sum = 0;
    for (int64_t k = 0; k < 3; ++k) {
      double s = 0;
      for (int64_t c = 0; c < 8; ++c)
        s += as_double(run.x[n * 8 + c]) * as_double(run.wg[run.index[n * 3 + k] * 8 + c]);
      sum += exps[k] = std::exp(s);
    }
    for (double e : exps) expected.push_back(e / sum);
  }
  EXPECT_CLOSE(run.gates, expected, tolerance<typename Cpu<Real>::Acc>());
}

TYPED_TEST(Router, TiesGoToTheLowerIndex) {
  using Real = TypeParam;
  for (const Options& o : all_options(4, 4, 8, 3)) {
    if (o.bias) continue;
    RouterRun<Real> run(o);
    for (auto [first, second] : {std::pair{1, 6}, {5, 2}}) {  // two experts stand out, equal; all others are equal too
      std::fill(run.x.begin(), run.x.end(), from_double<Real>(1));
      std::fill(run.wg.begin(), run.wg.end(), from_double<Real>(0.25));
      for (int c = 0; c < 4; ++c) run.wg[first * 4 + c] = run.wg[second * 4 + c] = from_double<Real>(0.5);
      run.forward();
      for (int n = 0; n < 4; ++n) {
        EXPECT_EQ(run.index[n * 3], std::min(first, second)) << o.text();
        EXPECT_EQ(run.index[n * 3 + 1], std::max(first, second)) << o.text();
        EXPECT_EQ(run.index[n * 3 + 2], 0) << o.text();
      }
    }
  }
}

TYPED_TEST(Router, BiasChangesTheChoiceAndNothingElse) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  Options o{{30, 6, 5, 2, 1, Gate::sigmoid, true, 2.5, 0.1, 0.1}, true};
  RouterRun<Real> run(o);
  run.bias = {0, 0, 0, Acc(10), Acc(20)};
  run.forward();
  for (int64_t n = 0; n < 30; ++n) {
    EXPECT_EQ(run.index[n * 2], 4);
    EXPECT_EQ(run.index[n * 2 + 1], 3);
    EXPECT_NEAR(run.gates[n * 2] + run.gates[n * 2 + 1], 2.5, 1e-5);
  }
  RouterRun<Real> without(Options{o.shape});
  without.replay = run.index;
  without.forward();
  EXPECT_TRUE(bits_of(run.gates, run.lse, run.prob) == bits_of(without.gates, without.lse, without.prob));
}

TYPED_TEST(Router, ScopeSequenceIsTheMeanOfTheSequences) {
  using Real = TypeParam;
  const int64_t T = 70, C = 5, E = 6, K = 2;
  for (Gate gate : {Gate::softmax, Gate::sigmoid}) {
    RouterRun<Real> both(Options{{2 * T, C, E, K, 2, gate, true, 1, 0.3, 0}});
    both.losses();
    double sum = 0;
    for (int g = 0; g < 2; ++g) {
      RouterRun<Real> one(Options{{T, C, E, K, 1, gate, true, 1, 0.3, 0}});
      std::copy_n(&both.x[g * T * C], T * C, one.x.begin());
      one.forward();
      one.losses();
      sum += one.stats.aux_loss;
      for (int64_t e = 0; e < E; ++e) EXPECT_EQ(one.count[e], both.count[g * E + e]);
    }
    EXPECT_NEAR(both.stats.aux_loss, sum / 2, 1e-6);
  }
}

TYPED_TEST(Router, BalanceLossIsTheCoefficientAtBalance) {
  using Real = TypeParam;
  for (Gate gate : {Gate::softmax, Gate::sigmoid})
    for (int64_t G : {1, 2}) {
      RouterRun<Real> run(Options{{24, 8, 6, 2, G, gate, true, 1, 0.3, 0}});
      for (int i = 0; i < 48; ++i) run.replay.push_back(i % 6);  // as many choices of each, whatever the scores
      run.forward();
      run.losses();
      EXPECT_NEAR(run.stats.aux_loss, kMicroScale * 0.3, 1e-6);
      // Everything on one expert, with all the probability: coef * E.
      RouterRun<Real> one(Options{{24, 8, 6, 1, G, gate, true, 1, 0.3, 0}});
      for (int64_t i = 0; i < 6 * 8; ++i) one.wg[i] = from_double<Real>(i / 8 == 4 ? 10 : -10);
      std::fill(one.x.begin(), one.x.end(), from_double<Real>(1));
      one.forward();
      one.losses();
      EXPECT_NEAR(one.stats.aux_loss, kMicroScale * 0.3 * 6, 1e-5);
    }
}

TYPED_TEST(Router, ReplayRepeatsAndRefuses) {
  using Real = TypeParam;
  for (const Options& o : all_options(140, 12, 9, 3)) {
    RouterRun<Real> run(o), again(o);
    again.replay = run.index;
    again.forward();
    EXPECT_TRUE(bits_of(run.gates, run.index, run.lse, run.prob, run.count) ==
                bits_of(again.gates, again.index, again.lse, again.prob, again.count));
    EXPECT_EQ(again.status.code, DeviceStatus::ok);
    for (int32_t foreign : {9, -1, INT32_MAX, INT32_MIN}) {
      again.replay[3 * 100 + 1] = foreign;
      again.status = {};
      again.forward();
      EXPECT_EQ(again.status.code, DeviceStatus::expert_out_of_range);
      EXPECT_EQ(again.status.token, 100);
      EXPECT_EQ(again.status.value, foreign);
      for (int32_t e : again.index) ASSERT_TRUE(e >= 0 && e < 9);
    }
  }
}

TYPED_TEST(Router, NanGivesValidDistinctIndices) {
  using Real = TypeParam;
  for (const Options& o : all_options(20, 6, 5, 3))
    for (bool weights : {false, true}) {
      RouterRun<Real> run(o);
      auto nan = poisoned<Real>(1)[0];
      if (weights)
        run.wg[2 * 6] = nan;  // the logit of one expert; else all of one token
      else
        run.x[7 * 6 + 1] = nan;
      run.forward();
      for (int64_t n = 0; n < 20; ++n) {
        std::set<int32_t> chosen(&run.index[n * 3], &run.index[n * 3] + 3);
        EXPECT_EQ(chosen.size(), 3u);
        EXPECT_TRUE(*chosen.begin() >= 0 && *chosen.rbegin() < 5);
        EXPECT_EQ(std::isnan(run.lse[n]), weights || n == 7) << n;
        if (weights && o.shape.gate == Gate::sigmoid) {
          EXPECT_FALSE(chosen.count(2)) << n;  // numbers come first
        }
      }
    }
}

TYPED_TEST(Router, BiasUpdateFollowsTheSignOfTheLoad) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  std::vector<Acc> bias = {1, 2, 3, 4}, start = bias;
  std::vector<int32_t> load = {10, 2, 6, 6};  // mean 6
  Cpu<Real> dev;
  StepStats stats{.skip = 1};
  router_bias_update(dev, bias.data(), load.data(), &stats, 0.25, 4);
  EXPECT_EQ(bias, start);
  stats.skip = 0;
  router_bias_update(dev, bias.data(), load.data(), &stats, 0.25, 4);
  EXPECT_EQ(bias, (std::vector<Acc>{Acc(0.75), Acc(2.25), 3, 4}));
  load = {1000000000, 1000000000, 1000000000, 1000000001};  // the mean is no integer, the sum no int32
  router_bias_update(dev, bias.data(), load.data(), &stats, 0.25, 4);
  EXPECT_EQ(bias, (std::vector<Acc>{1, Acc(2.5), Acc(3.25), Acc(3.75)}));
}

// A replayed choice whose probability underflows: its gate is still the softmax over the chosen logits.
TYPED_TEST(Router, ReplayOfAnUnlikelyChoiceHasFiniteGates) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  RouterShape shape{1, 1, 3, 1, 1, Gate::softmax, true, 1, 0, 0};
  std::vector<Real> x = {Real(1)}, wg = {Real(904), Real(0), Real(1)};
  std::vector<Acc> gates(1), lse(1), prob(3);
  std::vector<int32_t> index(1), count(3), replay = {1};
  std::vector<char> scratch(router_scratch_bytes<Cpu<Real>>(shape));
  Cpu<Real> dev;
  router_forward(dev, gates.data(), index.data(), lse.data(), prob.data(), count.data(), scratch.data(), x.data(),
                 wg.data(), static_cast<const Acc*>(nullptr), replay.data(), shape);
  EXPECT_EQ(index[0], 1);
  EXPECT_EQ(gates[0], Acc(1));
}

TYPED_TEST(Router, BitsDoNotDependOnTheNumberOfThreads) {
  using Real = TypeParam;
  for (Options o : all_options(700, 96, 64, 4))
    if (o.shape.norm_topk_prob)
      expect_same_bits_on_any_threads([&] {
        RouterRun<Real> run(o);
        run.losses();
        run.backward();
        return bits_of(run.gates, run.index, run.lse, run.prob, run.count, run.load, run.dx, run.dwg) +
               bits_of(std::vector<double>{run.stats.aux_loss, run.stats.z_loss});
      });
}

}  // namespace
