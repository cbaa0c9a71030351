// The routing plan: a stable counting sort of N*K slots by expert. It takes microseconds, so it is timed as a step has
// it, inside a CUDA graph: the mean of 20 calls, over replays, caches warm. 0: production. 01 to 04: a rung a file
// (README.md); 03_radix_sort is CUB. Rung 01 runs at the larger shapes only if asked for by name.
//
// 02_atomics makes no stable plan, so its rows are not compared with the reference. At the reduced shape all variants
// are checked for what any plan has to be: every slot has a row, of the right expert and of no other slot.
//
//   dev/routing_plan/routing_plan [variant] [shape]
#include <algorithm>
#include <bit>
#include <numeric>

#include "dev/routing.h"
#include "dev/routing_plan/01_thread_an_expert.cuh"
#include "dev/routing_plan/02_atomics.cuh"
#include "dev/routing_plan/03_radix_sort.cuh"
#include "dev/routing_plan/04_dense_map.cuh"

namespace {
using namespace bench;

struct Shape {
  std::string name;
  int64_t N, K, E;
  double target_us;
  bool is_reduced = false;
};
const std::vector<Shape> shapes = {{"4096x8x64", 4096, 8, 64, 0},
                                   {"32768x2x8", 32768, 2, 8, 15},
                                   {"32768x8x128", 32768, 8, 128, 25},
                                   {"262144x8x128", 262144, 8, 128, 0}};
constexpr int64_t most_slots_of_01 = 65536;

// More than a tile of every rung, and no whole number of tiles.
Shape reduced(Shape s) { return {s.name, std::min<int64_t>(s.N, 16416) - 5, s.K, s.E, 0, true}; }

// misplaced: how many slots have no row, a row of another expert, or a row that says it is another slot's. Where there
// are none, slot_row and row_slot are inverse to each other.
__global__ void count_misplaced(int32_t* misplaced, RoutingPlan p, const int32_t* top_k_index, int64_t R) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= R) return;
  const int row = p.slot_row[slot], e = top_k_index[slot];
  const bool of_expert = row >= 0 && row < R && row >= p.offsets[e] && row < p.offsets[e + 1];
  if (!of_expert || p.row_slot[row] != slot) atomicAdd(misplaced, 1);
}

Case make(Lab& lab, const Shape& s) {
  const int64_t N = s.N, K = s.K, E = s.E, R = N * K;
  auto& dev = lab.dev;
  const Routing routing = make_routing(lab, N, K, E);
  const int32_t* chosen = routing.chosen;
  const RoutingPlan plan{lab.memory<int32_t>(E), lab.memory<int32_t>(E + 1), lab.memory<int32_t>(R),
                         lab.memory<int32_t>(R)};
  char* scratch = lab.memory<char>(int64_t(dispatch_scratch_bytes<Gpu<bf16>>(N, K, E)));
  int32_t *misplaced = lab.memory<int32_t>(1), *cursors = lab.memory<int32_t>(E);
  uint8_t* map = reinterpret_cast<uint8_t*>(lab.memory<char>(E * dense_map::padded(N)));

  std::vector<int32_t> slots(R);
  std::iota(slots.begin(), slots.end(), 0);
  radix_sort::Buffers b{lab.upload(slots), lab.memory<int32_t>(R), nullptr, 0, int(std::bit_width(uint64_t(E - 1)))};
  radix_sort::sort_pairs(dev, nullptr, b.temporary_bytes, chosen, b.sorted_experts, b.slots, plan.row_slot, R, b.bits);
  b.temporary = lab.memory<char>(int64_t(b.temporary_bytes));

  Case c;
  c.shape = s.name;
  const double list = double(R) * sizeof(int32_t);
  c.forward.bytes = 3 * list;
  c.calls_per_graph = 20, c.target_us = s.target_us;
  c.outputs = {exact_output("counts", plan.counts, E), exact_output("offsets", plan.offsets, E + 1),
               exact_output("row_slot", plan.row_slot, R), exact_output("slot_row", plan.slot_row, R)};
  if (s.is_reduced) c.outputs.push_back(exact_output("misplaced", misplaced, 1));
  auto add = [&](const char* name, std::string impl, double bytes, std::function<void()> make_plan) {
    Variant v{name, std::move(impl), make_plan};
    if (s.is_reduced)
      v.forward = [=, &dev] {
        make_plan();
        dev.zero(misplaced, sizeof(int32_t));
        launch(dev, count_misplaced, unsigned(ceil_div(R, 256)), 256, 0, misplaced, plan, chosen, R);
      };
    v.forward_work.bytes = bytes;
    c.variants.push_back(std::move(v));
  };
  add("production", "ours", 3 * list, [=, &dev] { dispatch_plan(dev, plan, scratch, chosen, N, K, E, 0); });
  if (s.is_reduced || R <= most_slots_of_01 || !lab.options.variants.empty())
    add("01_thread_an_expert", "ours-01_thread_an_expert", 3 * list,
        [=, &dev] { thread_an_expert::plan(dev, plan, chosen, R, int(E)); });
  add("02_atomics", "ours-02_atomics", 3 * list,
      [=, &dev] { atomic_plan::plan(dev, plan, cursors, chosen, R, int(E)); });
  c.variants.back().missing = {"row_slot", "slot_row"};
  add("03_radix_sort", "cub", 7 * list, [=, &dev] { radix_sort::plan(dev, plan, b, chosen, R, int(E)); });
  c.variants.back().is_library = true;
  add("04_dense_map", "ours-04_dense_map", 3 * list + 3 * double(E * N),
      [=, &dev] { dense_map::plan(dev, plan, map, chosen, N, K, int(E)); });
  c.reference = [=] {
    Values v{Lab::to(routing.counts), Lab::to(routing.offsets), Lab::to(routing.row_slot), Lab::to(routing.slot_row)};
    if (s.is_reduced) v.push_back({0.0});
    return v;
  };
  return c;
}
}  // namespace

int main(int argc, char** argv) { return run_family(argc, argv, "routing_plan", shapes, make, reduced); }
