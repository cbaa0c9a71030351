// Processes that work together: the World of a job, communicators of groups of its ranks, and their collectives.
//
// Every process opens one World at its start: under mpirun or srun through MPI, else from the variables RANK, WORLD_SIZE,
// MASTER_ADDR and MASTER_PORT over TCP, else it is alone. All communicators are made then, by all ranks in the same order;
// there is no other way to find each other later. The ranks of a group call the same operations of its Comm in the same
// order, with sizes that match; n counts elements of T = float, double, bf16, int32_t (sums), or anything (the rest).
// `name` is a string literal; it says in messages what was being done.
//
// A Comm made for a Cpu works on host memory and is synchronous. Its sums are taken in the order of the group's ranks, in
// double for double and in fp32 for float and bf16, which is rounded once: the same bits in every run, whatever carries
// the bytes. A Comm made for a Gpu works on device memory, through NCCL, on the stream of the device: nothing waits for
// the host, and the order of a sum is NCCL's. barrier(), max(), min(), sum() and gather_host() are about values of the host
// with either.
//
// Failure ends the whole job: whoever notices prints one line that names rank and operation, and every process ends with
// a status other than 0. Noticed are a rank whose process is gone, a wait longer than the time-out, NCCL's own errors, and
// exit() before the World was closed. Misuse throws Error; main() hands it to abort().
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "llmc/device.h"

class GpuBase;
struct Job;  // comm_link.h

// n elements for, or from, this rank of the group.
struct Piece {
  int rank;
  void* data;
  int64_t bytes;
  template <class T>
  Piece(int rank, T* data, int64_t n)
      : rank(rank), data(const_cast<void*>(static_cast<const void*>(data))), bytes(n * int64_t(sizeof(T))) {}
};

// An operation that was begun and goes on beside what the device does next. Its memory must not be touched before
// wait(), after which work on the device sees its result (on a GPU the host does not wait).
class [[nodiscard]] Begun {
 public:
  Begun() = default;
  explicit Begun(std::function<void()> finish) : finish_(std::move(finish)) {}
  Begun(Begun&& other) noexcept : finish_(std::exchange(other.finish_, nullptr)) {}
  Begun& operator=(Begun&& other) noexcept {
    finish_ = std::exchange(other.finish_, nullptr);
    return *this;
  }
  void wait() {
    if (auto finish = std::exchange(finish_, nullptr)) finish();
  }

 private:
  std::function<void()> finish_;
};

class Comm {
 public:
  Comm() = default;  // of a group that this rank is not in
  explicit operator bool() const { return group_ != nullptr; }
  int rank() const;  // in the group
  int size() const;
  const std::vector<int>& ranks() const;  // their ranks in the World

  // data (n) becomes the sum over the ranks.
  template <class T>
  void all_reduce(T* data, int64_t n, const char* name) const {
    all_reduce(data, n, sum_type<T>(), name, false).wait();
  }
  // out (n) = row `rank` of the sum of in (size, n); out may be that row of in.
  template <class T>
  void reduce_scatter(T* out, const T* in, int64_t n, const char* name) const {
    reduce_scatter(out, in, n, sum_type<T>(), name, false).wait();
  }
  // out (size, n) = in (n) of every rank; in may be row `rank` of out.
  template <class T>
  void all_gather(T* out, const T* in, int64_t n, const char* name) const {
    all_gather(static_cast<void*>(out), in, n * int64_t(sizeof(T)), name, false).wait();
  }
  // in: for each rank in turn to[rank] elements, one after another; out: likewise from[rank] elements of each rank.
  template <class T>
  void all_to_all(T* out, std::span<const int64_t> from, const T* in, std::span<const int64_t> to,
                  const char* name) const {
    exchange(row(in, to, name), row(out, from, name), "all_to_all", name, false).wait();
  }
  // data (n) becomes that of rank `root`.
  template <class T>
  void broadcast(T* data, int64_t n, int root, const char* name) const {
    broadcast(Piece(root, data, n), name);
  }
  template <class T>
  void send(const T* data, int64_t n, int to, const char* name) const {
    exchange({Piece(to, data, n)}, {}, "send", name, false).wait();
  }
  template <class T>
  void receive(T* data, int64_t n, int from, const char* name) const {
    exchange({}, {Piece(from, data, n)}, "receive", name, false).wait();
  }
  // Many at once, in any pattern; between two ranks pieces arrive in the order in which they are listed. Only ranks that
  // have a piece to send or to receive take part.
  void exchange(const std::vector<Piece>& sends, const std::vector<Piece>& receives, const char* name) const {
    exchange(sends, receives, "exchange", name, false).wait();
  }

  // Calls f, whose operations, none of them begun, do not depend on one another: on a GPU they are one launch.
  void together(const std::function<void()>& f) const;

