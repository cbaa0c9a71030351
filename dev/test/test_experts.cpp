// The six expert products and combine(): against a loop over tokens and logical weights, by finite differences, with
// NaN in every row that an expert must not touch, and materialised against zero-buffer dispatch.
#include <gtest/gtest.h>

#include "dev/test/op_test.h"
#include "moe/combine.h"
#include "moe/dispatch.h"
#include "moe/experts.h"

namespace {

template <class Real>
struct Experts : ::testing::Test {};
TYPED_TEST_SUITE(Experts, AllReals);

struct Case {
  int64_t N, K, E, C, F, capacity;
};
const Case kSmall{5, 2, 3, 6, 8, 0}, kDropping{9, 3, 4, 5, 8, 4};
// More than one tile of 256 rows and 128 weight rows, none of them full; expert 2 has no rows, 4 has one.
const Case kLarge{290, 2, 5, 133, 72, 0}, kLargeDropping{290, 2, 5, 133, 72, 261};
const Case kAllOnOne{270, 1, 7, 20, 16, 0}, kOneExpert{3, 1, 1, 5, 8, 0};

// Distinct experts for each token. For E = 5 they are those that kLarge wants: nearly all slots on 0 and 1. For E = 7
// the first is 3.
std::vector<int32_t> routing(const Case& c) {
  std::vector<int32_t> index;
  for (int64_t t = 0; t < c.N; ++t) {
    if (c.E == 5) {
      int32_t best = t == 77 ? 4 : t % 9 == 5 ? 3 : t % 9 == 7 ? 1 : 0;
      index.insert(index.end(), {best, best == 0 || best == 4 ? 1 : 0});
    } else {
      int64_t best = c.E == 7 ? 3 : int64_t(random_bits(5, 0, t) % uint64_t(c.E));
      for (int64_t k = 0; k < c.K; ++k) index.push_back(int32_t((best + k) % c.E));
    }
  }
  return index;
}

// One MoE layer without its router: inputs, and everything the ops write, poisoned until they do.
template <class Real>
struct Chain {
  using Acc = typename Cpu<Real>::Acc;
  Case c;
  ExpertShape s;
  Cpu<Real> dev;
  std::vector<int32_t> index, counts, offsets, row_slot, slot_row;
  std::vector<Real> x, w13, w2, dout, residual;
  std::vector<Acc> gates;
  std::vector<Real> x_rows, dout_rows;  // gathered copies
  std::vector<Real> h, a, y, out, dh, a_scaled, dx_rows, dx;
  std::vector<Acc> dgates, dw13, dw2;

