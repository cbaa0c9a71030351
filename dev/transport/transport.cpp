// Tokens to the ranks of their experts and back, by either transport.
//
//   dev/transport/transport [ranks] [results]     (default 2; results: a file that gets a line a row)
//
// Each rank is a process with a GPU. It has 4,096 to 65,536 tokens of width 2,048 in bf16, which choose 8 of 64 experts
// evenly. Dispatch brings each token once to each rank of its experts, return brings a row a token and rank back and adds
// them up: what moe/layer.h does around the experts, without them.
//   exchange  packs, reads the numbers of rows on the host, and sends through NCCL (expert_parallel.h)
//   pull      fetches through mapped memory, between meetings of the ranks, as one graph (expert_pull.h)
// Times are of the slowest rank, the median of rounds of the host's clock around ten turns; both must give the same bits.
// GB/s: bytes that have to come over the link into a GPU, whatever is moved besides. Where GPUs cannot address each other
// the program prints one line that begins with `skipped:` and exits with 77.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "dev/bench.h"
#include "dev/bench_common.h"
#include "dev/spawn_ranks.h"
#include "llmc/gpu.h"
#include "llmc/random.h"
#include "moe/combine.h"
#include "moe/expert_pull.h"

namespace {

using Real = bf16;
using Device = Gpu<Real>;
constexpr int64_t C = 2048, K = 8, E = 64;
constexpr int turns = 10, rounds = 9, skipped = 77;

struct Transports {
  Device& dev;
  Comm group;
  ExpertRanks r;
  Plan plan;
  std::unique_ptr<Arena<Device>> arena;
  PeerMemory peers;
  Tensor<Real> x, partial, arrived, packed, out, arrived_too, out_too;
  Tensor<int32_t> choices, destination, sent, offsets, row_slot, slot_row, source, place, position, counts;
  Tensor<char> scratch;

  Transports(Device& dev, const Comm& group, const Comm& host, ExpertRanks r) : dev(dev), group(group), r(r) {
    const int64_t M = r.M(), N = r.N, n = r.ranks;
    auto tensor = [&]<class T>(Tensor<T>& t, const char* name, std::vector<int64_t> shape) {
      t = plan.persistent<T>(name, shape, Category::workspace);
    };
    peers.declare(plan);
    tensor(x, "x", {N, C}), tensor(out, "out", {N, C}), tensor(out_too, "out too", {N, C});
    tensor(partial, "partial", {M, C}), tensor(packed, "packed", {M, C});
    tensor(arrived, "arrived", {M, C}), tensor(arrived_too, "arrived too", {M, C});
    tensor(choices, "choices", {M, K}), tensor(destination, "destination", {M, n});
    tensor(sent, "sent", {n}), tensor(offsets, "offsets", {n + 1});
    tensor(row_slot, "row_slot", {M * n}), tensor(slot_row, "slot_row", {M, n});
    tensor(source, "source", {M + 1}), tensor(place, "place", {N, n});
    tensor(position, "position", {N, n}), tensor(counts, "counts", {n, n});
    tensor(scratch, "scratch", {int64_t(dispatch_scratch_bytes<Device>(M, n, n))});
    peers.of(x), peers.of(partial);
    plan.place();
    arena = std::make_unique<Arena<Device>>(dev, plan, false);
    peers.open(dev, arena->base(), host, 60);

    std::vector<int32_t> chosen(M * K);  // the same on every rank
    for (int64_t t = 0; t < M; ++t)
      for (int64_t k = 0; k < K; ++k) {
        auto taken = [&](int32_t e) { return std::find(&chosen[t * K], &chosen[t * K + k], e) != &chosen[t * K + k]; };
        uint64_t at = uint64_t(t * K + k);
        do chosen[t * K + k] = int32_t(random_bits(1, 0, at) % uint64_t(E)), at += uint64_t(M * K);
        while (taken(chosen[t * K + k]));
      }
    dev.to_device(choices, chosen.data(), chosen.size() * sizeof(int32_t));
    for (auto [to, rows] : {std::pair<Real*, int64_t>{x, N}, {partial, M}}) {  // any values: rows that differ
      std::vector<Real> values(rows * C);
#pragma omp parallel for
      for (int64_t i = 0; i < rows * C; ++i)
        values[i] = Real(float(random_uniform(2, uint64_t(r.rank), uint64_t(i))) - 0.5f);
      dev.to_device(to, values.data(), values.size() * sizeof(Real));
    }
    expert_destinations(dev, destination, choices, r);  // in order, an expert's number is its place
    dispatch_plan(dev, {sent, offsets, row_slot, slot_row}, scratch, destination, M, n, n, 0);
    expert_pull_plan(dev, source, place, offsets, row_slot, slot_row, r);
    expert_positions(dev, position, counts, offsets, row_slot, slot_row, r);
    dev.synchronize();
  }

  void exchange_there() {
    expert_pack(dev, packed, x, position, C, r);
    exchange_rows<Device, Real>(dev, group, arrived, packed, counts, C, false, "tokens to experts");
  }
  void exchange_back() {
    exchange_rows<Device, Real>(dev, group, packed, partial, counts, C, true, "tokens from experts");
    combine(dev, out, packed, x, nullptr, position, r.N, r.ranks, C);
  }
  void pull_there() {
    peers.meet(dev);
    expert_pull(dev, arrived_too, static_cast<Peers<const Real>>(peers.of(x)), source, C, r);
  }
  void pull_back() {
    peers.meet(dev);
    expert_pull_back(dev, out_too, static_cast<Peers<const Real>>(peers.of(partial)), x, place, C, r);
    peers.meet(dev);
  }

