#include "moe/layout.h"

#include <array>
#include <map>
#include <optional>
#include <sstream>

#include "llmc/error.h"
#include "llmc/swiglu.h"

namespace {

std::string shown(const std::vector<int>& ranks) {
  std::ostringstream text;
  for (size_t i = 0; i < ranks.size() && i < 8; ++i) text << (i ? " " : "") << ranks[i];
  if (ranks.size() > 8) text << " ... " << ranks.back();
  return text.str();
}

// What the ranks of a group have in common, and no others; nothing: of a rank that is in no group of this kind.
using Key = std::array<int, 3>;
std::optional<Key> key_of(const Layout& layout, Group g, const Place& p) {
  switch (g) {
    case Group::world:
      return Key{};
    case Group::stage:
      return Key{p.pp};
    case Group::dp:
      return Key{p.pp, p.tp};
    case Group::tp:
      return Key{p.pp, p.dp};
    case Group::pp:
      return Key{p.dp, p.tp};
    case Group::ep:
      return Key{p.pp, p.edp};
    case Group::etp:
      return Key{p.pp, p.edp, p.ep};
    case Group::edp:
      return Key{p.pp, p.ep, p.etp};
    case Group::ends:
      if (p.pp == 0 || p.pp == layout.pp - 1) return Key{p.tp};
  }
  return {};
}

}  // namespace

void Layout::validate(int processes, const ModelConfig& model) const {
  for (auto [option, value] : {std::pair{"--dp", dp}, {"--tp", tp}, {"--pp", pp}, {"--ep", ep}, {"--etp", etp}})
    if (value < 1 || value > (1 << 20)) fail(option, " must be from 1 to 2^20, not ", value);
  if (int64_t(dp) * tp * pp != processes)
    fail("--dp ", dp, " --tp ", tp, " --pp ", pp, " are ", int64_t(dp) * tp * pp, " processes, but ", processes,
         processes == 1 ? " runs" : " run", "; start as many as their product");
  if (stage_ranks() % (int64_t(ep) * etp))
    fail("--ep ", ep, " --etp ", etp, ": their product ", int64_t(ep) * etp,
         " does not divide --dp x --tp = ", stage_ranks());
  if (pp > model.n_layer) fail("--pp ", pp, " is more than the ", model.n_layer, " layers of the model (--n-layer)");
  if (model.n_head % tp || model.n_kv_head % tp)
    fail("--tp ", tp, " does not divide --n-head ", model.n_head, " and --n-kv-head ", model.n_kv_head);
  for (auto [option, width] : {std::pair{"--d-dense", model.d_dense}, {"--d-shared", model.d_shared}})
    if (width % (int64_t(tp) * swiglu_interleave))
      fail("--tp ", tp, " does not cut ", option, " ", width, " into multiples of ", swiglu_interleave);
  if (model.n_expert % ep) fail("--ep ", ep, " does not divide --n-expert ", model.n_expert);
  if (model.d_expert % (int64_t(etp) * swiglu_interleave))
    fail("--etp ", etp, " does not cut --d-expert ", model.d_expert, " into multiples of ", swiglu_interleave);
}

Place place(const Layout& layout, int rank) {
  const int in_stage = rank % layout.stage_ranks();
  return {rank,
          rank / layout.stage_ranks(),
          in_stage / layout.tp,
          in_stage % layout.tp,
          in_stage / (layout.ep * layout.etp),
          in_stage / layout.etp % layout.ep,
          in_stage % layout.etp};
}

const char* name_of(Group g) {
  constexpr const char* names[] = {"world", "stage", "dp", "tp", "pp", "ep", "etp", "edp", "ends"};
  return names[int(g)];
}
const char* purpose_of(Group g) {
  constexpr const char* purposes[] = {"loss, gradient norm, decisions",
                                      "gradients and optimizer state of experts, routers and norms",
                                      "dense gradients and weights",
                                      "activations of split layers",
                                      "activations and their gradients, to the neighbour",
                                      "tokens to experts and back",
                                      "who has the parts of the same experts",
                                      "who has the same experts",
                                      "tied embeddings"};
  return purposes[int(g)];
}

std::vector<int> members(const Layout& layout, Group g, int rank) {
  const std::optional<Key> mine = key_of(layout, g, place(layout, rank));
  std::vector<int> ranks;
  for (int other = 0; mine && other < layout.world(); ++other)
    if (key_of(layout, g, place(layout, other)) == mine) ranks.push_back(other);
  return ranks;
}

std::vector<std::vector<int>> all_groups(const Layout& layout, Group g) {
  std::vector<std::vector<int>> all;
  std::map<Key, size_t> number;
  for (int rank = 0; rank < layout.world(); ++rank) {
    const std::optional<Key> key = key_of(layout, g, place(layout, rank));
    if (!key) continue;
    const auto [found, is_new] = number.try_emplace(*key, all.size());
    if (is_new) all.emplace_back();
    all[found->second].push_back(rank);
  }
  return all;
}

std::pair<int64_t, int64_t> share(int64_t n, int parts, int index) {
  return {n * index / parts, n * (index + 1) / parts};
}
std::pair<int64_t, int64_t> layers_of(const Layout& layout, const ModelConfig& model, int pp) {
  return share(model.n_layer, layout.pp, pp);
}
std::pair<int64_t, int64_t> experts_of(const Layout& layout, const ModelConfig& model, int ep) {
  return share(model.n_expert, layout.ep, ep);
}

std::string describe(const Layout& layout, const ModelConfig& model) {
  std::ostringstream text;
  text << "layout: " << layout.world() << " processes, dp " << layout.dp << " tp " << layout.tp << " pp " << layout.pp
       << "; experts edp " << layout.edp() << " ep " << layout.ep << " etp " << layout.etp << "\n";
  for (Group g : groups) {
    const auto all = all_groups(layout, g);
    text << "  " << name_of(g) << ": " << all.size() << " of " << all[0].size() << " (" << shown(all[0]) << "), "
         << purpose_of(g) << "\n";
  }
  for (int pp = 0; pp < layout.pp; ++pp) {
    auto [first, last] = layers_of(layout, model, pp);
    text << "  stage " << pp << ": layers " << first << " to " << last - 1 << ", " << model.n_expert / layout.ep
         << " of " << model.n_expert << " experts a rank\n";
  }
  return text.str();
}
