// A routing whose experts have whole tiles of rows: what the ragged ends of experts cost is the time of a layer with the
// router's own choices against that of the same layer with these.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

struct RoundedRouting {
  std::vector<int32_t> chosen;  // (N,K)
  int64_t moved = 0;            // slots whose expert is another now
  int64_t ragged = 0;           // experts whose rows are still no multiple
};

// Every expert's rows, in chosen (N,K), become the nearest multiple, or the next one where that keeps the sum at N*K.
// Greedy: experts with too many rows give away their slots of smallest gate, each to the expert that lacks most among
// those which the token has not. No slot is dropped and no token has an expert twice.
inline RoundedRouting round_rows(const std::vector<int32_t>& chosen, const std::vector<float>& gates, int64_t N,
                                 int64_t K, int64_t E, int64_t multiple) {
  RoundedRouting r{chosen};
  std::vector<std::vector<int64_t>> slots(E);
  for (int64_t s = 0; s < N * K; ++s) slots[chosen[s]].push_back(s);

  std::vector<int64_t> goal(E), count(E);
  for (int64_t e = 0; e < E; ++e)
    count[e] = int64_t(slots[e].size()), goal[e] = std::min(N, (count[e] + multiple / 2) / multiple * multiple);
  for (int64_t left = N * K - std::accumulate(goal.begin(), goal.end(), int64_t(0)); left != 0;) {
    const int64_t step = std::clamp(left, -multiple, multiple);
    int64_t best = -1, best_distance = 0;
    for (int64_t e = 0; e < E; ++e) {
      if (goal[e] + step < 0 || goal[e] + step > N) continue;
      const int64_t distance = std::abs(goal[e] + step - count[e]);
      if (best < 0 || distance < best_distance) best = e, best_distance = distance;
    }
    if (best < 0) break;
    goal[best] += step, left -= step;
  }

  for (int64_t e = 0; e < E; ++e) {
    std::stable_sort(slots[e].begin(), slots[e].end(), [&](int64_t a, int64_t b) { return gates[a] < gates[b]; });
    for (int64_t s : slots[e]) {
      if (count[e] <= goal[e]) break;
      const auto mine = r.chosen.begin() + s / K * K;
      int64_t to = -1;
      for (int64_t other = 0; other < E; ++other)
        if (goal[other] > count[other] && (to < 0 || goal[other] - count[other] > goal[to] - count[to]) &&
            std::find(mine, mine + K, other) == mine + K)
          to = other;
      if (to < 0) continue;
      r.chosen[s] = int32_t(to), --count[e], ++count[to], ++r.moved;
    }
  }
  for (int64_t e = 0; e < E; ++e) r.ragged += count[e] % multiple != 0;
  return r;
}
