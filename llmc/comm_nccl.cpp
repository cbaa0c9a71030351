// Collectives between GPUs: NCCL, where it was found. A group of one GPU needs none.
#ifdef GPT_MOE_CUDA
#include <cuda_runtime.h>
#ifdef GPT_MOE_NCCL
#include <nccl.h>
#endif

#include "llmc/comm_link.h"
#include "llmc/gpu.h"

namespace {

struct GpuAlone : Comm::Group {
  GpuAlone(GpuBase& dev, Job& job, const char* name, const std::vector<int>& ranks, int tag)
      : Group(job, name, ranks, tag), dev(dev) {}
  void copy(void* to, const void* from, int64_t bytes) override { dev.copy(to, from, size_t(bytes)); }
  Begun all_reduce(void*, int64_t, DType, const std::string&, bool) override { return Begun(); }
  Begun reduce_scatter(void*, const void*, int64_t, DType, const std::string&, bool) override { return Begun(); }
  Begun all_gather(void*, const void*, int64_t, const std::string&, bool) override { return Begun(); }
  Begun exchange(const std::vector<Piece>&, const std::vector<Piece>&, const std::string&, bool) override {
    return Begun();
  }

  GpuBase& dev;
};

#ifdef GPT_MOE_NCCL
void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) fail("CUDA: ", call, ": ", cudaGetErrorString(error));
}
void check(ncclResult_t result, const char* call) {
  if (result != ncclSuccess)
    fail("NCCL: ", call, ": ", ncclGetErrorString(result), " (", ncclGetLastError(nullptr), ")");
}
#define CHECK(call) check(call, #call)

ncclDataType_t nccl_type(DType type) {
  if (type == DType::f64) return ncclDouble;
  if (type == DType::f32) return ncclFloat;
  return type == DType::bf16 ? ncclBfloat16 : ncclInt32;
}

class NcclGroup : public GpuAlone {
 public:
  NcclGroup(GpuBase& dev, Job& job, const char* name, const std::vector<int>& ranks, int tag)
      : GpuAlone(dev, job, name, ranks, tag) {
    setenv("NCCL_RUNTIME_CONNECT", "0", 0);  // all connections now, none in mid-training
    ncclUniqueId id = {};
    if (rank == 0) CHECK(ncclGetUniqueId(&id));
    std::vector<ncclUniqueId> ids(ranks.size());
    job.gather(ranks, rank, tag, ids.data(), &id, sizeof id, operation("NCCL's id of", name));
    job.note(operation("opening", name));
    if (!job.watcher.joinable()) job.watcher = std::thread([&job] { job.watch(); });
    World::Watch watch(job, operation("opening", name) + " (" + list(ranks) + ")");
    CHECK(ncclCommInitRank(&comm_, size(), ids[0], rank));
    int least = 0, greatest = 0;  // what goes on aside needs few processors, but soon: kernels that fill the GPU follow
    CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CHECK(cudaStreamCreateWithPriority(&aside_, cudaStreamNonBlocking, greatest));
    dev.priorities = true;
    first_use();
    std::lock_guard lock(job.mutex);
    job.checks[this] = [this] {
      ncclResult_t state = ncclSuccess;
      ncclCommGetAsyncError(comm_, &state);
      if (state == ncclSuccess || state == ncclInProgress) return std::string();
      return this->job.last + ": NCCL reports " + ncclGetErrorString(state) + " in group \"" + this->name + "\" (" +
             list(this->ranks) + ")";
    };
  }
  ~NcclGroup() override {
    {
      std::lock_guard lock(job.mutex);
      job.checks.erase(this);
    }
    std::uncaught_exceptions() ? ncclCommAbort(comm_) : ncclCommDestroy(comm_);
    for (cudaEvent_t event : free_events_) cudaEventDestroy(event);
    cudaStreamDestroy(aside_);
  }

