// Memory of the other GPUs of this host, mapped into this process (CUDA IPC): a kernel reads a tensor of another rank as
// if it were its own.
//
// Every rank of the group plans the same tensors in the same order, though not at the same places of its arena, since what
// is at home on a rank differs. A tensor that others read is given to an op as peers.of(tensor), which the op takes as
// Peers<const T>. Where the ranks have it is gathered once, by open().
//
// Who reads must know that what it reads is there, and who wrote it, that it has been read. Both are known from a
// meeting, an op that every rank of the group puts on its stream: it is done when all of them have come to it, so
//   - what was put on any rank's stream before a meeting may be read by all after it, and
//   - what a rank has read before a meeting may be overwritten by its owner after it.
// The tensors that were read in between are given to the later meeting too, so that the plan keeps their memory until then.
//
// Meetings are numbered by a counter in device memory: a captured graph may be replayed. Nothing of this waits for the host.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "llmc/comm.h"
#include "llmc/plan.h"

class GpuBase;

inline constexpr int max_peers = 16;

// A pointer into the memory of each rank of the group, this one included; handed to kernels by value.
template <class T>
struct Peers {
  T* at[max_peers] = {};
  const int32_t* lost = nullptr;  // where it is not 0 a rank was waited for in vain, and nothing is to be read; or null
};

class PeerMemory;

// A tensor at all ranks, for an op that takes Peers<const T>.
template <class T>
struct PeerTensor {
  Tensor<T> here;
  const PeerMemory* memory;
  operator Peers<const T>() const;
  template <class F>
  void for_each_tensor(F f) const {
    f(here);
  }
};

// What the ranks tell each other while they compute: in the arena of each.
struct PeerFlags {
  uint64_t reached[max_peers];  // the last meeting that each rank has come to; each rank writes its own entry
  uint64_t meetings;            // of this rank
  int32_t lost;                 // 1: a rank did not come in time
};

class PeerMemory {
 public:
  // Why the ranks of `group` cannot address each other's memory; empty: they can. Called by all ranks of `all`, which get
  // the same answer, with their own groups.
  static std::string problem(GpuBase& dev, const World& world, const Comm& group, const Comm& all);

  // ---- while planning
  void declare(Plan& plan) {
    flags_ = plan.persistent<char>("peer flags", {int64_t(sizeof(PeerFlags))}, Category::workspace);
    of(flags_);
  }
  template <class T>
  PeerTensor<T> of(Tensor<T> tensor) {
    if (index_.try_emplace(tensor.info, index_.size()).second) {
      if (mapping_) fail("tensor ", tensor.info->name, " is read by other ranks, and was not planned to be");
      shared_.push_back(tensor.info);
    }
    return {tensor, this};
  }

  // Maps the arenas of the group, whose ranks call it together. timeout: in seconds, of a meeting.
  // Errors: the ranks have planned different tensors for each other; the GPUs cannot address each other.
  void open(GpuBase& dev, char* arena, const Comm& group, double timeout);

  template <class T>
  Peers<const T> pointers(const TensorInfo* tensor) const {
    Peers<const T> p;
    for (int r = 0; r < ranks_; ++r) p.at[r] = reinterpret_cast<const T*>(at_[index_.at(tensor) * ranks_ + r]);
    p.lost = &reinterpret_cast<const PeerFlags*>(flags_.data())->lost;
    return p;
  }

  // The meeting. A rank that does not come within the time-out is DeviceStatus::peer_late; from then on nobody is waited
  // for here, so that what is on the stream runs to its end, with values that mean nothing.
  void meet(GpuBase& dev) const;

 private:
  struct Mapping;
  static std::string map(Mapping& mapping, const World* world, char* base);

  Tensor<char> flags_;
  std::map<const TensorInfo*, size_t> index_;
  std::vector<const TensorInfo*> shared_;
  std::vector<char*> at_;  // (tensors, ranks)
  int rank_ = 0, ranks_ = 0;
  std::vector<int> names_;  // of the ranks in the world
  uint64_t patience_ = 0;   // nanoseconds
  std::shared_ptr<Mapping> mapping_;
};

template <class T>
PeerTensor<T>::operator Peers<const T>() const {
  return memory->pointers<T>(here.info);
}
