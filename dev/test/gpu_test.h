// What the tests of the GPU's ops share. A test states what it runs once, over any device. It is then run with the same
// inputs on Cpu<double> (the truth), on Cpu<Real> (what that precision costs) and on Gpu<Real>, and outputs are compared
// one by one. Tests with Small in their name are quick enough for a memory checker.
#pragma once
#include <map>
#include <tuple>

#include "dev/test/op_test.h"
#include "llmc/gpu.h"
#include "llmc/step.h"
#include "moe/dispatch.h"

using GpuReals = ::testing::Types<bf16, float>;

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    static const std::string problem = gpu_problem();
    if (!problem.empty()) GTEST_SKIP() << "no GPU: " << problem;
  }
};

// The device of this process: creating one is slow.
template <class Real>
Gpu<Real>& gpu() {
  static Gpu<Real> dev;
  return dev;
}

// Which kernels run: each op must hold for all of these.
struct KernelChoice {
  const char* name;
  bool portable, plain_matmul;
};
inline constexpr KernelChoice kernel_choices[] = {
    {"special kernels", false, false}, {"portable kernels", true, false}, {"plain matmul", false, true}};
template <class Body>
void for_each_kernel_choice(GpuBase& dev, const Body& body) {
  for (const KernelChoice& k : kernel_choices) {
    SCOPED_TRACE(k.name);
    dev.portable = k.portable, dev.plain_matmul = k.plain_matmul;
    body();
    dev.portable = dev.plain_matmul = false;
  }
}

// random_tensor<double>, kept: every test runs a dozen times with the same inputs.
inline const std::vector<double>& random_values(std::string_view name, int64_t n, double scale = 1, double mean = 0) {
  static std::map<std::tuple<std::string, int64_t, double, double>, std::vector<double>> kept;
  auto [at, fresh] = kept.try_emplace({std::string(name), n, scale, mean});
  if (fresh) at->second = random_tensor<double>(name, n, scale, mean);
  return at->second;
}

// What an op has written, back on the host.
struct Output {
  // exact: the bits of Cpu<Real>; sums: values of the type of sums; stored: values rounded to Real
  enum Kind { exact, sums, stored };
  std::string name;
  Kind kind;
  std::string bits;
  std::vector<double> values;  // of the part that is to be written
  bool rest_untouched;         // the others are still poisoned
};

// Where a parameter gradient starts, and its type.
enum class Onto { zeros, wide, narrow };
inline constexpr Onto all_onto[] = {Onto::zeros, Onto::wide, Onto::narrow};

// Inputs, outputs and scratch of one run in the memory of its device, each an allocation of exactly its size. Outputs
// and scratch are poisoned: NaN, or an integer that nothing accepts. Faults are reported as those of layer 7.
template <class D>
class Buffers {
 public:
  using Real = typename D::Real;
  using Acc = typename D::Acc;

  D& dev;

  explicit Buffers(D& dev) : dev(dev) {
    dev.layer = 7;
    dev.status = status_ = upload(std::vector<DeviceStatus>(1));
    static_assert(sizeof(DeviceStatus) == 3 * sizeof(int64_t));
    watch("status", Output::exact, reinterpret_cast<int64_t*>(status_), 3);
  }
  ~Buffers() {
    dev.status = nullptr, dev.layer = -1;
    for (auto& [p, bytes] : blocks_) dev.release(p);
  }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  // ---- inputs
  template <class T>
  T* upload(const std::vector<T>& v) {
    T* p = static_cast<T*>(allocate(v.size() * sizeof(T)));
    dev.to_device(p, v.data(), v.size() * sizeof(T));
    return p;
  }
  Real* real(const std::vector<double>& v) { return upload(converted<Real>(v)); }
  Acc* acc(const std::vector<double>& v) { return upload(converted<Acc>(v)); }
  Real* real(std::string_view name, int64_t n, double scale = 1, double mean = 0) {
    return real(random_values(name, n, scale, mean));
  }
  Acc* acc(std::string_view name, int64_t n, double scale = 1, double mean = 0) {
    return acc(random_values(name, n, scale, mean));
  }
  StepParams* params(StepParams p) { return upload(std::vector<StepParams>{p}); }
  void* scratch(size_t bytes) {
    void* p = allocate(bytes);
    dev.fill_byte(p, poison_byte<Real>, bytes);
    return p;
  }

