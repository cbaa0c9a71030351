#include "llmc/gpu.h"

#include <cstring>
#include <new>

#include "llmc/cuda_common.cuh"

struct GpuGraph {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ~GpuGraph() {
    if (exec) cudaGraphExecDestroy(exec);
    if (graph) cudaGraphDestroy(graph);
  }
};

// Slots of pinned host memory with a twin on the device; slot i is reused once its last copy has been consumed.
struct GpuBase::Staging {
  static constexpr int n_slots = 4;
  struct Slot {
    void *pinned = nullptr, *device = nullptr;
    size_t bytes = 0;
    cudaEvent_t arrived = nullptr, consumed = nullptr;
  };
  cudaStream_t copy_stream = nullptr;
  std::vector<Slot> slots{n_slots}, fetched{n_slots};  // to the device; from it (no twin)
  unsigned next = 0, next_fetch = 0;
};

std::string gpu_problem() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) return "no NVIDIA driver answers, or one too old for this CUDA";
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (count == 0) return "no GPU is visible";
  cudaDeviceProp properties;
  error = cudaGetDeviceProperties(&properties, 0);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (properties.major < 8)
    return std::string(properties.name) + " has compute capability " + std::to_string(properties.major) + "." +
           std::to_string(properties.minor) + "; 8.0 or later is needed (CUDA_VISIBLE_DEVICES chooses another GPU)";
  return "";
}

GpuBase::GpuBase(bool planning, int local_rank) : staging_(std::make_unique<Staging>()) {
  if (planning) return;
  std::string problem = gpu_problem();
  if (!problem.empty()) fail("--device cuda: ", problem);
  int count = 0;
  CUDA_CHECK(cudaGetDeviceCount(&count));
  if (count > 1 && local_rank >= count)
    fail("--device cuda: process ", local_rank, " of this host (from 0), but ", count,
         " GPUs are visible; start one a GPU");
  const int device = count > 1 ? local_rank : 0;
  CUDA_CHECK(cudaSetDevice(device));
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  gpu_name = properties.name, multiprocessors = properties.multiProcessorCount;
  shared_bytes_per_block = properties.sharedMemPerBlockOptin;
  capability = properties.major * 10 + properties.minor;
  cudaStream_t s;
  CUDA_CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  stream = s;
  CUDA_CHECK(cudaStreamCreateWithFlags(&staging_->copy_stream, cudaStreamNonBlocking));
  for (auto* slots : {&staging_->slots, &staging_->fetched})
    for (auto& slot : *slots) {
      CUDA_CHECK(cudaEventCreateWithFlags(&slot.arrived, cudaEventDisableTiming));
      CUDA_CHECK(cudaEventCreateWithFlags(&slot.consumed, cudaEventDisableTiming));
    }
  libraries = open_libraries();
  Memory now = memory();
  context_bytes = now.total - now.free;
}

GpuBase::~GpuBase() {
  if (!stream) return;
  cudaStreamSynchronize(stream);
  for (auto* slots : {&staging_->slots, &staging_->fetched})
    for (auto& slot : *slots) {
      cudaEventDestroy(slot.arrived), cudaEventDestroy(slot.consumed);
      if (slot.pinned) cudaFreeHost(slot.pinned);
      if (slot.device) cudaFree(slot.device);
    }
  cudaStreamDestroy(staging_->copy_stream);
  cudaStreamDestroy(stream);
}

void* GpuBase::allocate(size_t bytes) {
  void* p = nullptr;
  cudaError_t error = cudaMalloc(&p, bytes ? bytes : 1);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky: forget it
    throw std::bad_alloc();
  }
  CUDA_CHECK(error);
  return p;
}
void GpuBase::release(void* p) {
  if (!p) return;
  cudaStreamSynchronize(stream);
  cudaFree(p);
}
void GpuBase::fill_byte(void* p, int byte, size_t bytes) {
  if (bytes) CUDA_CHECK(cudaMemsetAsync(p, byte, bytes, stream));
}
void GpuBase::copy(void* to, const void* from, size_t bytes) {
  if (bytes) CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}