  explicit Chain(const Case& c, bool plain = false)
      : c(c), s{c.N * c.K, c.K, c.E, c.C, c.F}, dev{.plain_matmul = plain} {
    index = routing(c);
    counts.resize(c.E), offsets.resize(c.E + 1), row_slot.resize(s.R), slot_row.resize(s.R);
    Scratch buckets(dispatch_scratch_bytes<Cpu<Real>>(c.N, c.K, c.E));
    dispatch_plan(dev, {counts.data(), offsets.data(), row_slot.data(), slot_row.data()}, buckets, index.data(), c.N,
                  c.K, c.E, c.capacity);
    x = random_tensor<Real>("x", c.N * c.C), dout = random_tensor<Real>("dout", c.N * c.C);
    residual = random_tensor<Real>("residual", c.N * c.C);
    w13 = random_tensor<Real>("w13", c.E * 2 * c.F * c.C, 1.5 / std::sqrt(c.C));
    w2 = random_tensor<Real>("w2", c.E * c.C * c.F, 1 / std::sqrt(c.F));
    gates = random_tensor<Acc>("gates", s.R, 0.3, 0.5);
    h = dh = poisoned<Real>(s.R * 2 * c.F), a = a_scaled = poisoned<Real>(s.R * c.F);
    x_rows = dout_rows = y = dx_rows = poisoned<Real>(s.R * c.C), out = dx = poisoned<Real>(c.N * c.C);
    dgates = poisoned<Acc>(s.R), dw13.assign(w13.size(), Acc(0)), dw2.assign(w2.size(), Acc(0));
    gather(x_rows, x), gather(dout_rows, dout);
  }
  void gather(std::vector<Real>& rows, const std::vector<Real>& tokens) {
    dispatch_gather(dev, rows.data(), tokens.data(), offsets.data(), row_slot.data(), c.N, c.K, c.E, c.C);
  }
  int64_t rows() const { return offsets[c.E]; }
  Scratch scratch() const { return Scratch(experts_scratch_bytes<Cpu<Real>>(s)); }
  const int32_t* slots(bool materialised) const { return materialised ? nullptr : row_slot.data(); }
  void up(bool m = false) {
    experts_up(dev, h.data(), a.data(), scratch(), (m ? x_rows : x).data(), w13.data(), offsets.data(), slots(m), s);
  }
  void down() { experts_down(dev, y.data(), scratch(), a.data(), w2.data(), offsets.data(), s); }
  void down_backward(bool m = false, bool keep_a = false) {
    experts_down_backward(dev, dh.data(), a_scaled.data(), dgates.data(), scratch(), (m ? dout_rows : dout).data(),
                          w2.data(), h.data(), keep_a ? a.data() : nullptr, gates.data(), offsets.data(), slots(m),
                          row_slot.data(), s);
  }
  void down_weight(Grad<Cpu<Real>> g, bool m = false) {
    experts_down_backward_weight(dev, g, scratch(), (m ? dout_rows : dout).data(), a_scaled.data(), offsets.data(),
                                 slots(m), s);
  }
  void up_input() {
    experts_up_backward_input(dev, dx_rows.data(), scratch(), dh.data(), w13.data(), offsets.data(), s);
  }
  void up_weight(Grad<Cpu<Real>> g, bool m = false) {
    experts_up_backward_weight(dev, g, scratch(), dh.data(), (m ? x_rows : x).data(), offsets.data(), slots(m), s);
  }
  Chain& run(bool m = false, bool keep_a = false) {
    up(m), down();
    combine(dev, out.data(), y.data(), residual.data(), gates.data(), slot_row.data(), c.N, c.K, c.C);
    down_backward(m, keep_a);
    down_weight({dw2.data(), true}, m);
    up_input();
    std::vector<Real> zero(c.N * c.C, from_double<Real>(0));
    combine(dev, dx.data(), dx_rows.data(), zero.data(), nullptr, slot_row.data(), c.N, c.K, c.C);
    up_weight({dw13.data(), true}, m);
    return *this;
  }
  std::string bits() const { return bits_of(h, a, y, out, dh, a_scaled, dx_rows, dx, dgates, dw13, dw2); }
};

// The same by loops over slots, in double, with weights addressed by their logical row.
struct Literal {
  std::vector<double> h, a, y, out, dh, a_scaled, dx_rows, dx, dgates, dw13, dw2;
  template <class Real>
  explicit Literal(const Chain<Real>& t) {
    const auto [N, K, E, C, F, capacity] = t.c;
    auto x = converted<double>(t.x), w13 = converted<double>(t.w13), w2 = converted<double>(t.w2);
    auto dout = converted<double>(t.dout), gates = converted<double>(t.gates);
    h = dh = std::vector<double>(t.s.R * 2 * F), a = a_scaled = std::vector<double>(t.s.R * F);
    y = dx_rows = std::vector<double>(t.s.R * C), out = converted<double>(t.residual), dx = std::vector<double>(N * C);
    dgates = std::vector<double>(t.s.R), dw13 = std::vector<double>(w13.size()), dw2 = std::vector<double>(w2.size());
    for (int64_t slot = 0; slot < t.s.R; ++slot) {
      int64_t r = t.slot_row[slot], token = slot / K, e = t.index[slot];
      if (r < 0) continue;
      const double *xt = &x[token * C], *d = &dout[token * C];
      for (int64_t f = 0; f < F; ++f) {
        int64_t g_at = w13_row(f, false), u_at = w13_row(f, true);
        const double *wg = &w13[(e * 2 * F + g_at) * C], *wu = &w13[(e * 2 * F + u_at) * C];
        double g = 0, u = 0, da = 0;
        for (int64_t c = 0; c < C; ++c) g += xt[c] * wg[c], u += xt[c] * wu[c], da += d[c] * w2[(e * C + c) * F + f];
        double sigmoid = 1 / (1 + std::exp(-g)), act = g * sigmoid * u;
        double dg = gates[slot] * da * u * sigmoid * (1 + g * (1 - sigmoid)), du = gates[slot] * da * g * sigmoid;
        h[r * 2 * F + g_at] = g, h[r * 2 * F + u_at] = u, dh[r * 2 * F + g_at] = dg, dh[r * 2 * F + u_at] = du;
        a[r * F + f] = act, a_scaled[r * F + f] = gates[slot] * act, dgates[slot] += da * act;
        for (int64_t c = 0; c < C; ++c) {
          y[r * C + c] += act * w2[(e * C + c) * F + f];
          dx_rows[r * C + c] += dg * wg[c] + du * wu[c];
          dw13[(e * 2 * F + g_at) * C + c] += dg * xt[c], dw13[(e * 2 * F + u_at) * C + c] += du * xt[c];
          dw2[(e * C + c) * F + f] += gates[slot] * act * d[c];
        }
      }
      for (int64_t c = 0; c < C; ++c)
        out[token * C + c] += gates[slot] * y[r * C + c], dx[token * C + c] += dx_rows[r * C + c];
    }
  }
};

template <class T>
std::vector<T> first(const std::vector<T>& v, int64_t n) {
  return {v.begin(), v.begin() + n};
}

TYPED_TEST(Experts, TheChainIsTheLoopOverTokens) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  const bool narrow = !std::is_same_v<Real, Acc>;
  for (const Case& c : {kSmall, kDropping, kLarge, kLargeDropping})
    for (bool plain : {false, true}) {
      Chain<Real> t(c, plain);
      t.run();
      Literal expected(t);
      int64_t rows = t.rows();
      EXPECT_EQ(rows<t.s.R, c.capacity> 0);
      auto near = [&](const auto& v, const auto& e, double limit) {
        int64_t n = rows * v.size() / t.s.R;
        EXPECT_CLOSE(first(v, n), first(e, n), limit);
      };
      near(t.h, expected.h, tolerance<Real>());
      near(t.a, expected.a, tolerance<Real>(2));
      near(t.y, expected.y, tolerance<Real>(2));
      near(t.dh, expected.dh, tolerance<Real>(2));
      near(t.a_scaled, expected.a_scaled, tolerance<Real>(2));
      near(t.dx_rows, expected.dx_rows, tolerance<Real>(2));
      EXPECT_CLOSE(t.out, expected.out, tolerance<Real>(2));
      EXPECT_CLOSE(t.dx, expected.dx, tolerance<Real>(2));
      // Sums in Acc of factors that were rounded.
      EXPECT_CLOSE(t.dgates, expected.dgates, narrow ? tolerance<Real>(2) : tolerance<Acc>(2));
      EXPECT_CLOSE(t.dw13, expected.dw13, narrow ? tolerance<Real>(2) : tolerance<Acc>(2));
      EXPECT_CLOSE(t.dw2, expected.dw2, narrow ? tolerance<Real>(2) : tolerance<Acc>(2));
      for (int64_t slot = 0; slot < t.s.R; ++slot)
        EXPECT_TRUE(t.slot_row[slot] >= 0 || t.dgates[slot] == Acc(0)) << "dropped slot " << slot;
    }
}

