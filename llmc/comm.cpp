// The World, and collectives on host memory: all of them are messages between pairs of ranks, and sums are our own loop
// over the ranks, so that neither the library nor its choice of algorithm can change a bit.
#include "llmc/comm.h"

#include <csignal>
#include <charconv>
#include <cstdio>
#include <fstream>
#include <numeric>

#include <sched.h>
#include <unistd.h>

#include "llmc/comm_link.h"
#include "llmc/cpu_math.h"

namespace {

using Clock = std::chrono::steady_clock;
Clock::duration seconds(double s) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
}

Job* open_job = nullptr;  // of this process, until its World is closed

// While it lives, SIGTERM waits: a launcher sends it to all when one rank has died, and the others are to say first what
// they were waiting for.
volatile std::sig_atomic_t terminated = 0;
class HoldTermination {
 public:
  HoldTermination() {
    struct sigaction hold = {};
    hold.sa_handler = [](int) { terminated = 1; };
    hold.sa_flags = SA_RESTART;
    sigaction(SIGTERM, &hold, &before_);
  }
  ~HoldTermination() {
    sigaction(SIGTERM, &before_, nullptr);
    if (terminated) terminated = 0, raise(SIGTERM);
  }

 private:
  struct sigaction before_ = {};
};

// The machine and its table of processes: host names may repeat.
Job::Place this_place() {
  Job::Place place = {{}, int(getpid())};
  std::string boot, processes(64, 0);
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), boot);
  processes.resize(std::max<ssize_t>(0, readlink("/proc/self/ns/pid", processes.data(), processes.size())));
  if (!boot.empty()) std::snprintf(place.host, sizeof place.host, "%s %s", boot.c_str(), processes.c_str());
  return place;
}

const char* variable(const char* name) {
  const char* value = std::getenv(name);
  return value && *value ? value : nullptr;
}
int integer(const char* name, const char* value, int low, int high) {
  int number = 0;
  auto [end, error] = std::from_chars(value, value + std::strlen(value), number);
  if (error != std::errc() || *end || number < low || number > high)
    fail(name, "=", value, ": must be a number from ", low, " to ", high);
  return number;
}

std::unique_ptr<Link> open_link(double timeout) {
  if (variable("OMPI_COMM_WORLD_SIZE") || variable("PMI_RANK") || variable("PMIX_RANK")) {
#ifdef GPT_MOE_MPI
    return open_mpi_link();
#else
    fail(
        "started by mpirun or srun, but built without MPI: install it and build again, or set RANK, WORLD_SIZE, "
        "MASTER_ADDR and MASTER_PORT");
#endif
  }
  const bool slurm = variable("SLURM_STEP_NUM_TASKS") && !variable("RANK") && !variable("WORLD_SIZE");
  const char *rank_name = slurm ? "SLURM_PROCID" : "RANK", *size_name = slurm ? "SLURM_STEP_NUM_TASKS" : "WORLD_SIZE";
  const char *rank = variable(rank_name), *size = variable(size_name);
  if (!rank && !size) return nullptr;
  if (!rank || !size)
    fail((rank ? rank_name : size_name), " is set but ", (rank ? size_name : rank_name), " is not: a job needs both");
  const int n = integer(size_name, size, 1, 1 << 20), r = integer(rank_name, rank, 0, n - 1);
  if (n == 1) return nullptr;
  const char *host = variable("MASTER_ADDR"), *port = variable("MASTER_PORT");
  if (!host || !port)
    fail(size_name, "=", size, ", but ", (host ? "MASTER_PORT" : "MASTER_ADDR"),
         " is not set: where rank 0 listens for the others");
  return open_tcp_link(r, n, host, integer("MASTER_PORT", port, 1, 65535), timeout);
}

// One rank after another, rounded once.
void sum_parts(void* out, const std::vector<const void*>& parts, int64_t n, DType type) {
  auto sum = [&]<class T, class Acc>(T, Acc) { sum_in_order<T, Acc>(static_cast<T*>(out), parts, false, n); };
  if (type == DType::f64) return sum(double(), double());
  if (type == DType::f32) return sum(float(), float());
  if (type == DType::bf16) return sum(bf16(), float());
  sum(int32_t(), uint32_t());  // wraps around
}