void GpuBase::to_device(void* device, const void* host, size_t bytes) {
  CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
}
void GpuBase::to_host(void* host, const void* device, size_t bytes) {
  CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
}
void GpuBase::rows_to_device(void* device, size_t device_pitch, const void* host, size_t width, size_t rows) {
  if (rows == 1) return to_device(device, host, width);  // a pitch has 31 bits
  CUDA_CHECK(cudaMemcpy2DAsync(device, device_pitch, host, width, width, rows, cudaMemcpyHostToDevice, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
}
void GpuBase::rows_to_host(void* host, const void* device, size_t device_pitch, size_t width, size_t rows) {
  if (rows == 1) return to_host(host, device, width);
  CUDA_CHECK(cudaMemcpy2DAsync(host, width, device, device_pitch, width, rows, cudaMemcpyDeviceToHost, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
}
void GpuBase::synchronize() { CUDA_CHECK(cudaStreamSynchronize(stream)); }

void GpuBase::stage(void* device, const void* host, size_t bytes) {
  auto& slot = staging_->slots[staging_->next++ % Staging::n_slots];
  CUDA_CHECK(cudaEventSynchronize(slot.consumed));  // at once, but for a host that is four copies ahead
  if (slot.bytes < bytes) {
    if (slot.pinned) CUDA_CHECK(cudaFreeHost(slot.pinned)), CUDA_CHECK(cudaFree(slot.device));
    slot.pinned = slot.device = nullptr, slot.bytes = 0;
    CUDA_CHECK(cudaMallocHost(&slot.pinned, bytes));
    slot.device = allocate(bytes), slot.bytes = bytes;
  }
  std::memcpy(slot.pinned, host, bytes);
  CUDA_CHECK(cudaMemcpyAsync(slot.device, slot.pinned, bytes, cudaMemcpyHostToDevice, staging_->copy_stream));
  CUDA_CHECK(cudaEventRecord(slot.arrived, staging_->copy_stream));
  CUDA_CHECK(cudaStreamWaitEvent(stream, slot.arrived));
  copy(device, slot.device, bytes);
  CUDA_CHECK(cudaEventRecord(slot.consumed, stream));
}

GpuBase::Fetch GpuBase::fetch(const std::vector<std::pair<const void*, size_t>>& pieces) {
  size_t total = 0, at = 0;
  for (auto& [p, bytes] : pieces) total += bytes;
  auto& slot = staging_->fetched[staging_->next_fetch++ % Staging::n_slots];
  CUDA_CHECK(cudaEventSynchronize(slot.arrived));
  if (slot.bytes < total) {
    if (slot.pinned) CUDA_CHECK(cudaFreeHost(slot.pinned));
    slot.pinned = nullptr, slot.bytes = 0;
    CUDA_CHECK(cudaMallocHost(&slot.pinned, total));
    slot.bytes = total;
  }
  for (auto& [p, bytes] : pieces) {
    CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(slot.pinned) + at, p, bytes, cudaMemcpyDeviceToHost, stream));
    at += bytes;
  }
  CUDA_CHECK(cudaEventRecord(slot.arrived, stream));
  return [&slot, total] {
    CUDA_CHECK(cudaEventSynchronize(slot.arrived));
    const char* first = static_cast<const char*>(slot.pinned);
    return std::vector<char>(first, first + total);
  };
}

GpuBase::Graph GpuBase::capture(const std::function<void()>& body) {
  auto g = std::make_shared<GpuGraph>();
  CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  try {
    body();
  } catch (...) {
    cudaStreamEndCapture(stream, &g->graph);
    cudaGetLastError();  // the capture's own failure says nothing new
    throw;
  }
  CUDA_CHECK(cudaStreamEndCapture(stream, &g->graph));
  CUDA_CHECK(cudaGraphInstantiate(&g->exec, g->graph, priorities ? cudaGraphInstantiateFlagUseNodePriority : 0));
  return g;
}
void GpuBase::launch(GpuGraph& graph) { CUDA_CHECK(cudaGraphLaunch(graph.exec, stream)); }

std::vector<std::string> GpuBase::nodes(const GpuGraph& graph) {
  size_t n = 0;
  CUDA_CHECK(cudaGraphGetNodes(graph.graph, nullptr, &n));
  std::vector<cudaGraphNode_t> all(n);
  CUDA_CHECK(cudaGraphGetNodes(graph.graph, all.data(), &n));
  std::vector<std::string> kinds;
  for (cudaGraphNode_t node : all) {
    cudaGraphNodeType type;
    CUDA_CHECK(cudaGraphNodeGetType(node, &type));
    if (type == cudaGraphNodeTypeMemcpy) {
      cudaMemcpy3DParms p{};
      CUDA_CHECK(cudaGraphMemcpyNodeGetParams(node, &p));
      cudaPointerAttributes to{};
      CUDA_CHECK(cudaPointerGetAttributes(&to, p.dstPtr.ptr));
      kinds.push_back(to.type == cudaMemoryTypeDevice ? "copy" : "device-to-host copy");
    } else {
      kinds.push_back(type == cudaGraphNodeTypeKernel   ? "kernel"
                      : type == cudaGraphNodeTypeMemset ? "memset"
                      : type == cudaGraphNodeTypeHost   ? "host"
                      : type == cudaGraphNodeTypeEmpty  ? "empty"
                                                        : "other " + std::to_string(int(type)));
    }
  }
  return kinds;
}

GpuBase::Memory GpuBase::memory() {
  Memory m;
  CUDA_CHECK(cudaMemGetInfo(&m.free, &m.total));
  return m;
}
