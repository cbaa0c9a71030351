#include "dev/bench_cpu.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "llmc/error.h"
#include "llmc/random.h"

namespace bench_cpu {
namespace {

constexpr double error_limit = 1e-5;  // |got - expected| / |expected|, Euclidean norms over a tensor of floats
constexpr double worst_limit = 1e-3;  // the largest |got - expected| / (|expected| + rms) of an element

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double time_of(const std::function<void()>& body) {
  double start = seconds();
  body();
  return seconds() - start;
}

std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "unknown";
}

void poison(const Output& o) {
  std::visit([](auto v) { std::memset(v.data(), 0xFF, v.size_bytes()); }, o.values);  // NaN, or -1
}

// What is wrong with an output; empty: nothing.
std::string complaint(const Output& o, const std::vector<double>& expected) {
  char text[128] = "";
  if (const auto* integers = std::get_if<std::span<int32_t>>(&o.values)) {
    auto [got, wanted] = std::mismatch(integers->begin(), integers->end(), expected.begin());
    if (got != integers->end())
      std::snprintf(text, sizeof text, "element %ld is %d, not %.0f", long(got - integers->begin()), *got, *wanted);
    return text;
  }
  std::span<float> got = std::get<std::span<float>>(o.values);
  double difference = 0, norm = 0, worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(got[i] - expected[i], 2);
    norm += std::pow(expected[i], 2);
  }
  double rms = std::sqrt(norm / double(got.size()));
  for (size_t i = 0; i < got.size(); ++i)
    worst = std::max(worst, std::abs(got[i] - expected[i]) / (std::abs(expected[i]) + rms));
  double error = std::sqrt(difference / norm);
  if (!(error <= error_limit) || !(worst <= worst_limit))  // or NaN
    std::snprintf(text, sizeof text, "error %.1e (limit %.0e), of the worst element %.1e (limit %.0e)", error,
                  error_limit, worst, worst_limit);
  return text;
}

// Vector multiply-adds in as many independent chains as hide their latency: two a clock with a latency of 4 or 5 are 8
// to 10 in flight. Returns a value that needs them all.
constexpr int chains = 12;
float multiply_adds(int64_t steps) {
  Lanes sum[chains], a = Lanes{} + 0.5f, b = Lanes{} + 1.0f;
  for (int c = 0; c < chains; ++c) sum[c] = Lanes{} + float(c);  // equal chains would be computed once
  for (int64_t i = 0; i < steps; ++i)
    for (Lanes& s : sum) s = s * a + b;
  float total = 0;
  for (Lanes& s : sum) total += s[0];
  return total;
}

}  // namespace

// ---- the machine ----

double Machine::clock() {
  if (clock_ > 0) return clock_;
  constexpr int64_t steps = 2'000'000;
  for (int run = 0; run < 10; ++run) {
    double t = time_of([] {
      uint64_t x = 0, y = 3;
      asm volatile("" : "+r"(y));  // a register: processors add constants while they rename registers, several a clock
      for (int64_t i = 0; i < steps; i += 8)
        for (int j = 0; j < 8; ++j) {
          x += y;
          asm volatile("" : "+r"(x));  // the next addition needs this one's result
        }
    });
    clock_ = std::max(clock_, double(steps) / t);
  }
  return clock_;
}

double Machine::addition() {
  if (addition_ > 0) return addition_;
  constexpr int64_t steps = 1'000'000;
  volatile float one = 1;
  for (int run = 0; run < 10; ++run) {
    double t = time_of([&] {
      float x = 0, y = one;
      for (int64_t i = 0; i < steps; ++i) x += y;
      asm volatile("" : : "m"(x));  // needed, as far as the compiler knows
    });
    addition_ = run == 0 ? t / steps : std::min(addition_, t / steps);
  }
  return addition_;
}