char* at(const void* p, int64_t bytes) { return const_cast<char*>(static_cast<const char*>(p)) + bytes; }

struct HostGroup : Comm::Group {
  using Group::Group;

  void copy(void* to, const void* from, int64_t bytes) override { std::memcpy(to, from, size_t(bytes)); }

  // Each rank sums one part of the data and sends it to the others.
  Begun all_reduce(void* data, int64_t n, DType type, const std::string& what, bool) override {
    const int64_t width = int64_t(dtype_size(type));
    auto part = [=, this](int r) { return n / size() * r + std::min<int64_t>(r, n % size()); };
    auto begun = sum_to(at(data, part(rank) * width), data, part, type, what);
    return Begun([=, this, begun = std::make_shared<Begun>(std::move(begun))] {
      begun->wait();
      std::vector<Piece> sends, receives;
      for (int r = 0; r < size(); ++r) {
        if (r == rank) continue;
        sends.emplace_back(r, at(data, part(rank) * width), (part(rank + 1) - part(rank)) * width);
        receives.emplace_back(r, at(data, part(r) * width), (part(r + 1) - part(r)) * width);
      }
      exchange(sends, receives, what, false).wait();
    });
  }
  Begun reduce_scatter(void* out, const void* in, int64_t n, DType type, const std::string& what, bool) override {
    return sum_to(
        out, in, [=](int r) { return n * r; }, type, what);
  }
  Begun all_gather(void* out, const void* in, int64_t bytes, const std::string& what, bool) override {
    std::vector<Piece> sends, receives;
    for (int r = 0; r < size(); ++r) {
      if (r == rank) continue;
      sends.emplace_back(r, at(in, 0), bytes);
      receives.emplace_back(r, at(out, r * bytes), bytes);
    }
    if (bytes && at(out, rank * bytes) != in) copy(at(out, rank * bytes), in, bytes);
    return exchange(sends, receives, what, false);
  }
  Begun exchange(const std::vector<Piece>& sends, const std::vector<Piece>& receives, const std::string& what,
                 bool) override {
    return Begun([this, what, batch = job.post(tag, ranks, sends, receives, what)] { job.wait(*batch, ranks, what); });
  }

 private:
  // out = the sum of the ranks' parts part(rank) to part(rank + 1) of `in`.
  template <class Part>
  Begun sum_to(void* out, const void* in, Part part, DType type, const std::string& what) {
    const int64_t width = int64_t(dtype_size(type)), n = part(rank + 1) - part(rank);
    auto received = std::make_shared<std::vector<char>>(size_t(n * width) * (size() - 1));
    std::vector<Piece> sends, receives;
    std::vector<const void*> parts;
    for (int r = 0; r < size(); ++r) {
      parts.push_back(r == rank ? at(in, part(r) * width) : received->data() + receives.size() * n * width);
      if (r == rank) continue;
      sends.emplace_back(r, at(in, part(r) * width), (part(r + 1) - part(r)) * width);
      receives.emplace_back(r, at(parts.back(), 0), n * width);
    }
    auto begun = std::make_shared<Begun>(exchange(sends, receives, what, false));
    return Begun([=] {
      begun->wait();
      sum_parts(out, parts, n, type);
      (void)received;  // lives until here
    });
  }
};

}  // namespace

std::string list(const std::vector<int>& ranks) {
  std::string text = "ranks";
  for (int r : ranks) text += " " + std::to_string(r);
  return text;
}
int place_in(const std::vector<int>& ranks, int rank) {
  auto found = std::find(ranks.begin(), ranks.end(), rank);
  return found == ranks.end() ? -1 : int(found - ranks.begin());
}

// ---- a job ----

