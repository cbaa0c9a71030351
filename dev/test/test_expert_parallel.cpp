// Tokens that go to experts of other ranks and back: all ranks of a group in one process, rows moved by hand.
#include "moe/expert_parallel.h"

#include <gtest/gtest.h>

#include "moe/expert_pull.h"

#include "dev/test/op_test.h"
#include "dev/test/places.h"
#include "moe/combine.h"

namespace {

struct Case {
  std::string name;
  int ranks;
  int64_t N, K, E;
  std::vector<int32_t> choices;  // (M,K); -1: none
  int parts;                     // of an expert
  ExpertSlots table;
  int32_t place(int64_t slot) const {  // of a choice
    return choices[slot] < 0 ? -1 : table.place[choices[slot] * ranks + slot / K / N];
  }
  bool goes(int64_t slot, int rank) const { return choices[slot] >= 0 && place(slot) / table.slots == rank / parts; }
  std::vector<int32_t> places() const {
    std::vector<int32_t> all(choices.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = place(int64_t(i));
    return all;
  }
};
ExpertRanks of_rank(const Case& c, int rank) {
  return {c.ranks, rank, c.N, c.K, c.E, c.parts, c.table.slots - c.E / c.table.hosts};
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (auto [ranks, parts] : {std::pair{1, 1}, {2, 1}, {2, 2}, {3, 1}, {4, 1}, {4, 2}, {4, 4}})
    for (int64_t K : {1, 2, 3, 4})
      for (int64_t experts : {1, 2, 5}) {
        const int64_t E = ranks / parts * experts;
        for (int64_t N : {1, 9, 40}) {
          const std::string size = std::to_string(ranks) + " ranks, parts " + std::to_string(parts) + " N " +
                                   std::to_string(N) + " K " + std::to_string(K) + " E " + std::to_string(E);
          const int64_t slots = ranks * N * K;
          auto add = [&](const std::string& name, auto choice) {
            const int hosts = ranks / parts;
            Case c{size + ", " + name, ranks, N, K, E, {}, parts, experts_in_order(E, hosts, ranks, experts)};
            for (int64_t slot = 0; slot < slots; ++slot) c.choices.push_back(int32_t(choice(slot)));
            all.push_back(c);
            if (N == 9) {  // the same choices, and experts anywhere
              c.name += ", placed",
                  c.table = random_places(all.size(), E, hosts, ranks, experts + int64_t(all.size() % 3));
              all.push_back(c);
            }
          };
          auto random = random_ints(size, slots, E), drop = random_ints(size + " drop", slots, 4);
          add("random", [&](int64_t s) { return random[s]; });
          add("some nowhere", [&](int64_t s) { return drop[s] ? random[s] : -1; });
          add("whole tokens nowhere", [&](int64_t s) { return s / K % 3 ? random[s] : -1; });
          add("to the first", [&](int64_t) { return 0; });
          add("to the last rank", [&](int64_t s) { return E - 1 - s % experts; });
          add("each to its own", [&](int64_t s) { return s / K / N / parts * experts; });
          add("none", [](int64_t) { return -1; });
        }
      }
  return all;
}

// What a rank knows.
template <class Real>
struct Rank {
  using Acc = typename Cpu<Real>::Acc;
  std::vector<int32_t> places, own_places, destination, plan_counts, offsets, row_slot, slot_row, index, position,
      counts;
  std::vector<int32_t> source, place;  // of those who fetch
  std::vector<Acc> gates;
  DeviceStatus status;