double Machine::fma_rate(int threads) {
  if (double known = fma_rate_[threads]; known > 0) return known;
  constexpr int64_t steps = 400'000;
  double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    double best = 0;
    float total = 0;
    for (int run = 0; run < 10; ++run) {
      double t = time_of([&] { total += multiply_adds(steps); });
      best = std::max(best, 2.0 * chains * lanes * double(steps) / t);
    }
    sum += best;
    asm volatile("" : : "m"(total));  // needed, as far as the compiler knows
  }
  return fma_rate_[threads] = sum;
}

double Machine::bandwidth(int threads, double bytes) {
  const bool small = bytes < double(1 << 20);
  double& best = bandwidth_[{threads, small}];
  if (best > 0) return best;
  const size_t share = (size_t(small ? 256 : 64 << 10) << 10) / size_t(threads), total = share * size_t(threads);
  const int copies = small ? 100 : 1;
  Array<char> from(total, 1), to(total);
  for (int run = 0; run < 6; ++run) {
    double t = time_of([&] {
#pragma omp parallel num_threads(threads)
      {
        const size_t begin = share * size_t(omp_get_thread_num());
        for (int copy = 0; copy < copies; ++copy) std::memcpy(to.data() + begin, from.data() + begin, share);
      }
    });
    best = std::max(best, 2.0 * copies * double(total) / t);
  }
  return best;
}

double Machine::seconds(const Work& work) {
  int threads = work.threads > 0 ? work.threads : omp_get_max_threads();
  double time = std::max(work.flops / fma_rate(threads), work.clocks / (clock() * threads));
  if (work.chained > 0) time = std::max(time, work.chained * addition() / threads);
  if (work.bytes > 0) time = std::max(time, work.bytes / bandwidth(threads, work.bytes));
  return time;
}

// ---- options ----

Options parse_options(int argc, char** argv) {
  Options options = bench::parse_options(argc, argv, {{"threads", std::to_string(omp_get_max_threads())}});
  const int64_t threads = options.number("threads");
  if (threads > 4096) fail("--threads must be at most 4096, not ", threads);
  omp_set_num_threads(int(threads));
  return options;
}

// ---- the laboratory ----

Array<float> normal_values(int64_t n, uint64_t stream, double scale) {
  Array<float> v(n);
#pragma omp parallel for
  for (int64_t i = 0; i < n; ++i) v[i] = float(scale * random_normal(1, stream, uint64_t(i)));
  return v;
}

Lab::Lab(std::string bench, const Options& options)
    : options(options), bench_(std::move(bench)), results_(options, "cpu") {
  if (options.check_only) return;
  int threads = omp_get_max_threads();
  std::printf("%s: %d threads of %s, %.2f GHz, %.1f ns an addition in a chain\n", bench_.c_str(), threads,
              processor().c_str(), machine.clock() * 1e-9, machine.addition() * 1e9);
  std::printf("multiply-adds of %ld floats: %.0f GFLOP/s on one thread, %.0f on all; copy: %.0f GB/s on all\n",
              long(lanes), machine.fma_rate(1) * 1e-9, machine.fma_rate(threads) * 1e-9,
              machine.bandwidth(threads, 1e9) * 1e-9);
}

std::vector<std::vector<double>> Lab::time_in_turns(const std::vector<std::function<void()>>& bodies) const {
  const double sample = 200e-6;  // seconds at least, so that the clock's own time does not count
  const double share = options.quick ? 0.03 : 0.4;
  const size_t least = options.quick ? 3 : 7;
  std::vector<int> calls;
  for (const auto& body : bodies) {
    body();
    calls.push_back(int(std::clamp(std::ceil(sample / time_of(body)), 1.0, 1e4)));
  }
  std::vector<std::vector<double>> times(bodies.size());
  double start = seconds();
  while (times[0].size() < least || seconds() - start < share * double(bodies.size()))
    for (size_t i = 0; i < bodies.size(); ++i)
      times[i].push_back(time_of([&] {
                           for (int call = 0; call < calls[i]; ++call) bodies[i]();
                         }) /
                         calls[i]);
  return times;
}

