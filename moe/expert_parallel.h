// Expert parallelism: a rank has E/ep of the experts, or of each of these the etp-th part of its width, and computes with
// every token of its group of ep * etp ranks that chose one of them.
//
// The ranks gather all choices, so that each makes the same plan of who sends what: the tokens of rank s that have an
// expert on rank d go there once, however many of its experts they chose, in the order of the tokens. What arrived is a
// batch of tokens with a choice each, in which experts of other ranks are -1: from there on everything is as on one rank
// (dispatch.h, experts.h), rows in the order (expert, source rank, token). Back goes one row a token and rank: the sum of
// its experts' rows there, gates included; the token's own rank adds these up in the order of the ranks.
//
// The parts of an expert are on neighbouring ranks. A token goes to all of them, and their sums are parts of its sum.
//
// M = ep * etp * N tokens of the group, numbered rank * N + token.
#pragma once
#include "llmc/comm.h"
#include "llmc/plan.h"
#include "moe/dispatch.h"

// The ranks of the group.
struct ExpertRanks {
  int ranks = 1, rank = 0;
  int64_t N, K, E;  // tokens of a rank, choices of a token, experts in all
  int parts = 1;    // of an expert; divides ranks
  HOST_DEVICE int64_t M() const { return ranks * N; }
  HOST_DEVICE int64_t experts() const { return E / (ranks / parts); }  // of a rank, whole or in parts
  HOST_DEVICE int64_t first_expert(int64_t r) const { return r / parts * experts(); }
  HOST_DEVICE bool has(int64_t r, int64_t e) const { return e >= first_expert(r) && e < first_expert(r) + experts(); }
  int64_t share() const { return parts * N * K; }  // rows of a rank's experts, in the mean
};

// destination (M, ranks): d where the token chose an expert of rank d, else -1. dispatch_plan() of it (E = K = ranks) is the
// plan of the exchange: bucket d lists the tokens that go to rank d, in order.
template <class Device>
void expert_destinations(Device& dev, int32_t* destination, const int32_t* top_k_index, ExpertRanks r);

// The batch that arrives here: of its i-th token, index (M,K): its choices as numbers of this rank's experts, -1 for those
// of other ranks; gates (M,K) beside them. Past its end -1.
//   in  offsets, row_slot: of the exchange's plan; top_k_index (M,K), all_gates (M,K): of all tokens
template <class Device>
void expert_arrivals(Device& dev, int32_t* index, typename Device::Acc* gates, const int32_t* offsets,
                     const int32_t* row_slot, const int32_t* top_k_index, const typename Device::Acc* all_gates,
                     ExpertRanks r);

// Where this rank's tokens are in what it sends: position (N, ranks) of its token for rank d, grouped by d, or -1;
// counts (ranks, ranks): tokens from rank s to rank d.
template <class Device>
void expert_positions(Device& dev, int32_t* position, int32_t* counts, const int32_t* offsets, const int32_t* row_slot,
                      const int32_t* slot_row, ExpertRanks r);

// packed (., C): row position[t,d] = x[t]
template <class Device>
void expert_pack(Device& dev, typename Device::Real* packed, const typename Device::Real* x, const int32_t* position,
                 int64_t C, ExpertRanks r);

// dgates (N,K) = that of the rank which has the expert, or the sum over its parts, in order, from `returned` (., K) in the
// order of what was sent; 0 for a slot that a rank dropped.
template <class Device>
void expert_gate_gradients(Device& dev, typename Device::Acc* dgates, const typename Device::Acc* returned,
                           const int32_t* position, const int32_t* top_k_index, ExpertRanks r);

// Rows of `width` elements between the ranks, as counts says: from what is packed here to what arrives, or back. The host
// reads counts and waits for the device to do so.
template <class Device, class T>
void exchange_rows(Device& dev, const Comm& comm, T* to, const T* from, const int32_t* counts, int64_t width, bool back,
                   const char* name) {
  const int ranks = comm.size(), rank = comm.rank();
  std::vector<int32_t> n(size_t(ranks) * ranks);
  dev.to_host(n.data(), counts, n.size() * sizeof n[0]);
  std::vector<Piece> out, in;
  for (int r = 0, sent = 0, arrived = 0; r < ranks; ++r) {
    const int to_r = n[rank * ranks + r], from_r = n[r * ranks + rank];
    T* packed = const_cast<T*>(back ? to : from) + sent * width;
    T* here = const_cast<T*>(back ? from : to) + arrived * width;
    (back ? in : out).emplace_back(r, packed, to_r * width);
    (back ? out : in).emplace_back(r, here, from_r * width);
    sent += to_r, arrived += from_r;
  }
  comm.exchange(out, in, name);
}