  Rank(const Case& c, int rank, const std::vector<Acc>& all_gates) {
    const ExpertRanks r = of_rank(c, rank);
    const int64_t M = r.M(), n = c.ranks;
    destination.assign(M * n, -77), plan_counts.assign(n, -77), offsets.assign(n + 1, -77);
    row_slot.assign(M * n, -77), slot_row.assign(M * n, -77), index.assign(M * c.K, -77);
    position.assign(c.N * n, -77), counts.assign(n * n, -77), gates = poisoned<Acc>(M * c.K);
    Cpu<Real> dev{.status = &status};
    places = c.choices, own_places.assign(c.N * c.K, -77);
    expert_places(dev, places.data(), places.data(), c.table.place.data(), 0, M, r);
    expert_places(dev, own_places.data(), c.choices.data() + rank * c.N * c.K, c.table.place.data(), rank * c.N, c.N,
                  r);
    expert_destinations(dev, destination.data(), places.data(), r);
    Scratch scratch(dispatch_scratch_bytes<Cpu<Real>>(M, n, n));
    dispatch_plan(dev, {plan_counts.data(), offsets.data(), row_slot.data(), slot_row.data()}, scratch,
                  destination.data(), M, n, n, 0);
    expert_arrivals(dev, index.data(), gates.data(), offsets.data(), row_slot.data(), places.data(), all_gates.data(),
                    r);
    expert_positions(dev, position.data(), counts.data(), offsets.data(), row_slot.data(), slot_row.data(), r);
    source.assign(M + 1, -77), place.assign(c.N * n, -77);
    expert_pull_plan(dev, source.data(), place.data(), offsets.data(), row_slot.data(), slot_row.data(), r);
  }
};

// A pointer to each rank's vector.
template <class T>
Peers<const T> peers(const std::vector<std::vector<T>>& all) {
  Peers<const T> p;
  for (size_t r = 0; r < all.size(); ++r) p.at[r] = all[r].data();
  return p;
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Tokens of the group with an expert on rank d, ascending.
std::vector<int64_t> tokens_for(const Case& c, int d) {
  std::vector<int64_t> tokens;
  for (int64_t t = 0; t < c.ranks * c.N; ++t)
    for (int64_t k = 0; k < c.K; ++k)
      if (c.goes(t * c.K + k, d)) {
        tokens.push_back(t);
        break;
      }
  return tokens;
}

// Moves rows from what each rank has packed to what arrives at each, or back, as the counts say.
template <class T>
void exchange(const Case& c, const std::vector<int32_t>& counts, std::vector<std::vector<T>>& packed,
              std::vector<std::vector<T>>& arrived, int64_t width, bool back) {
  std::vector<int64_t> received(size_t(c.ranks), 0);
  for (int s = 0; s < c.ranks; ++s) {
    int64_t sent = 0;
    for (int d = 0; d < c.ranks; ++d) {
      const int64_t n = counts[s * c.ranks + d];
      ASSERT_LE((sent + n) * width, int64_t(packed[s].size()));
      ASSERT_LE((received[d] + n) * width, int64_t(arrived[d].size()));
      T *here = packed[s].data() + sent * width, *there = arrived[d].data() + received[d] * width;
      std::copy_n(back ? there : here, n * width, back ? here : there);
      sent += n, received[d] += n;
    }
  }
}

template <class Real>
struct ExpertParallel : ::testing::Test {};
TYPED_TEST_SUITE(ExpertParallel, AllReals);

TYPED_TEST(ExpertParallel, EveryTokenGoesOnceToEachRankOfItsExperts) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    const int64_t M = c.ranks * c.N;
    auto all_gates = random_tensor<Acc>("gates", M * c.K);
    for (int rank = 0; rank < c.ranks; ++rank) {
      Rank<Real> r(c, rank, all_gates);
      EXPECT_EQ(r.status.code, DeviceStatus::ok);
      EXPECT_EQ(r.places, c.places());
      EXPECT_TRUE(std::equal(r.own_places.begin(), r.own_places.end(), r.places.begin() + rank * c.N * c.K));
      int64_t sent = 0;
      for (int d = 0; d < c.ranks; ++d) {
        const std::vector<int64_t> tokens = tokens_for(c, d);
        ASSERT_EQ(r.offsets[d + 1] - r.offsets[d], int64_t(tokens.size()));
        std::vector<int64_t> from(size_t(c.ranks), 0);
        std::vector<int32_t> expected_position(size_t(c.N), -1);
        for (size_t i = 0; i < tokens.size(); ++i) {
          EXPECT_EQ(r.row_slot[r.offsets[d] + i] / c.ranks, tokens[i]);
          const int64_t s = tokens[i] / c.N;
          if (s == rank) expected_position[tokens[i] % c.N] = int32_t(sent + from[s]);
          ++from[s];
        }
        for (int s = 0; s < c.ranks; ++s) EXPECT_EQ(r.counts[s * c.ranks + d], from[s]);
        for (int64_t t = 0; t < c.N; ++t) EXPECT_EQ(r.position[t * c.ranks + d], expected_position[t]);
        sent += from[rank];
      }
      EXPECT_LE(sent, c.N * std::min<int64_t>(c.ranks, c.K * c.parts));
      const std::vector<int64_t> arrived = tokens_for(c, rank);
      EXPECT_EQ(r.source[M], int64_t(arrived.size()));
      for (int64_t i = 0; i < M; ++i) EXPECT_EQ(r.source[i], i < int64_t(arrived.size()) ? arrived[i] : -1);
      for (int64_t i = 0; i < M; ++i)
        for (int64_t k = 0; k < c.K; ++k) {
          const int64_t slot = i < int64_t(arrived.size()) ? arrived[i] * c.K + k : -1;
          const bool here = slot >= 0 && c.goes(slot, rank);
          EXPECT_EQ(r.index[i * c.K + k], here ? c.place(slot) % c.table.slots : -1);
          EXPECT_EQ(r.gates[i * c.K + k], here ? all_gates[slot] : Acc(0));
        }
    }
  }
}

// Expert e makes (e + 1) x of a token x, each of its parts as much of that. What comes back is the sum over its experts, gates included, wherever they are.
TYPED_TEST(ExpertParallel, ThereAndBackIsTheSumOverTheExperts) {
  using Real = TypeParam;
  using Acc = typename Cpu<Real>::Acc;
  const int64_t C = 5;
  for (const Case& c : cases()) {
    if (c.N == 40 && c.K > 2) continue;
    SCOPED_TRACE(c.name);
    const int64_t M = c.ranks * c.N, experts = c.table.slots;
    auto x = random_tensor<Real>("x", M * C), residual = random_tensor<Real>("residual", M * C);
    auto all_gates = random_tensor<Acc>("gates", M * c.K, 0.3, 0.5);
    Cpu<Real> dev;
    std::vector<Rank<Real>> ranks;
    std::vector<std::vector<Real>> packed, arrived, partial, returned;
    std::vector<std::vector<Acc>> dgates, returned_dgates;
    for (int r = 0; r < c.ranks; ++r) {
      ranks.emplace_back(c, r, all_gates);
      packed.push_back(poisoned<Real>(M * C)), arrived.push_back(poisoned<Real>(M * C));
      returned.push_back(poisoned<Real>(M * C)), partial.push_back(poisoned<Real>(M * C));
      dgates.push_back(poisoned<Acc>(M * c.K)), returned_dgates.push_back(poisoned<Acc>(M * c.K));
      expert_pack(dev, packed[r].data(), x.data() + r * c.N * C, ranks[r].position.data(), C, of_rank(c, r));
    }
    const std::vector<int32_t>& counts = ranks[0].counts;
    exchange(c, counts, packed, arrived, C, false);
    for (int d = 0; d < c.ranks; ++d) {
      const std::vector<int64_t> tokens = tokens_for(c, d);
      for (size_t i = 0; i < tokens.size(); ++i)
        ASSERT_EQ(std::memcmp(&arrived[d][i * C], &x[tokens[i] * C], C * sizeof(Real)), 0) << i;
      // The experts of this rank, as a rank that has them all would.
      std::vector<int32_t> n(experts), offsets(experts + 1), row_slot(M * c.K), slot_row(M * c.K);
      DeviceStatus status;
      Cpu<Real> watched{.status = &status};
      Scratch scratch(dispatch_scratch_bytes<Cpu<Real>>(M, c.K, experts));
      dispatch_plan(watched, {n.data(), offsets.data(), row_slot.data(), slot_row.data()}, scratch,
                    ranks[d].index.data(), M, c.K, experts, 0);
      EXPECT_EQ(status.code, DeviceStatus::ok);
      auto y = poisoned<Real>(M * c.K * C);
      std::vector<int64_t> expert_in(experts, -1);
      for (int64_t i = 0; i < c.E * c.ranks; ++i)
        if (c.table.place[i] / experts == d / c.parts) expert_in[c.table.place[i] % experts] = i / c.ranks;
      for (int64_t slot = 0; slot < experts; ++slot)
        for (int64_t row = offsets[slot]; row < offsets[slot + 1]; ++row)
          for (int64_t i = 0; i < C; ++i)
            y[row * C + i] = from_double<Real>(double(expert_in[slot] + 1) / c.parts *
                                               as_double(arrived[d][row_slot[row] / c.K * C + i]));
      combine(dev, partial[d].data(), y.data(), static_cast<const Real*>(nullptr), ranks[d].gates.data(),
              slot_row.data(), M, c.K, C);
      for (int64_t i = 0; i < int64_t(tokens.size()); ++i)  // the gate's gradient of slot s is s + 1, in parts
        for (int64_t k = 0; k < c.K; ++k)
          dgates[d][i * c.K + k] =
              ranks[d].index[i * c.K + k] < 0 ? Acc(-1) : Acc(tokens[i] * c.K + k + 1) / Acc(c.parts);
    }
    exchange(c, counts, returned, partial, C, true);
    exchange(c, counts, returned_dgates, dgates, c.K, true);
    std::vector<std::vector<Real>> own_x;
    for (int r = 0; r < c.ranks; ++r) own_x.emplace_back(x.begin() + r * c.N * C, x.begin() + (r + 1) * c.N * C);
    for (int r = 0; r < c.ranks; ++r) {
      auto fetched = poisoned<Real>(M * C);
      expert_pull(dev, fetched.data(), peers(own_x), ranks[r].source.data(), C, of_rank(c, r));
      EXPECT_TRUE(same_bits(fetched, arrived[r]));  // past the end both are untouched
    }
    for (int r = 0; r < c.ranks; ++r) {
      auto out = poisoned<Real>(c.N * C);
      combine(dev, out.data(), returned[r].data(), residual.data() + r * c.N * C, static_cast<const Acc*>(nullptr),
              ranks[r].position.data(), c.N, c.ranks, C);
      auto own = poisoned<Acc>(c.N * c.K);
      expert_gate_gradients(dev, own.data(), returned_dgates[r].data(), ranks[r].position.data(),
                            ranks[r].own_places.data(), of_rank(c, r));
      std::vector<double> expected(size_t(c.N * C));
      for (int64_t t = 0; t < c.N; ++t) {
        const int64_t at = r * c.N + t;
        for (int64_t i = 0; i < C; ++i) {
          expected[t * C + i] = as_double(residual[at * C + i]);
          for (int64_t k = 0; k < c.K; ++k)
            if (int32_t e = c.choices[at * c.K + k]; e >= 0)
              expected[t * C + i] += all_gates[at * c.K + k] * double(e + 1) * as_double(x[at * C + i]);
        }
        for (int64_t k = 0; k < c.K; ++k)
          EXPECT_EQ(own[t * c.K + k], c.choices[at * c.K + k] < 0 ? Acc(0) : Acc(at * c.K + k + 1));
      }
      EXPECT_CLOSE(out, expected, tolerance<Real>(4));
      // The same bits where the ranks fetch.
      auto fetched = poisoned<Real>(c.N * C);
      expert_pull_back(dev, fetched.data(), peers(partial), residual.data() + r * c.N * C, ranks[r].place.data(), C,
                       of_rank(c, r));
      EXPECT_TRUE(same_bits(fetched, out));
      auto fetched_dgates = poisoned<Acc>(c.N * c.K);
      expert_pull_gate_gradients(dev, fetched_dgates.data(), peers(dgates), ranks[r].place.data(),
                                 ranks[r].own_places.data(), of_rank(c, r));
      EXPECT_TRUE(same_bits(fetched_dgates, own));
    }
  }
}

}  // namespace
