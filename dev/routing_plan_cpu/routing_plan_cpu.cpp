// The routing plan on the host's processors: a stable counting sort of R = N*K slots by expert, in three steps:
// README.md of this folder walks through them. 0: production, dispatch_plan() of Cpu<float>, which also looks for
// indices out of range and keeps to a capacity.
//
//   dev/routing_plan_cpu/routing_plan_cpu [variant] [32768x8x128] [--quick] ...     (dev/bench_cpu.h)
#include <omp.h>

#include <algorithm>
#include <memory>

#include "dev/bench_cpu.h"
#include "dev/routing_plan_cpu/01_scan_an_expert.h"
#include "dev/routing_plan_cpu/02_counting_sort.h"
#include "dev/routing_plan_cpu/03_blocks.h"
#include "llmc/random.h"
#include "moe/dispatch.h"

namespace {
using namespace bench_cpu;

struct Shape {
  std::string name;
  int64_t N, K, E;
};
const std::vector<Shape> shapes = {
    {"4096x2x8", 4096, 2, 8}, {"32768x2x8", 32768, 2, 8}, {"32768x8x128", 32768, 8, 128}};
Shape reduced(Shape s) { return {s.name, 333, s.K, s.E}; }

struct Tensors {
  Array<int32_t> expert, counts, offsets, row_slot, slot_row, scratch;
  Cpu<float> dev;
  RoutingPlan plan() { return {counts.data(), offsets.data(), row_slot.data(), slot_row.data()}; }
};

Case make(const Shape& s) {
  const int64_t N = s.N, K = s.K, E = s.E, R = N * K;
  auto t = std::make_shared<Tensors>();
  t->counts.resize(E), t->offsets.resize(E + 1), t->row_slot.resize(R), t->slot_row.resize(R);
  t->scratch.resize(omp_get_max_threads() * blocks::row_of_counters(E));
  // K different experts a token, drawn evenly.
  for (int64_t token = 0; token < N; ++token)
    for (int64_t k = 0, draw = 0; k < K; ++draw) {
      auto e = int32_t(random_bits(7, 1, uint64_t(token) << 20 | uint64_t(draw)) % uint64_t(E));
      if (std::find(t->expert.end() - k, t->expert.end(), e) == t->expert.end()) t->expert.push_back(e), ++k;
    }

  Case c;
  c.shape = s.name;
  c.bytes = 12 * double(R);
  c.outputs = {{"counts", std::span(t->counts)},
               {"offsets", std::span(t->offsets)},
               {"row_slot", std::span(t->row_slot)},
               {"slot_row", std::span(t->slot_row)}};
  const double bytes = 16 * double(R);
  auto rung = [&](const char* name, auto plan, Work work) {
    c.variants.push_back(
        {name, std::string("ours-") + name, [=] { plan(t->plan(), t->scratch.data(), t->expert.data(), R, E); }, work});
  };
  c.variants.push_back({"production",
                        "ours",
                        [=] { dispatch_plan(t->dev, t->plan(), nullptr, t->expert.data(), N, K, E, 0); },
                        {.bytes = bytes, .clocks = 4 * double(R), .threads = 1}});
  rung("01_scan_an_expert", scan_an_expert::plan, {.clocks = double(R) * (double(E) * (1 + 1.0 / double(lanes)) + 20)});
  rung("02_counting_sort", counting_sort::plan, {.bytes = bytes, .clocks = 4 * double(R), .threads = 1});
  rung("03_blocks", blocks::plan, {.bytes = bytes, .clocks = 4 * double(R)});
  c.reference = [=] {
    Cpu<double> cpu;
    std::vector<int32_t> counts(E), offsets(E + 1), row_slot(R), slot_row(R);
    dispatch_plan(cpu, {counts.data(), offsets.data(), row_slot.data(), slot_row.data()}, nullptr, t->expert.data(), N,
                  K, E, 0);
    Values all;
    for (const auto* values : {&counts, &offsets, &row_slot, &slot_row})
      all.emplace_back(values->begin(), values->end());
    return all;
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_ladder(argc, argv, "routing_plan_cpu", shapes, make, reduced); }