TEST(Gradients, ExpertChain) {
  for (const Case& c : {kSmall, kDropping}) {
    Chain<double> t(c);
    t.run();
    auto objective = [&] {
      t.up(), t.down();
      combine(t.dev, t.out.data(), t.y.data(), t.residual.data(), t.gates.data(), t.slot_row.data(), c.N, c.K, c.C);
      return weighted_sum(t.out, t.dout);
    };
    EXPECT_LT(gradient_error(t.x, t.dx, objective), gradient_limit);
    EXPECT_LT(gradient_error(t.w13, t.dw13, objective, 300), gradient_limit);
    EXPECT_LT(gradient_error(t.w2, t.dw2, objective, 300), gradient_limit);
    EXPECT_LT(gradient_error(t.gates, t.dgates, objective), gradient_limit);
  }
}

TYPED_TEST(Experts, WeightGradientsAreRoundedOnce) {
  using Real = TypeParam;
  for (const Case& c : {kDropping, kLarge}) {
    Chain<Real> t(c);
    t.run();
    for (bool m : {false, true}) {
      expect_accumulates<Real>(c.E * c.C * c.F, [&](Grad<Cpu<Real>> g) { t.down_weight(g, m); });
      expect_accumulates<Real>(c.E * 2 * c.F * c.C, [&](Grad<Cpu<Real>> g) { t.up_weight(g, m); });
    }
  }
}

