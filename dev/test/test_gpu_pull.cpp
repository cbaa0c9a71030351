// Rows that ranks fetch from each other's memory: the kernels on one GPU, against the CPU; and the real way, in processes of
// their own with mapped memory, graphs and random delays, against what the exchange of rows computes.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <chrono>
#include <numeric>
#include <thread>

#include "dev/spawn_ranks.h"
#include "dev/test/gpu_test.h"
#include "llmc/rmsnorm.h"
#include "moe/combine.h"
#include "moe/expert_pull.h"

namespace {

// ---- the kernels ----

template <class Real>
struct GpuPull : GpuTest {};
TYPED_TEST_SUITE(GpuPull, GpuReals);

// Every rank's memory is on the one GPU.
template <class Real>
void check_kernels(const Routing& routing, int ranks, int64_t C) {
  const int64_t M = routing.N, N = M / ranks, K = routing.K, E = routing.E;
  for (int rank = 0; rank < ranks; ++rank) {
    SCOPED_TRACE(routing.name + ", rank " + std::to_string(rank) + " of " + std::to_string(ranks) + ", N " +
                 std::to_string(N) + " K " + std::to_string(K) + " E " + std::to_string(E) + " C " + std::to_string(C));
    const ExpertRanks r{ranks, rank, N, K, E};
    int64_t arriving = 0;
    for (int64_t t = 0; t < M; ++t)
      arriving += std::any_of(&routing.index[t * K], &routing.index[t * K] + K,
                              [&](int e) { return e >= 0 && e / r.slots() == rank; });
    expect_calibrated<Real>([&]<class D>(Buffers<D>& b) {
      using T = typename D::Real;
      using Acc = typename D::Acc;
      auto* choices = b.upload(routing.index);
      auto* destination = b.out_int("destination", M * ranks);
      expert_destinations(b.dev, destination, choices, r);  // in order, an expert's number is its place
      auto *counts = b.out_int("counts", ranks), *offsets = b.out_int("offsets", ranks + 1),
           *row_slot = b.out_int("row_slot", M * ranks), *slot_row = b.out_int("slot_row", M * ranks);
      dispatch_plan(b.dev, {counts, offsets, row_slot, slot_row}, b.scratch(dispatch_scratch_bytes<D>(M, ranks, ranks)),
                    destination, M, ranks, ranks, 0);
      auto *source = b.out_int("source", M + 1), *position = b.out_int("position", N * ranks);
      expert_pull_plan(b.dev, source, position, offsets, row_slot, slot_row, r);
      Peers<const T> x, partial;
      Peers<const Acc> dgates;
      for (int p = 0; p < ranks; ++p) {
        x.at[p] = b.real("x of " + std::to_string(p), N * C);
        partial.at[p] = b.real("partial of " + std::to_string(p), M * C);
        dgates.at[p] = b.acc("dgates of " + std::to_string(p), M * K);
      }
      expert_pull(b.dev, b.out("arrived", M * C, Output::exact, arriving * C), x, source, C, r);
      expert_pull_back(b.dev, b.out("out", N * C, Output::exact), partial, b.real("addend", N * C), position, C, r);
      auto* own = b.out_acc("own dgates", N * K);
      b.watch("bits of own dgates", Output::exact, own, N * K);
      expert_pull_gate_gradients(b.dev, own, dgates, position, choices + rank * N * K, r);
    });
  }
}
Routing elsewhere(Routing r) {
  r.name += ", some nowhere";
  for (size_t i = 0; i < r.index.size(); ++i)
    if (random_bits(6, 0, i) % 4 == 0) r.index[i] = -1;
  return r;
}
TYPED_TEST(GpuPull, RowsSmall) {
  check_kernels<TypeParam>(random_routing(1, 1, 1), 1, 1);
  check_kernels<TypeParam>(random_routing(40, 2, 8), 2, 8);
  check_kernels<TypeParam>(elsewhere(random_routing(60, 3, 9, 4)), 3, 37);
  check_kernels<TypeParam>(same_for_all(40, 2, 8, 6), 4, 16);
  check_kernels<TypeParam>(same_for_all(40, 1, 8, 0), 8, 24);
  check_kernels<TypeParam>(round_robin(64, 2, 16), 16, 264);
}
TYPED_TEST(GpuPull, Rows) {
  check_kernels<TypeParam>(random_routing(8000, 8, 128), 8, 256);
  check_kernels<TypeParam>(elsewhere(random_routing(3000, 4, 60)), 4, 133);
  check_kernels<TypeParam>(random_routing(2000, 8, 64), 2, 2048);
}

// Where a rank was waited for in vain, nothing is read and nothing written.
TYPED_TEST(GpuPull, NothingIsReadFromLostRanksSmall) {
  using D = Gpu<TypeParam>;
  Buffers<D> b(gpu<TypeParam>());
  const ExpertRanks r{2, 0, 4, 1, 2};
  const int64_t C = 8;
  Peers<const TypeParam> rows;
  Peers<const float> dgates;
  rows.lost = dgates.lost = b.upload(std::vector<int32_t>{1});
  auto* arrived = b.out("arrived", 8 * C, Output::exact, 0);
  auto* out = b.out("out", 4 * C, Output::exact, 0);
  auto* own = b.out_acc("own", 4, 0);
  auto* source = b.upload(std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8});
  auto* position = b.upload(std::vector<int32_t>{0, 0, 1, 1, 2, 2, 3, 3});
  expert_pull(b.dev, arrived, rows, source, C, r);
  expert_pull_back(b.dev, out, rows, b.real("addend", 4 * C), position, C, r);
  expert_pull_gate_gradients(b.dev, own, dgates, position, b.upload(std::vector<int32_t>{0, 1, 0, 1}), r);
  b.dev.synchronize();
  for (const Output& o : b.outputs()) EXPECT_TRUE(o.rest_untouched) << o.name;
}

