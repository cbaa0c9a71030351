// A random routing plan on the device: K distinct experts a token, drawn evenly, laid out by the CPU's dispatch_plan().
#pragma once
#include <algorithm>

#include "dev/bench.h"
#include "llmc/random.h"
#include "moe/dispatch.h"

struct Routing {
  std::vector<int32_t> top_k_index, counts, offsets, row_slot, slot_row;  // on the host
  RoutingPlan host() { return {counts.data(), offsets.data(), row_slot.data(), slot_row.data()}; }
  int32_t* chosen = nullptr;  // top_k_index on the device
  RoutingPlan plan{};         // the plan on the device
};

inline Routing make_routing(bench::Lab& lab, int64_t N, int64_t K, int64_t E, uint64_t stream = 1) {
  Routing r;
  r.top_k_index.resize(N * K), r.counts.resize(E), r.offsets.resize(E + 1);
  r.row_slot.resize(N * K), r.slot_row.resize(N * K);
  for (int64_t t = 0; t < N; ++t) {
    int32_t* mine = &r.top_k_index[t * K];
    for (int64_t k = 0, draw = 0; k < K; ++draw) {
      auto e = int32_t(random_bits(7, stream, uint64_t(t) << 20 | uint64_t(draw)) % uint64_t(E));
      if (std::find(mine, mine + k, e) == mine + k) mine[k++] = e;
    }
  }
  Cpu<float> cpu;
  std::vector<char> scratch(dispatch_scratch_bytes<Cpu<float>>(N, K, E));
  dispatch_plan(cpu, r.host(), scratch.data(), r.top_k_index.data(), N, K, E, 0);
  r.chosen = lab.upload(r.top_k_index);
  r.plan = {lab.upload(r.counts), lab.upload(r.offsets), lab.upload(r.row_slot), lab.upload(r.slot_row)};
  return r;
}
