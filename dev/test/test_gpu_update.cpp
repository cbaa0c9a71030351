// AdamW, the gradient norm and the decisions taken from it on the GPU, with views in device memory.
#include <gtest/gtest.h>

#include "dev/test/gpu_test.h"
#include "llmc/adamw.h"
#include "llmc/global_norm.h"

namespace {

template <class Real>
struct GpuUpdate : GpuTest {};
TYPED_TEST_SUITE(GpuUpdate, GpuReals);

constexpr AdamWConfig kAdamW{0.9, 0.95, 1e-3, 0.1};

// A buffer of weights with all its state.
template <class D>
struct Buffer {
  typename D::Real* weight;
  typename D::Acc *master, *m, *v;
  Grad<D> grad, second;
};
struct BufferShape {
  std::string name;
  int64_t rows, cols;
  bool wide, tied;
};
std::vector<double> some_grad(const BufferShape& s) { return random_values(s.name + ".grad", s.rows * s.cols); }

template <class D>
Buffer<D> make_buffer(Buffers<D>& b, const BufferShape& s, const std::vector<double>& grad) {
  const int64_t n = s.rows * s.cols;
  auto weight = random_values(s.name + ".weight", n), v = random_values(s.name + ".v", n, 0.1);
  for (double& a : v) a = std::abs(a);
  Buffer<D> r;
  r.weight = b.inout(s.name + ".weight", weight);
  if constexpr (std::is_same_v<typename D::Real, typename D::Acc>)
    r.master = r.weight;
  else
    r.master = b.acc(weight);
  b.watch(s.name + ".master, moved", Output::sums, r.master, n, -1, weight);  // a small move of a large weight
  r.m = b.inout_acc(s.name + ".m", random_values(s.name + ".m", n, 0.1)), r.v = b.inout_acc(s.name + ".v", v);
  r.grad = s.wide ? Grad<D>{b.acc(grad), true} : Grad<D>{b.real(grad), false};
  if (s.tied) r.second = {b.acc(s.name + ".second", n), true};
  return r;
}

// Three buffers, five tensors: whole, tied; the gate rows of an expert with NaN in the gradients of rows of nobody; a
// vector; a large matrix in two halves.
struct Tensors {
  bool wide = true;
  BufferShape a{"a", 130, 3, true, true}, b{"b", 64, 5, wide, false}, c{"c", 200, 77, wide, false};
  std::vector<double> grad_a = some_grad(a), grad_b = some_grad(b), grad_c = some_grad(c);
  static constexpr int64_t n_views = 5, n_partials = 3 + 1 + 1 + 2 + 2;
  const std::vector<int64_t> first_partials{0, 3, 4, 5, 7, n_partials};
  explicit Tensors(bool wide) : wide(wide) {
    for (int64_t row = 7; row < 64; ++row)
      if (!(row >= 16 && row % 16 < 8)) std::fill_n(&grad_b[row * 5], 5, std::numeric_limits<double>::quiet_NaN());
  }
  template <class D>
  const ParameterView<D>* views(Buffers<D>& buffers) const {
    auto A = make_buffer(buffers, a, grad_a), B = make_buffer(buffers, b, grad_b), C = make_buffer(buffers, c, grad_c);
    auto view = [](const Buffer<D>& p, RowMap map, int64_t rows, int64_t cols, int64_t first_partial, bool decay) {
      return ParameterView<D>{p.weight, p.master, p.m, p.v, p.grad, p.second, map, rows, cols, first_partial, decay};
    };
    return buffers.upload(std::vector<ParameterView<D>>{
        view(A, {0, 1, 1}, 130, 3, 0, true), view(B, {16, 8, 16}, 24, 5, 3, true), view(B, {0, 1, 1}, 7, 5, 4, false),
        view(C, {0, 1, 1}, 100, 77, 5, true), view(C, {100, 1, 1}, 100, 77, 7, false)});
  }
};

TYPED_TEST(GpuUpdate, AdamWSmall) {
  for (bool wide : {true, false})
    for (int32_t skip : {0, 1}) {
      Tensors t(wide);
      expect_calibrated<TypeParam>([&](auto& b) {
        auto* views = t.views(b);
        for (int64_t step = 1; step <= 4; ++step)
          adamw(b.dev, views, b.params({.learning_rate = 0.01 * double(step), .step = step}),
                b.stats({{.clip = 0.5 / double(step), .skip = skip}}), t.n_views, kAdamW);
      });
    }
}

TYPED_TEST(GpuUpdate, AdamWOfLargeAndTinyTensors) {
  const BufferShape large{"large", 700, 1024, true, false}, tiny{"tiny", 1, 1, false, false},
      vector{"vector", 1, 5001, true, true};
  expect_calibrated<TypeParam>([&]<class D>(Buffers<D>& b) {
    std::vector<ParameterView<D>> views;
    int64_t first_partial = 0;
    for (const BufferShape& s : {large, tiny, vector}) {
      auto p = make_buffer(b, s, some_grad(s));
      views.push_back(
          {p.weight, p.master, p.m, p.v, p.grad, p.second, {0, 1, 1}, s.rows, s.cols, first_partial, s.rows > 1});
      first_partial += (s.rows + norm_block_rows - 1) / norm_block_rows;
    }
    for (int64_t step : {1, 1000})
      adamw(b.dev, b.upload(views), b.params({.learning_rate = 1e-3, .step = step}), b.stats({{.clip = 0.75}}), 3,
            AdamWConfig{});
  });
}

TYPED_TEST(GpuUpdate, WeightsAreTheRoundedMastersSmall) {
  using D = Gpu<TypeParam>;
  Buffers<D> b(gpu<TypeParam>());
  const BufferShape s{"w", 33, 37, true, false};
  auto p = make_buffer(b, s, some_grad(s));
  ParameterView<D> view{p.weight, p.master, p.m, p.v, p.grad, p.second, {0, 1, 1}, s.rows, s.cols, 0, true};
  adamw(b.dev, b.upload(std::vector<ParameterView<D>>{view}), b.params({.learning_rate = 0.1, .step = 1}), b.stats(), 1,
        kAdamW);
  auto weight = b.read(p.weight);
  auto master = b.read(p.master);
  for (size_t i = 0; i < weight.size(); ++i)
    EXPECT_EQ(as_double(weight[i]), as_double(from_double<TypeParam>(as_double(master[i]))));
}

// ---- the norm and what follows from it

TYPED_TEST(GpuUpdate, NormAndClippingSmall) {
  for (bool wide : {true, false})
    for (double clip_norm : {0.0, 1.0, 1e6}) {
      Tensors t(wide);
      expect_calibrated<TypeParam>([&](auto& b) {
        auto* views = t.views(b);
        auto* partials = b.out_acc("partials", t.n_partials);
        global_norm_partials(b.dev, partials, views, t.n_views);
        auto* stats = b.stats({{.loss = 3}});
        auto* outliers = b.upload(std::vector<OutlierState>(1));
        update_decision(b.dev, stats, outliers, partials, b.upload(t.first_partials), t.n_views,
                        {.clip_norm = clip_norm});
        b.watch("count", Output::exact, &outliers->count, 1);
        b.watch("window", Output::sums, outliers->loss, 2 * OutlierState::window);
        adamw(b.dev, views, b.params({.learning_rate = 0.01, .step = 1}), stats, t.n_views, kAdamW);
      });
    }
}

TYPED_TEST(GpuUpdate, NormOfLargeTensors) {
  const BufferShape large{"large", 1000, 768, true, true}, narrow{"narrow", 333, 1025, false, false};
  expect_calibrated<TypeParam>(
      [&]<class D>(Buffers<D>& b) {
        std::vector<ParameterView<D>> views;
        int64_t partials = 0;
        for (const BufferShape& s : {large, narrow}) {
          auto p = make_buffer(b, s, some_grad(s));
          views.push_back({p.weight, p.master, p.m, p.v, p.grad, p.second, {0, 1, 1}, s.rows, s.cols, partials, true});
          partials += (s.rows + norm_block_rows - 1) / norm_block_rows;
        }
        auto* out = b.out_acc("partials", partials);
        auto* table = b.upload(views);
        global_norm_partials(b.dev, out, table, 2);
        update_decision(b.dev, b.stats(), b.upload(std::vector<OutlierState>(1)), out,
                        b.upload(std::vector<int64_t>{0, norm_blocks(large.rows), partials}), 2, {});
      },
      norm_block_rows * 1025);
}

// Views that leave out the rows of other ranks: their blocks of the table stay as they are.
TYPED_TEST(GpuUpdate, SomeRowsSmall) {
  const BufferShape large{"large", 330, 33, true, true}, narrow{"narrow", 200, 77, false, false};
  const int64_t partials = norm_blocks(large.rows) + norm_blocks(narrow.rows);
  expect_calibrated<TypeParam>([&]<class D>(Buffers<D>& b) {
    auto A = make_buffer(b, large, some_grad(large)), B = make_buffer(b, narrow, some_grad(narrow));
    std::vector<ParameterView<D>> views;
    int64_t blocks = 0;
    auto view = [&](const Buffer<D>& p, int64_t first, int64_t rows, int64_t cols, int64_t first_partial) {
      views.push_back({p.weight, p.master, p.m, p.v, p.grad, p.second, {first, 1, 1}, rows, cols, first_partial, true});
      views.back().first_block = blocks, blocks += norm_blocks(rows);
    };
    view(A, 64, 128, 33, 1), view(A, 320, 10, 33, 5), view(B, 128, 72, 77, 8);
    auto* table = b.upload(views);
    auto* out = b.inout_acc("partials", std::vector<double>(size_t(partials), 42));
    global_norm_partials(b.dev, out, table, 3);
    for (int64_t i : {0, 3, 4, 6, 7}) b.watch("block " + std::to_string(i), Output::exact, out + i, 1);  // still 42
    auto* stats = b.stats();
    update_decision(b.dev, stats, b.upload(std::vector<OutlierState>(1)), out,
                    b.upload(std::vector<int64_t>{0, norm_blocks(large.rows), partials}), 2, {.clip_norm = 1});
    for (auto [first, n] : {std::pair(2, 1), {0, 2}, {3, 0}})  // some views at a time
      adamw(b.dev, table + first, b.params({.learning_rate = 0.01, .step = 1}), stats, n, kAdamW);
  });
}

TYPED_TEST(GpuUpdate, NanAndInfSkipTheUpdateAndNameTheFirstBadTensorSmall) {
  using D = Gpu<TypeParam>;
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), -std::numeric_limits<double>::infinity()})
    for (int tensor = -2; tensor < 5; ++tensor) {
      if (tensor == -1) continue;
      Tensors t(tensor % 2 == 0);
      if (tensor == 0) t.grad_a[129 * 3] = bad;  // in its last block
      if (tensor == 1) t.grad_b[16 * 5 + 1] = bad;
      if (tensor == 1 || tensor == 2) t.grad_b[6 * 5] = bad;
      if (tensor == 3) t.grad_c[99 * 77 + 76] = bad;
      if (tensor >= 3) t.grad_c[199 * 77] = bad;
      Buffers<D> b(gpu<TypeParam>());
      auto* views = t.views(b);
      std::string before = bits_of(b.outputs());
      auto* partials = b.out_acc("partials", t.n_partials);
      auto* stats = b.stats({{.loss = tensor == -2 ? bad : 3}});
      auto* outliers = b.upload(std::vector<OutlierState>(1));
      global_norm_partials(b.dev, partials, views, t.n_views);
      update_decision(b.dev, stats, outliers, partials, b.upload(t.first_partials), t.n_views,
                      {.clip_norm = 1, .skip_loss_z = 1e-9});
      adamw(b.dev, views, b.params({.learning_rate = 0.1, .step = 1}), stats, t.n_views, kAdamW);
      StepStats s = b.read(stats)[0];
      EXPECT_EQ(s.skip, 1);
      EXPECT_EQ(s.bad_tensor, tensor);
      OutlierState window = b.read(outliers)[0];
      EXPECT_EQ(window.count, 0);  // it does not enter the window
      EXPECT_EQ(window.loss[0], 0);
      EXPECT_TRUE(bits_of(b.outputs()).substr(0, before.size()) == before) << "a skipped update changes something";
    }
}