// ---- the ranks of a job: each a process, which says what went wrong on stderr ----

int wrong = 0;  // in this process
void expect(bool holds, const std::string& what) {
  if (holds) return;
  if (++wrong <= 10) std::fprintf(stderr, "rank %s: %s\n", std::getenv("RANK"), what.c_str());
}
void pause(uint64_t bits, int most_microseconds) {
  std::this_thread::sleep_for(std::chrono::microseconds(bits % uint64_t(most_microseconds)));
}

constexpr int steps = 3;  // of a program

// What all ranks start a batch of programs from; every rank knows all of it.
template <class Real>
struct Inputs {
  std::vector<int32_t> choices;                 // (M,K)
  std::vector<std::vector<Real>> x;             // of each rank (N,C)
  std::vector<std::vector<float>> dgates;       // of each rank (M,K)
  std::vector<std::vector<Real>> arrived, out;  // afterwards
  std::vector<std::vector<float>> own;          //
  std::vector<int32_t> arriving = std::vector<int32_t>(max_peers);

  Inputs(int batch, ExpertRanks r, int64_t C) {
    const std::string name = "batch " + std::to_string(batch);
    for (int64_t i = 0; i < r.M() * r.K; ++i) {
      const uint64_t bits = random_bits(11, uint64_t(batch), uint64_t(i));
      const int64_t anywhere = int64_t(bits % uint64_t(r.E));
      choices.push_back(int32_t(batch % 5 == 1   ? 0                                 // all to one rank
                                : batch % 5 == 2 ? (bits >> 40) % 3 ? -1 : anywhere  // many tokens nowhere
                                : batch % 5 == 3 ? i / r.K / r.N * r.slots()         // each to its own rank
                                                 : anywhere));
    }
    for (int p = 0; p < r.ranks; ++p) {
      x.push_back(random_tensor<Real>(name + " x" + std::to_string(p), r.N * C));
      dgates.push_back(random_tensor<float>(name + " g" + std::to_string(p), r.M() * r.K));
    }
  }

