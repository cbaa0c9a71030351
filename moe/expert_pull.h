// Expert parallelism over mapped memory (llmc/peer_memory.h): what expert_parallel.h sends and brings back, here each rank
// fetches, every row across the link once and straight to its place. No numbers of rows are known to the host, and none is
// packed. The batch that arrives, and every sum, are the same to the bit.
//
// Between who wrote and who fetches there is a meeting of the ranks, and another before what was fetched is overwritten.
#pragma once
#include "llmc/peer_memory.h"
#include "moe/expert_parallel.h"

// Who fetches what.
//   in   offsets, row_slot, slot_row: of the exchange's plan (expert_destinations)
//   out  source (M+1): the token, rank * N + token, that is the i-th to arrive here; past the end -1; source[M]: how many
//        position (N, ranks): the place of this rank's token among what arrives at rank d, or -1
template <class Device>
void expert_pull_plan(Device& dev, int32_t* source, int32_t* position, const int32_t* offsets, const int32_t* row_slot,
                      const int32_t* slot_row, ExpertRanks r);

// arrived (M,C): row i = x[source[i]], of x (N,C) at each rank. Rows past the end are not written.
template <class Device>
void expert_pull(Device& dev, typename Device::Real* arrived, Peers<const typename Device::Real> x,
                 const int32_t* source, int64_t C, ExpertRanks r);

// out (N,C) = addend + the sum over d, ascending, of partial[position[t,d]] at rank d, partial (M,C), in Acc: combine() of
// what transport by exchange brings back. out may be addend.
template <class Device>
void expert_pull_back(Device& dev, typename Device::Real* out, Peers<const typename Device::Real> partial,
                      const typename Device::Real* addend, const int32_t* position, int64_t C, ExpertRanks r);

// dgates (N,K) = that of the rank which has the expert, or the sum over its parts, in order, from their dgates (M,K); 0 for
// a slot that no rank has.
template <class Device>
void expert_pull_gate_gradients(Device& dev, typename Device::Acc* dgates, Peers<const typename Device::Acc> theirs,
                                const int32_t* position, const int32_t* top_k_index, ExpertRanks r);