// Losses 1 and 3, norms 10 and 30 fill the window; then come outliers of each kind.
TYPED_TEST(GpuUpdate, OutliersSmall) {
  struct Step {
    double loss, norm;
  };
  std::vector<Step> steps;
  for (int64_t i = 0; i < OutlierState::window; ++i) steps.push_back({i % 2 ? 1.0 : 3.0, i % 2 ? 10.0 : 30.0});
  steps[OutlierState::window / 2] = {64, 64};  // far out, but the window is not full
  for (Step s : {Step{6, 40}, {1000, 20}, {-100, 20}, {2, 1024}, {100, 16}, {2, 20}}) steps.push_back(s);
  for (UpdateRules rules : {UpdateRules{0, 5, 0}, UpdateRules{1, 0, 5}, UpdateRules{0, 0, 0}})
    expect_calibrated<TypeParam>([&](auto& b) {
      Tensors t(true);
      auto* outliers = b.upload(std::vector<OutlierState>(1));
      std::vector<StepStats> stats;
      for (Step s : steps) stats.push_back({.loss = s.loss});
      auto* out = b.stats(stats);
      for (size_t i = 0; i < steps.size(); ++i) {
        std::vector<double> partials(t.n_partials, 0.0);
        partials[4] = steps[i].norm * steps[i].norm;
        update_decision(b.dev, out + i, outliers, b.acc(partials), b.upload(t.first_partials), t.n_views, rules);
      }
      b.watch("count", Output::exact, &outliers->count, 1);
      b.watch("window", Output::sums, outliers->loss, 2 * OutlierState::window);
    });
}

// ---- what a step begins with

TYPED_TEST(GpuUpdate, ResetStatsAndAddToSmall) {
  for (int64_t n : {1, 37, 1000, 100003})
    expect_calibrated<TypeParam>([&](auto& b) {
      reset_stats(b.dev, b.stats({{1, 2, 3, 4, 5, 1, 6, 7, 8}}));
      add_to(b.dev, b.inout_acc("to", random_values("to", n)), b.acc("from", n), n);
    });
}

}  // namespace