  // `programs` programs as the exchange of rows computes them, all ranks in this process.
  void run(int programs, ExpertRanks group, int64_t C) {
    const int n = group.ranks;
    const int64_t M = group.M(), N = group.N, K = group.K;
    Cpu<Real> dev;
    std::vector<std::vector<int32_t>> position;
    std::vector<int32_t> counts(n * n);
    for (int p = 0; p < n; ++p) {
      ExpertRanks r = group;
      r.rank = p;
      std::vector<int32_t> destination(M * n), plan_counts(n), offsets(n + 1), row_slot(M * n), slot_row(M * n);
      position.emplace_back(N * n);
      expert_destinations(dev, destination.data(), choices.data(), r);
      Scratch scratch(dispatch_scratch_bytes<Cpu<Real>>(M, n, n));
      dispatch_plan(dev, {plan_counts.data(), offsets.data(), row_slot.data(), slot_row.data()}, scratch,
                    destination.data(), M, n, n, 0);
      expert_positions(dev, position[p].data(), counts.data(), offsets.data(), row_slot.data(), slot_row.data(), r);
    }
    auto exchange = [&](auto& packed, auto& there, int64_t width, bool back) {
      std::vector<int64_t> received(n, 0);
      for (int s = 0; s < n; ++s)
        for (int64_t d = 0, sent = 0; d < n; ++d) {
          const int64_t rows = counts[s * n + d];
          auto *here = packed[s].data() + sent * width, *far = there[d].data() + received[d] * width;
          std::copy_n(back ? far : here, rows * width, back ? here : far);
          sent += rows, received[d] += rows;
        }
      for (int d = 0; d < n; ++d) arriving[d] = int32_t(received[d]);
    };
    arrived.assign(n, std::vector<Real>(M * C)), out.assign(n, std::vector<Real>(N * C));
    own.assign(n, std::vector<float>(N * K));
    std::vector<std::vector<Real>> packed(n, std::vector<Real>(M * C)), partial(n, std::vector<Real>(M * C));
    std::vector<std::vector<float>> packed_dgates(n, std::vector<float>(M * K));
    for (int step = 0; step < programs * steps; ++step) {
      for (int p = 0; p < n; ++p) expert_pack(dev, packed[p].data(), x[p].data(), position[p].data(), C, group);
      exchange(packed, arrived, C, false);
      for (int p = 0; p < n; ++p)
        residual_add(dev, partial[p].data(), arrived[p].data(), arrived[p].data(), arriving[p] * C);
      exchange(packed, partial, C, true);
      exchange(packed_dgates, dgates, K, true);
      for (int p = 0; p < n; ++p) {
        combine(dev, out[p].data(), packed[p].data(), x[p].data(), static_cast<const float*>(nullptr),
                position[p].data(), N, n, C);
        expert_gate_gradients(dev, own[p].data(), packed_dgates[p].data(), position[p].data(),
                              choices.data() + p * N * K, group);
        residual_add(dev, x[p].data(), out[p].data(), x[p].data(), N * C);
      }
    }
  }
};

// One rank's tensors and its program.
template <class Real>
struct Rank {
  Gpu<Real>& dev;
  ExpertRanks r;
  int64_t C;
  Plan plan;
  std::unique_ptr<Arena<Gpu<Real>>> arena;
  PeerMemory peers;
  Tensor<Real> x, partial, arrived, out;
  Tensor<float> dgates, own;
  Tensor<int32_t> choices, destination, counts, offsets, row_slot, slot_row, source, position;
  Tensor<char> scratch, status, junk;
  static constexpr int64_t junk_bytes = int64_t(128) << 20;

  Rank(Gpu<Real>& dev, ExpertRanks r, int64_t C, const Comm& group, double timeout) : dev(dev), r(r), C(C) {
    const int64_t M = r.M(), N = r.N, n = r.ranks;
    auto tensor = [&]<class T>(Tensor<T>& t, const char* name, std::vector<int64_t> shape) {
      t = plan.persistent<T>(name, shape, Category::workspace);
    };
    Tensor<char> other;  // nothing is at the same place on two ranks
    tensor(other, "of this rank", {1000 + 7000 * r.rank});
    peers.declare(plan);
    tensor(x, "x", {N, C}), tensor(arrived, "arrived", {M, C}), tensor(partial, "partial", {M, C});
    tensor(out, "out", {N, C}), tensor(dgates, "dgates", {M, r.K}), tensor(own, "own", {N, r.K});
    tensor(choices, "choices", {M, r.K}), tensor(destination, "destination", {M, n});
    tensor(counts, "counts", {n}), tensor(offsets, "offsets", {n + 1});
    tensor(row_slot, "row_slot", {M * n}), tensor(slot_row, "slot_row", {M, n});
    tensor(source, "source", {M + 1}), tensor(position, "position", {N, n});
    tensor(scratch, "scratch", {int64_t(dispatch_scratch_bytes<Gpu<Real>>(M, n, n))});
    tensor(status, "status", {int64_t(sizeof(DeviceStatus))}), tensor(junk, "junk", {junk_bytes});
    peers.of(x), peers.of(partial), peers.of(dgates);
    plan.place();
    arena = std::make_unique<Arena<Gpu<Real>>>(dev, plan, false);
    peers.open(dev, arena->base(), group, timeout);
    dev.status = reinterpret_cast<DeviceStatus*>(status.data());
    const DeviceStatus none;
    dev.to_device(dev.status, &none, sizeof none);
  }
  ~Rank() { dev.status = nullptr; }