TYPED_TEST(Experts, WrittenWeightGradientsAreThoseAddedToZeros) {
  using Real = TypeParam;
  for (const Case& c : {kSmall, kDropping, kLarge, kLargeDropping, kAllOnOne, kOneExpert})
    for (bool plain : {false, true}) {
      Chain<Real> t(c, plain);
      t.run();
      for (bool m : {false, true}) {
        expect_writes<Real>(c.E * c.C * c.F, [&](Grad<Cpu<Real>> g) { t.down_weight(g, m); });
        expect_writes<Real>(c.E * 2 * c.F * c.C, [&](Grad<Cpu<Real>> g) { t.up_weight(g, m); });
      }
    }
}

TYPED_TEST(Experts, ActivationsHaveTheSameBitsWhereHIsNotWanted) {
  using Real = TypeParam;
  for (const Case& c : {kSmall, kDropping, kLarge, kLargeDropping, kAllOnOne})
    for (bool plain : {false, true})
      for (bool m : {false, true}) {
        Chain<Real> t(c, plain);
        t.up(m);
        auto alone = poisoned<Real>(t.a.size());
        experts_up(t.dev, nullptr, alone.data(), t.scratch(), (m ? t.x_rows : t.x).data(), t.w13.data(),
                   t.offsets.data(), t.slots(m), t.s);
        EXPECT_TRUE(bits_of(alone) == bits_of(t.a)) << c.N << " tokens, plain " << plain << ", materialised " << m;
      }
}

TYPED_TEST(Experts, MaterialisedAndKeptActivationsGiveTheSameBits) {
  using Real = TypeParam;
  for (const Case& c : {kSmall, kDropping, kLarge, kLargeDropping}) {
    std::string expected = Chain<Real>(c).run().bits();
    EXPECT_TRUE(Chain<Real>(c).run(true, false).bits() == expected) << "materialised";
    EXPECT_TRUE(Chain<Real>(c).run(false, true).bits() == expected) << "A kept";
    EXPECT_TRUE(Chain<Real>(c).run(true, true).bits() == expected) << "both";
  }
}

TYPED_TEST(Experts, RowsPastTheLastAreNotWritten) {
  using Real = TypeParam;
  for (const Case& c : {kDropping, kLargeDropping})
    for (bool m : {false, true}) {
      Chain<Real> t(c);
      if (m)  // the rows of the last expert are then nobody's
        t.offsets[c.E] = t.offsets[c.E - 1];
      for (auto* v : {&t.h, &t.a, &t.y, &t.dh, &t.a_scaled, &t.dx_rows}) *v = random_tensor<Real>("stale", v->size());
      t.run(m);
      ASSERT_LT(t.rows(), t.s.R);
      for (auto* v : {&t.h, &t.a, &t.y, &t.dh, &t.a_scaled, &t.dx_rows}) {
        auto stale = random_tensor<Real>("stale", v->size());
        size_t from = t.rows() * (v->size() / t.s.R);
        EXPECT_EQ(std::memcmp(&(*v)[from], &stale[from], (v->size() - from) * sizeof(Real)), 0);
      }
    }
}

// Fills with NaN all rows of v (R rows) but those of expert e.
template <class Real, class T>
void poison_others(const Chain<Real>& t, std::vector<T>& v, int64_t e) {
  int64_t width = v.size() / t.s.R;
  std::fill(v.begin(), v.begin() + t.offsets[e] * width, poisoned<T>(1)[0]);
  std::fill(v.begin() + t.offsets[e + 1] * width, v.end(), poisoned<T>(1)[0]);
}

