// How the processes of a run share the work: which ranks form which group, and what of the model each has.
//
//   world = dp * tp * pp                rank = (pp_index * dp + dp_index) * tp + tp_index
//   a stage: the dp * tp ranks that have the same layers. Its MoE layers see the same ranks as edp * ep * etp:
//                                       rank in the stage = (edp_index * ep + ep_index) * etp + etp_index
//
// dp: data (batch rows); tp: heads, dense width and vocabulary; pp: layers, in order; ep: experts; etp: the width of
// an expert; edp = dp * tp / (ep * etp): how many copies of each expert there are. The group `ep` has all experts in all
// their parts: ep * etp ranks.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "moe/config.h"

struct Layout {
  int dp = 1, tp = 1, pp = 1, ep = 1, etp = 1;

  bool operator==(const Layout&) const = default;
  int world() const { return dp * tp * pp; }
  int stage_ranks() const { return dp * tp; }
  int edp() const { return stage_ranks() / (ep * etp); }
  // Throws one line naming the options for a layout that `world` processes cannot form or this model cannot be cut into.
  void validate(int world, const ModelConfig& model) const;
};

// Where a rank stands in both views.
struct Place {
  int rank = 0, pp = 0, dp = 0, tp = 0, edp = 0, ep = 0, etp = 0;
  bool operator==(const Place&) const = default;
};
Place place(const Layout& layout, int rank);  // rank in [0, world)

// The groups in which ranks talk to one another. Of each kind, every rank is in exactly one group (`ends`: those of the
// first and the last stage, the dp ranks of both together).
enum class Group { world, stage, dp, tp, pp, ep, etp, edp, ends };
inline constexpr Group groups[] = {Group::world, Group::stage, Group::dp,  Group::tp,  Group::pp,
                                   Group::ep,    Group::etp,   Group::edp, Group::ends};
const char* name_of(Group g);
const char* purpose_of(Group g);  // what passes within it

// The ranks of the group of this kind that `rank` is in, ascending; empty where it is in none.
std::vector<int> members(const Layout& layout, Group g, int rank);
// All groups of a kind, by their first rank: the order in which every process creates them.
std::vector<std::vector<int>> all_groups(const Layout& layout, Group g);

// A share [first, second) of n things for part `index` of `parts`: sizes differ by one at most, the larger ones last.
std::pair<int64_t, int64_t> share(int64_t n, int parts, int index);
// Layers of a stage; the rank's experts; both as [first, second).
std::pair<int64_t, int64_t> layers_of(const Layout& layout, const ModelConfig& model, int pp);
std::pair<int64_t, int64_t> experts_of(const Layout& layout, const ModelConfig& model, int ep);

// What --dry-run prints: a line a kind of group, with its size, its number and the first of them.
std::string describe(const Layout& layout, const ModelConfig& model);
