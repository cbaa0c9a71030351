#include "moe/expert_slots.h"

#include <charconv>
#include <map>
#include <sstream>

#include "llmc/error.h"
#include "llmc/files.h"

std::vector<std::vector<ExpertSlots::Run>> ExpertSlots::runs() const {
  std::vector<std::vector<int64_t>> slot(size_t(hosts), std::vector<int64_t>(size_t(E), -1));
  for (int64_t i = 0; i < E * sources; ++i) slot[size_t(place[i] / slots)][size_t(i / sources)] = place[i] % slots;
  std::vector<std::vector<Run>> all(static_cast<size_t>(hosts));
  for (int64_t e = 0; e < E; ++e) {
    bool goes_on = e > 0;  // the run of the expert before, on every host
    for (const auto& s : slot) goes_on = goes_on && (s[e] < 0 ? s[e - 1] < 0 : s[e - 1] >= 0 && s[e] == s[e - 1] + 1);
    for (int h = 0; h < hosts; ++h)
      if (slot[h][e] >= 0 && goes_on)
        ++all[h].back().n;
      else if (slot[h][e] >= 0)
        all[h].push_back({e, 1, slot[h][e]});
  }
  return all;
}

void ExpertSlots::validate(const std::string& where, int64_t slots_in_use) const {
  std::map<int32_t, int64_t> expert_in;
  std::map<std::pair<int64_t, int64_t>, int32_t> place_on;  // of (expert, host)
  for (int64_t i = 0; i < E * sources; ++i) {
    const int64_t e = i / sources;
    const int32_t at = place[i];
    if (at < 0 || at >= hosts * slots || at % slots >= slots_in_use)
      fail(where, ": expert ", e, " for tokens of rank ", i % sources, ": ", at, " is not host * ", slots,
           " + slot, with host < ", hosts, " and slot < ", slots_in_use);
    if (const int64_t other = expert_in.try_emplace(at, e).first->second; other != e)
      fail(where, ": experts ", other, " and ", e, " are both in slot ", at % slots, " of host ", at / slots);
    if (const int32_t other = place_on.try_emplace({e, at / slots}, at).first->second; other != at)
      fail(where, ": expert ", e, " is in slots ", other % slots, " and ", at % slots, " of host ", at / slots,
           "; one is enough");
  }
}

ExpertSlots experts_in_order(int64_t E, int hosts, int sources, int64_t slots) {
  ExpertSlots s{E, hosts, sources, slots, {}};
  const int64_t share = E / hosts;
  for (int64_t e = 0; e < E; ++e)
    s.place.insert(s.place.end(), size_t(sources), int32_t(e / share * slots + e % share));
  return s;
}

std::vector<std::vector<int32_t>> read_places(const std::string& path, int64_t tables, int64_t numbers) {
  std::istringstream text(read_file(path));
  std::vector<int32_t> all;
  for (std::string word; text >> word;) {
    auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), all.emplace_back());
    if (error != std::errc() || end != word.data() + word.size())
      fail(path, ": what stands in place ", all.size(), " is not the number of a slot");
  }
  if (int64_t(all.size()) != tables * numbers)
    fail(path, " has ", all.size(), " numbers, not ", numbers, " for each of ", tables, " layers with experts");
  std::vector<std::vector<int32_t>> places;
  for (int64_t t = 0; t < tables; ++t) places.emplace_back(all.begin() + t * numbers, all.begin() + (t + 1) * numbers);
  return places;
}