  // Rows of the two results that differ.
  int64_t different(Tensor<Real> one, Tensor<Real> other, int64_t rows) {
    std::vector<Real> a(rows * C), b(rows * C);
    dev.to_host(a.data(), one, a.size() * sizeof(Real)), dev.to_host(b.data(), other, b.size() * sizeof(Real));
    int64_t n = 0;
    for (int64_t i = 0; i < rows; ++i) n += std::memcmp(&a[i * C], &b[i * C], C * sizeof(Real)) != 0;
    return n;
  }
};

// Milliseconds of one turn on the slowest rank.
double time_of(Device& dev, const Comm& host, const std::function<void()>& turn) {
  std::vector<double> ms;
  for (int round = -2; round < rounds; ++round) {
    dev.synchronize();
    host.barrier("a round");
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < turns; ++i) turn();
    dev.synchronize();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    const double slowest = host.max(took.count() / turns, "times");
    if (round >= 0) ms.push_back(slowest);
  }
  return bench::percentiles(ms).median;
}

int rank_main(const std::string& results) {
  World world(60);
  std::vector<int> all(world.size());
  std::iota(all.begin(), all.end(), 0);
  Device dev(false, world.local_rank());
  const Comm host = world.host_comm(all, "host"), group = world.comm(dev, all, "experts");
  const bool lead = world.rank() == 0;
  if (E % world.size()) fail("transport: ", E, " experts over ", world.size(), " ranks");
  const std::string problem = PeerMemory::problem(dev, world, group, host);
  if (!problem.empty()) {
    if (lead) std::printf("skipped: %s\n", problem.c_str());
    return skipped;
  }
  if (lead)
    std::printf("%d x %s, rows of %lld bf16, %lld of %lld experts a token\n%9s %9s  %-9s %10s %10s %10s %8s %8s\n",
                world.size(), dev.gpu_name.c_str(), (long long)C, (long long)K, (long long)E, "tokens", "MB over",
                "transport", "there ms", "back ms", "both ms", "GB/s", "x");
  const char* run_id = std::getenv("RUN_ID");
  int64_t wrong = 0;
  for (int64_t N : {4096, 8192, 16384, 32768, 65536}) {
    Transports t(dev, group, host, {world.size(), world.rank(), N, K, E});
    std::vector<int32_t> counts(world.size() * world.size());
    dev.to_host(counts.data(), t.counts, counts.size() * sizeof(int32_t));
    int64_t arriving = 0, over_link = 0;  // rows; of the rank that gets most
    for (int d = 0; d < world.size(); ++d) {
      int64_t there = 0, back = 0;
      for (int s = 0; s < world.size(); ++s) {
        if (d == world.rank()) arriving += counts[s * world.size() + d];
        if (s != d) there += counts[s * world.size() + d], back += counts[d * world.size() + s];
      }
      over_link = std::max(over_link, there + back);
    }
    auto graph_of = [&](std::function<void()> ops) {
      auto graph = dev.capture(ops);
      return [&dev, graph] { dev.launch(*graph); };
    };
    struct Way {
      const char* name;
      std::function<void()> there, back, both;
    };
    const Way ways[] = {{"exchange", [&] { t.exchange_there(); }, [&] { t.exchange_back(); },
                         [&] { t.exchange_there(), t.exchange_back(); }},
                        {"pull", graph_of([&] { t.pull_there(); }), graph_of([&] { t.pull_back(); }),
                         graph_of([&] { t.pull_there(), t.pull_back(); })}};
    double exchange_ms = 0;
    for (const Way& way : ways) {
      const double there = time_of(dev, host, way.there), back = time_of(dev, host, way.back),
                   both = time_of(dev, host, way.both);
      const double megabytes = double(over_link * C) * sizeof(Real) * 1e-6, speed = megabytes / both;
      if (&way == ways) exchange_ms = both;
      if (!lead) continue;
      std::printf("%9lld %9.1f  %-9s %10.3f %10.3f %10.3f %8.1f %8.2f\n", (long long)N, megabytes, way.name, there,
                  back, both, speed, exchange_ms / both);
      std::fflush(stdout);
      if (results.empty()) continue;
      nlohmann::ordered_json row{{"bench", "transport"},
                                 {"shape", "olmoe-64x8." + std::to_string(N)},
                                 {"impl", &way == ways ? "ours-exchange" : "ours"},
                                 {"variant", way.name},
                                 {"there_ms", there},
                                 {"back_ms", back},
                                 {"ms", both},
                                 {"gbps", speed},
                                 {"ranks", world.size()},
                                 {"gpu", bench::short_name(dev.gpu_name)},
                                 {"date", bench::utc("%F")},
                                 {"run_id", run_id ? run_id : bench::utc("%Y%m%dT%H%M%SZ")}};
      std::ofstream(results, std::ios::app) << row.dump() << "\n";
    }
    const int64_t bad = t.different(t.arrived, t.arrived_too, arriving) + t.different(t.out, t.out_too, N);
    if (bad) std::fprintf(stderr, "rank %d: %lld rows differ between the transports\n", world.rank(), (long long)bad);
    wrong += bad;
  }
  return wrong ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) try {
  if (is_spawned_rank()) return rank_main(argc > 1 ? argv[1] : "");
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 2;
  int gpus = 0;
  if (!gpu_problem().empty() || cudaGetDeviceCount(&gpus) != cudaSuccess) gpus = 0;
  if (ranks < 2 || gpus < ranks) {
    std::printf("skipped: %d ranks on the %d GPUs of this machine\n", ranks, gpus);
    return skipped;
  }
  for (int status : spawn_ranks(ranks, {argc > 2 ? argv[2] : ""}, 280))
    if (status) return status;
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "transport: %s\n", e.what());
  return 1;
}