  void delay(uint64_t bits) { dev.fill_byte(junk, 0, bits % 3 ? size_t((bits >> 8) % uint64_t(junk_bytes)) : 0); }

  // Of each rank's x and dgates: fetched, worked on, brought back; at once the memory gets other values. variant: of the
  // delays.
  void program(int variant) {
    uint64_t at = 0;
    auto some_time = [&] { delay(random_bits(12, uint64_t(variant * max_peers + r.rank), at++)); };
    const int64_t M = r.M(), n = r.ranks;
    expert_destinations(dev, destination, choices, r);
    dispatch_plan(dev, {counts, offsets, row_slot, slot_row}, scratch, destination, M, n, n, 0);
    expert_pull_plan(dev, source, position, offsets, row_slot, slot_row, r);
    for (int step = 0; step < steps; ++step) {
      dev.fill_byte(arrived, 0xFF, arrived.info->bytes);
      some_time();
      peers.meet(dev);
      some_time();
      expert_pull(dev, arrived, static_cast<Peers<const Real>>(peers.of(x)), source, C, r);
      residual_add(dev, partial, arrived, arrived, M * C);
      some_time();
      peers.meet(dev);
      some_time();
      expert_pull_gate_gradients(dev, own, static_cast<Peers<const float>>(peers.of(dgates)), position,
                                 choices + r.rank * r.N * r.K, r);
      expert_pull_back(dev, out, static_cast<Peers<const Real>>(peers.of(partial)), x, position, C, r);
      some_time();
      peers.meet(dev);
      dev.fill_byte(partial, 0xFF, partial.info->bytes);
      residual_add(dev, x, out, x, r.N * C);
    }
  }

  void put(const Inputs<Real>& in) {
    dev.stage(choices, in.choices.data(), choices.info->bytes);
    dev.stage(x, in.x[r.rank].data(), x.info->bytes);
    dev.stage(dgates, in.dgates[r.rank].data(), dgates.info->bytes);
  }
  template <class T>
  void compare(const char* name, const std::string& when, Tensor<T> tensor, const std::vector<T>& expected,
               int64_t elements) {
    std::vector<T> got(elements);
    dev.to_host(got.data(), tensor, got.size() * sizeof(T));
    expect(got.empty() || std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)) == 0,
           when + ": " + name + " differs from what the exchange computes");
  }
  DeviceStatus read_status() {
    DeviceStatus s;
    dev.to_host(&s, dev.status, sizeof s);
    return s;
  }
};

template <class Real>
void check_rounds(Gpu<Real>& dev, ExpertRanks r, int64_t C, const Comm& group) {
  Rank<Real> rank(dev, r, C, group, 60);
  constexpr int variants = 4;
  std::vector<GpuBase::Graph> graphs;
  for (int v = 0; v < variants; ++v) graphs.push_back(dev.capture([&] { rank.program(v); }));
  for (int batch = 0; batch < 60; ++batch) {
    const bool replayed = batch % 3 != 0;
    const std::string when = "batch " + std::to_string(batch) + (replayed ? " of graphs" : "");
    auto own_bits = [&](int i) { return random_bits(13, uint64_t(batch * max_peers + r.rank), uint64_t(i)); };
    Inputs<Real> in(batch, r, C);
    pause(own_bits(0), 3000);
    rank.put(in);
    const int programs = 1 + batch % 5;  // put on the stream at once
    for (int i = 0; i < programs; ++i) {
      if (own_bits(10 + i) % 2) pause(own_bits(20 + i), 2000);
      const int variant = int(own_bits(30 + i) % variants);
      replayed ? dev.launch(*graphs[variant]) : rank.program(variant);
    }
    in.run(programs, r, C);
    rank.compare("x", when, rank.x, in.x[r.rank], r.N * C);
    rank.compare("out", when, rank.out, in.out[r.rank], r.N * C);
    rank.compare("own dgates", when, rank.own, in.own[r.rank], r.N * r.K);
    rank.compare("arrived", when, rank.arrived, in.arrived[r.rank], in.arriving[r.rank] * C);
    expect(rank.read_status().code == DeviceStatus::ok, when + ": a fault is reported");
  }
}