  void together(const std::function<void()>& f) override {
    CHECK(ncclGroupStart());
    f();
    CHECK(ncclGroupEnd());
  }
  Begun all_reduce(void* data, int64_t n, DType type, const std::string& what, bool aside) override {
    return queue(what, aside, [&](cudaStream_t s) {
      CHECK(ncclAllReduce(data, data, size_t(n), nccl_type(type), ncclSum, comm_, s));
    });
  }
  Begun reduce_scatter(void* out, const void* in, int64_t n, DType type, const std::string& what, bool aside) override {
    return queue(what, aside, [&](cudaStream_t s) {
      CHECK(ncclReduceScatter(in, out, size_t(n), nccl_type(type), ncclSum, comm_, s));
    });
  }
  Begun all_gather(void* out, const void* in, int64_t bytes, const std::string& what, bool aside) override {
    return queue(what, aside,
                 [&](cudaStream_t s) { CHECK(ncclAllGather(in, out, size_t(bytes), ncclInt8, comm_, s)); });
  }
  Begun exchange(const std::vector<Piece>& sends, const std::vector<Piece>& receives, const std::string& what,
                 bool aside) override {
    return queue(what, aside, [&](cudaStream_t s) {
      for (const Piece& p : sends)
        if (p.bytes) CHECK(ncclSend(p.data, size_t(p.bytes), ncclInt8, p.rank, comm_, s));
      for (const Piece& p : receives)
        if (p.bytes) CHECK(ncclRecv(p.data, size_t(p.bytes), ncclInt8, p.rank, comm_, s));
    });
  }

 private:
  // One operation of a communicator runs at a time, in the order in which they were queued, which is the same on all
  // ranks: what goes on aside comes after all that the device's stream has so far, and this stream's next operation
  // after all that was begun.
  template <class Call>
  Begun queue(const std::string& what, bool aside, Call call) {
    job.note(what);
    cudaEvent_t event = nullptr;
    if (aside) {
      if (free_events_.empty()) CHECK(cudaEventCreateWithFlags(&free_events_.emplace_back(), cudaEventDisableTiming));
      event = free_events_.back(), free_events_.pop_back();
      CHECK(cudaEventRecord(event, dev.stream));
      CHECK(cudaStreamWaitEvent(aside_, event));
    } else if (newest_) {
      CHECK(cudaStreamWaitEvent(dev.stream, newest_));
    }
    CHECK(ncclGroupStart());
    call(aside ? aside_ : dev.stream);
    CHECK(ncclGroupEnd());
    if (!aside) return Begun();
    CHECK(cudaEventRecord(event, aside_));
    newest_ = event;
    return Begun([this, event] {
      CHECK(cudaStreamWaitEvent(dev.stream, event));
      if (newest_ == event) newest_ = nullptr;
      free_events_.push_back(event);
    });
  }

  // NCCL connects two ranks when they first exchange something: now.
  void first_use() {
    constexpr int64_t bytes = 256;
    char* p = static_cast<char*>(dev.allocate(2 * size() * bytes));
    dev.zero(p, 2 * size() * bytes);
    std::vector<Piece> sends, receives;
    for (int r = 0; r < size(); ++r) {
      if (r == rank) continue;
      sends.emplace_back(r, p + r * bytes, bytes);
      receives.emplace_back(r, p + (size() + r) * bytes, bytes);
    }
    all_reduce(p, bytes / 4, DType::f32, operation("first use of", name.c_str()), true).wait();
    exchange(sends, receives, operation("first use of", name.c_str()), true).wait();
    dev.synchronize();
    dev.release(p);
  }

  ncclComm_t comm_ = nullptr;
  cudaStream_t aside_ = nullptr;  // what was begun
  cudaEvent_t newest_ = nullptr;  // its end; null where the device's stream waits for it already
  std::vector<cudaEvent_t> free_events_;
};
#endif

}  // namespace

Comm World::comm(GpuBase& dev, const std::vector<int>& ranks, const char* name) {
  const int tag = job_->new_group(ranks, name);
  if (place_in(ranks, rank()) < 0) return Comm();
  if (ranks.size() == 1) return Comm(std::make_shared<GpuAlone>(dev, *job_, name, ranks, tag));
#ifdef GPT_MOE_NCCL
  return Comm(std::make_shared<NcclGroup>(dev, *job_, name, ranks, tag));
#else
  fail(operation("group", name), " of ", list(ranks), ": built without NCCL, which several GPUs need");
#endif
}
#endif
