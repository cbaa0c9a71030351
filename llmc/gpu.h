// The GPU as a device. This header knows nothing of CUDA, so that the model and the trainer are compiled as plain C++;
// gpu.cu implements it, and the .cu file beside each op instantiates the op for Gpu<bf16> and Gpu<float>.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "llmc/device.h"

struct CUstream_st;  // what a cudaStream_t points to

// A captured program (a CUDA graph), ready to be launched again and again.
struct GpuGraph;

// What every storage type shares. All work is put on one stream and nothing waits for it, except synchronize(),
// release() and what copies between host and device (stage() and fetch() only where the host is far ahead). Errors of
// the CUDA runtime are thrown as Error with the name of the call.
class GpuBase {
 public:
  static constexpr const char* name = "cuda";
  static constexpr bool has_graphs = true;
  static constexpr size_t alignment = 256;
  static constexpr int64_t classifier_bytes = int64_t(448) << 20;  // logits at a time: products large enough to be fast

  bool plain_matmul = false;  // dense products by our own plain kernel instead of cuBLASLt
  bool portable = false;      // the simplest kernels on tensor cores: none for Hopper alone, the router in several
  int expert_tile = -1;       // to measure: this tile for Hopper's expert products (experts_hopper_kernels.h), if >= 0
  DeviceStatus* status = nullptr;
  int layer = -1;
  bool priorities = false;  // graphs take part of their work from streams of other priorities, and are to keep those

  // planning: for memory plans only, no GPU needed. local_rank: of the processes of this host, each of which takes a GPU
  // (or sees no other). Errors: no GPU of compute capability 8.0 or later answers; fewer GPUs than processes.
  explicit GpuBase(bool planning = false, int local_rank = 0);
  ~GpuBase();
  GpuBase(const GpuBase&) = delete;
  GpuBase& operator=(const GpuBase&) = delete;

  void* allocate(size_t bytes);  // std::bad_alloc where the GPU has no room
  void release(void* p);
  void zero(void* p, size_t bytes) { fill_byte(p, 0, bytes); }
  void fill_byte(void* p, int byte, size_t bytes);
  void copy(void* to, const void* from, size_t bytes);  // within the device
  void to_device(void* device, const void* host, size_t bytes);
  void to_host(void* host, const void* device, size_t bytes);
  void rows_to_device(void* device, size_t device_pitch, const void* host, size_t width, size_t rows);
  void rows_to_host(void* host, const void* device, size_t device_pitch, size_t width, size_t rows);
  void synchronize();

  // Copies `bytes` of host memory to the device without waiting: through pinned memory and a copy stream, so that it
  // overlaps with what runs; work put on the stream later sees it. The host may reuse its memory at once.
  void stage(void* device, const void* host, size_t bytes);
  // The way back: copies of these pieces (address, bytes) are queued behind what was put on the stream so far. The
  // returned function waits for them alone and gives the bytes, one piece after another; it is to be called before the
  // fourth fetch that follows.
  using Fetch = std::function<std::vector<char>()>;
  Fetch fetch(const std::vector<std::pair<const void*, size_t>>& pieces);

  // Records the work that `body` puts on the stream as a graph instead of running it.
  using Graph = std::shared_ptr<GpuGraph>;
  Graph capture(const std::function<void()>& body);
  void launch(GpuGraph& graph);
  // The nodes of a graph by kind: "kernel", "memset", "copy", "device-to-host copy", "host", ... one entry a node.
  static std::vector<std::string> nodes(const GpuGraph& graph);

  CUstream_st* stream = nullptr;
  int multiprocessors = 0;
  size_t shared_bytes_per_block = 0;  // the most that a kernel may ask for
  int capability = 0;                 // 80, 90, ...
  std::string gpu_name;               // "NVIDIA H100 80GB HBM3"
  struct Memory {
    size_t free, total;
  };
  static Memory memory();  // of the device, as the driver says
  // In use on the device once context and libraries are set up and before a tensor is allocated: what other processes
  // hold counts too.
  size_t context_bytes = 0;

  struct Libraries;  // cuBLASLt and what its heuristics chose; matmul.cu
  static std::shared_ptr<Libraries> open_libraries();
  std::shared_ptr<Libraries> libraries;

 private:
  struct Staging;
  std::unique_ptr<Staging> staging_;
};

// One NVIDIA GPU.
//   Real  storage type of weights and activations: bf16 (tensor cores) or float (plain kernels, for debugging)
//   Acc   float
template <class Real_>
struct Gpu : GpuBase {
  using GpuBase::GpuBase;
  using Real = Real_;
  using Acc = float;
};

// Why no GPU can be used here: no driver, none fit. Empty if one can.
std::string gpu_problem();
