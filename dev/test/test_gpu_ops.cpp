// Embedding, RMSNorm, residual addition, QK-norm with RoPE and SwiGLU on the GPU.
#include <gtest/gtest.h>

#include "dev/test/gpu_test.h"
#include "llmc/embedding.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
#include "llmc/swiglu.h"

namespace {

template <class Real>
struct GpuOps : GpuTest {};
TYPED_TEST_SUITE(GpuOps, GpuReals);

struct Gpu16 : GpuTest {};

// ---- embedding

template <class Real>
void check_embedding(const std::vector<int32_t>& tokens, int64_t C, int64_t V) {
  int64_t N = int64_t(tokens.size());
  SCOPED_TRACE("N " + std::to_string(N) + " C " + std::to_string(C) + " V " + std::to_string(V));
  for (Onto onto : all_onto)
    expect_calibrated<Real>(
        [&]<class D>(Buffers<D>& b) {
          const int32_t* t = b.upload(tokens);
          embedding_forward(b.dev, b.out("out", N * C, Output::exact), t, b.real("table", V * C), N, C, V);
          void* scratch = b.scratch(embedding_backward_scratch_bytes<D>(N, C, V));
          embedding_backward(b.dev, b.grad("dtable", V * C, onto), scratch, t, b.real("dout", N * C), N, C, V);
        },
        N);
}
// Nearly all positions hold token 3.
std::vector<int32_t> one_popular(int64_t N, int64_t V) {
  auto tokens = random_ints("tokens", N, V);
  for (int64_t n = 0; n < N; ++n)
    if (n % 50) tokens[n] = 3;
  return tokens;
}

TYPED_TEST(GpuOps, EmbeddingSmall) {
  check_embedding<TypeParam>({0}, 1, 1);
  check_embedding<TypeParam>({4, 0, 4, 2, 4, 2, 1}, 5, 5);
  check_embedding<TypeParam>({39}, 37, 40);
  check_embedding<TypeParam>(random_ints("tokens", 70, 20), 8, 40);
}

TYPED_TEST(GpuOps, Embedding) {
  check_embedding<TypeParam>(random_ints("tokens", 150, 40), 33, 40);
  check_embedding<TypeParam>(random_ints("tokens", 300, 5000), 64, 5000);
  check_embedding<TypeParam>(random_ints("tokens", 64, 50257), 8, 50257);
  check_embedding<TypeParam>(random_ints("tokens", 1000, 300), 136, 300);
  check_embedding<TypeParam>(one_popular(5000, 11), 37, 11);
  check_embedding<TypeParam>(one_popular(3000, 500), 768, 500);
  check_embedding<TypeParam>(one_popular(100, 50), 2048, 50);
  check_embedding<TypeParam>(one_popular(100, 50), 4096, 50);
}

// A foreign token reads row 0, is named, and adds to no row of the gradient.
TYPED_TEST(GpuOps, EmbeddingForeignTokenSmall) {
  for (int32_t foreign : {40, -1, INT32_MAX, INT32_MIN}) {
    auto tokens = random_ints("tokens", 70, 40);
    tokens[33] = foreign;
    check_embedding<TypeParam>(tokens, 37, 40);
    Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
    embedding_forward(b.dev, b.out("out", 70 * 3), b.upload(tokens), b.real("table", 40 * 3), 70, 3, 40);
    DeviceStatus status = b.status();
    EXPECT_EQ(status.code, DeviceStatus::token_out_of_range);
    EXPECT_EQ(status.layer, 7);
    EXPECT_EQ(status.token, 33);
    EXPECT_EQ(status.value, foreign);
  }
}

TYPED_TEST(GpuOps, TheFirstFaultStaysSmall) {
  Buffers<Gpu<TypeParam>> b(gpu<TypeParam>());
  std::vector<int32_t> tokens(100, 9);
  auto forward = [&](int64_t V) {
    embedding_forward(b.dev, b.out("out", 100), b.upload(tokens), b.real("table", 9), 100, 1, V);
  };
  tokens[40] = 5;
  forward(9);  // all but one are foreign, all with the same value
  DeviceStatus first = b.status();
  EXPECT_EQ(first.code, DeviceStatus::token_out_of_range);
  EXPECT_EQ(first.value, 9);
  EXPECT_TRUE(first.token >= 0 && first.token < 100 && first.token != 40);
  b.dev.layer = 8;
  tokens.assign(100, -5);
  forward(9);
  EXPECT_EQ(b.status().layer, 7);
  EXPECT_EQ(b.status().token, first.token);
  EXPECT_EQ(b.status().value, 9);
}

// ---- RMSNorm

enum class Residual { none, apart, in_place };

template <class Real>
void check_rmsnorm(int64_t N, int64_t C) {
  SCOPED_TRACE("N " + std::to_string(N) + " C " + std::to_string(C));
  for (Residual residual : {Residual::none, Residual::apart, Residual::in_place})
    expect_calibrated<Real>([&]<class D>(Buffers<D>& b) {
      auto *x = b.real("x", N * C), *w = b.real("w", C);
      auto* rstd = b.out_acc("rstd", N);
      if (residual == Residual::none) {
        rmsnorm_forward(b.dev, b.out("out", N * C), rstd, x, w, N, C, 0.3);
      } else {
        auto* sum = residual == Residual::in_place ? x : b.out("sum apart", N * C, Output::exact);
        b.watch("sum", Output::exact, sum, N * C);
        residual_rmsnorm_forward(b.dev, sum, b.out("out", N * C), rstd, x, b.real("branch", N * C), w, N, C, 0.3);
        x = sum;
      }
      auto past = random_values("dresidual", N * C);
      auto* dx = residual == Residual::in_place ? b.inout("dx", past) : b.out("dx", N * C);
      auto* dresidual = residual == Residual::none ? nullptr : residual == Residual::apart ? b.real(past) : dx;
      Onto onto = all_onto[int(residual)];
      rmsnorm_backward(b.dev, dx, b.grad("dw", C, onto), b.scratch(rmsnorm_backward_scratch_bytes<D>(N, C)),
                       b.real("dout", N * C), dresidual, x, w, rstd, N, C);
    });
}

TYPED_TEST(GpuOps, RmsnormSmall) {
  for (auto [N, C] : {std::pair{1, 1}, {1, 8}, {3, 37}, {70, 8}, {2, 130}}) check_rmsnorm<TypeParam>(N, C);
}
TYPED_TEST(GpuOps, Rmsnorm) {
  for (auto [N, C] : {std::pair{70, 37}, {33, 768}, {200, 1024}, {5, 4096}, {1, 2048}, {1000, 64}, {3, 1021}})
    check_rmsnorm<TypeParam>(N, C);
}

// ---- residual addition

template <class Real>
void check_residual_add(int64_t n) {
  SCOPED_TRACE(n);
  expect_calibrated<Real>([&]<class D>(Buffers<D>& b) {
    auto va = random_values("a", n), vb = random_values("b", n);
    residual_add(b.dev, b.out("out", n, Output::exact), b.real(va), b.real(vb), n);
    auto *over_a = b.inout("over a", va, Output::exact), *over_b = b.inout("over b", vb, Output::exact);
    residual_add(b.dev, over_a, over_a, b.real(vb), n);
    residual_add(b.dev, over_b, b.real(va), over_b, n);
  });
}
TYPED_TEST(GpuOps, ResidualAddSmall) {
  for (int64_t n : {1, 7, 8, 99, 256}) check_residual_add<TypeParam>(n);
}
TYPED_TEST(GpuOps, ResidualAdd) {
  for (int64_t n : {4099, 1 << 20, (1 << 18) + 1}) check_residual_add<TypeParam>(n);
}

// ---- QK-norm and RoPE

template <class Real>
void check_rope(int64_t N, HeadShape heads) {
  SCOPED_TRACE("N " + std::to_string(N) + " head_dim " + std::to_string(heads.head_dim));
  const int64_t HD = heads.head_dim;
  for (bool norm : {false, true})
    for (Onto onto : all_onto) {
      if (!norm && onto != Onto::zeros) continue;  // no gradient is accumulated
      SCOPED_TRACE(norm ? "norm" : "no norm");
      expect_calibrated<Real>([&]<class D>(Buffers<D>& b) {
        auto *qkv = b.real("qkv", N * heads.qkv_width()), *q = norm ? b.real("qw", HD) : nullptr,
             *k = norm ? b.real("kw", HD) : nullptr;
        auto *table = b.acc(rope_table(50, HD, 100)),
             *rstd = norm ? b.out_acc("rstd", N * (heads.n_head + heads.n_kv_head)) : nullptr;
        const int32_t* positions = b.upload(random_ints("positions", N, 50));
        qknorm_rope_forward(b.dev, b.out("qk", N * heads.qk_width()), rstd, qkv, q, k, table, positions, N, heads, 0.1);
        Grad<D> dq = norm ? b.grad("dq_weight", HD, onto) : Grad<D>{},
                dk = norm ? b.grad("dk_weight", HD, onto) : Grad<D>{};
        auto* dqkv = b.inout("dqkv", random_values("dqkv", N * heads.qkv_width()));
        qknorm_rope_backward(b.dev, dqkv, dq, dk, b.scratch(qknorm_rope_backward_scratch_bytes<D>(N, heads)), qkv, rstd,
                             q, k, table, positions, N, heads);
      });
    }
}
TYPED_TEST(GpuOps, QknormRopeSmall) {
  check_rope<TypeParam>(1, {1, 1, 2});
  check_rope<TypeParam>(1, {2, 1, 16});
  check_rope<TypeParam>(5, {3, 2, 10});
  check_rope<TypeParam>(9, {4, 2, 64});
}
TYPED_TEST(GpuOps, QknormRope) {
  check_rope<TypeParam>(140, {3, 2, 10});
  check_rope<TypeParam>(70, {2, 2, 16});
  check_rope<TypeParam>(257, {4, 2, 32});
  check_rope<TypeParam>(300, {6, 1, 64});
  check_rope<TypeParam>(70, {2, 1, 96});
  check_rope<TypeParam>(130, {8, 2, 128});
  check_rope<TypeParam>(33, {2, 1, max_head_dim});
}

// ---- SwiGLU

template <class Real>
void check_swiglu(int64_t N, int64_t F, double scale) {
  SCOPED_TRACE("N " + std::to_string(N) + " F " + std::to_string(F));
  expect_calibrated<Real>([&]<class D>(Buffers<D>& b) {
    auto* h = b.real("h", N * 2 * F, scale);
    swiglu_forward(b.dev, b.out("a", N * F), h, N, F);
    swiglu_backward(b.dev, b.out("dh", N * 2 * F), b.real("da", N * F), h, N, F);
  });
}
TYPED_TEST(GpuOps, SwigluSmall) {
  check_swiglu<TypeParam>(1, 8, 1);
  check_swiglu<TypeParam>(70, 24, 3);
  check_swiglu<TypeParam>(3, 16, 500);  // exp overflows
}
TYPED_TEST(GpuOps, Swiglu) {
  check_swiglu<TypeParam>(5, 520, 3);
  check_swiglu<TypeParam>(1, 2048, 3);
  check_swiglu<TypeParam>(333, 136, 3);
  check_swiglu<TypeParam>(70, 1024, 20);
}

// ---- gradients of parameters

TEST_F(Gpu16, EmbeddingAndNormGradientsAreRoundedOnceSmall) {
  expect_rounded_once(40 * 33, [](auto& b, Grad<Gpu<bf16>> g) {
    void* scratch = b.scratch(embedding_backward_scratch_bytes<Gpu<bf16>>(200, 33, 40));
    embedding_backward(b.dev, g, scratch, b.upload(random_ints("tokens", 200, 40)), b.real("dout", 200 * 33), 200, 33,
                       40);
  });
  expect_rounded_once(1000, [](auto& b, Grad<Gpu<bf16>> g) {
    void* scratch = b.scratch(rmsnorm_backward_scratch_bytes<Gpu<bf16>>(70, 1000));
    rmsnorm_backward(b.dev, b.out("dx", 70000), g, scratch, b.real("dout", 70000), nullptr, b.real("x", 70000),
                     b.real("w", 1000), b.acc("rstd", 70), 70, 1000);
  });
  const HeadShape heads{2, 1, 128};
  expect_rounded_once(256, [&](auto& b, Grad<Gpu<bf16>> g) {
    Grad<Gpu<bf16>> second = g;
    g.visit([&](auto* p) { second.data = p + 128; });
    void* scratch = b.scratch(qknorm_rope_backward_scratch_bytes<Gpu<bf16>>(70, heads));
    qknorm_rope_backward(b.dev, b.real("dqkv", 70 * 512), g, second, scratch, b.real("qkv", 70 * 512),
                         b.acc("rstd", 70 * 3), b.real("qw", 128), b.real("kw", 128), b.acc(rope_table(50, 128, 100)),
                         b.upload(random_ints("positions", 70, 50)), 70, heads);
  });
}

}  // namespace