int Job::new_group(const std::vector<int>& ranks, const char* name) {
  const std::string group = operation("group", name) + " of " + list(ranks) + ": ";
  if (ranks.empty()) fail(group, "it is empty");
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] < 0 || ranks[i] >= size) fail(group, "there are ", size, " ranks");
    if (place_in(ranks, ranks[i]) != int(i)) fail(group, "rank ", ranks[i], " is in it twice");
  }
  if (next_tag == 32767) fail(group, "32766 groups are enough");  // the tags that MPI grants
  return next_tag++;
}

std::shared_ptr<Link::Batch> Job::post(int tag, const std::vector<int>& ranks, std::vector<Piece> sends,
                                       std::vector<Piece> receives, const std::string& what) {
  note(what), ++under_way;
  for (auto* pieces : {&sends, &receives})
    for (Piece& piece : *pieces) piece.rank = ranks[piece.rank];
  return link->post(tag, sends, receives);
}

void Job::wait(Link::Batch& batch, const std::vector<int>& ranks, const std::string& what) {
  auto arrived = [&] {
    try {
      link->progress(batch);
    } catch (const Error& error) {
      abort(what + ": " + error.what());  // here, where the memory of all transfers is still ours
    }
    return batch.left == 0;
  };
  auto complete = [&] { return arrived() && (--under_way, true); };
  if (complete()) return;
  HoldTermination hold;
  const auto start = Clock::now();
  auto next_look = start + seconds(0.02);
  for (int turn = 0;; ++turn) {
    if (complete()) return;
    turn < 1000 ? void(sched_yield()) : void(usleep(50));  // the ranks that we wait for may need our processor
    const auto now = Clock::now();
    if (now < next_look) continue;
    next_look = now + seconds(0.02);
    if (link->farewell()) link->abort();
    for (int r : ranks) {
      if (!batch.with[r] || !gone(r)) continue;
      arrived();  // it may have left in an orderly way after its last message
      if (batch.with[r]) abort(what + ": rank " + std::to_string(r) + " is gone (group of " + list(ranks) + ")");
    }
    if (now - start > seconds(timeout)) {
      std::ostringstream line;
      line << what << " waited " << timeout << " s for its group (" << list(ranks)
           << "): is a rank gone? (--comm-timeout)";
      abort(line.str());
    }
  }
}

void Job::gather(const std::vector<int>& ranks, int me, int tag, void* out, const void* in, int64_t bytes,
                 const std::string& what) {
  std::vector<Piece> sends, receives;
  for (int r = 0; r < int(ranks.size()); ++r) {
    if (r == me) continue;
    sends.emplace_back(r, at(in, 0), bytes);
    receives.emplace_back(r, at(out, r * bytes), bytes);
  }
  if (bytes) std::memcpy(at(out, me * bytes), in, size_t(bytes));
  if (!sends.empty()) wait(*post(tag, ranks, sends, receives, what), ranks, what);
}

bool Job::gone(int r) const { return link->gone(r) || ended(r); }
bool Job::ended(int r) const {
  const bool here = !places.empty() && places[r].host[0] && !std::strcmp(places[r].host, places[rank].host);
  return here && kill(places[r].pid, 0) != 0 && errno == ESRCH;
}

void Job::note(const std::string& what) {
  std::lock_guard lock(mutex);
  last = what;
}

void Job::print(const std::string& line) const {
  std::string text = (size > 1 ? "rank " + std::to_string(rank) + ": " : "") + line + "\n";
  std::fflush(stdout);
  if (write(STDERR_FILENO, text.data(), text.size()) < 0) return;  // one write: lines of ranks do not mix
}

void Job::abort(const std::string& line) {
  if (!link) {
    print(line);
    std::fflush(nullptr), _exit(1);
  }
  HoldTermination hold;
  // Many may have noticed: the lowest of them speaks, and its farewell silences the others.
  const auto turn = Clock::now() + seconds(0.1 * std::min(rank, 10));
  bool said = link->farewell();
  while (!said && Clock::now() < turn) usleep(1000), said = link->farewell();
  if (!said) print(line);
  link->abort();
  _exit(1);
}