TYPED_TEST(Experts, NanAroundAnExpertDoesNotReachIt) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  for (const Case& c : {kDropping, kLargeDropping}) {
    Chain<Real> clean(c);
    clean.run();
    for (int64_t e = 0; e < c.E; ++e)
      for (bool m : {false, true}) {
        SCOPED_TRACE("expert " + std::to_string(e) + (m ? " materialised" : ""));
        Chain<Real> t(c);
        auto nan = poisoned<Real>(1)[0];
        for (int64_t n = 0; n < c.N;
             ++n) {  // tokens of other experts alone; where dispatch is materialised, all tokens
          bool mine = false;
          for (int64_t k = 0; k < c.K; ++k) {
            int64_t row = t.slot_row[n * c.K + k];
            bool here = row >= t.offsets[e] && row < t.offsets[e + 1];
            mine |= here;
            if (!here) t.gates[n * c.K + k] = poisoned<Acc>(1)[0];
          }
          if (!mine || m) std::fill_n(&t.x[n * c.C], c.C, nan), std::fill_n(&t.dout[n * c.C], c.C, nan);
        }
        poison_others(t, t.x_rows, e), poison_others(t, t.dout_rows, e);
        for (int64_t i = 0; i < c.E; ++i)
          if (i != e)
            std::fill_n(&t.w13[i * 2 * c.F * c.C], 2 * c.F * c.C, nan),
                std::fill_n(&t.w2[i * c.C * c.F], c.C * c.F, nan);
        t.up(m);
        poison_others(t, t.h, e), poison_others(t, t.a, e);
        t.down();
        t.down_backward(m);
        poison_others(t, t.dh, e), poison_others(t, t.a_scaled, e);
        t.down_weight({t.dw2.data(), true}, m);
        t.up_input();
        t.up_weight({t.dw13.data(), true}, m);
        auto same = [&](const auto& v, const auto& expected, int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ASSERT_TRUE(std::isfinite(as_double(v[i])));
          EXPECT_EQ(std::memcmp(v.data() + begin, expected.data() + begin, (end - begin) * sizeof(v[0])), 0);
        };
        int64_t r0 = t.offsets[e], r1 = t.offsets[e + 1], W = 2 * c.F * c.C;
        same(t.h, clean.h, r0 * 2 * c.F, r1 * 2 * c.F), same(t.a, clean.a, r0 * c.F, r1 * c.F);
        same(t.y, clean.y, r0 * c.C, r1 * c.C), same(t.dh, clean.dh, r0 * 2 * c.F, r1 * 2 * c.F);
        same(t.a_scaled, clean.a_scaled, r0 * c.F, r1 * c.F), same(t.dx_rows, clean.dx_rows, r0 * c.C, r1 * c.C);
        same(t.dw13, clean.dw13, e * W, (e + 1) * W), same(t.dw2, clean.dw2, e * W / 2, (e + 1) * W / 2);
        for (int64_t r = r0; r < r1; ++r) same(t.dgates, clean.dgates, t.row_slot[r], t.row_slot[r] + 1);
      }
  }
}

TYPED_TEST(Experts, CombineMayWriteOverItsAddendAndIgnoresDroppedSlots) {
  using Real = TypeParam;
  for (int64_t C : {3, 600}) {  // within one piece of 256 columns, and over two and a bit
    const Case c{9, 3, 4, C, 8, 4};
    Chain<Real> t(c);
    t.y = third(random_tensor<Real>("y", t.s.R * C));
    std::vector<double> expected = converted<double>(t.residual), sum = expected;
    for (int64_t slot = 0; slot < t.s.R; ++slot)
      for (int64_t i = 0; i < C && t.slot_row[slot] >= 0; ++i) {
        double y = as_double(t.y[t.slot_row[slot] * C + i]);
        expected[slot / c.K * C + i] += double(t.gates[slot]) * y, sum[slot / c.K * C + i] += y;
      }
    std::fill(t.y.begin() + t.rows() * C, t.y.end(), poisoned<Real>(1)[0]);
    combine(t.dev, t.out.data(), t.y.data(), t.residual.data(), t.gates.data(), t.slot_row.data(), c.N, c.K, C);
    combine(t.dev, t.dx.data(), t.y.data(), t.residual.data(), nullptr, t.slot_row.data(), c.N, c.K, C);
    EXPECT_CLOSE(t.out, expected, tolerance<Real>());
    EXPECT_CLOSE(t.dx, sum, tolerance<Real>());
    for (int64_t i = 0; i < c.N * C; ++i) {  // k ascending, to the bit
      typename Cpu<Real>::Acc in_order = 0;
      for (int64_t slot = i / C * c.K; slot < (i / C + 1) * c.K; ++slot)
        if (t.slot_row[slot] >= 0) in_order += typename Cpu<Real>::Acc(t.y[t.slot_row[slot] * C + i % C]);
      ASSERT_EQ(as_double(t.dx[i]), as_double(Real(typename Cpu<Real>::Acc(t.residual[i]) + in_order)));
    }
    combine(t.dev, t.residual.data(), t.y.data(), t.residual.data(), t.gates.data(), t.slot_row.data(), c.N, c.K, C);
    EXPECT_TRUE(bits_of(t.residual) == bits_of(t.out));
  }
}

TYPED_TEST(Experts, BitsDoNotDependOnTheNumberOfThreads) {
  using Real = TypeParam;
  for (const Case& c : {kDropping, kLarge})
    expect_same_bits_on_any_threads([&] { return Chain<Real>(c).run().bits(); });
}

}  // namespace
