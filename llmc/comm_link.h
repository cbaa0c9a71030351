// Behind comm.h: what carries bytes between processes (Link), what a process knows of its job (Job), and what a backend
// does for a group of ranks (Group).
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "llmc/comm.h"

class Link {
 public:
  virtual ~Link() = default;  // the orderly end, after a last barrier
  const char* name = "";
  int rank = 0, size = 1;

  // Messages under way: how many in all, and how many with each rank.
  struct Batch {
    int left = 0;
    std::vector<int> with;
    virtual ~Batch() = default;
  };
  // Posts messages of ranks of the World. Two ranks match theirs in the order of posting, for each tag (> 0) by itself. A
  // message of another size than was expected is an Error.
  virtual std::shared_ptr<Batch> post(int tag, const std::vector<Piece>& sends, const std::vector<Piece>& receives) = 0;
  virtual void progress(Batch& batch) = 0;  // never blocks
  virtual bool gone(int) { return false; }  // this rank has closed its end
  virtual bool farewell() = 0;              // some rank is ending the job and has said why
  virtual void abort() = 0;                 // says farewell to all; ends all; does not return
};
std::unique_ptr<Link> open_mpi_link();
std::unique_ptr<Link> open_tcp_link(int rank, int size, const std::string& host, int port, double timeout);

struct Job {
  struct Place {
    char host[128];
    int pid;
  };
  std::unique_ptr<Link> link;  // none: a process alone
  const char* launcher = "single";
  int rank = 0, size = 1, next_tag = 1;
  int under_way = 0;  // batches posted and not waited for yet
  double timeout;
  std::vector<Place> places;  // of the ranks
  std::string last = "the start";

  explicit Job(double timeout) : timeout(timeout) {}
  ~Job();
  // Checks a new group and counts it; its tag.
  int new_group(const std::vector<int>& ranks, const char* name);
  void gather(const std::vector<int>& ranks, int me, int tag, void* out, const void* in, int64_t bytes,
              const std::string& what);
  std::shared_ptr<Link::Batch> post(int tag, const std::vector<int>& ranks, std::vector<Piece> sends,
                                    std::vector<Piece> receives, const std::string& what);
  void wait(Link::Batch& batch, const std::vector<int>& ranks, const std::string& what);
  bool gone(int rank) const;
  bool ended(int rank) const;          // a process of this host that is no more; for any thread
  void note(const std::string& what);  // the last operation
  void print(const std::string& line) const;
  [[noreturn]] void abort(const std::string& line);

  // A thread that looks after what the host cannot poll while it waits for the GPU.
  std::mutex mutex;
  std::condition_variable wake;
  std::thread watcher;
  bool closing = false;
  std::string watched;  // empty: nothing
  std::chrono::steady_clock::time_point deadline;
  std::map<const void*, std::function<std::string()>> checks;  // of groups: what is wrong; empty: nothing
  void watch();
};

// `all_reduce "gradients"`
inline std::string operation(const char* kind, const char* name) { return std::string(kind) + " \"" + name + "\""; }
std::string list(const std::vector<int>& ranks);        // "ranks 0 1 2 3"
int place_in(const std::vector<int>& ranks, int rank);  // -1: not among them

// Ranks are those of the group, of which there are two or more, and no piece is of or for this rank itself.
struct Comm::Group {
  Job& job;
  std::string name;
  std::vector<int> ranks;
  int rank, tag;

  Group(Job& job, const char* name, const std::vector<int>& ranks, int tag);
  virtual ~Group() = default;
  int size() const { return int(ranks.size()); }
  virtual void copy(void* to, const void* from, int64_t bytes) = 0;
  virtual void together(const std::function<void()>& f) { f(); }
  virtual Begun all_reduce(void* data, int64_t n, DType type, const std::string& what, bool aside) = 0;
  virtual Begun reduce_scatter(void* out, const void* in, int64_t n, DType type, const std::string& what,
                               bool aside) = 0;
  virtual Begun all_gather(void* out, const void* in, int64_t bytes, const std::string& what, bool aside) = 0;
  virtual Begun exchange(const std::vector<Piece>& sends, const std::vector<Piece>& receives, const std::string& what,
                         bool aside) = 0;
};