void Job::watch() {
  std::unique_lock lock(mutex);
  while (!closing) {
    std::string trouble;
    for (auto& [group, check] : checks)
      if (trouble.empty()) trouble = check();
    if (trouble.empty() && !watched.empty() && Clock::now() > deadline) {
      std::ostringstream line;
      line << watched << " waited " << timeout << " s for the GPU (the last operation was " << last
           << "): is a rank gone? (--comm-timeout)";
      trouble = line.str();
    }
    for (int r = 0; r < size && trouble.empty() && !watched.empty(); ++r)
      if (ended(r))
        trouble = watched + ": rank " + std::to_string(r) + " is gone (the last operation was " + last + ")";
    if (!trouble.empty()) print(trouble), _exit(1);  // the link belongs to the other thread: its ends just close
    wake.wait_for(lock, std::chrono::milliseconds(100));
  }
}

Job::~Job() {
  if (open_job == this) open_job = nullptr;
  {
    std::lock_guard lock(mutex);
    closing = true;
  }
  wake.notify_all();
  if (watcher.joinable()) watcher.join();
}

// ---- World ----

World::World(double timeout) : job_(std::make_unique<Job>(timeout)) {
  set_timeout(timeout);
  if (open_job) fail("a process has one World");
  job_->link = open_link(timeout);
  if (!job_->link) return;
  open_job = job_.get();
  static const int registered = std::atexit([] {
    if (open_job) open_job->abort("exit in the middle of the job (the last operation was " + open_job->last + ")");
  });
  (void)registered;
  job_->launcher = job_->link->name;
  job_->rank = job_->link->rank, job_->size = job_->link->size;
  std::vector<Job::Place> places(job_->size);
  Job::Place here = this_place();
  std::vector<int> all(job_->size);
  std::iota(all.begin(), all.end(), 0);
  job_->gather(all, rank(), job_->next_tag++, places.data(), &here, sizeof here, "gathering at the start");
  job_->places = places;
}

World::~World() {
  if (!job_->link) return;
  if (std::uncaught_exceptions()) {  // the process is about to fail, and exit() will tell
    job_.release();
    return;
  }
  std::vector<int> all(size());
  std::iota(all.begin(), all.end(), 0);
  job_->gather(all, rank(), job_->next_tag, nullptr, nullptr, 0, "closing the job");
  open_job = nullptr;
}

void World::set_timeout(double seconds) {
  if (!(seconds > 0)) fail("--comm-timeout ", seconds, ": must be more than 0 seconds");
  job_->timeout = seconds;
}
double World::timeout() const { return job_->timeout; }
int World::rank() const { return job_->rank; }
int World::size() const { return job_->size; }
const char* World::launcher() const { return job_->launcher; }
bool World::same_host(int r) const {
  return r == rank() || !std::strcmp(job_->places[r].host, job_->places[rank()].host);
}
int World::local_rank() const {
  int lower = 0;
  for (int r = 0; r < rank(); ++r) lower += same_host(r);
  return lower;
}
int World::local_size() const {
  int n = 0;
  for (int r = 0; r < size(); ++r) n += same_host(r);
  return n;
}
void World::abort(const std::string& line) {
  if (job_->under_way) {  // MPI must not go on with transfers whose memory an exception has freed
    job_->print(line);
    _exit(1);
  }
  job_->abort(line);
}

Comm World::host_comm(const std::vector<int>& ranks, const char* name) {
  const int tag = job_->new_group(ranks, name);
  if (place_in(ranks, rank()) < 0) return Comm();
  return Comm(std::make_shared<HostGroup>(*job_, name, ranks, tag));
}

World::Watch::Watch(Job& job, std::string what) : job_(job) {
  std::lock_guard lock(job.mutex);
  job.watched = std::move(what), job.deadline = Clock::now() + seconds(job.timeout);
}
World::Watch::~Watch() {
  std::lock_guard lock(job_.mutex);
  job_.watched.clear();
}

// ---- Comm: what does not depend on the backend ----