// The last rank comes seconds too late: the others say so, once, and run on.
void check_late(Gpu<float>& dev, ExpertRanks r, const Comm& group) {
  const int64_t C = 64;
  Rank<float> rank(dev, r, C, group, 1);
  const bool late = r.rank == r.ranks - 1;
  rank.put(Inputs<float>(0, r, C));
  auto graph = dev.capture([&] { rank.program(0); });  // nine meetings
  dev.synchronize();
  group.barrier("before somebody is late");
  const auto begin = std::chrono::steady_clock::now();
  if (late) std::this_thread::sleep_for(std::chrono::seconds(5));
  dev.launch(*graph);
  dev.synchronize();
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
  const DeviceStatus s = rank.read_status();
  if (late) return expect(s.code == DeviceStatus::ok, "the late rank waited for somebody");
  expect(s.code == DeviceStatus::peer_late && s.value == r.ranks - 1 && s.token == 1,
         "status " + std::to_string(s.code) + ", rank " + std::to_string(s.value) + ", " + std::to_string(s.token) +
             " s where the last rank is late");
  expect(waited.count() > 0.9 && waited.count() < 4, "waited " + std::to_string(waited.count()) + " s instead of 1");
}

void check_different_plans(Gpu<float>& dev, ExpertRanks r, const Comm& group) {
  r.N += r.rank;
  try {
    Rank<float> rank(dev, r, 8, group, 60);
    expect(false, "plans that differ are accepted");
  } catch (const Error& e) {
    expect(std::string(e.what()).find("plan different tensors for each other") != std::string::npos, e.what());
  }
}

constexpr int skip = 77;

int rank_main() {
  World world(60);
  std::vector<int> all(world.size());
  std::iota(all.begin(), all.end(), 0);
  const Comm group = world.host_comm(all, "ranks");
  Gpu<float> narrow(false, world.local_rank());
  Gpu<bf16> dev(false, world.local_rank());
  const std::string problem = PeerMemory::problem(dev, world, group, group);
  if (!problem.empty()) {
    if (world.rank() == 0) std::fprintf(stderr, "no peer memory: %s\n", problem.c_str());
    return skip;
  }
  ExpertRanks r{world.size(), world.rank(), 190, 4, 8 * world.size()};
  check_rounds(dev, r, 264, group);
  r.N = 37, r.K = 1;
  check_rounds(narrow, r, 33, group);
  check_late(narrow, r, group);
  check_different_plans(narrow, r, group);
  return wrong ? 1 : 0;
}

// On a machine with one GPU its ranks share it, and take turns.
void check_processes(int ranks) {
  int gpus = 0;
  if (!gpu_problem().empty() || cudaGetDeviceCount(&gpus) != cudaSuccess) gpus = 0;
  if (gpus == 0) GTEST_SKIP() << "no GPU: " << gpu_problem();
  if (gpus > 1 && gpus < ranks) GTEST_SKIP() << ranks << " ranks on " << gpus << " GPUs";
  const std::vector<int> statuses = spawn_ranks(ranks, {}, 280);
  if (statuses[0] == skip) GTEST_SKIP() << "the GPUs cannot address each other's memory";
  for (int r = 0; r < ranks; ++r) EXPECT_EQ(statuses[r], 0) << "rank " << r;
}
TEST(GpuPullRanks, Two) { check_processes(2); }
TEST(GpuPullRanks, Three) { check_processes(3); }

}  // namespace

int main(int argc, char** argv) {
  if (is_spawned_rank()) try {
      return rank_main();
    } catch (const std::exception& e) {
      std::fprintf(stderr, "rank %s: %s\n", std::getenv("RANK"), e.what());
      return 1;
    }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
