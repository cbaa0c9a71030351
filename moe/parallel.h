// The processes of a run as the model sees them: their layout, where this one stands, and the communicators of its groups.
#pragma once
#include <array>
#include <map>

#include "llmc/comm.h"
#include "llmc/homes.h"
#include "moe/expert_slots.h"
#include "moe/layout.h"

struct Parallel {
  Layout layout;
  Place here;
  World* world = nullptr;  // none: a process alone, or the plan of one rank of others
  std::array<Comm, std::size(groups)> comms;
  Comm host;  // of all ranks, for values in host memory

  bool alone() const { return layout.world() == 1; }
  bool lead() const { return here.rank == 0; }  // writes what the job writes once
  const Comm& operator[](Group g) const { return comms[int(g)]; }
  // Whether all that a step exchanges passes within the same ranks. It is one communicator's then, which does one
  // operation after another, in the order in which they were queued, the same on every rank: no two ranks wait for each
  // other in different ones, even where some go on beside the device's stream. (Two communicators at work at a time
  // would need processors for both, and an exchange of gradients would take the links that tokens of experts wait for.)
  bool one_group() const { return !alone() && layout.dp == layout.world() && layout.ep * layout.etp == 1; }
  int stage_rank() const { return here.rank % layout.stage_ranks(); }

  // ---- where the optimizer state of a matrix lives: `pieces` rows of logical tensors, dealt out in units ----

  // The same on every rank of the stage.
  Homes replicated(const std::vector<int64_t>& pieces, int64_t unit) const {
    return homes(Group::stage, layout.stage_ranks(), stage_rank(), pieces, unit, 0);
  }
  // Cut by tensor parallelism: the same on the ranks of the dp group (where nothing is cut, the stage: what goes to the
  // same ranks is exchanged at once). rows: of the buffer, padding included.
  Homes dense(const std::vector<int64_t>& pieces, int64_t unit, int64_t rows) const {
    return homes(layout.tp == 1 ? Group::stage : Group::dp, layout.dp, here.dp, pieces, unit, rows);
  }
  // Tied embeddings: the same on the dp ranks of the first stage, which have the gradient of the embedding, and of the last,
  // which have that of the head.
  Homes ends(const std::vector<int64_t>& pieces, int64_t unit, int64_t rows) const {
    if (layout.pp == 1) return dense(pieces, unit, rows);
    Homes h = homes(Group::ends, 2 * layout.dp, here.dp + (here.pp ? layout.dp : 0), pieces, unit, rows);
    h.first_hosts = layout.dp;
    return h;
  }
  // Those of the experts of a layer, which a rank has in its slots; `rows` of an expert, of which a rank has all or (slabs
  // of columns, or of gate and up rows) the part of its etp index.
  Homes experts(const ExpertSlots& slots, int64_t rows, int64_t unit) const {
    Homes h;
    h.group = int(Group::stage), h.rank = stage_rank(), h.slabs = layout.etp;
    h.bounds = home_bounds(std::vector<int64_t>(size_t(slots.E), rows), unit, layout.stage_ranks());
    const auto runs = slots.runs();
    for (int r = 0; r < layout.stage_ranks(); ++r) {
      const Place p = place(layout, here.pp * layout.stage_ranks() + r);
      Homes::Host& host = h.hosts.emplace_back(Homes::Host{slots.slots * rows, p.etp, {}});
      for (const auto& run : runs[p.ep]) host.runs.push_back({run.expert * rows, run.n * rows, run.slot * rows});
    }
    return h;
  }

 private:
  static Homes homes(Group g, int ranks, int rank, const std::vector<int64_t>& pieces, int64_t unit, int64_t rows) {
    Homes h;
    h.group = int(g), h.rank = rank, h.bounds = home_bounds(pieces, unit, ranks);
    h.hosts.assign(size_t(ranks), host_of_all(std::max(rows, h.bounds.back())));
    return h;
  }
};

// Makes the communicators: called once by every process, with the same layout.
template <class Device>
Parallel open_parallel(World& world, Device& dev, const Layout& layout) {
  Parallel p;
  p.layout = layout, p.here = place(layout, world.rank()), p.world = &world;
  if (p.alone()) return p;
  std::map<std::vector<std::vector<int>>, Comm> made;  // kinds whose groups are the same share communicators
  for (Group g : {Group::world, Group::stage, Group::dp, Group::tp, Group::pp, Group::ep, Group::ends}) {
    if (layout.pp == 1 && (g == Group::pp || g == Group::ends)) continue;
    auto [found, is_new] = made.try_emplace(all_groups(layout, g));
    for (const std::vector<int>& ranks : found->first)
      if (Comm comm = is_new ? world.comm(dev, ranks, name_of(g)) : Comm()) found->second = comm;
    p.comms[size_t(g)] = found->second;
  }
  p.host = world.host_comm(p[Group::world].ranks(), "host");
  return p;
}
