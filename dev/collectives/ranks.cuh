// What the rungs of this folder share: the GPUs of one host, driven by one thread. A rank is a GPU with one stream; its
// memory can be read and written by the kernels of every other rank.
//
// A collective is correct like an op on a stream: it reads what was put into its inputs earlier on any rank's stream,
// and when it is done on a rank, that rank may overwrite its own inputs and outputs, since no other reads them any
// more.
#pragma once
#include <algorithm>
#include <array>
#include <string>
#include <type_traits>
#include <vector>

#include "llmc/cuda_common.cuh"

namespace collectives {

constexpr int max_ranks = 8;

// A pointer into the memory of each rank, handed to kernels by value.
template <class T>
struct Peers {
  T* at[max_ranks] = {};
  Peers() = default;
  template <class U>
  requires(!std::is_same_v<U, T> && std::is_same_v<const U, T>) Peers(const Peers<U>& p) {
    for (int r = 0; r < max_ranks; ++r) at[r] = p[r];
  }
  T*& operator[](int rank) { return at[rank]; }
  T* operator[](int rank) const { return at[rank]; }
};
// The same as an argument from which T is not deduced, so that Peers<T> is accepted.
template <class T>
using ConstPeers = std::type_identity_t<Peers<const T>>;

// Why the first n GPUs cannot be ranks; empty: they can.
inline std::string no_ranks_because(int n) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  if (count < n) return "this machine has " + std::to_string(count);
  for (int r = 0; r < n; ++r)
    for (int s = 0; s < n; ++s) {
      int can = r == s;
      if (r != s) CUDA_CHECK(cudaDeviceCanAccessPeer(&can, r, s));
      if (!can) return "GPU " + std::to_string(r) + " cannot address the memory of GPU " + std::to_string(s);
    }
  return "";
}

class Ranks {
 public:
  explicit Ranks(int n) : n(n) {
    for (int r = 0; r < n; ++r) {
      use(r);
      for (int s = 0; s < n; ++s)
        if (s != r) CUDA_CHECK(cudaDeviceEnablePeerAccess(s, 0));
      CUDA_CHECK(cudaStreamCreateWithFlags(&stream[r], cudaStreamNonBlocking));
      CUDA_CHECK(cudaEventCreateWithFlags(&here_[r], cudaEventDisableTiming));
      int count = 0;
      CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, r));
      multiprocessors = std::min(multiprocessors, count);
    }
  }
  ~Ranks() {
    release();
    for (int r = 0; r < n; ++r) cudaSetDevice(r), cudaEventDestroy(here_[r]), cudaStreamDestroy(stream[r]);
    cudaSetDevice(0);
  }
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  const int n;
  int multiprocessors = 1 << 30;  // of the smallest
  std::array<cudaStream_t, max_ranks> stream{};

  void use(int rank) const { CUDA_CHECK(cudaSetDevice(rank)); }

  template <class... Params, class... Args>
  void launch(int rank, void (*kernel)(Params...), dim3 grid, int threads, const Args&... args) const {
    if (grid.x == 0 || grid.y == 0) return;
    use(rank);
    kernel<<<grid, threads, 0, stream[rank]>>>(static_cast<Params>(args)...);
    CUDA_CHECK(cudaGetLastError());
  }
  // By the copy engines, on the stream of the rank that receives.
  void copy(int to_rank, void* to, int from_rank, const void* from, int64_t bytes) const {
    use(to_rank);
    if (bytes > 0) CUDA_CHECK(cudaMemcpyPeerAsync(to, to_rank, from, from_rank, size_t(bytes), stream[to_rank]));
  }
  // What is put on any of the streams from here on begins when all that was put on every one of them is done. Nothing
  // waits on the host.
  void meet() const {
    for (int r = 0; r < n; ++r) use(r), CUDA_CHECK(cudaEventRecord(here_[r], stream[r]));
    for (int r = 0; r < n; ++r)
      for (int s = 0; s < n; ++s)
        if (s != r) CUDA_CHECK(cudaStreamWaitEvent(stream[r], here_[s]));
  }
  void synchronize() const {
    for (int r = 0; r < n; ++r) use(r), CUDA_CHECK(cudaStreamSynchronize(stream[r]));
  }

  // Memory of a rank, filled with NaN bytes, until release().
  template <class T>
  T* memory(int rank, int64_t count) {
    void* p = nullptr;
    const size_t bytes = size_t(std::max<int64_t>(count, 1)) * sizeof(T);
    use(rank);
    const cudaError_t error = cudaMalloc(&p, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // not sticky: forget it
      throw std::bad_alloc();
    }
    CUDA_CHECK(error);
    owned_.push_back(p);
    CUDA_CHECK(cudaMemsetAsync(p, 0xFF, bytes, stream[rank]));
    return static_cast<T*>(p);
  }
  template <class T>
  T* upload(int rank, const std::vector<T>& values) {
    T* p = memory<T>(rank, int64_t(values.size()));
    if (!values.empty())
      CUDA_CHECK(cudaMemcpyAsync(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, stream[rank]));
    CUDA_CHECK(cudaStreamSynchronize(stream[rank]));
    return p;
  }
  template <class T>
  std::vector<T> host(int rank, const T* device, int64_t count) const {
    std::vector<T> values(count);
    use(rank);
    if (count > 0)
      CUDA_CHECK(cudaMemcpyAsync(values.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost, stream[rank]));
    CUDA_CHECK(cudaStreamSynchronize(stream[rank]));
    return values;
  }
  // What was allocated after this many pieces, the newest first. No kernel may run.
  size_t pieces() const { return owned_.size(); }
  void release(size_t keep = 0) {
    for (; owned_.size() > keep; owned_.pop_back()) cudaFree(owned_.back());
  }

 private:
  std::array<cudaEvent_t, max_ranks> here_{};
  std::vector<void*> owned_;
};

// ---- 16 bytes at a time ----

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p, int64_t i) {
  return reinterpret_cast<const Pack<T>*>(p)[i];
}
template <class T>
__device__ __forceinline__ void store_pack(T* p, int64_t i, const Pack<T>& pack) {
  reinterpret_cast<Pack<T>*>(p)[i] = pack;
}

// Pack i of all ranks added up in the order of the ranks, in fp32, rounded once: the same bits whoever computes it. All
// loads are issued before the first sum: `most` of them are in registers, which is why it is known to the compiler.
// Ordinary loads, not the read-only path: another GPU may have just written this.
template <int most, class T>
__device__ __forceinline__ Pack<T> sum_of_ranks(const Peers<const T>& in, int ranks, int64_t i) {
  Pack<T> part[most], sum;
#pragma unroll
  for (int s = 0; s < most; ++s)
    if (s < ranks) part[s] = load_pack(in.at[s], i);
#pragma unroll
  for (int e = 0; e < Pack<T>::n; ++e) {
    float total = 0;
#pragma unroll
    for (int s = 0; s < most; ++s)
      if (s < ranks) total += part[s][e];
    sum.set(e, total);
  }
  return sum;
}

// Calls f with 2, 4 or 8 as a constant: the smallest that is enough.
template <class F>
void with_most(int ranks, F f) {
  if (ranks <= 2)
    f(std::integral_constant<int, 2>());
  else if (ranks <= 4)
    f(std::integral_constant<int, 4>());
  else
    f(std::integral_constant<int, max_ranks>());
}

template <class T>
int64_t packs_of(const char* rung, int64_t elements) {
  if (elements % Pack<T>::n) fail("collectives ", rung, ": ", elements, " elements are no multiple of 16 bytes");
  return elements / Pack<T>::n;
}

}  // namespace collectives
