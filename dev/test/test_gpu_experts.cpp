// The six expert products on the GPU, as one chain with combine(): values, NaN in every row that an expert must not
// touch, materialised against zero-buffer dispatch, kept against recomputed activations.
#include <gtest/gtest.h>

#include "dev/test/gpu_test.h"
#include "moe/combine.h"
#include "moe/experts.h"
#include "moe/experts_hopper_kernels.h"

namespace {

template <class Real>
struct GpuExperts : GpuTest {};
TYPED_TEST_SUITE(GpuExperts, GpuReals);

struct Gpu16 : GpuTest {};

struct Case {
  Routing routing;
  int64_t capacity, C, F;
  std::string text() const {
    return routing.name + " N " + std::to_string(routing.N) + " K " + std::to_string(routing.K) + " E " +
           std::to_string(routing.E) + " capacity " + std::to_string(capacity) + " C " + std::to_string(C) + " F " +
           std::to_string(F);
  }
};
// Tokens 1, 4, 7, ... are kept by nobody.
Routing without_every_third(Routing r) {
  for (int64_t slot = 0; slot < r.N * r.K; ++slot)
    if (slot / r.K % 3 == 1) r.index[slot] = -1;
  r.name += ", every third token dropped";
  return r;
}
std::vector<Case> small_cases() {
  return {{random_routing(1, 1, 1), 0, 8, 8},
          {random_routing(5, 2, 3), 0, 6, 8},
          {random_routing(9, 3, 4), 4, 5, 8},
          {random_routing(6, 2, 8), 0, 16, 16},
          {without_every_third(random_routing(20, 2, 4)), 0, 24, 16},
          {same_for_all(9, 1, 3, 2), 7, 40, 24},
          {without_every_third(same_for_all(70, 2, 8, 6)), 40, 133, 8},
          {empty_and_single(40, 5), 30, 16, 24}};
}
std::vector<Case> cases() {
  return {{empty_and_single(290, 5), 0, 133, 72},
          {empty_and_single(290, 5), 261, 133, 72},
          {empty_and_single(290, 8), 200, 128, 64},
          {random_routing(300, 8, 64), 0, 64, 40},
          {random_routing(500, 4, 128), 0, 72, 24},
          {random_routing(500, 4, 128, 9), 60, 64, 32},
          {same_for_all(300, 1, 1, 0), 0, 96, 64},
          {same_for_all(300, 1, 8, 7), 0, 200, 136},
          {round_robin(257, 2, 8), 0, 128, 136},
          {random_routing(200, 2, 3), 0, 6, 8},
          {without_every_third(random_routing(400, 2, 8)), 90, 256, 192},
          {random_routing(130, 5, 9), 0, 264, 128}};
}

struct Inputs {
  std::vector<double> x, dout, w13, w2, gates, residual;
};
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
void fill_rows(std::vector<double>& v, int64_t first, int64_t n, int64_t width) {
  std::fill_n(v.begin() + first * width, n * width, kNan);
}
// NaN wherever no kept slot reads.
Inputs some_inputs(const Case& c, const HostPlan& plan) {
  const auto& [name, N, K, E, index] = c.routing;
  Inputs in{random_values("x", N * c.C),
            random_values("dout", N * c.C),
            random_values("w13", E * 2 * c.F * c.C, 1.5 / std::sqrt(double(c.C))),
            random_values("w2", E * c.C * c.F, 1 / std::sqrt(double(c.F))),
            random_values("gates", N * K, 0.3, 0.5),
            random_values("residual", N * c.C)};
  for (int64_t n = 0; n < N; ++n) {
    bool kept = false;
    for (int64_t slot = n * K; slot < (n + 1) * K; ++slot)
      if (plan.slot_row[slot] < 0)
        in.gates[slot] = kNan;
      else
        kept = true;
    if (!kept) fill_rows(in.x, n, 1, c.C), fill_rows(in.dout, n, 1, c.C);
  }
  return in;
}
// NaN in all that expert e does not read: other tokens, gates and weights.
void poison_others(Inputs& in, const Case& c, const HostPlan& plan, int64_t e) {
  const auto& [name, N, K, E, index] = c.routing;
  for (int64_t n = 0; n < N; ++n) {
    bool mine = false;
    for (int64_t slot = n * K; slot < (n + 1) * K; ++slot)
      if (plan.slot_row[slot] >= plan.offsets[e] && plan.slot_row[slot] < plan.offsets[e + 1])
        mine = true;
      else
        in.gates[slot] = kNan;
    if (!mine) fill_rows(in.x, n, 1, c.C), fill_rows(in.dout, n, 1, c.C);
  }
  for (int64_t i = 0; i < E; ++i)
    if (i != e) fill_rows(in.w13, i, 1, 2 * c.F * c.C), fill_rows(in.w2, i, 1, c.C * c.F);
}

struct Mode {
  bool materialised = false, keep_a = false;
};
enum Place { kH = 1, kA, kY, kDh, kAScaled, kDxRows, kDgates, kDw2, kDw13 };  // among the outputs; 0 is the status

// The layer without its router. Rows past the last that is used stay poisoned in every buffer.
template <class D>
void chain(Buffers<D>& b, const Case& c, const HostPlan& plan, const Inputs& in, Mode mode, Onto onto) {
  const auto& [name, N, K, E, index] = c.routing;
  const ExpertShape s{N * K, K, E, c.C, c.F};
  const int64_t C = c.C, F = c.F, rows = plan.rows();
  auto scratch = [&] { return b.scratch(experts_scratch_bytes<D>(s)); };
  auto *offsets = b.upload(plan.offsets), *row_slot = b.upload(plan.row_slot), *slot_row = b.upload(plan.slot_row);
  auto *x = b.real(in.x), *dout = b.real(in.dout), *w13 = b.real(in.w13), *w2 = b.real(in.w2);
  auto* gates = b.acc(in.gates);
  auto *h = b.out("h", s.R * 2 * F, Output::stored, rows * 2 * F), *a = b.out("a", s.R * F, Output::stored, rows * F),
       *y = b.out("y", s.R * C, Output::stored, rows * C), *dh = b.out("dh", s.R * 2 * F, Output::stored, rows * 2 * F),
       *a_scaled = b.out("a_scaled", s.R * F, Output::stored, rows * F),
       *dx_rows = b.out("dx_rows", s.R * C, Output::stored, rows * C);
  auto* dgates = b.out_acc("dgates", s.R);
  Grad<D> dw2 = b.grad("dw2", E * C * F, onto), dw13 = b.grad("dw13", E * 2 * F * C, onto);
  auto *out = b.inout("out", in.residual), *dx = b.inout("dx", in.residual);
  const int32_t* slots = row_slot;
  if (mode.materialised) {
    auto gathered = [&](const typename D::Real* tokens) {
      auto* all = static_cast<typename D::Real*>(b.scratch(size_t(s.R * C) * sizeof(typename D::Real)));
      dispatch_gather(b.dev, all, tokens, offsets, row_slot, N, K, E, C);
      return all;
    };
    x = gathered(x), dout = gathered(dout), slots = nullptr;
  }
  experts_up(b.dev, h, a, scratch(), x, w13, offsets, slots, s);
  experts_down(b.dev, y, scratch(), a, w2, offsets, s);
  combine(b.dev, out, y, out, gates, slot_row, N, K, C);
  experts_down_backward(b.dev, dh, a_scaled, dgates, scratch(), dout, w2, h, mode.keep_a ? a : nullptr, gates, offsets,
                        slots, row_slot, s);
  experts_down_backward_weight(b.dev, dw2, scratch(), dout, a_scaled, offsets, slots, s);
  experts_up_backward_input(b.dev, dx_rows, scratch(), dh, w13, offsets, s);
  combine(b.dev, dx, dx_rows, dx, nullptr, slot_row, N, K, C);
  experts_up_backward_weight(b.dev, dw13, scratch(), dh, x, offsets, slots, s);
}

template <class Real>
void check_experts(const std::vector<Case>& all) {
  int i = 0;
  for (const Case& c : all) {
    SCOPED_TRACE(c.text());
    HostPlan plan(c.routing, c.capacity);
    Inputs in = some_inputs(c, plan);
    for (Onto onto : {Onto::zeros, i++ % 2 ? Onto::wide : Onto::narrow})
      expect_calibrated<Real>([&](auto& b) { chain(b, c, plan, in, {}, onto); });
  }
}
TYPED_TEST(GpuExperts, Small) { check_experts<TypeParam>(small_cases()); }
TYPED_TEST(GpuExperts, Chain) { check_experts<TypeParam>(cases()); }

template <class Real>
void check_modes(const std::vector<Case>& all) {
  for (const Case& c : all) {
    SCOPED_TRACE(c.text());
    HostPlan plan(c.routing, c.capacity);
    Inputs in = some_inputs(c, plan);
    for_each_kernel_choice(gpu<Real>(), [&] {
      auto run = [&](Mode mode) {
        return outputs_of(gpu<Real>(), [&](auto& b) { chain(b, c, plan, in, mode, Onto::zeros); });
      };
      auto expected = run({});
      for (Mode mode : {Mode{true, false}, {false, true}, {true, true}}) {
        auto got = run(mode);
        for (size_t i = 0; i < got.size(); ++i)
          EXPECT_TRUE(got[i].bits == expected[i].bits)
              << got[i].name << (mode.materialised ? ", materialised" : "") << (mode.keep_a ? ", A kept" : "");
      }
    });
  }
}
TYPED_TEST(GpuExperts, MaterialisedAndKeptActivationsGiveTheSameBitsSmall) { check_modes<TypeParam>(small_cases()); }
TYPED_TEST(GpuExperts, MaterialisedAndKeptActivationsGiveTheSameBits) { check_modes<TypeParam>(cases()); }

// The weight gradients written over NaN, and A where H is not wanted.
template <class Real>
void check_writing(const std::vector<Case>& all) {
  using D = Gpu<Real>;
  for (const Case& c : all) {
    SCOPED_TRACE(c.text());
    const auto& [name, N, K, E, index] = c.routing;
    const ExpertShape s{N * K, K, E, c.C, c.F};
    const int64_t C = c.C, F = c.F;
    HostPlan plan(c.routing, c.capacity);
    Inputs in = some_inputs(c, plan);
    expect_written<Real>(E * C * F, [&](auto& b, Grad<D> g) {
      experts_down_backward_weight(b.dev, g, b.scratch(experts_scratch_bytes<D>(s)), b.real(in.dout),
                                   b.real("a_scaled", s.R * F), b.upload(plan.offsets), b.upload(plan.row_slot), s);
    });
    expect_written<Real>(E * 2 * F * C, [&](auto& b, Grad<D> g) {
      experts_up_backward_weight(b.dev, g, b.scratch(experts_scratch_bytes<D>(s)), b.real("dh", s.R * 2 * F),
                                 b.real(in.x), b.upload(plan.offsets), b.upload(plan.row_slot), s);
    });
    for_each_kernel_choice(gpu<Real>(), [&] {
      auto activations = [&](bool with_h) {
        return outputs_of(gpu<Real>(), [&](auto& b) {
          auto* h = with_h ? static_cast<Real*>(b.scratch(size_t(s.R * 2 * F) * sizeof(Real))) : nullptr;
          experts_up(b.dev, h, b.out("a", s.R * F, Output::stored, plan.rows() * F),
                     b.scratch(experts_scratch_bytes<D>(s)), b.real(in.x), b.real(in.w13), b.upload(plan.offsets),
                     b.upload(plan.row_slot), s);
        });
      };
      auto alone = activations(false);
      EXPECT_TRUE(bits_of(alone) == bits_of(activations(true))) << "A without H";
      for (const Output& o : alone) EXPECT_TRUE(o.rest_untouched) << o.name;
    });
  }
}
TYPED_TEST(GpuExperts, WrittenGradientsAndActivationsAloneSmall) { check_writing<TypeParam>(small_cases()); }
TYPED_TEST(GpuExperts, WrittenGradientsAndActivationsAlone) { check_writing<TypeParam>(cases()); }

// Every tile that Hopper's kernels come in, at widths that end within tiles.
struct HopperTile : GpuTest, testing::WithParamInterface<int> {
  void check(const std::vector<Case>& all) {
    auto& dev = gpu<bf16>();
    // Skipped and not passed: the kernels run on Hopper alone, so elsewhere there is nothing to test. The summary of
    // scripts/test_gpu.sh names every test that was skipped.
    if (!hopper::usable(dev, ExpertShape{1, 1, 1, 8, 8}))
      GTEST_SKIP() << dev.gpu_name << " is no Hopper GPU, or there is no code for it";
    SCOPED_TRACE(hopper::tile_names[GetParam()]);
    dev.expert_tile = GetParam();
    check_experts<bf16>(all);
    check_writing<bf16>(all);
    dev.expert_tile = -1;
  }
};
INSTANTIATE_TEST_SUITE_P(All, HopperTile, testing::Range(0, hopper::tile_choices));
TEST_P(HopperTile, Tiny) { check({{random_routing(70, 2, 2), 0, 72, 40}}); }  // a tile or two: for the race checker
TEST_P(HopperTile, Small) { check({{random_routing(150, 2, 3), 0, 72, 40}, {empty_and_single(40, 5), 30, 64, 64}}); }
TEST_P(HopperTile, EveryProduct) {
  check({{empty_and_single(290, 5), 261, 200, 72},
         {random_routing(300, 8, 64), 0, 64, 40},
         {random_routing(900, 3, 4), 0, 328, 264},
         {random_routing(400, 3, 512), 0, 64, 64},
         {same_for_all(700, 2, 8, 6), 500, 264, 200}});
}

template <class Real>
void check_neighbours(const Case& c, Mode mode) {
  SCOPED_TRACE(c.text() + (mode.materialised ? ", materialised" : ""));
  const auto& [name, N, K, E, index] = c.routing;
  HostPlan plan(c.routing, c.capacity);
  const Inputs in = some_inputs(c, plan);
  for_each_kernel_choice(gpu<Real>(), [&] {
    auto run = [&](const Inputs& inputs) {
      return outputs_of(gpu<Real>(), [&](auto& b) { chain(b, c, plan, inputs, mode, Onto::zeros); });
    };
    auto clean = run(in);
    for (int64_t e = 0; e < E; ++e) {
      Inputs dirty = in;
      poison_others(dirty, c, plan, e);
      auto got = run(dirty);
      auto same = [&](Place place, int64_t first, int64_t n, int64_t parts) {
        const Output &o = got[place], &expected = clean[place];
        size_t width = o.bits.size() / size_t(parts);
        EXPECT_TRUE(o.bits.compare(first * width, n * width, expected.bits, first * width, n * width) == 0)
            << o.name << " of expert " << e;
      };
      int64_t first = plan.offsets[e], n = plan.offsets[e + 1] - first;
      for (Place place : {kH, kA, kY, kDh, kAScaled, kDxRows}) same(place, first, n, N * K);
      for (int64_t r = first; r < first + n; ++r) same(kDgates, plan.row_slot[r], 1, N * K);
      same(kDw2, e, 1, E), same(kDw13, e, 1, E);
    }
  });
}
TYPED_TEST(GpuExperts, NanAroundAnExpertDoesNotReachItSmall) {
  for (const Case& c : small_cases())
    for (bool materialised : {false, true}) check_neighbours<TypeParam>(c, {materialised, false});
}
TYPED_TEST(GpuExperts, NanAroundAnExpertDoesNotReachIt) {
  for (const Case& c : {Case{empty_and_single(290, 5), 261, 133, 72}, Case{random_routing(300, 3, 8), 100, 128, 72}})
    for (bool materialised : {false, true}) check_neighbours<TypeParam>(c, {materialised, false});
}

// What a further pass adds: as combine() in place; nothing is read or written where it has no rows.
TYPED_TEST(GpuExperts, FurtherRowsSmall) {
  for (const Case& c :
       {Case{random_routing(40, 2, 4), 9, 40, 0}, Case{without_every_third(random_routing(30, 3, 5)), 0, 37, 0}}) {
    SCOPED_TRACE(c.text());
    const int64_t N = c.routing.N, K = c.routing.K, C = c.C;
    const HostPlan plan(c.routing, c.capacity);
    expect_calibrated<TypeParam>([&]<class D>(Buffers<D>& b) {
      auto *rows = b.real("rows", N * K * C), *addend = b.real("addend", N * C);
      auto* gates = b.acc("gates", N * K);
      auto* slot_row = b.upload(plan.slot_row);
      for (bool gated : {true, false}) {
        auto *in_place = b.inout("in place", random_values("addend", N * C)), *out = b.out("combine", N * C);
        combine(b.dev, out, rows, addend, gated ? gates : nullptr, slot_row, N, K, C);
        combine_more(b.dev, in_place, rows, gated ? gates : nullptr, slot_row, b.upload(plan.offsets) + c.routing.E, N,
                     K, C);
        EXPECT_TRUE(bits_of(b.read(in_place)) == bits_of(b.read(out)));
      }
      combine_more(b.dev, b.out("alone", N * C, Output::exact, 0), rows, gates, slot_row,
                   b.upload(std::vector<int32_t>{0}), N, K, C);
    });
  }
}

TEST_F(Gpu16, ExpertGradientsAreRoundedOnceSmall) {
  const Case c{random_routing(150, 2, 4), 60, 40, 24};
  const ExpertShape s{300, 2, 4, 40, 24};
  HostPlan plan(c.routing, c.capacity);
  Inputs in = some_inputs(c, plan);
  expect_rounded_once(4 * 40 * 24, [&](auto& b, Grad<Gpu<bf16>> g) {
    experts_down_backward_weight(b.dev, g, b.scratch(experts_scratch_bytes<Gpu<bf16>>(s)), b.real(in.dout),
                                 b.real("a_scaled", 300 * 24), b.upload(plan.offsets), b.upload(plan.row_slot), s);
  });
  expect_rounded_once(4 * 48 * 40, [&](auto& b, Grad<Gpu<bf16>> g) {
    experts_up_backward_weight(b.dev, g, b.scratch(experts_scratch_bytes<Gpu<bf16>>(s)), b.real("dh", 300 * 48),
                               b.real(in.x), b.upload(plan.offsets), b.upload(plan.row_slot), s);
  });
}

}  // namespace