Comm::Group::Group(Job& job, const char* name, const std::vector<int>& ranks, int tag)
    : job(job), name(name), ranks(ranks), rank(place_in(ranks, job.rank)), tag(tag) {}

int Comm::rank() const { return group_->rank; }
int Comm::size() const { return group_->size(); }
const std::vector<int>& Comm::ranks() const { return group_->ranks; }

void Comm::together(const std::function<void()>& f) const { group_->together(f); }
Begun Comm::all_reduce(void* data, int64_t n, DType type, const char* name, bool aside) const {
  const std::string what = operation("all_reduce", name);
  if (n < 0) fail(what, ": ", n, " elements");
  return size() == 1 ? Begun() : group_->all_reduce(data, n, type, what, aside);
}
Begun Comm::reduce_scatter(void* out, const void* in, int64_t n, DType type, const char* name, bool aside) const {
  const std::string what = operation("reduce_scatter", name);
  if (n < 0) fail(what, ": ", n, " elements");
  if (size() > 1) return group_->reduce_scatter(out, in, n, type, what, aside);
  if (n && out != in) group_->copy(out, in, n * int64_t(dtype_size(type)));
  return Begun();
}
Begun Comm::all_gather(void* out, const void* in, int64_t bytes, const char* name, bool aside) const {
  const std::string what = operation("all_gather", name);
  if (bytes < 0) fail(what, ": ", bytes, " bytes");
  if (size() > 1) return group_->all_gather(out, in, bytes, what, aside);
  if (bytes && out != in) group_->copy(out, in, bytes);
  return Begun();
}
Begun Comm::exchange(std::vector<Piece> sends, std::vector<Piece> receives, const char* kind, const char* name,
                     bool aside) const {
  const std::string what = operation(kind, name);
  std::vector<Piece> own[2];
  for (auto* pieces : {&sends, &receives}) {
    for (const Piece& piece : *pieces) {
      if (piece.rank < 0 || piece.rank >= size())
        fail(what, ": rank ", piece.rank, " is not in the group: it has ", size());
      if (piece.bytes < 0) fail(what, ": ", piece.bytes, " bytes for rank ", piece.rank);
      if (piece.rank == rank()) own[pieces == &receives].push_back(piece);
    }
    std::erase_if(*pieces, [&](const Piece& piece) { return piece.rank == rank(); });
  }
  bool fits = own[0].size() == own[1].size();
  for (size_t i = 0; fits && i < own[0].size(); ++i) fits = own[0][i].bytes == own[1][i].bytes;
  if (!fits) fail(what, ": what rank ", rank(), " sends itself is not what it expects from itself");
  for (size_t i = 0; i < own[0].size(); ++i)
    if (own[0][i].bytes && own[0][i].data != own[1][i].data)
      group_->copy(own[1][i].data, own[0][i].data, own[0][i].bytes);
  return sends.empty() && receives.empty() ? Begun() : group_->exchange(sends, receives, what, aside);
}
void Comm::broadcast(const Piece& data, const char* name) const {
  if (data.rank < 0 || data.rank >= size())
    fail(operation("broadcast", name), ": rank ", data.rank, " is not in the group: it has ", size());
  std::vector<Piece> sends;
  for (int r = 0; data.rank == rank() && r < size(); ++r)
    if (r != rank()) sends.emplace_back(r, static_cast<char*>(data.data), data.bytes);
  exchange(sends, data.rank == rank() ? std::vector<Piece>() : std::vector<Piece>{data}, "broadcast", name, false)
      .wait();
}
void Comm::check_counts(std::span<const int64_t> counts, const char* name) const {
  if (int64_t(counts.size()) != size())
    fail(operation("all_to_all", name), ": ", counts.size(), " counts for a group of ", size(), " ranks");
  for (int64_t n : counts)
    if (n < 0) fail(operation("all_to_all", name), ": ", n, " elements");
}
void Comm::gather_host(void* out, const void* in, int64_t bytes, const char* kind, const char* name) const {
  group_->job.gather(group_->ranks, rank(), group_->tag, out, in, bytes, operation(kind, name));
}
