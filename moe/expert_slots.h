// Which rank computes which expert. The ranks of a group that share the experts of a layer are hosts (the etp ranks that
// have the parts of an expert are one host together), and each has the same number of slots for the weights of an expert.
// A table says for every expert and every rank of the group, the source of a token, in which slot of which host the
// tokens of that rank are computed with that expert: host * slots + slot.
//
// In the order of the experts it is e / (E / hosts) and e % (E / hosts) for all sources. But an expert may be anywhere, and
// on several hosts, each for some of the sources; a slot, and a host, may be empty. The results are those of any other
// table, but for the order in which sums are taken.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

struct ExpertSlots {
  int64_t E = 0;
  int hosts = 1, sources = 1;
  int64_t slots = 0;           // of a host
  std::vector<int32_t> place;  // (E, sources)

  // Experts [expert, expert + n) in slots from `slot` on.
  struct Run {
    int64_t expert, n, slot;
  };
  // What each host has, ascending by expert: two hosts have the same experts in a run, or none of it in common.
  std::vector<std::vector<Run>> runs() const;

  // Throws a line that begins with `where` for a place that is none of the first `slots_in_use` slots of a host, a slot
  // of two experts, or an expert twice on a host.
  void validate(const std::string& where, int64_t slots_in_use) const;
};

// The experts in order, from the first slot of every host. hosts divides E.
ExpertSlots experts_in_order(int64_t E, int hosts, int sources, int64_t slots);

// Tables of a text file: numbers between white space, table after table, each `numbers` long. Throws a line that names
// the path where it cannot be read, or holds anything else.
std::vector<std::vector<int32_t>> read_places(const std::string& path, int64_t tables, int64_t numbers);
