// The routing plan: a stable counting sort of N*K slots by expert. It takes microseconds, so it is timed as a step has it,
// inside a CUDA graph: the mean of 20 calls, over replays. 0: production. 1: a thread an expert (naive.cuh).
// cub: CUB's radix sort (cub_sort.cuh).
//
//   build/routing_plan [--shapes 32768x8x128,...] [--quick]
#include <bit>
#include <numeric>

#include "dev/routing.h"
#include "dev/routing_plan/cub_sort.cuh"
#include "dev/routing_plan/naive.cuh"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, K, E;
  double target_us;
};
const std::vector<Shape> shapes = {{"32768x8x128", 32768, 8, 128, 25}, {"32768x2x8", 32768, 2, 8, 15}};
Shape reduced(Shape s) { return s; }

Case make(Lab& lab, const Shape& s) {
  int64_t N = s.N, K = s.K, E = s.E, R = N * K;
  auto& dev = lab.dev;
  Routing routing = make_routing(lab, N, K, E);
  const int32_t* chosen = routing.chosen;
  RoutingPlan plan{lab.memory<int32_t>(E), lab.memory<int32_t>(E + 1), lab.memory<int32_t>(R), lab.memory<int32_t>(R)};
  char* scratch = lab.memory<char>(int64_t(dispatch_scratch_bytes<Gpu<bf16>>(N, K, E)));

  std::vector<int32_t> slots(R);
  std::iota(slots.begin(), slots.end(), 0);
  cub_sort::Buffers b{lab.upload(slots), lab.memory<int32_t>(R), nullptr, 0, int(std::bit_width(uint64_t(E - 1)))};
  cub_sort::sort_pairs(dev, nullptr, b.temporary_bytes, chosen, b.sorted_experts, b.slots, plan.row_slot, R, b.bits);
  b.temporary = lab.memory<char>(int64_t(b.temporary_bytes));

  Case c;
  c.shape = s.name;
  c.forward.bytes = double(3 * R) * sizeof(int32_t);
  c.calls_per_graph = 20, c.target_us = s.target_us;
  c.outputs = {exact_output("counts", plan.counts, E), exact_output("offsets", plan.offsets, E + 1),
               exact_output("row_slot", plan.row_slot, R), exact_output("slot_row", plan.slot_row, R)};
  c.variants.push_back({"production", "ours", [=, &dev] { dispatch_plan(dev, plan, scratch, chosen, N, K, E, 0); }});
  c.variants.push_back(
      {"naive", "ours-naive", [=, &dev] { launch(dev, naive::plan, 1, 128, 0, plan, chosen, R, int(E)); }});
  Variant cub{"cub", "cub", [=, &dev] { cub_sort::plan(dev, plan, b, chosen, R, int(E)); }};
  cub.is_library = true;
  c.variants.push_back(cub);
  c.reference = [=] {
    return Values{Lab::to(routing.counts), Lab::to(routing.offsets), Lab::to(routing.row_slot),
                  Lab::to(routing.slot_row)};
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "routing_plan", shapes, make, reduced); }
