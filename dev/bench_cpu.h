// The frame of the ladders that need no GPU (dev/*_cpu): what bench.h is to the others, for the host's own processors.
//
// A ladder describes a Case for each of its shapes: what comes out, the variants that compute it (0 is production,
// called through its header), and how Cpu<double> computes the same. The frame checks every variant against that, at a
// reduced size and at the full one, times them in turns, and prints for each the time that was predicted beside the
// time that it took. A variant that fails the check prints FAIL, leaves no row, and makes the program exit with 1.
//
//   dev/NAME/NAME [variant] [shape] [options]     (bench_options.h, and --threads N)
//
// A run of everything appends its rows to dev/results/cpu.jsonl; any other run writes only where --out says. The last
// line counts: `NAME: N checks, M failed`.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <new>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "dev/bench_options.h"

namespace bench_cpu {

// ---- vectors and memory ----

// A register full of floats, which may begin at any float in memory.
#if defined(__AVX512F__)
inline constexpr int64_t lanes = 16;
#elif defined(__AVX__)
inline constexpr int64_t lanes = 8;
#else
inline constexpr int64_t lanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(lanes * sizeof(float)), aligned(sizeof(float)), may_alias));

// Memory as devices allocate it: vectors of 64 bytes that begin at multiples of 64 lie in one cache line each, not in
// two.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t boundary{256};
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), boundary)); }
  void deallocate(T* p, size_t) { ::operator delete(p, boundary); }
  bool operator==(const Aligned&) const = default;
};
template <class T>
using Array = std::vector<T, Aligned<T>>;

// ---- predictions ----

// What a variant does. Its time is predicted as the largest of four: operations (a multiply-add is two) over the
// measured FMA peak of its threads; clocks that its busiest port takes, summed over threads, over the measured clock;
// additions of floats each of which needs the result of the one before, at their measured latency; and bytes over the
// measured bandwidth of a copy.
struct Work {
  double flops = 0, bytes = 0, clocks = 0, chained = 0;
  int threads = 0;  // 0: all
};

// The host's rates, each measured when it is first asked for.
class Machine {
 public:
  double clock();                               // hertz, from a chain of additions that take a clock each
  double addition();                            // seconds that an addition of floats takes in a chain
  double fma_rate(int threads);                 // operations a second of all these threads together
  double bandwidth(int threads, double bytes);  // bytes a second of a copy, read and written, that moves as many
  double seconds(const Work& work);

 private:
  double clock_ = 0, addition_ = 0;
  std::map<int, double> fma_rate_;
  std::map<std::pair<int, bool>, double> bandwidth_;  // by number of threads, and whether caches hold the arrays
};

// ---- a case ----

struct Output {
  std::string name;
  std::variant<std::span<float>, std::span<int32_t>> values;  // integers are right or wrong
};

struct Variant {
  std::string name, impl;     // impl: "ours" for variant 0, "ours-..." or a library's name for the others
  std::function<void()> run;  // owns, through what it captures, the memory that it works on
  Work work;
};

using Values = std::vector<std::vector<double>>;  // one entry an output

struct Case {
  std::string shape;
  std::vector<Output> outputs;
  std::vector<Variant> variants;
  double flops = 0, bytes = 0;        // what has to be done: the rate that is printed
  std::function<Values()> reference;  // by Cpu<double>
};

// ---- options ----

using bench::guarded, bench::Options, bench::settle_names;

// The command line of all programs, and --threads N, which is set here.
Options parse_options(int argc, char** argv);

// ---- the laboratory ----

Array<float> normal_values(int64_t n, uint64_t stream, double scale = 1);

using bench::percentiles, bench::Timing;

class Lab {
 public:
  Lab(std::string bench, const Options& options);  // shapes and variants by their whole names

  const Options options;
  Machine machine;

  bool wants_shape(const std::string& shape) const {
    return options.shapes.empty() || bench::contains(options.shapes, shape);
  }
  // Seconds of a call of each: one sample a round, in which all have their turn.
  std::vector<std::vector<double>> time_in_turns(const std::vector<std::function<void()>>& bodies) const;
  // Checks the variants asked for, and variant 0 always; the names of those that are wrong. size: for what is printed.
  std::vector<std::string> check(const Case& c, const char* size);
  void check_and_measure(Case c, std::vector<std::string> wrong);  // wrong: those that are known to be
  // Counts a check. Prints FAIL and remembers it unless the complaint is empty; whether it is.
  bool accept(const std::string& what, const std::string& complaint);
  // Adds gpu ("cpu"), threads, cpu, date and run_id, and writes the row where results are recorded.
  void write(nlohmann::ordered_json row, int threads);
  // Prints the count of checks. 0 if all passed.
  int exit_code() const { return bench::finish(bench_, checks_, failures_, options); }

 private:
  bool wants(const Variant& v);

  std::string bench_;
  int checks_ = 0, failures_ = 0;
  bench::Results results_;
};

// The main() of a ladder. A Shape has a member `name`; reduced gives one of the same name that even a build with
// sanitizers computes in no time, with odd sizes.
template <class Shape>
int run_ladder(int argc, char** argv, const char* name, const std::vector<Shape>& shapes, Case (*make)(const Shape&),
               Shape (*reduced)(Shape)) {
  return guarded(name, [&] {
    Options options = parse_options(argc, argv);
    std::vector<std::string> variants, names;
    for (const Shape& shape : shapes) {
      names.push_back(shape.name);
      for (const Variant& v : make(reduced(shape)).variants) bench::add_once(variants, v.name);
    }
    if (settle_names(options, variants, names)) return 0;
    Lab lab(name, options);
    for (const Shape& shape : shapes) {
      if (!lab.wants_shape(shape.name)) continue;
      std::vector<std::string> wrong = lab.check(make(reduced(shape)), "at a reduced size");
      if (!lab.options.check_only) lab.check_and_measure(make(shape), std::move(wrong));
    }
    return lab.exit_code();
  });
}

}  // namespace bench_cpu
