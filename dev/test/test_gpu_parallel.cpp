// What training over several ranks adds on a GPU: sums of gradients that arrived, and who sends which token where.
#include <gtest/gtest.h>

#include <numeric>

#include "dev/test/gpu_test.h"
#include "dev/test/places.h"
#include "llmc/homes.h"
#include "moe/expert_parallel.h"

namespace {

template <class Real>
struct GpuParallel : GpuTest {};
TYPED_TEST_SUITE(GpuParallel, GpuReals);

// The bits of the CPU's: both add one part after the other.
template <class Real>
void check_sum(int n_parts, int64_t n) {
  for (bool wide : {true, false})
    for (bool add : {true, false}) {
      SCOPED_TRACE(std::to_string(n_parts) + " parts of " + std::to_string(n) + (wide ? ", wide" : "") +
                   (add ? ", add" : ""));
      expect_calibrated<Real>([&](auto& b) {
        auto* out = add ? b.acc("sum so far", n) : b.out_acc("sum", n);
        b.watch("bits of the sum", Output::exact, out, n);
        SumParts parts;
        for (int p = 0; p < n_parts; ++p) {
          auto values = third(random_values("part " + std::to_string(p), n));
          parts.part[parts.n++] = wide ? static_cast<const void*>(b.acc(values)) : b.real(values);
        }
        sum_parts(b.dev, out, parts, wide, add, n);
      });
    }
}
TYPED_TEST(GpuParallel, SumSmall) {
  for (int n_parts : {1, 2, 3, 16})
    for (int64_t n : {1, 37, 1000}) check_sum<TypeParam>(n_parts, n);
}
TYPED_TEST(GpuParallel, Sum) {
  for (int64_t n : {1200011, 1200016}) check_sum<TypeParam>(3, n);  // element by element, in pieces of 16 bytes
}

struct Case {
  Routing routing;  // of all tokens of the group
  int ranks;
  int64_t C;
  int parts = 1;      // of an expert
  int64_t extra = 0;  // slots of a rank; not 0: experts are anywhere
  ExpertSlots table() const {
    const int hosts = ranks / parts;
    const int64_t E = routing.E, slots = E / hosts + extra;
    return extra ? random_places(uint64_t(E), E, hosts, ranks, slots) : experts_in_order(E, hosts, ranks, slots);
  }
};
std::vector<int64_t> sent_by(const Case& c, int rank) {  // rows to each rank
  const int64_t N = c.routing.N / c.ranks, K = c.routing.K;
  const ExpertSlots table = c.table();
  std::vector<int64_t> n(size_t(c.ranks), 0);
  for (int64_t t = rank * N; t < (rank + 1) * N; ++t)
    for (int d = 0; d < c.ranks; ++d) {
      bool goes = false;
      for (int64_t k = 0; k < K; ++k)
        if (const int32_t e = c.routing.index[t * K + k]; e >= 0)
          goes |= table.place[e * c.ranks + rank] / table.slots == d / c.parts;
      n[d] += goes;
    }
  return n;
}

template <class Real>
void check_exchange(const Case& c) {
  const int64_t N = c.routing.N / c.ranks, K = c.routing.K, M = c.routing.N, n = c.ranks;
  const auto gates = random_values("gates", M * K, 0.3, 0.5);
  for (int rank = 0; rank < c.ranks; ++rank) {
    SCOPED_TRACE(c.routing.name + ", rank " + std::to_string(rank) + " of " + std::to_string(c.ranks) + ", N " +
                 std::to_string(N) + " parts " + std::to_string(c.parts) + " K " + std::to_string(K) + " E " +
                 std::to_string(c.routing.E) + " C " + std::to_string(c.C));
    const std::vector<int64_t> sent = sent_by(c, rank);
    const int64_t rows = std::accumulate(sent.begin(), sent.end(), int64_t(0));
    const ExpertRanks r{c.ranks, rank, N, K, c.routing.E, c.parts, c.extra};
    const std::vector<int32_t> table_values = c.table().place;
    expect_calibrated<Real>([&]<class D>(Buffers<D>& b) {
      const int32_t *choices = b.upload(c.routing.index), *table = b.upload(table_values);
      auto *places = b.out_int("places", M * K), *own = b.out_int("own places", N * K);
      expert_places(b.dev, places, choices, table, 0, M, r);
      expert_places(b.dev, own, choices + rank * N * K, table, rank * N, N, r);
      auto* destination = b.out_int("destination", M * n);
      expert_destinations(b.dev, destination, places, r);
      auto *counts = b.out_int("counts", n), *offsets = b.out_int("offsets", n + 1),
           *row_slot = b.out_int("row_slot", M * n), *slot_row = b.out_int("slot_row", M * n);
      dispatch_plan(b.dev, {counts, offsets, row_slot, slot_row}, b.scratch(dispatch_scratch_bytes<D>(M, n, n)),
                    destination, M, n, n, 0);
      auto* arrived_gates = b.out_acc("arrived gates", M * K);
      b.watch("bits of the gates", Output::exact, arrived_gates, M * K);
      expert_arrivals(b.dev, b.out_int("arrived choices", M * K), arrived_gates, offsets, row_slot, places,
                      b.acc(gates), r);
      auto* position = b.out_int("position", N * n);
      expert_positions(b.dev, position, b.out_int("exchange counts", n * n), offsets, row_slot, slot_row, r);
      expert_pack(b.dev, b.out("packed", n * N * c.C, Output::exact, rows * c.C), b.real("x", N * c.C), position, c.C,
                  r);
      auto* dgates = b.out_acc("dgates", N * K);
      b.watch("bits of dgates", Output::exact, dgates, N * K);
      expert_gate_gradients(b.dev, dgates, b.acc("returned", n * N * K), position, own, r);
    });
  }
}
Routing elsewhere(Routing r) {
  r.name += ", some nowhere";
  for (size_t i = 0; i < r.index.size(); ++i)
    if (random_bits(6, 0, i) % 4 == 0) r.index[i] = -1;
  return r;
}
TYPED_TEST(GpuParallel, ExchangeSmall) {
  for (const Case& c : {Case{random_routing(1, 1, 1), 1, 1},
                        {random_routing(40, 2, 8), 2, 8},
                        {elsewhere(random_routing(60, 3, 9, 4)), 3, 37},
                        {same_for_all(40, 2, 8, 6), 4, 16},
                        {same_for_all(40, 1, 8, 0), 8, 24},
                        {round_robin(64, 2, 8), 8, 33},
                        {elsewhere(random_routing(40, 3, 6)), 4, 16, 2},
                        {random_routing(40, 2, 3), 4, 16, 4},
                        {elsewhere(random_routing(40, 3, 8)), 4, 16, 1, 1},
                        {random_routing(40, 2, 6), 4, 16, 2, 3},
                        {elsewhere(random_routing(64, 4, 64)), 4, 64}})
    check_exchange<TypeParam>(c);
}
TYPED_TEST(GpuParallel, Exchange) {
  for (const Case& c : {Case{random_routing(8000, 8, 128), 8, 256},
                        {elsewhere(random_routing(3000, 4, 60)), 4, 133},
                        {random_routing(8000, 8, 64), 8, 256, 2},
                        {random_routing(8000, 8, 128), 8, 256, 1, 4},
                        {same_for_all(2000, 8, 128, 120), 4, 1024}})
    check_exchange<TypeParam>(c);
}

}  // namespace