  // ---- outputs; `written`: only that many are to be written, the rest is to stay poisoned
  Real* out(const std::string& name, int64_t n, Output::Kind kind = Output::stored, int64_t written = -1) {
    return poisoned_output<Real>(name, kind, n, written);
  }
  Acc* out_acc(const std::string& name, int64_t n, int64_t written = -1) {
    return poisoned_output<Acc>(name, Output::sums, n, written);
  }
  int32_t* out_int(const std::string& name, int64_t n) { return poisoned_output<int32_t>(name, Output::exact, n, -1); }

  // ---- what an op changes in place
  Real* inout(const std::string& name, const std::vector<double>& v, Output::Kind kind = Output::stored) {
    return watch(name, kind, real(v), int64_t(v.size()));
  }
  Acc* inout_acc(const std::string& name, const std::vector<double>& v) {
    return watch(name, Output::sums, acc(v), int64_t(v.size()));
  }
  int32_t* inout_int(const std::string& name, const std::vector<int32_t>& v) {
    return watch(name, Output::exact, upload(v), int64_t(v.size()));
  }
  Grad<D> grad(const std::string& name, int64_t n, Onto onto) {
    const auto& start = random_values("gradient so far", n, onto == Onto::zeros ? 0 : 1);
    if (onto == Onto::narrow) return {inout(name, start), false};
    return {inout_acc(name, start), true};
  }
  StepStats* stats(const std::vector<StepStats>& v = {StepStats{}}) {
    StepStats* p = upload(v);
    for (size_t i = 0; i < v.size(); ++i) {
      watch("stats.loss", Output::sums, &p[i].loss, 1);
      watch("stats.aux_loss", Output::sums, &p[i].aux_loss, 1);
      watch("stats.z_loss", Output::sums, &p[i].z_loss, 1);
      watch("stats.grad_norm", Output::sums, &p[i].grad_norm, 1);
      watch("stats.clip", Output::sums, &p[i].clip, 1);
      watch("stats.skip", Output::exact, &p[i].skip, 1);
      watch("stats.bad_tensor", Output::exact, &p[i].bad_tensor, 1);
      watch("stats.loss_z", Output::sums, &p[i].loss_z, 1);
      watch("stats.norm_z", Output::sums, &p[i].norm_z, 1);
    }
    return p;
  }

  // Makes n values at p an output. They are compared less `minus`, where that is given.
  template <class T>
  T* watch(const std::string& name, Output::Kind kind, T* p, int64_t n, int64_t written = -1,
           const std::vector<double>& minus = {}) {
    outputs_.push_back([=, this] {
      std::vector<T> v(n);
      dev.to_host(v.data(), p, v.size() * sizeof(T));
      Output o{name, kind, bits_of(v), {}, true};
      int64_t end = written < 0 ? n : written;
      for (int64_t i = 0; i < end; ++i) o.values.push_back(as_double(v[i]) - (minus.empty() ? 0 : minus[i]));
      for (size_t i = size_t(end) * sizeof(T); i < o.bits.size(); ++i)
        o.rest_untouched &= uint8_t(o.bits[i]) == poison_byte<T>;
      return o;
    });
    return p;
  }
  std::vector<Output> outputs() const {
    std::vector<Output> all;
    for (auto& collect : outputs_) all.push_back(collect());
    return all;
  }
  // All of one allocation.
  template <class T>
  std::vector<T> read(const T* p) const {
    for (auto& [block, bytes] : blocks_)
      if (block == p) {
        std::vector<T> v(bytes / sizeof(T));
        dev.to_host(v.data(), p, bytes);
        return v;
      }
    fail("not an allocation of these buffers");
  }
  DeviceStatus status() const { return read(status_)[0]; }

 private:
  template <class T>
  static constexpr uint8_t poison_byte = std::is_same_v<T, int32_t> ? 0x5A : 0xFF;

  void* allocate(size_t bytes) {
    void* p = dev.allocate(bytes);
    blocks_.emplace_back(p, bytes);
    return p;
  }
  template <class T>
  T* poisoned_output(const std::string& name, Output::Kind kind, int64_t n, int64_t written) {
    T* p = static_cast<T*>(allocate(size_t(n) * sizeof(T)));
    dev.fill_byte(p, poison_byte<T>, size_t(n) * sizeof(T));
    return watch(name, kind, p, n, written);
  }

