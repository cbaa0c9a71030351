// The MoE layer as other programs call it (library/gpt_moe.h), on the CPU.
#include <algorithm>
#include <numeric>

#include "dev/test/library_test.h"

namespace {

moe::LayerConfig small() {
  moe::LayerConfig c;
  c.tokens = 37, c.d_model = 24, c.d_expert = 16, c.n_expert = 5, c.top_k = 2;
  c.aux_coef = 0.01, c.z_coef = 0.001;
  return c;
}

// The layer as most model files have it: a loop over tokens and experts. The first row of an expert that its capacity has
// no room for, and the rows after it, are dropped.
LayerValues::Values loop_over_experts(const moe::LayerConfig& c, const LayerValues& v) {
  LayerValues::Values out = v.residual;
  std::vector<int64_t> taken(size_t(c.n_expert), 0);
  const int64_t C = c.d_model, F = c.d_expert;
  for (int64_t t = 0; t < c.tokens; ++t) {
    auto product = [&](const double* row, const double* with, int64_t n) {
      return std::inner_product(row, row + n, with, 0.0);
    };
    const double* x = &v.x[size_t(t * C)];
    std::vector<double> logits;
    for (int64_t e = 0; e < c.n_expert; ++e) logits.push_back(product(&v.router[size_t(e * C)], x, C));
    std::vector<size_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    double sum = 0;
    for (int64_t k = 0; k < c.top_k; ++k) sum += std::exp(logits[order[size_t(k)]]);
    for (int64_t k = 0; k < c.top_k; ++k) {
      const int64_t e = int64_t(order[size_t(k)]);
      if (c.capacity && taken[size_t(e)] == c.capacity) continue;
      ++taken[size_t(e)];
      const double *w13 = &v.w13[size_t(e * 2 * F * C)], *w2 = &v.w2[size_t(e * C * F)];
      std::vector<double> a;
      for (int64_t f = 0; f < F; ++f) {
        const double gate = product(w13 + moe::w13_row(f, false) * C, x, C);
        a.push_back(gate / (1 + std::exp(-gate)) * product(w13 + moe::w13_row(f, true) * C, x, C));
      }
      for (int64_t i = 0; i < C; ++i)
        out[size_t(t * C + i)] += std::exp(logits[size_t(e)]) / sum * product(w2 + i * F, a.data(), F);
    }
  }
  return out;
}

TEST(Library, IsTheLoopOverExperts) {
  for (int64_t capacity : {0, 9}) {
    moe::LayerConfig c = small();
    c.capacity = capacity;
    LayerValues v(c);
    Cpu<double> dev;
    run_layer(dev, c, v);
    const auto expected = loop_over_experts(c, v);
    for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(v.out[i], expected[i], 1e-12) << i << " of " << capacity;
    EXPECT_EQ(std::accumulate(v.load.begin(), v.load.end(), 0), c.tokens * c.top_k);  // before dropping
    EXPECT_GE(v.losses[0], c.aux_coef * 0.5);
    EXPECT_GT(v.losses[1], 0);
  }
}

// With both losses, through the gates too.
TEST(Library, GradientsAreThoseOfFiniteDifferences) {
  moe::LayerConfig c = small();
  LayerValues v(c);
  Cpu<double> dev;
  run_layer(dev, c, v);
  auto objective = [&](LayerValues& at) {
    run_layer(dev, c, at, 0);
    return std::inner_product(at.out.begin(), at.out.end(), v.dout.begin(), at.losses[0] + at.losses[1]);
  };
  auto compare = [&](const char* name, LayerValues::Values LayerValues::*values, const LayerValues::Values& gradient) {
    double slope = 0, step = 1e-6, difference = 0;
    for (double sign : {1.0, -1.0}) {
      LayerValues moved = v;
      for (size_t i = 0; i < gradient.size(); ++i) (moved.*values)[i] += sign * step * random_normal(8, 1, int64_t(i));
      difference += sign * objective(moved) / (2 * step);
    }
    for (size_t i = 0; i < gradient.size(); ++i) slope += gradient[i] * random_normal(8, 1, int64_t(i));
    EXPECT_NEAR(slope, difference, 1e-6 * (1 + std::fabs(slope))) << name;
  };
  compare("x", &LayerValues::x, v.dx), compare("router", &LayerValues::router, v.d_router);
  compare("w13", &LayerValues::w13, v.d_w13), compare("w2", &LayerValues::w2, v.d_w2);
}

template <class Real>
void same_bits_whatever_is_kept() {
  moe::LayerConfig c = small();
  Cpu<Real> dev;
  LayerValues act(c), none(c), up(c), infer(c), narrow(c);
  run_layer(dev, c, act);
  size_t kept[3];
  for (auto [policy, v] : {std::pair{moe::Recompute::none, &none}, {moe::Recompute::up, &up}}) {
    c.recompute = policy;
    run_layer(dev, c, *v);
    EXPECT_EQ(v->out, act.out);
    EXPECT_EQ(v->dx, act.dx);
    EXPECT_EQ(v->d_router, act.d_router);
    EXPECT_EQ(v->d_w13, act.d_w13);
    EXPECT_EQ(v->d_w2, act.d_w2);
  }
  run_layer(dev, c, infer, 0);
  EXPECT_EQ(infer.out, act.out);
  EXPECT_EQ(infer.load, act.load);
  EXPECT_EQ(infer.losses, act.losses);

  for (auto policy : {moe::Recompute::none, moe::Recompute::act, moe::Recompute::up}) {
    c.recompute = policy, c.dtype = library_dtype<Real>();
    kept[int(policy)] = moe::Layer(c).saved_bytes();
  }
  const size_t R = size_t(c.tokens * c.top_k), H = R * size_t(2 * c.d_expert) * sizeof(Real), A = H / 2, block = 256;
  EXPECT_LT(kept[2], 5 * 4 * R + 10 * block);  // integers and gates, each tensor to the next multiple of 256
  EXPECT_NEAR(double(kept[1] - kept[2]), double(H), double(block));
  EXPECT_NEAR(double(kept[0] - kept[1]), double(A), double(block));
}
TEST(Library, SameBitsWhateverIsKept) {
  same_bits_whatever_is_kept<float>();
  same_bits_whatever_is_kept<bf16>();
}

TEST(Library, GradientsAreAddedOrWritten) {
  moe::LayerConfig c = small();
  Cpu<float> dev;
  LayerValues written(c), twice(c);
  c.add_gradients = false;
  run_layer(dev, c, written, 3);
  c.add_gradients = true;
  run_layer(dev, c, twice, 2);
  for (auto gradient : {&LayerValues::d_router, &LayerValues::d_w13, &LayerValues::d_w2})
    for (size_t i = 0; i < (written.*gradient).size(); ++i)
      ASSERT_EQ((twice.*gradient)[i], 2 * (written.*gradient)[i]) << i;
  EXPECT_EQ(written.dx, twice.dx);
}

// One line with these words.
void expect_error(const std::vector<std::string>& words, auto&& call) {
  try {
    call();
    ADD_FAILURE() << "no error; expected " << words[0];
  } catch (const std::runtime_error& e) {
    const std::string line = e.what();
    EXPECT_EQ(line.find('\n'), std::string::npos);
    for (const std::string& word : words) EXPECT_NE(line.find(word), std::string::npos) << line;
  }
}

TEST(Library, RefusesWhatCannotBe) {
  using C = moe::LayerConfig;
  auto refused = [&](std::vector<std::string> words, auto change) {
    C c = small();
    change(c);
    expect_error(words, [&] { moe::Layer layer(c); });
  };
  refused({"tokens", "0"}, [](C& c) { c.tokens = 0; });
  refused({"d_expert", "12"}, [](C& c) { c.d_expert = 12; });
  refused({"n_expert", "513"}, [](C& c) { c.n_expert = 513; });
  refused({"top_k", "6"}, [](C& c) { c.top_k = 6; });
  refused({"2^31"}, [](C& c) { c.tokens = int64_t(1) << 30, c.n_expert = 8; });
  refused({"capacity"}, [](C& c) { c.capacity = -1; });
  refused({"aux_coef"}, [](C& c) { c.aux_coef = std::nan(""); });
  refused({"route_scale", "sigmoid"}, [](C& c) { c.route_scale = 2; });
#ifndef GPT_MOE_CUDA
  refused({"built without CUDA"}, [](C& c) { c.place = moe::Place::cuda; });
#else
  refused({"f64", "bf16"}, [](C& c) { c.place = moe::Place::cuda, c.dtype = moe::Dtype::f64; });
  if (!gpu_problem().empty()) refused({gpu_problem()}, [](C& c) { c.place = moe::Place::cuda; });
#endif

  moe::Layer layer(small());
  alignas(256) char memory[512];
  const void* p = memory;
  const moe::Weights weights{p, p, p};
  expect_error({"out", "null"}, [&] { layer.forward(nullptr, nullptr, memory, p, p, weights); });
  expect_error({"workspace", "256"}, [&] { layer.forward(memory, nullptr, memory + 16, p, p, weights); });
  expect_error({"weights.w2", "null"}, [&] { layer.forward(memory, nullptr, memory, p, p, {p, p, nullptr}); });
  expect_error({"bias", "sigmoid"}, [&] { layer.forward(memory, nullptr, memory, p, p, {p, p, p, p}); });
  expect_error({"saved", "null"}, [&] {
    layer.backward(memory, {memory, memory, memory}, nullptr, memory, p, p, weights);
  });
  expect_error({"gradients.w13", "16"}, [&] {
    layer.backward(memory, {memory, memory + 8, memory}, p, memory, p, p, weights);
  });
}

}  // namespace
