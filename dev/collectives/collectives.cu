// Collectives between the GPUs of one host: all-reduce, all-gather, and the all-to-all of rows that expert parallelism
// needs; by the copy engines, by kernels that read the other GPUs' memory, and by NCCL, where it was found at build
// time. README.md of this folder walks through the rungs. One process, one thread, a GPU a rank.
//
//   dev/collectives/collectives [variant] [shape] [--ranks 2] [--quick] [--check-only]
//
// Needs two GPUs that can address each other. Where there are none, nothing is checked: one line, exit code 77.
#include <cstdio>
#include <map>
#include <memory>
#include <set>

#include "dev/bench.h"
#include "dev/collectives/01_copy.cuh"
#include "dev/collectives/02_one_shot.cuh"
#include "dev/collectives/03_two_shot.cuh"
#include "dev/collectives/04_pull_rows.cuh"
#ifdef GPT_MOE_NCCL
#include "dev/collectives/nccl.cuh"
#endif
#include "llmc/random.h"

namespace {
using namespace bench;
using namespace collectives;

constexpr int skipped = 77;
constexpr int64_t flush_bytes = int64_t(256) << 20;  // more than any cache
constexpr int64_t row_width = 2048;                  // bf16: rows of 4 KiB

// ---- what is done, and to how much ----

enum class Op { all_reduce, all_gather, all_to_all };

struct Shape {
  std::string name;
  Op op;
  DType type;
  int64_t bytes;  // of each rank's result
};
const std::vector<Shape> shapes = [] {
  const std::pair<const char*, int64_t> sizes[] = {
      {"64KiB", int64_t(64) << 10}, {"1MiB", int64_t(1) << 20},     {"8MiB", int64_t(8) << 20},
      {"64MiB", int64_t(64) << 20}, {"512MiB", int64_t(512) << 20},
  };
  std::vector<Shape> all;
  for (auto& [size, bytes] : sizes)
    all.push_back({std::string("all_reduce_bf16.") + size, Op::all_reduce, DType::bf16, bytes});
  for (auto& [size, bytes] : sizes)
    all.push_back({std::string("all_reduce_fp32.") + size, Op::all_reduce, DType::f32, bytes});
  for (auto& [size, bytes] : sizes)
    all.push_back({std::string("all_gather.") + size, Op::all_gather, DType::bf16, bytes});
  for (auto& [size, bytes] : sizes)
    all.push_back({std::string("all_to_all.") + size, Op::all_to_all, DType::bf16, bytes});
  return all;
}();

struct Problem {
  Op op;
  int64_t n;          // all-reduce: elements; all-gather: elements of each rank; all-to-all: rows wanted from each rank
  int64_t width = 1;  // all-to-all: elements of a row
  bool uneven = false;  // all-to-all: n, 2n or none
};

Problem full_size(const Shape& s, int ranks) {
  const int64_t elements = s.bytes / int64_t(dtype_size(s.type)), unit = 16 / int64_t(dtype_size(s.type));
  if (s.op == Op::all_reduce) return {s.op, elements};
  if (s.op == Op::all_gather) return {s.op, elements / ranks / unit * unit};
  return {s.op, std::max<int64_t>(1, elements / row_width / ranks), row_width};
}
// One pack of 16 bytes, three, and more than all threads of the largest grid can take at a time; no size a power of
// two.
std::vector<Problem> reduced(const Shape& s) {
  const int64_t unit = 16 / int64_t(dtype_size(s.type));
  if (s.op == Op::all_reduce) return {{s.op, unit}, {s.op, 3 * unit}, {s.op, 300'001 * unit}};
  if (s.op == Op::all_gather) return {{s.op, unit}, {s.op, 3 * unit}, {s.op, 100'003 * unit}};
  return {{s.op, 1, 8, false}, {s.op, 5, 257 * 8, true}, {s.op, 67, 256, true}};
}

// ---- values ----

// Element i of what a rank contributes: whole numbers of -8 ... 8, whose sums every type holds exactly. rough: all bits
// of the type's significand at varying exponents, so that another order of the sum gives other bits.
template <class T>
HOST_DEVICE float contributed(int rank, int64_t i, bool rough) {
  const uint64_t bits = random_bits(7, uint64_t(rank), uint64_t(i));
  if (!rough) return float(int(bits % 17) - 8);
  constexpr int digits = sizeof(T) == 2 ? 8 : 24;
  return float(int(bits & ((1u << digits) - 1)) - (1 << (digits - 1))) * float(1 << (bits >> 32 & 15));
}
template <class T>
HOST_DEVICE T stored(float value) {
#ifdef __CUDA_ARCH__
  return from_float<T>(value);
#else
  return T(value);
#endif
}

// What the result of a rank must be.
struct Expected {
  Op op;
  int ranks;
  int64_t n, width;
  bool rough;
  const RowOf* wanted;  // all-to-all: of this rank

  template <class T>
  HOST_DEVICE T at(int64_t i) const {
    if (op == Op::all_gather) return stored<T>(contributed<T>(int(i / n), i % n, rough));
    if (op == Op::all_to_all)
      return stored<T>(contributed<T>(wanted[i / width].rank, wanted[i / width].row * width + i % width, rough));
    float total = 0;
    for (int s = 0; s < ranks; ++s) total += contributed<T>(s, i, rough);
    return stored<T>(total);
  }
};

constexpr int threads = 256;
unsigned blocks_for(int64_t n) { return unsigned(std::min<int64_t>(4096, ceil_div(n, threads))); }

template <class T>
__global__ void contribute(T* p, int64_t n, int rank, bool rough) {
  for (int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x; i < n; i += int64_t(gridDim.x) * threads)
    p[i] = stored<T>(contributed<T>(rank, i, rough));
}
template <class T>
__global__ void count_wrong(unsigned long long* wrong, const T* got, int64_t n, Expected expected) {
  for (int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x; i < n; i += int64_t(gridDim.x) * threads)
    if (!(to_float(got[i]) == to_float(expected.at<T>(i)))) atomicAdd(wrong, 1ull);
}
// Keeps a stream busy while the host puts work behind it.
__global__ void pause(uint64_t nanoseconds) {
  const uint64_t end = two_shot::nanoseconds() + nanoseconds;
  while (two_shot::nanoseconds() < end) __nanosleep(1000);
}

// ---- the buffers of a problem, and who solves it ----

struct Contender {
  std::string name;
  std::function<void()> run;
  double link_bytes = 0, local_bytes = 0;  // into each GPU over the link; of its own memory, while the link waits
  bool fixed_order = true;                 // adds up in the order of the ranks
  std::function<void()> prepare = [] {};   // untimed
};

template <class T>
struct Case {
  Problem problem;
  std::vector<int64_t> contribution, result;  // elements of each rank's input and output
  Peers<T> in, out, staging, packed;          // staging: all-reduce; packed: all-to-all, (rows sent, width)
  Exchange exchange;
  double least_bytes = 0;  // over the link into each GPU, whatever the method
  std::vector<Contender> contenders;
};

#ifdef GPT_MOE_NCCL
using Library = Nccl;
const char* const library = "nccl";
const std::vector<std::string> variants = {"nccl",        "01_copy",      "02_one_shot",
                                           "03_two_shot", "04_pull_rows", "nccl_packed"};
#else
struct Library {
  explicit Library(const Ranks&) {}
};
const char* const library = "";
const std::vector<std::string> variants = {"01_copy", "02_one_shot", "03_two_shot", "04_pull_rows"};
#endif

template <class T>
void add_contenders(Case<T>& c, const Ranks& ranks, const two_shot::Meeting& meeting,
                    [[maybe_unused]] const Library& lib) {
  const double W = ranks.n, bytes = double(c.problem.n * c.problem.width) * sizeof(T);  // of each rank, to or from each
  const int64_t n = c.problem.n;
  std::vector<Contender>& list = c.contenders;
  if (c.problem.op == Op::all_reduce) {
    const double once = (W - 1) * bytes, twice = 2 * (W - 1) / W * bytes;
    c.least_bytes = twice;
    list.push_back(
        {"01_copy", [&, n] { copy_engine::all_reduce(ranks, c.out, c.in, c.staging, n); }, once, (W + 1) * bytes});
    list.push_back({"02_one_shot", [&, n] { one_shot::all_reduce(ranks, c.out, c.in, n); }, once});
    list.push_back({"03_two_shot", [&, n] { two_shot::all_reduce(ranks, c.out, c.in, meeting, n); }, twice});
#ifdef GPT_MOE_NCCL
    list.push_back({"nccl", [&, n] { lib.all_reduce(c.out, c.in, n); }, twice, 0, false});
#endif
  } else if (c.problem.op == Op::all_gather) {
    c.least_bytes = (W - 1) * bytes;
    list.push_back({"01_copy", [&, n] { copy_engine::all_gather(ranks, c.out, c.in, n); }, c.least_bytes, 2 * bytes});
    list.push_back({"02_one_shot", [&, n] { one_shot::all_gather(ranks, c.out, c.in, n); }, c.least_bytes});
#ifdef GPT_MOE_NCCL
    list.push_back({"nccl", [&, n] { lib.all_gather(c.out, c.in, n); }, c.least_bytes});
#endif
  } else {
    const double packing = 2 * W * bytes;  // read and written
    c.least_bytes = (W - 1) * bytes;
    list.push_back({"01_copy", [&] { copy_engine::all_to_all(ranks, c.out, c.packed, c.in, c.exchange); },
                    c.least_bytes, packing + 2 * bytes});
    list.push_back({"04_pull_rows", [&] { pull_rows::all_to_all(ranks, c.out, c.in, c.exchange); }, c.least_bytes});
#ifdef GPT_MOE_NCCL
    // Second, what the exchange alone takes: of rows that something has laid side by side before.
    auto pack = [&] { pack_for_sending(ranks, c.packed, c.in, c.exchange); };
    auto send = [&] { lib.all_to_all(c.out, c.packed, c.exchange); };
    list.push_back({"nccl", [=] { pack(), send(); }, c.least_bytes, packing});
    list.push_back({"nccl_packed", send, c.least_bytes, 0, true, pack});
#endif
  }
}

template <class T>
std::unique_ptr<Case<T>> make_case(Ranks& ranks, const Problem& p) {
  auto c = std::make_unique<Case<T>>();
  c->problem = p;
  const int64_t table_rows = p.n * ranks.n;
  if (p.op == Op::all_to_all)
    c->exchange = make_exchange(ranks, table_rows, p.width,
                                [&](int d, int s) { return p.uneven ? p.n * ((2 * d + s + 1) % 3) : p.n; });
  for (int r = 0; r < ranks.n; ++r) {
    const bool exchange = p.op == Op::all_to_all;
    c->contribution.push_back(exchange ? table_rows * p.width : p.n);
    c->result.push_back(exchange ? c->exchange.rows(r) * p.width : p.op == Op::all_gather ? p.n * ranks.n : p.n);
    c->in[r] = ranks.memory<T>(r, c->contribution[r]);
    c->out[r] = ranks.memory<T>(r, c->result[r]);
    if (p.op == Op::all_reduce) c->staging[r] = ranks.memory<T>(r, (ranks.n - 1) * p.n);
    if (exchange) c->packed[r] = ranks.memory<T>(r, c->exchange.sent_rows(r) * p.width);
  }
  return c;
}

// Inputs anew, NaN everywhere else, then the contender.
template <class T>
void run_checked(const Ranks& ranks, const Case<T>& c, const Contender& contender, bool rough) {
  auto poison = [&](int r, T* p, int64_t n) {
    if (p && n > 0) CUDA_CHECK(cudaMemsetAsync(p, 0xFF, size_t(n) * sizeof(T), ranks.stream[r]));
  };
  for (int r = 0; r < ranks.n; ++r) {
    ranks.launch(r, contribute<T>, blocks_for(c.contribution[r]), threads, c.in[r], c.contribution[r], r, rough);
    poison(r, c.out[r], c.result[r]);
    poison(r, c.staging[r], (ranks.n - 1) * c.problem.n);
    if (c.packed[r]) poison(r, c.packed[r], c.exchange.sent_rows(r) * c.problem.width);
  }
  contender.prepare();
  contender.run();
  ranks.synchronize();
}

template <class T>
Expected expected_of(const Ranks& ranks, const Case<T>& c, int rank, bool rough, bool on_gpu) {
  Expected e{c.problem.op, ranks.n, c.problem.n, c.problem.width, rough, nullptr};
  if (c.problem.op == Op::all_to_all)
    e.wanted = on_gpu ? c.exchange.wanted_on_gpu[rank] : c.exchange.wanted[rank].data();
  return e;
}

// Elements of the results that are wrong, of all ranks, by the host.
template <class T>
int64_t wrong_on_host(const Ranks& ranks, const Case<T>& c, const std::vector<std::vector<T>>& expected) {
  int64_t wrong = 0;
  for (int r = 0; r < ranks.n; ++r) {
    const std::vector<T> got = ranks.host(r, c.out[r], c.result[r]);
    for (int64_t i = 0; i < c.result[r]; ++i) wrong += !(float(got[i]) == float(expected[r][i]));
  }
  return wrong;
}
// And by the GPUs, which compute what they expect in the same way.
template <class T>
int64_t wrong_on_gpu(Ranks& ranks, const Case<T>& c, bool rough) {
  int64_t wrong = 0;
  const size_t keep = ranks.pieces();
  for (int r = 0; r < ranks.n; ++r) {
    auto* count = ranks.upload(r, std::vector<unsigned long long>(1));
    ranks.launch(r, count_wrong<T>, blocks_for(c.result[r]), threads, count, c.out[r], c.result[r],
                 expected_of(ranks, c, r, rough, true));
    wrong += int64_t(ranks.host(r, count, 1)[0]);
  }
  ranks.release(keep);
  return wrong;
}

// ---- timing ----

class Clock {
 public:
  explicit Clock(Ranks& ranks) : ranks_(ranks) {
    for (int r = 0; r < ranks.n; ++r) {
      flush_[r] = ranks.memory<char>(r, flush_bytes);
      CUDA_CHECK(cudaEventCreate(&begin_[r]));
      CUDA_CHECK(cudaEventCreate(&end_[r]));
    }
  }
  ~Clock() {
    for (int r = 0; r < ranks_.n; ++r) cudaEventDestroy(begin_[r]), cudaEventDestroy(end_[r]);
  }
  Clock(const Clock&) = delete;
  Clock& operator=(const Clock&) = delete;

  // Milliseconds of a run on the slowest rank, from a common start. The caches are overwritten before it, and the GPUs
  // kept waiting until the host has queued all of it.
  double once(const std::function<void()>& body) {
    for (int r = 0; r < ranks_.n; ++r) {
      ranks_.use(r);
      CUDA_CHECK(cudaMemsetAsync(flush_[r], ++byte_ & 127, size_t(flush_bytes), ranks_.stream[r]));
      ranks_.launch(r, pause, 1, 1, uint64_t(500'000));
    }
    ranks_.meet();
    for (int r = 0; r < ranks_.n; ++r) ranks_.use(r), CUDA_CHECK(cudaEventRecord(begin_[r], ranks_.stream[r]));
    body();
    for (int r = 0; r < ranks_.n; ++r) ranks_.use(r), CUDA_CHECK(cudaEventRecord(end_[r], ranks_.stream[r]));
    ranks_.synchronize();
    double slowest = 0;
    for (int r = 0; r < ranks_.n; ++r) {
      float ms = 0;
      CUDA_CHECK(cudaEventElapsedTime(&ms, begin_[r], end_[r]));
      slowest = std::max(slowest, double(ms));
    }
    return slowest;
  }
  // Of each of these; they take turns, all once, all again and so on.
  std::vector<Timing> in_turns(const std::vector<const Contender*>& all, int rounds) {
    std::vector<std::vector<double>> ms(all.size());
    for (int round = -2; round < rounds; ++round)
      for (size_t i = 0; i < all.size(); ++i) {
        all[i]->prepare();
        const double time = once(all[i]->run);
        if (round >= 0) ms[i].push_back(time);
      }
    std::vector<Timing> times;
    for (auto& of_one : ms) times.push_back(percentiles(of_one));
    return times;
  }

 private:
  Ranks& ranks_;
  std::array<char*, max_ranks> flush_{};
  std::array<cudaEvent_t, max_ranks> begin_{}, end_{};
  int byte_ = 0;
};

// Bytes a second into a GPU, by a copy of 512 MiB.
struct Link {
  double one_way = 0;  // the ceiling of this program
  double at_once = 0;  // while every GPU fetches from its neighbour
};
Link measure_link(Ranks& ranks, Clock& clock) {
  const int64_t bytes = int64_t(512) << 20;
  const size_t keep = ranks.pieces();
  Peers<char> from, to;
  for (int r = 0; r < ranks.n; ++r) from[r] = ranks.memory<char>(r, bytes), to[r] = ranks.memory<char>(r, bytes);
  const Contender one{"", [&] { ranks.copy(1, to[1], 0, from[0], bytes); }};
  const Contender all{"", [&] {
                        for (int r = 0; r < ranks.n; ++r)
                          ranks.copy(r, to[r], (r + 1) % ranks.n, from[(r + 1) % ranks.n], bytes);
                      }};
  const std::vector<Timing> times = clock.in_turns({&one, &all}, 10);
  ranks.release(keep);
  const Link link{1e3 * double(bytes) / times[0].median, 1e3 * double(bytes) / times[1].median};
  std::printf("ceiling: link %.0f GB/s, a copy from GPU 0 to GPU 1 (%.0f GB/s into each GPU while all fetch)\n",
              link.one_way * 1e-9, link.at_once * 1e-9);
  return link;
}

// ---- the program ----

struct Program {
  Lab& lab;
  Ranks& ranks;
  Clock& clock;
  const Library& lib;
  const Link link;
  const std::vector<std::string> chosen;  // variants; none: all
  int checks = 0, failures = 0;

  bool wants(const Contender& contender) const { return chosen.empty() || contains(chosen, contender.name); }

  bool note(bool good, const std::string& what) {
    ++checks, failures += !good;
    std::printf("%s collectives %s\n", good ? "  ok" : "FAIL", what.c_str());
    return good;
  }

  // Every contender at small sizes, against what the host computes. Returns who was wrong.
  template <class T>
  std::set<std::string> check(const std::string& group, const std::vector<Problem>& problems,
                              const two_shot::Meeting& meeting) {
    std::map<std::string, int64_t> wrong;
    const size_t keep = ranks.pieces();
    for (const Problem& p : problems) {
      auto c = make_case<T>(ranks, p);
      add_contenders(*c, ranks, meeting, lib);
      for (const bool rough : {false, true}) {
        std::vector<std::vector<T>> expected(ranks.n);
        for (int r = 0; r < ranks.n; ++r) {
          const Expected e = expected_of(ranks, *c, r, rough, false);
          for (int64_t i = 0; i < c->result[r]; ++i) expected[r].push_back(e.template at<T>(i));
        }
        for (const Contender& contender : c->contenders) {
          if (!wants(contender) || (rough && !contender.fixed_order)) continue;
          run_checked(ranks, *c, contender, rough);
          wrong[contender.name] += wrong_on_host(ranks, *c, expected);
          if (std::string who = two_shot::no_show(ranks, meeting); !who.empty()) fail(contender.name, ": ", who);
        }
      }
      ranks.release(keep);
    }
    std::set<std::string> bad;
    for (auto& [name, count] : wrong)
      if (!note(count == 0, group + " " + name + " against the host: " + std::to_string(count) + " elements wrong"))
        bad.insert(name);
    return bad;
  }

  template <class T>
  void measure(const Shape& s, const two_shot::Meeting& meeting, const std::set<std::string>& bad) {
    auto c = make_case<T>(ranks, full_size(s, ranks.n));
    add_contenders(*c, ranks, meeting, lib);
    std::vector<const Contender*> all;
    std::vector<bool> good;
    for (const Contender& contender : c->contenders) {
      if (!wants(contender)) continue;
      run_checked(ranks, *c, contender, false);
      const int64_t wrong = wrong_on_gpu(ranks, *c, false);
      all.push_back(&contender);
      good.push_back(
          note(wrong == 0, s.name + " " + contender.name + ": " + std::to_string(wrong) + " elements wrong") &&
          !bad.count(contender.name));
    }
    if (all.empty()) return;
    const std::vector<Timing> times = clock.in_turns(all, lab.options.quick ? 5 : 30);
    if (std::string who = two_shot::no_show(ranks, meeting); !who.empty()) fail(s.name, ": ", who);
    report(s, c->least_bytes, all, good, times);
  }

  void report(const Shape& s, double least_bytes, const std::vector<const Contender*>& all,
              const std::vector<bool>& good, const std::vector<Timing>& times) {
    double library_ms = 0;
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i]->name == library) library_ms = times[i].median;
    const double local = lab.copy_bandwidth();
    std::printf("collectives %s, %d ranks\n  %-14s %10s %10s %10s %10s %10s %10s %10s\n", s.name.c_str(), ranks.n,
                "variant", "ms", "p10", "p90", "GB/s", "% link", "predicted", "x library");
    for (size_t i = 0; i < all.size(); ++i) {
      const Contender& v = *all[i];
      const Timing& t = times[i];
      const double floor = 1e3 * least_bytes / link.one_way, rate = least_bytes / t.median * 1e-6;
      const double predicted = 1e3 * (v.link_bytes / link.one_way + v.local_bytes / local);
      std::printf("  %-14s %10.4f %10.4f %10.4f %10.1f %9.1f%% %10.4f", v.name.c_str(), t.median, t.p10, t.p90, rate,
                  100 * floor / t.median, predicted);
      if (library_ms > 0) std::printf(" %10.2f", library_ms / t.median);
      std::printf("%s\n", good[i] ? "" : " FAIL");
      if (!good[i]) continue;
      const bool ours = v.name[0] == '0';
      Record r;
      r.set("bench", "collectives").set("shape", s.name).set("impl", ours ? "ours-" + v.name : v.name);
      r.set("variant", v.name).set("ms", t.median).set("gbps", rate).set("floor_ms", floor);
      r.set("predicted_ms", predicted).set("predicted_bytes", v.link_bytes + v.local_bytes);
      r.set("p10_ms", t.p10).set("p90_ms", t.p90).set("percent_of_ceiling", 100 * floor / t.median);
      if (library_ms > 0) r.set("ratio_to_library", library_ms / t.median);
      r.set("ranks", ranks.n).set("ceiling_gbps", link.one_way * 1e-9);
      lab.write(std::move(r));
    }
    std::fflush(stdout);
  }

  template <class T>
  void run(const std::vector<Shape>& wanted, DType type) {
    const two_shot::Meeting meeting = two_shot::make_meeting<T>(ranks);
    const size_t keep = ranks.pieces();
    std::map<std::string, std::set<std::string>> bad;  // by group
    for (const Shape& s : wanted) {
      if (s.type != type) continue;
      try {
        const std::string group = s.name.substr(0, s.name.find('.'));
        if (!bad.count(group)) bad[group] = check<T>(group, reduced(s), meeting);
        if (!lab.options.check_only) measure<T>(s, meeting, bad[group]);
      } catch (const std::bad_alloc&) { note(false, s.name + ": these GPUs have no room for it"); }
      ranks.release(keep);
    }
  }
};

int run(const Options& options) {
  std::vector<std::string> names;
  for (const Shape& s : shapes) names.push_back(s.name);
  if (options.list) {
    std::printf("shapes: %s\nvariants: %s\n", joined(names).c_str(), joined(variants).c_str());
    return 0;
  }
  const std::vector<std::string> asked = match_shapes(options.shapes, names),
                                 chosen = match_variants(options.variants, variants);
  std::vector<Shape> wanted;
  for (const Shape& s : shapes)
    if (asked.empty() || contains(asked, s.name)) wanted.push_back(s);

  const int64_t n = options.number("ranks");
  if (n < 2 || n > max_ranks) fail("--ranks must be 2 to ", max_ranks, ", not ", n);
  if (const std::string why = no_ranks_because(int(n)); !why.empty()) {
    std::printf("skipped: collectives: needs %s GPUs that can address each other; %s\n",
                n == 2 ? "two" : std::to_string(n).c_str(), why.c_str());
    return skipped;
  }
  Lab lab("collectives", options);
  Ranks ranks{int(n)};
  Clock clock(ranks);
#ifdef GPT_MOE_NCCL
  const Library lib(ranks);
  std::printf("NCCL %s\n", Nccl::version().c_str());
#else
  const Library lib(ranks);
  std::printf("built without NCCL (nccl.h and libnccl were not found): the rungs alone\n");
#endif
  Link link;
  if (!options.check_only) {
    link = measure_link(ranks, clock);
    ranks.use(0), lab.copy_bandwidth();
  }
  Program program{lab, ranks, clock, lib, link, chosen};
  program.run<bf16>(wanted, DType::bf16);
  program.run<float>(wanted, DType::f32);
  return finish("collectives", program.checks, program.failures, options);
}
}  // namespace

int main(int argc, char** argv) {
  return guarded("collectives", [&] { return run(parse_options(argc, argv, {{"ranks", "2"}})); });
}
