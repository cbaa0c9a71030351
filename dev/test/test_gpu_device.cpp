// The GPU as a device: memory, copies in order with the work around them, captured graphs.
#include <gtest/gtest.h>

#include "dev/test/gpu_test.h"
#include "llmc/embedding.h"
#include "llmc/matmul.h"
#include "llmc/rmsnorm.h"
#include "llmc/swiglu.h"

namespace {

template <class Real>
struct GpuDevice : GpuTest {};
TYPED_TEST_SUITE(GpuDevice, GpuReals);

TYPED_TEST(GpuDevice, CopiesAndFillsSmall) {
  auto& dev = gpu<TypeParam>();
  EXPECT_GE(dev.capability, 80);
  EXPECT_GT(dev.multiprocessors, 0);
  EXPECT_FALSE(dev.gpu_name.empty());
  for (size_t n : {0, 1, 3, 1001}) {
    std::vector<char> host(n, 'x'), back(n);
    auto *p = static_cast<char*>(dev.allocate(n)), *q = static_cast<char*>(dev.allocate(n));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(p) % GpuBase::alignment, 0u);
    dev.to_device(p, host.data(), n);
    dev.fill_byte(q, 'y', n);
    dev.copy(q, p, n / 2);
    dev.to_host(back.data(), q, n);
    for (size_t i = 0; i < n; ++i) EXPECT_EQ(back[i], i < n / 2 ? 'x' : 'y');
    dev.zero(q, n);
    dev.to_host(back.data(), q, n);
    EXPECT_EQ(std::count(back.begin(), back.end(), 0), int64_t(n));
    dev.release(p), dev.release(q);
  }
}

// Rows that lie apart on the device and together on the host; the gaps stay as they are.
TYPED_TEST(GpuDevice, RowsSmall) {
  auto& dev = gpu<TypeParam>();
  const size_t pitch = 37, width = 11, rows = 5;
  std::vector<char> host(width * rows), back(width * rows), all(pitch * rows);
  for (size_t i = 0; i < host.size(); ++i) host[i] = char(i);
  auto* p = static_cast<char*>(dev.allocate((rows - 1) * pitch + 3 + width));  // the last row has no gap behind it
  dev.fill_byte(p, 'y', (rows - 1) * pitch + 3 + width);
  dev.rows_to_device(p + 3, pitch, host.data(), width, rows);
  dev.to_host(all.data(), p, (rows - 1) * pitch + 3 + width);
  for (size_t i = 0; i < (rows - 1) * pitch + 3 + width; ++i) {
    bool inside = i >= 3 && (i - 3) % pitch < width;
    EXPECT_EQ(all[i], inside ? host[(i - 3) / pitch * width + (i - 3) % pitch] : 'y') << i;
  }
  dev.rows_to_host(back.data(), p + 3, pitch, width, rows);
  EXPECT_EQ(back, host);
  dev.release(p);
}

TYPED_TEST(GpuDevice, TooLargeAnAllocationThrowsAndLeavesTheDeviceUsable) {
  auto& dev = gpu<TypeParam>();
  auto memory = dev.memory();
  EXPECT_GE(memory.total, memory.free);
  EXPECT_THROW(dev.allocate(memory.total + (size_t(1) << 30)), std::bad_alloc);
  Buffers<Gpu<TypeParam>> b(dev);
  EXPECT_EQ(b.read(b.upload(std::vector<int32_t>{5, 6})), (std::vector<int32_t>{5, 6}));
}

// Each round stages new values into the same place and adds them to its own copy of ones, behind work that takes long.
template <class Real>
void check_staging(int64_t rounds, int64_t n, int64_t width) {
  auto& dev = gpu<Real>();
  Buffers<Gpu<Real>> b(dev);
  Real *in = b.out("in", n), *ones = b.real(std::vector<double>(n, 1.0));
  auto *x = b.real("x", width * width), *w = b.real("w", width * width), *y = b.out("y", width * width);
  void* scratch = b.scratch(matmul_scratch_bytes<Gpu<Real>>(width, width, width));
  std::vector<Real*> sums;
  std::vector<Real> host(n);
  for (int64_t i = 0; i < rounds; ++i) sums.push_back(b.out("sum", n));
  for (int64_t i = 0; i < rounds; ++i) {
    matmul_forward(dev, y, scratch, x, w, width, width, width);
    int64_t bytes = i < 3 ? n / 2 : n;  // a later one is larger
    std::fill(host.begin(), host.end(), from_double<Real>(double(i)));
    dev.stage(in, host.data(), size_t(bytes) * sizeof(Real));
    std::fill(host.begin(), host.end(), from_double<Real>(-1));  // the host may reuse its memory at once
    residual_add(dev, sums[i], in, ones, bytes);
  }
  for (int64_t i = 0; i < rounds; ++i) {
    auto sum = b.read(sums[i]);
    for (int64_t j = 0; j < (i < 3 ? n / 2 : n); ++j) ASSERT_EQ(as_double(sum[j]), double(i + 1)) << i;
  }
}
TYPED_TEST(GpuDevice, StagedDataArriveInOrderSmall) { check_staging<TypeParam>(9, 37, 16); }
TYPED_TEST(GpuDevice, StagedDataArriveInOrder) { check_staging<TypeParam>(40, 100003, 1024); }

