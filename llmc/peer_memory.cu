#include "llmc/peer_memory.h"

#include <cstdio>
#include <exception>

#include "llmc/cuda_common.cuh"
#include "llmc/random.h"

namespace {

__device__ __forceinline__ void store_release(uint64_t* p, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

struct Meeting {
  PeerFlags* flags[max_peers];
  int names[max_peers];
  int rank, ranks;
  uint64_t patience;
};

// One block; thread s sees to rank s. The kernels before this one have ended, and the release hands on what they wrote and
// that they have read; the kernels after it begin when the acquires of all threads are done. A flag is stored into the
// memory of who waits for it, so that waiting costs the link nothing. Whoever comes late may find a peer one meeting
// further, which is why `reached` is compared and not expected.
__global__ void __launch_bounds__(32) meet_peers(const __grid_constant__ Meeting m, DeviceStatus* status, int layer) {
  PeerFlags* mine = m.flags[m.rank];
  const int peer = threadIdx.x;
  const uint64_t meeting = mine->meetings + 1;
  __syncwarp();  // all have read it
  if (peer == 0) mine->meetings = meeting;
  if (peer >= m.ranks || peer == m.rank) return;
  store_release(&m.flags[peer]->reached[m.rank], meeting);
  const uint64_t begin = nanoseconds();
  while (load_acquire(&mine->reached[peer]) < meeting) {
    if (*static_cast<volatile int32_t*>(&mine->lost)) return;
    if (nanoseconds() - begin > m.patience) {
      atomicExch(&mine->lost, 1);
      return report_fault(status, layer, DeviceStatus::peer_late, int64_t(m.patience / 1'000'000'000), m.names[peer]);
    }
    __nanosleep(40);
  }
}

std::string text(const char* call, cudaError_t error) {
  cudaGetLastError();  // what failed here is no fault of a later call
  return std::string(call) + ": " + cudaGetErrorString(error);
}

// What the lowest rank says that says anything.
std::string first_line(const Comm& comm, const std::string& mine, const char* name) {
  char line[240] = {};
  std::snprintf(line, sizeof line, "%s", mine.c_str());
  std::vector<char> lines(sizeof line * size_t(comm.size()));
  comm.gather_host(lines.data(), line, sizeof line, "gather", name);
  for (int r = 0; r < comm.size(); ++r)
    if (const char* found = &lines[size_t(r) * sizeof line]; *found) return found;
  return "";
}

}  // namespace

// What one rank has opened of the others. All ranks close it together, before any frees its memory; where something went
// wrong the process is about to end, and nobody is waited for.
struct PeerMemory::Mapping {
  GpuBase& dev;
  Comm group;
  std::vector<char*> base{};  // of each rank, as seen from here

  ~Mapping() {
    if (std::uncaught_exceptions()) return;
    cudaStreamSynchronize(dev.stream);
    for (int r = 0; r < int(base.size()); ++r)
      if (r != group.rank() && base[r]) cudaIpcCloseMemHandle(base[r]);
    group.barrier("closing peer memory");
  }
};

// Maps the allocations that begin at `base` on their ranks and are zero there: each rank's number is left in the first
// word meanwhile, to see that it is the right memory that was mapped. Returns why a rank of the group could not, the same
// to all of them. world: given where it is not known yet that this is one host.
std::string PeerMemory::map(Mapping& m, const World* world, char* base) {
  struct Hello {
    cudaIpcMemHandle_t handle;
    char bus[32];
  };
  const int ranks = m.group.size(), rank = m.group.rank();
  const std::vector<int>& names = m.group.ranks();
  std::string problem;
  auto check = [&](const char* call, cudaError_t error) {
    if (error != cudaSuccess && problem.empty()) problem = text(call, error);
    return error == cudaSuccess;
  };
  int device = 0;
  Hello mine{};
  const uint32_t owner = 1 + uint32_t(names[rank]);
  check("cudaGetDevice", cudaGetDevice(&device));
  check("cudaDeviceGetPCIBusId", cudaDeviceGetPCIBusId(mine.bus, sizeof mine.bus, device));
  check("cudaIpcGetMemHandle", cudaIpcGetMemHandle(&mine.handle, base));
  check("cudaMemcpy", cudaMemcpyAsync(base, &owner, sizeof owner, cudaMemcpyHostToDevice, m.dev.stream));
  check("cudaStreamSynchronize", cudaStreamSynchronize(m.dev.stream));
  std::vector<Hello> all(ranks);
  m.group.gather_host(all.data(), &mine, sizeof mine, "gather", "handles of peer memory");

  m.base.assign(size_t(ranks), nullptr), m.base[rank] = base;
  for (int r = 0; r < ranks && problem.empty(); ++r) {
    if (r == rank) continue;
    auto pair = [&](const char* what) {
      return "rank " + std::to_string(names[rank]) + what + std::to_string(names[r]);
    };
    if (world && !world->same_host(names[r])) problem = pair(" is on another host than rank ");
    int other = -1, can = 1;
    if (cudaDeviceGetByPCIBusId(&other, all[r].bus) != cudaSuccess)
      cudaGetLastError();  // this process does not see it; opening its memory may work all the same
    else if (other != device)
      check("cudaDeviceCanAccessPeer", cudaDeviceCanAccessPeer(&can, device, other));
    if (!can) problem = pair("'s GPU cannot address the memory of that of rank ");
    if (!problem.empty()) break;
    void* p = nullptr;
    if (!check("cudaIpcOpenMemHandle", cudaIpcOpenMemHandle(&p, all[r].handle, cudaIpcMemLazyEnablePeerAccess))) break;
    m.base[r] = static_cast<char*>(p);
    uint32_t found = 0;
    if (!check("cudaMemcpy", cudaMemcpyAsync(&found, p, sizeof found, cudaMemcpyDeviceToHost, m.dev.stream)) ||
        !check("cudaStreamSynchronize", cudaStreamSynchronize(m.dev.stream)))
      break;
    if (found != 1 + uint32_t(names[r])) problem = pair(" finds other memory than that of rank ");
  }
  m.group.barrier("numbers in peer memory");  // all have looked
  m.dev.zero(base, sizeof owner), m.dev.synchronize();
  return first_line(m.group, problem, "who can map peer memory");
}

std::string PeerMemory::problem(GpuBase& dev, const World& world, const Comm& group, const Comm& all) {
  std::string mine;
  if (group.size() > max_peers)
    mine =
        "at most " + std::to_string(max_peers) + " GPUs read each other's memory, not " + std::to_string(group.size());
  else {
    constexpr size_t bytes = size_t(2) << 20;  // an allocation of its own for the driver too
    char* p = static_cast<char*>(dev.allocate(bytes));
    {
      Mapping trial{dev, group};
      mine = map(trial, &world, p);
    }
    dev.release(p);
  }
  return first_line(all, mine, "which groups can map peer memory");
}

void PeerMemory::open(GpuBase& dev, char* arena, const Comm& group, double timeout) {
  rank_ = group.rank(), ranks_ = group.size(), names_ = group.ranks();
  patience_ = uint64_t(std::min(timeout, 1e9) * 1e9);
  uint64_t shape = shared_.size();
  std::vector<int64_t> mine, offsets(shared_.size() * ranks_);
  for (const TensorInfo* t : shared_) {
    shape = mix64(shape ^ hash_name(t->name)), shape = mix64(shape ^ t->bytes);
    mine.push_back(static_cast<char*>(t->data) - arena);
  }
  std::vector<uint64_t> shapes(ranks_);
  group.gather_host(shapes.data(), &shape, sizeof shape, "gather", "what ranks read of each other");
  for (int r = 0; r < ranks_; ++r)
    if (shapes[r] != shapes[0]) fail("ranks ", names_[0], " and ", names_[r], " plan different tensors for each other");
  group.gather_host(offsets.data(), mine.data(), int64_t(mine.size() * sizeof mine[0]), "gather",
                    "where ranks have what others read");

  mapping_.reset(new Mapping{dev, group});
  const std::string problem = map(*mapping_, nullptr, arena);
  if (!problem.empty()) fail("peer memory: ", problem);
  at_.clear();
  for (size_t i = 0; i < shared_.size(); ++i)
    for (int r = 0; r < ranks_; ++r) at_.push_back(mapping_->base[r] + offsets[r * shared_.size() + i]);
}

void PeerMemory::meet(GpuBase& dev) const {
  Meeting m{};
  for (int r = 0; r < ranks_; ++r)
    m.flags[r] = reinterpret_cast<PeerFlags*>(at_[index_.at(flags_.info) * ranks_ + r]), m.names[r] = names_[r];
  m.rank = rank_, m.ranks = ranks_, m.patience = patience_;
  launch(dev, meet_peers, 1, 32, 0, m, dev.status, dev.layer);
}
