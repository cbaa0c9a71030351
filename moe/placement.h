// Which rank computes which expert, so that the busiest rank has little more to do than the mean. Functions of small
// arrays: no device, no communication, the same result wherever the same numbers go in, so that every rank can decide
// alone and the simulator decides as the trainer does.
//
// E experts, P ranks of the expert-parallel group, S slots a rank; a slot holds the weights of one expert. An expert
// has one copy or several (replicas), on different ranks. Loads are rows (of whatever period), smoothed or exact.
//
// Sources: longest processing time first, R. L. Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl.
// Math. 17 (1969); replicas for the highest load a copy and packing first among nodes, then within each, as in
// DeepSeek's EPLB (the balancer described in the DeepSeek-V3 report, section 3.4); moving experts between ranks during
// training, SmartMoE (Zhai et al., USENIX ATC 2023); shadows, FasterMoE (He et al., PPoPP 2022), section 4.1.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace placement {

struct Table {
  int64_t ranks = 0, slots = 0;
  std::vector<int32_t> expert;  // (P,S): the expert of a slot, or -1: an empty slot

  int32_t at(int64_t rank, int64_t slot) const { return expert[size_t(rank * slots + slot)]; }
  int32_t& at(int64_t rank, int64_t slot) { return expert[size_t(rank * slots + slot)]; }
  bool operator==(const Table&) const = default;
};

// Expert e on rank e / ceil(E/P), in order. Error: more experts than slots.
Table in_order(int64_t experts, int64_t ranks, int64_t slots);

// Copies of each expert (E), at least one, at most P; their sum is the smaller of P*S and E*P. One after another goes to
// the expert with the highest load a copy (ties: the lower expert). Error: E > P*S.
std::vector<int32_t> copies(std::span<const double> load, int64_t ranks, int64_t slots);

// One copy of each expert, S or fewer a rank: the heaviest first to the rank with the least load that has room; then
// the busiest rank exchanges experts (or hands one over to a free slot) with whichever rank lowers the larger load of
// the two most, until none does. With number_of_copies (E), as many copies of equal load instead, no two on one rank (a
// copy that finds no such rank is left out). Error: E > P*S.
Table pack(std::span<const double> load, int64_t ranks, int64_t slots);
Table pack(std::span<const double> load, std::span<const int32_t> number_of_copies, int64_t ranks, int64_t slots);

// Replicas in all slots that there are: copies(), then pack().
Table replicate(std::span<const double> load, int64_t ranks, int64_t slots);

// The same where ranks [n*P/nodes, (n+1)*P/nodes) share node n, and links within a node are faster: experts are packed
// onto nodes first, then copied and packed within theirs, so that all copies of an expert are on one node. Error: P is
// not a multiple of nodes, or E not at most P*S.
Table hierarchical(std::span<const double> load, int64_t nodes, int64_t ranks, int64_t slots);

// next with its ranks and slots renamed so that as few slots as possible get other weights than `now` has there: ranks
// by an assignment of least cost (H. W. Kuhn, "The Hungarian method for the assignment problem", 1955), P^3 steps; an
// expert that stays on its rank stays in its slot. With nodes > 1 ranks keep to a node, and nodes are assigned first.
Table least_moves(const Table& next, const Table& now, int64_t nodes = 1);

// Slots of `next` that have an expert whose weights `now` does not have on that rank: what a change sends.
int64_t moves(const Table& next, const Table& now);

// Which copy takes the rows of each source rank: slots[e*P + s] = rank*S + slot for expert e and rows of rank s.
// rows (E,P). Experts with one copy first; then the rest, most rows first, each to the copy on the rank with the least
// rows by then (ties: the source's own rank, then the lower rank); then what the busiest rank can pass on with gain.
// Error: an expert without a copy.
std::vector<int32_t> route(const Table& table, std::span<const double> rows);

// Rows that each rank computes (P), by such a routing of rows (E,P).
std::vector<double> rank_rows(std::span<const int32_t> slots, std::span<const double> rows, int64_t ranks,
                              int64_t slots_per_rank);

// Largest over mean; 1 where all are zero.
double imbalance(std::span<const double> rank_rows);

// Shadows of one micro-step: experts that the ranks which would send them rows compute themselves, with weights pulled from
// the expert's host and gradients sent back.
struct ShadowCosts {
  double row = 0;       // seconds that a rank takes for a row, forward and backward
  double weights = 0;   // seconds to send an expert's weights to one rank
  double gradient = 0;  // seconds to send its gradient home from one rank, and to add it
};
struct Shadow {
  int32_t expert;
  std::vector<int32_t> ranks;  // ascending; that take their own rows
};
// The experts worth it, at most `slots` a rank: as long as it pays, of the busiest rank's experts the one that lowers the
// time most, on those ranks that send it rows and have a slot left, either one of them or as many of the heaviest as is best. Time: rows
// of the busiest rank times costs.row, and all weights and gradients that one host sends and gets, one after another.
// FasterMoE's rule asks whether an expert, not a rank, is the busiest, and leaves out that its gradient is summed.
// slots_of as by route().
std::vector<Shadow> shadows(std::span<const int32_t> slots_of, std::span<const double> rows, int64_t ranks,
                            int64_t slots_per_rank, int64_t slots, const ShadowCosts& costs);

}  // namespace placement