  // The same as operations to wait for later, in the same order on every rank of the group. On the CPU begin posts the
  // transfers and wait() takes the sums; on a GPU they run on a stream of the communicator beside the device's.
  template <class T>
  Begun begin_all_reduce(T* data, int64_t n, const char* name) const {
    return all_reduce(data, n, sum_type<T>(), name, true);
  }
  template <class T>
  Begun begin_reduce_scatter(T* out, const T* in, int64_t n, const char* name) const {
    return reduce_scatter(out, in, n, sum_type<T>(), name, true);
  }
  template <class T>
  Begun begin_all_gather(T* out, const T* in, int64_t n, const char* name) const {
    return all_gather(static_cast<void*>(out), in, n * int64_t(sizeof(T)), name, true);
  }
  Begun begin_exchange(const std::vector<Piece>& sends, const std::vector<Piece>& receives, const char* name) const {
    return exchange(sends, receives, "exchange", name, true);
  }

  // ---- values of the host ----

  // Returns when every rank of the group has called it.
  void barrier(const char* name) const { gather_host(nullptr, nullptr, 0, "barrier", name); }
  // The largest, the smallest (NaN if one is), the sum in the order of the ranks: the same value on every rank.
  template <class T>
  T max(T value, const char* name) const {
    return fold(value, "max", name, [](T a, T b) { return a != a || a > b ? a : b; });
  }
  template <class T>
  T min(T value, const char* name) const {
    return fold(value, "min", name, [](T a, T b) { return a != a || a < b ? a : b; });
  }
  template <class T>
  T sum(T value, const char* name) const {
    return fold(value, "sum", name, [](T a, T b) { return a + b; });
  }
  // out (size, bytes) = in (bytes) of every rank, in host memory.
  void gather_host(void* out, const void* in, int64_t bytes, const char* kind, const char* name) const;

  struct Group;  // what a backend implements: comm_link.h
  explicit Comm(std::shared_ptr<Group> group) : group_(std::move(group)) {}

 private:
  template <class T>
  static constexpr DType sum_type() {
    static_assert(
        std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, bf16> || std::is_same_v<T, int32_t>,
        "sums are of float, double, bf16 or int32_t");
    return dtype_of<T>();
  }
  template <class T, class F>
  T fold(T value, const char* kind, const char* name, F f) const {
    std::vector<T> all(size());
    gather_host(all.data(), &value, sizeof(T), kind, name);
    value = all[0];
    for (size_t r = 1; r < all.size(); ++r) value = f(value, all[r]);
    return value;
  }
  template <class T>
  std::vector<Piece> row(T* data, std::span<const int64_t> counts, const char* name) const {
    check_counts(counts, name);
    std::vector<Piece> pieces;
    for (int r = 0; r < size(); data += counts[r++]) pieces.emplace_back(r, data, counts[r]);
    return pieces;
  }
  void check_counts(std::span<const int64_t> counts, const char* name) const;
  Begun all_reduce(void* data, int64_t n, DType type, const char* name, bool aside) const;
  Begun reduce_scatter(void* out, const void* in, int64_t n, DType type, const char* name, bool aside) const;
  Begun all_gather(void* out, const void* in, int64_t bytes, const char* name, bool aside) const;
  Begun exchange(std::vector<Piece> sends, std::vector<Piece> receives, const char* kind, const char* name,
                 bool aside) const;
  void broadcast(const Piece& data, const char* name) const;

  std::shared_ptr<Group> group_;
};

class World {
 public:
  // Waits until all processes of the job are there. timeout: in seconds, of every wait for another rank.
  explicit World(double timeout = 600);
  ~World();  // every rank closes its World; it waits for the others
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  void set_timeout(double seconds);
  double timeout() const;
  int rank() const;
  int size() const;
  int local_size() const;  // ranks of this host
  int local_rank() const;  // among the ranks of this host: which GPU to take
  bool same_host(int rank) const;
  const char* launcher() const;  // "mpi", "tcp", "single"

  // The communicator of these ranks of the World, in this order. Called by every rank of the World, whether it is in the
  // group or not, with the same list.
  template <class Real>
  Comm comm(Cpu<Real>&, const std::vector<int>& ranks, const char* name) {
    return host_comm(ranks, name);
  }
  Comm comm(GpuBase& dev, const std::vector<int>& ranks, const char* name);  // where CUDA is compiled in
  Comm host_comm(const std::vector<int>& ranks, const char* name);

  // Prints the line ("rank 3: " before it if there are others) and ends all processes of the job with status 1. If
  // several ranks come here for the same reason, one of them prints.
  [[noreturn]] void abort(const std::string& line);

  // While it lives, the host waits for its GPU, which may wait for other ranks: too long ends the job, naming `what`.
  class Watch {
   public:
    Watch(Job& job, std::string what);
    ~Watch();
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;

   private:
    Job& job_;
  };
  Watch watch(std::string what) { return Watch(*job_, std::move(what)); }

 private:
  std::unique_ptr<Job> job_;
};
