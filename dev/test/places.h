// Experts at random in the slots of hosts, some of them on several hosts.
#pragma once
#include "llmc/random.h"
#include "moe/expert_slots.h"

// E experts, at most hosts * slots; of the slots that are left some get another copy of an expert. Each source has an
// expert at any one of its copies.
inline ExpertSlots random_places(uint64_t seed, int64_t E, int hosts, int sources, int64_t slots) {
  uint64_t drawn = 0;
  auto draw = [&](size_t n) { return size_t(random_bits(17, seed, drawn++) % n); };
  std::vector<int32_t> free(size_t(hosts * slots));
  for (size_t i = 0; i < free.size(); ++i) free[i] = int32_t(i);
  std::vector<std::vector<int32_t>> copies(static_cast<size_t>(E));
  for (auto& of_expert : copies) {
    auto at = free.begin() + int64_t(draw(free.size()));
    of_expert.push_back(*at), free.erase(at);
  }
  for (int32_t place : free) {
    auto& of_expert = copies[draw(copies.size())];
    bool has_it = false;
    for (int32_t other : of_expert) has_it = has_it || other / slots == place / slots;
    if (!has_it && draw(4) > 0) of_expert.push_back(place);
  }
  ExpertSlots s{E, hosts, sources, slots, {}};
  for (const auto& of_expert : copies)
    for (int source = 0; source < sources; ++source) s.place.push_back(of_expert[draw(of_expert.size())]);
  return s;
}