bool Lab::wants(const Variant& v) {
  if (v.impl == "ours") return true;  // speeds are held against it
  if (!options.variants.empty()) return bench::contains(options.variants, v.name);
  // A rung so slow that its runs would take up all the time runs if it is asked for by name.
  const double limit = options.quick && options.shapes.empty() ? 0.03 : 1.0;
  return options.check_only || machine.seconds(v.work) < limit;
}

std::vector<std::string> Lab::check(const Case& c, const char* size) {
  std::vector<std::string> wrong;
  const Values expected = c.reference();
  for (const Variant& v : c.variants) {
    if (!wants(v)) continue;
    for (const Output& o : c.outputs) poison(o);
    v.run();
    for (size_t i = 0; i < c.outputs.size(); ++i)
      if (!accept(bench_ + " " + c.shape + " " + v.name + " " + size + ", " + c.outputs[i].name,
                  complaint(c.outputs[i], expected[i])))
        wrong.push_back(v.name);
  }
  if (options.check_only && wrong.empty()) std::printf("%s %s: right\n", bench_.c_str(), c.shape.c_str());
  return wrong;
}

void Lab::check_and_measure(Case c, std::vector<std::string> wrong) {
  for (const std::string& name : check(c, "at full size")) wrong.push_back(name);
  std::erase_if(c.variants, [&](const Variant& v) { return !wants(v); });
  std::vector<std::function<void()>> bodies;
  for (const Variant& v : c.variants) bodies.push_back(v.run);
  const std::vector<std::vector<double>> times = time_in_turns(bodies);
  const bool has_flops = c.flops > 0;

  std::printf("%s %s\n", bench_.c_str(), c.shape.c_str());
  std::printf("  %-18s %8s %10s %10s %10s %9s %13s %11s %13s\n", "variant", "threads", "ms", "p10", "p90",
              has_flops ? "GFLOP/s" : "GB/s", "predicted ms", "of it", "x production");
  for (size_t i = 0; i < c.variants.size(); ++i) {
    const Variant& v = c.variants[i];
    const Timing t = percentiles(times[i]);
    const double rate = (has_flops ? c.flops : c.bytes) / t.median * 1e-9, predicted = machine.seconds(v.work);
    const double ratio = percentiles(times[0]).median / t.median;
    const int threads = v.work.threads > 0 ? v.work.threads : omp_get_max_threads();
    const bool good = !bench::contains(wrong, v.name);
    std::printf("  %-18s %8d %10.4f %10.4f %10.4f %9.1f %13.4f %10.0f%% %13.2f%s\n", v.name.c_str(), threads,
                t.median * 1e3, t.p10 * 1e3, t.p90 * 1e3, rate, predicted * 1e3, 100 * predicted / t.median, ratio,
                good ? "" : " FAIL");
    if (!good) continue;
    nlohmann::ordered_json row{{"bench", bench_},
                               {"shape", c.shape},
                               {"impl", v.impl},
                               {"variant", v.name},
                               {"ms", t.median * 1e3},
                               {"p10_ms", t.p10 * 1e3},
                               {"p90_ms", t.p90 * 1e3},
                               {has_flops ? "gflops" : "gbps", rate},
                               {"predicted_ms", predicted * 1e3},
                               {"ratio_to_production", ratio}};
    write(std::move(row), threads);
  }
  std::fflush(stdout);
}

bool Lab::accept(const std::string& what, const std::string& complaint) {
  ++checks_;
  if (complaint.empty()) return true;
  std::printf("FAIL %s: %s\n", what.c_str(), complaint.c_str());
  ++failures_;
  return false;
}

void Lab::write(nlohmann::ordered_json row, int threads) {
  row["gpu"] = "cpu", row["threads"] = threads, row["cpu"] = processor();
  row["date"] = bench::utc("%F"), row["run_id"] = options.run_id;
  results_.write(row.dump());
}

}  // namespace bench_cpu