TYPED_TEST(GpuDevice, FetchGivesWhatWasThereAtThatPointSmall) {
  auto& dev = gpu<TypeParam>();
  Buffers<Gpu<TypeParam>> b(dev);
  const int64_t n = 5000;
  auto *a = b.upload(std::vector<int32_t>(n, -1)), *c = b.upload(std::vector<int32_t>{1, 2, 3});
  std::vector<std::pair<int, GpuBase::Fetch>> waiting;
  auto check = [&] {
    auto [byte, fetch] = waiting.front();
    auto bytes = fetch();
    ASSERT_EQ(bytes.size(), n + 8u);
    EXPECT_EQ(std::count(bytes.begin(), bytes.begin() + n, char(byte)), n);
    int32_t last[2];
    std::memcpy(last, &bytes[n], 8);
    EXPECT_EQ(last[0], 2);
    EXPECT_EQ(last[1], 3);
    waiting.erase(waiting.begin());
  };
  for (int i = 0; i < 12; ++i) {
    dev.fill_byte(a, i, n);
    waiting.emplace_back(i, dev.fetch({{a, n}, {c + 1, 8}}));
    dev.fill_byte(a, 99, n);  // later work does not show
    if (waiting.size() == 4) check();
  }
  while (!waiting.empty()) check();
}

// A few ops of every kind, from tokens on.
template <class Real>
struct Program {
  using D = Gpu<Real>;
  static constexpr int64_t N = 70, C = 64, V = 50;
  Buffers<D> b{gpu<Real>()};
  int32_t* tokens = b.upload(random_ints("tokens", N, V));
  Real *table = b.real("table", V*C), *weight = b.real("weight", C), *w = b.real("w", 2 * C * C);
  Real *x = b.out("x", N*C), *out = b.out("out", N*C), *h = b.out("h", N * 2 * C), *a = b.out("a", N*C);
  float* rstd = b.out_acc("rstd", N);
  Grad<D> dw = b.grad("dw", 2 * C * C, Onto::wide), dtable = b.grad("dtable", V*C, Onto::narrow);
  int32_t *counts = b.out_int("counts", V), *offsets = b.out_int("offsets", V + 1),
          *row_slot = b.out_int("row_slot", N), *slot_row = b.out_int("slot_row", N);
  void* product = b.scratch(matmul_scratch_bytes<D>(N, C, 2 * C));
  void* sums = b.scratch(embedding_backward_scratch_bytes<D>(N, C, V));
  void* plan = b.scratch(dispatch_scratch_bytes<D>(N, 1, V));
  void run() {
    embedding_forward(b.dev, x, tokens, table, N, C, V);
    rmsnorm_forward(b.dev, out, rstd, x, weight, N, C, 1e-6);
    matmul_forward(b.dev, h, product, out, w, N, C, 2 * C);
    swiglu_forward(b.dev, a, h, N, C);
    residual_add(b.dev, x, x, a, N * C);
    matmul_backward_weight(b.dev, dw, product, h, out, N, C, 2 * C);
    embedding_backward(b.dev, dtable, sums, tokens, a, N, C, V);
    dispatch_plan(b.dev, {counts, offsets, row_slot, slot_row}, plan, tokens, N, 1, V, 3);
  }
};

TYPED_TEST(GpuDevice, ACapturedGraphReplaysWithTheSameBitsSmall) {
  using Real = TypeParam;
  Program<Real> direct, replayed;
  direct.run();  // and sets up what is set up once
  auto graph = gpu<Real>().capture([&] { replayed.run(); });
  EXPECT_EQ(as_double(replayed.b.read(replayed.counts)[0]), 0x5A5A5A5A) << "capturing runs nothing";
  gpu<Real>().launch(*graph);
  EXPECT_TRUE(bits_of(direct.b.outputs()) == bits_of(replayed.b.outputs()));
  // Other inputs at the same place, twice; gradients go on from where they are.
  for (auto name : {"second", "third"}) {
    auto tokens = random_ints(name, direct.N, direct.V);
    for (Program<Real>* p : {&direct, &replayed}) gpu<Real>().stage(p->tokens, tokens.data(), tokens.size() * 4);
    direct.run();
    gpu<Real>().launch(*graph);
    EXPECT_TRUE(bits_of(direct.b.outputs()) == bits_of(replayed.b.outputs())) << name;
  }
  auto nodes = GpuBase::nodes(*graph);
  EXPECT_GE(std::count(nodes.begin(), nodes.end(), "kernel"), 8);
  for (const std::string& kind : nodes)
    EXPECT_TRUE(kind == "kernel" || kind == "memset" || kind == "copy" || kind == "empty") << kind;
}

}  // namespace