  DeviceStatus* status_;
  std::vector<std::pair<void*, size_t>> blocks_;
  std::vector<std::function<Output()>> outputs_;
};

// Runs `body` on a device.
template <class D, class Body>
std::vector<Output> outputs_of(D& dev, const Body& body) {
  Buffers<D> b(dev);
  body(b);
  return b.outputs();
}
inline std::string bits_of(const std::vector<Output>& outputs) {
  std::string bits;
  for (const Output& o : outputs) bits += o.bits;
  return bits;
}

// What an output of n values may be further from the truth than twice the distance of the CPU's.
//   float: `terms` summed one after another cost 2^-24 sqrt(terms), where the CPU's order may cost next to nothing; at
//   least what the GPU's exponential costs.
//   bf16: the CPU can be exact, or nearly, by luck where there are few values. Then one value that the GPU rounds to the
//   other neighbour is 2^-8 of itself away, 2^-8/sqrt(n) of the norm. Rounding all values costs 1e-3 or more.
template <class Real>
double slack(Output::Kind kind, size_t n, int64_t terms) {
  if (kind == Output::stored && std::is_same_v<Real, bf16>) return 1e-4 + 0x1p-8 / std::sqrt(double(n));
  return std::max(2e-6, 0x1p-23 * std::sqrt(double(terms)));  // tensor cores cut off where the CPU rounds
}

template <class Real>
void expect_outputs(const std::vector<Output>& got, const std::vector<Output>& cpu, const std::vector<Output>& truth,
                    int64_t terms) {
  ASSERT_EQ(got.size(), truth.size());
  ASSERT_EQ(cpu.size(), truth.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const Output& o = got[i];
    EXPECT_TRUE(o.rest_untouched) << o.name << " was written where it must not be";
    if (o.kind == Output::exact) {
      EXPECT_TRUE(o.bits == cpu[i].bits) << o.name << " differs from the CPU's, error "
                                         << relative_error(o.values, cpu[i].values);
    } else {
      double error = relative_error(o.values, truth[i].values), cost = relative_error(cpu[i].values, truth[i].values);
      EXPECT_LE(error, 2 * cost + slack<Real>(o.kind, o.values.size(), terms))
          << o.name << ", the CPU's error is " << cost;
    }
  }
}

// Two runs on the GPU give the same bits, and every output is right, whichever kernels run. terms: of the longest sum.
template <class Real, class Body>
void expect_calibrated(const Body& body, int64_t terms = 1000) {
  Cpu<double> exact;
  Cpu<Real> cpu;
  auto truth = outputs_of(exact, body), calibration = outputs_of(cpu, body);
  for_each_kernel_choice(gpu<Real>(), [&] {
    auto got = outputs_of(gpu<Real>(), body);
    expect_outputs<Real>(got, calibration, truth, terms);
    EXPECT_TRUE(bits_of(outputs_of(gpu<Real>(), body)) == bits_of(got)) << "another run gives other bits";
  });
}

// `run(buffers, gradient)` adds to n elements: a sum finished in float and rounded to bf16 once. The two runs may order
// their sums differently, which moves hardly any value across a rounding; rounding twice moves a quarter of them.
template <class Run>
void expect_rounded_once(int64_t n, const Run& run, bool onto_zeros = false) {
  auto& dev = gpu<bf16>();
  for_each_kernel_choice(dev, [&] {
    Buffers<Gpu<bf16>> b(dev);
    Grad<Gpu<bf16>> wide = b.grad("wide", n, Onto::zeros), narrow = b.grad("narrow", n, Onto::narrow);
    if (onto_zeros) dev.zero(narrow.data, size_t(n) * sizeof(bf16));
    run(b, wide), run(b, narrow);
    auto contribution = b.read(static_cast<float*>(wide.data));
    auto start = random_tensor<bf16>("gradient so far", n);
    if (onto_zeros) std::fill(start.begin(), start.end(), bf16(0));
    auto sum = b.read(static_cast<bf16*>(narrow.data));
    int64_t different = 0;
    for (int64_t i = 0; i < n; ++i) different += sum[i].bits != bf16(float(start[i]) + contribution[i]).bits;
    EXPECT_LE(different, 1 + n / 50) << "of " << n;
  });
}

// `run(buffers, gradient)` told to write n elements over NaN leaves what adding to zeros does, up to the sign of a zero.
template <class Real, class Run>
void expect_written(int64_t n, const Run& run) {
  for_each_kernel_choice(gpu<Real>(), [&] {
    for (bool wide : {true, false}) {
      auto left = [&](bool add) {
        Buffers<Gpu<Real>> b(gpu<Real>());
        const size_t bytes = size_t(n) * (wide ? sizeof(float) : sizeof(Real));
        const Grad<Gpu<Real>> g{b.scratch(bytes), wide, add};
        if (add) b.dev.zero(g.data, bytes);
        run(b, g);
        return wide ? converted<double>(b.read(static_cast<float*>(g.data)))
                    : converted<double>(b.read(static_cast<Real*>(g.data)));
      };
      const auto written = left(false), sum = left(true);
      EXPECT_TRUE(written == sum) << (wide ? "wide, " : "narrow, ") << relative_error(written, sum);
    }
  });
}

// ---- routings, for the ops of the MoE layer

struct Routing {
  std::string name;
  int64_t N, K, E;
  std::vector<int32_t> index;  // (N,K)
};
// K different experts a token, at random; popular > K: most of them are among the first few.
inline Routing random_routing(int64_t N, int64_t K, int64_t E, int64_t popular = 0) {
  Routing r{popular ? "skewed" : "random", N, K, E, {}};
  for (int64_t t = 0; t < N; ++t) {
    std::vector<int32_t> order(E);
    for (int32_t e = 0; e < E; ++e) order[e] = e;
    for (int64_t k = 0; k < K; ++k) {
      uint64_t bits = random_bits(3, 0, uint64_t(t * K + k));
      int64_t range = popular > K && bits >> 60 ? popular - k : E - k;
      std::swap(order[k], order[k + int64_t((bits & 0xFFFFFFFF) % uint64_t(range))]);
    }
    r.index.insert(r.index.end(), order.begin(), order.begin() + K);
  }
  return r;
}
// The experts of token t are first(t), first(t) + 1, ... modulo E.
template <class First>
Routing consecutive_routing(const std::string& name, int64_t N, int64_t K, int64_t E, First first) {
  Routing r{name, N, K, E, {}};
  for (int64_t t = 0; t < N; ++t)
    for (int64_t k = 0; k < K; ++k) r.index.push_back(int32_t((first(t) + k) % E));
  return r;
}
inline Routing round_robin(int64_t N, int64_t K, int64_t E) {
  return consecutive_routing("round robin", N, K, E, [=](int64_t t) { return t * K; });
}
// With K = 1 every token goes to one expert; with more, to the same few.
inline Routing same_for_all(int64_t N, int64_t K, int64_t E, int64_t first) {
  return consecutive_routing("all on " + std::to_string(first), N, K, E, [=](int64_t) { return first; });
}
// Of two choices among at least 5 experts: expert 2 has no rows, expert 4 has one.
inline Routing empty_and_single(int64_t N, int64_t E) {
  Routing r{"one empty, one single", N, 2, E, {}};
  for (int64_t t = 0; t < N; ++t) {
    int32_t best = t == N / 3 ? 4 : t % 9 == 5 ? 3 : t % 9 == 7 ? 1 : 0;
    r.index.insert(r.index.end(), {best, best == 0 || best == 4 ? 1 : 0});
  }
  return r;
}

// The plan of a routing, on the host.
struct HostPlan {
  std::vector<int32_t> counts, offsets, row_slot, slot_row;
  HostPlan(const Routing& r, int64_t capacity)
      : counts(r.E), offsets(r.E + 1), row_slot(r.N * r.K), slot_row(r.N * r.K) {
    Cpu<float> dev;
    Scratch scratch(dispatch_scratch_bytes<Cpu<float>>(r.N, r.K, r.E));
    dispatch_plan(dev, {counts.data(), offsets.data(), row_slot.data(), slot_row.data()}, scratch, r.index.data(), r.N,
                  r.K, r.E, capacity);
  }
  int64_t rows() const { return offsets.back(); }
};
