#include "dev/bench.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "llmc/event_log.h"
#include "llmc/matmul.h"

namespace bench {
namespace {

constexpr size_t flush_bytes = size_t(256) << 20;  // more than any cache
constexpr int initial_byte = 0x3C;                 // what gradients start from: about 0.0115 in either type
constexpr double most_seconds = 3;                 // a variant so slow that its runs pass this gets fewer of them

double initial_value(DType type) {
  uint32_t bits = type == DType::bf16 ? 0x3C3C0000u : 0x3C3C3C3Cu;
  return std::bit_cast<float>(bits);
}

void require_gpu() {
  std::string problem = gpu_problem();
  if (!problem.empty()) fail("needs a GPU: ", problem, " (families whose names end in _cpu need none)");
}

void run_all(const Variant& v) {
  v.forward();
  if (v.backward) v.backward();
}

bool makes(const Variant& v, const Output& o) {
  if (o.pass == 1 && !v.backward) return false;
  return !contains(v.missing, o.name);
}

}  // namespace

// ---- timing ----

// Everything is queued before anything is waited for, so that the host is ahead of the GPU: what lies between two events
// is the GPU's time. The overwriting of the caches separates the runs.
//
// A GPU at its power limit is slower after a second of hard work than at its start. So that none has a better place in
// the row than another, bodies take turns: all once, all again, and so on.
std::vector<Timing> Lab::time_in_turns(const std::vector<Timed>& all) {
  GpuEvents log(dev);
  std::vector<std::shared_ptr<GpuGraph>> graphs;
  std::vector<int> runs;
  auto run = [&](size_t i) {
    all[i].prepare();
    if (!graphs[i]) dev.fill_byte(flush_, int(++stream_ & 127), flush_bytes);
    size_t begin = log.mark();
    graphs[i] ? dev.launch(*graphs[i]) : all[i].body();
    log.mark();
    return begin;
  };
  for (size_t i = 0; i < all.size(); ++i) {
    const Timed& t = all[i];
    t.prepare(), t.body();  // libraries choose their kernels, lazily loaded code is loaded
    graphs.push_back(t.calls > 1 ? dev.capture([&] {
      for (int n = 0; n < t.calls; ++n) t.body();
    })
                                 : nullptr);
    double estimate = log.ms(run(i), 1);
    int affordable = int(most_seconds * 1e3 / std::max(estimate, 1e-6));
    runs.push_back(std::max(3, std::min(options.quick ? 5 : 30, affordable)));
    log.clear();
  }
  for (int round = 0; round < 5; ++round)
    for (size_t i = 0; i < all.size(); ++i)
      if (runs[i] > 3) run(i);
  log.clear();
  std::vector<std::vector<size_t>> begins(all.size());
  for (int round = 0; round < 30; ++round)
    for (size_t i = 0; i < all.size(); ++i)
      if (round < runs[i]) begins[i].push_back(run(i));
  std::vector<Timing> times;
  for (size_t i = 0; i < all.size(); ++i) {
    std::vector<double> ms;
    for (size_t begin : begins[i]) ms.push_back(log.ms(begin, begin + 1) / all[i].calls);
    times.push_back(percentiles(ms));
  }
  return times;
}
Timing Lab::time(const std::function<void()>& body, const std::function<void()>& prepare, int calls) {
  return time_in_turns({{body, prepare, calls}})[0];
}

// ---- the laboratory ----

std::string short_name(const std::string& gpu_name) {
  std::vector<std::string> words(1);
  for (char c : gpu_name) {
    if (c == ' ' || c == '-')
      words.emplace_back();
    else
      words.back() += char(std::tolower(c));
  }
  std::string name;
  for (const std::string& w : words) {
    if (w.empty() || w == "nvidia" || w == "geforce" || w == "tesla") continue;
    name += w;
    if (w.find_first_of("0123456789") != std::string::npos) break;  // "rtx" goes on, "rtx4090" is complete
  }
  return name.empty() ? "gpu" : name;
}

Lab::Lab(std::string bench, const Options& options)
    : dev((require_gpu(), false)),
      options(options),
      bench_(std::move(bench)),
      results_(options, short_name(dev.gpu_name)) {
  flush_ = dev.allocate(flush_bytes);
}
Lab::~Lab() {
  release();
  dev.release(flush_);
}
void Lab::release() {
  for (void* p : owned_) dev.release(p);
  owned_.clear();
}

bool Lab::wants_shape(const std::string& shape) {
  add_once(known_shapes_, shape);
  if (options.list) {
    std::printf("shape: %s\n", shape.c_str());
    return false;
  }
  auto asks = [&](const std::string& s) { return shape == s || shape.starts_with(s + "."); };
  bool wanted = options.shapes.empty() || std::any_of(options.shapes.begin(), options.shapes.end(), asks);
  any_shape_ |= wanted;
  return wanted;
}
bool Lab::select(const Case& c) {
  std::vector<std::string> names;
  for (const Variant& v : c.variants) names.push_back(v.name), add_once(known_variants_, v.name);
  chosen_.clear();
  for (const std::string& asked : options.variants) {
    std::string name = match_variant(asked, names);
    if (!name.empty()) chosen_.push_back(name), add_once(answered_, asked);
  }
  return options.variants.empty() || !chosen_.empty();
}
// Variant 0 always runs: the others are compared with it.
bool Lab::wants_variant(const Variant& v) const {
  return v.impl == "ours" || options.variants.empty() || contains(chosen_, v.name);
}
int Lab::exit_code() {
  if (options.list) return 0;
  if (!options.shapes.empty() && !any_shape_)
    fail("no shape is called '", options.shapes[0], "'; there are: ", joined(known_shapes_));
  for (const std::string& asked : options.variants)
    if (!contains(answered_, asked)) fail("no variant is called '", asked, "'; there are: ", joined(known_variants_));
  return finish(bench_, checks_, failures_, options);
}

double Lab::copy_bandwidth() {
  if (copy_bandwidth_ == 0) {
    size_t bytes = size_t(1) << 30;
    auto* from = static_cast<bf16*>(dev.allocate(bytes));
    void* to = dev.allocate(bytes);
    fill_normal(dev, from, int64_t(bytes / sizeof(bf16)), 1, 0, ++stream_);
    copy_bandwidth_ = 2e3 * double(bytes) / time([&] { dev.copy(to, from, bytes); }).median;
    dev.release(from), dev.release(to);
    std::printf("ceiling: copy %.0f GB/s\n", copy_bandwidth_ * 1e-9);
  }
  return copy_bandwidth_;
}
double Lab::matmul_rate() {
  if (matmul_rate_ == 0) {
    const int64_t n = 8192;
    bf16* p = static_cast<bf16*>(dev.allocate(3 * n * n * sizeof(bf16)));
    void* scratch = dev.allocate(matmul_scratch_bytes<Gpu<bf16>>(n, n, n));
    fill_normal(dev, p, 3 * n * n, 1, 0, ++stream_);
    Timing t = time([&] { matmul_forward(dev, p, scratch, p + n * n, p + 2 * n * n, n, n, n); });
    matmul_rate_ = 2e3 * double(n) * double(n) * double(n) / t.median;
    dev.release(p), dev.release(scratch);
    std::printf("ceiling: matrix product %.1f TFLOP/s\n", matmul_rate_ * 1e-12);
  }
  return matmul_rate_;
}
double Lab::floor_ms(Work work) {
  double seconds = 0;
  if (work.flops > 0) seconds = std::max(seconds, work.flops / matmul_rate());
  if (work.bytes > 0) seconds = std::max(seconds, work.bytes / copy_bandwidth());
  if (work.fp32_flops > 0) seconds = std::max(seconds, work.fp32_flops / fp32_rate(dev));
  return 1e3 * seconds;
}

void Lab::fail_with(const std::string& line) {
  std::printf("FAIL %s\n", line.c_str());
  ++failures_;
}
bool Lab::accept(const std::string& what, const Output& limits, const Difference& d) {
  ++checks_;
  bool good = d.not_finite == 0 && d.error <= limits.error_limit && d.worst <= limits.worst_limit;
  char numbers[160];
  std::snprintf(numbers, sizeof numbers, " %s: error %.1e, worst element %.1e, %lld not finite", limits.name.c_str(),
                d.error, d.worst, (long long)d.not_finite);
  if (!good)
    fail_with(what + numbers);
  else
    std::printf("  ok %s%s\n", what.c_str(), numbers);
  return good;
}

void Lab::run_checked(const Case& c, const Variant& v) {
  c.prepare();
  for (const Output& o : c.outputs) {
    if (o.before == Before::input) continue;
    int byte = o.before == Before::gradient ? initial_byte : 0xFF;
    dev.fill_byte(o.data, byte, size_t(o.n) * dtype_size(o.type));
  }
  run_all(v);
}

bool Lab::check_reference(const Case& c) {
  wrong_.clear();
  if (!select(c)) return false;
  Values expected = c.reference();
  std::vector<double*> on_device;
  for (size_t i = 0; i < c.outputs.size(); ++i) {
    const Output& o = c.outputs[i];
    if (int64_t(expected[i].size()) != o.n) fail(c.shape, ": the reference of ", o.name, " has another size");
    if (o.before == Before::gradient)
      for (double& value : expected[i]) value += initial_value(o.type);
    on_device.push_back(upload(expected[i]));
  }
  for (const Variant& v : c.variants) {
    if (!v.checked || !wants_variant(v)) continue;
    run_checked(c, v);
    for (size_t i = 0; i < c.outputs.size(); ++i) {
      const Output& o = c.outputs[i];
      if (makes(v, o) && !accept(bench_ + " " + c.shape + " " + v.name + " against the CPU,", o,
                                 difference(dev, o.data, o.type, on_device[i], DType::f64, o.n)))
        wrong_.push_back(v.name);
    }
  }
  return true;
}

void Lab::check_and_measure(const Case& c) {
  if (options.check_only || !select(c)) return;
  std::vector<void*> first;  // what variant 0 made
  std::vector<std::vector<Timing>> times;
  std::vector<bool> good;
  std::vector<Timed> bodies;
  std::vector<size_t> body_of;  // which variant
  for (const Variant& v : c.variants) {
    times.emplace_back(), good.push_back(!contains(wrong_, v.name));
    if (!wants_variant(v)) continue;
    if (v.checked) {
      run_checked(c, v);
      for (size_t i = 0; i < c.outputs.size(); ++i) {
        const Output& o = c.outputs[i];
        size_t bytes = size_t(o.n) * dtype_size(o.type);
        bool is_first = first.size() == i;
        if (is_first) first.push_back(copy_of(static_cast<char*>(o.data), int64_t(bytes)));
        if (makes(v, o) && !accept(bench_ + " " + c.shape + " " + v.name + (is_first ? "," : " against variant 0,"), o,
                                   difference(dev, o.data, o.type, first[i], o.type, o.n)))
          good.back() = false;
      }
    }
    auto add = [&](std::function<void()> body) {
      bodies.push_back({std::move(body), c.prepare, c.calls_per_graph}), body_of.push_back(times.size() - 1);
    };
    add(v.forward);
    if (v.backward) add(v.backward), add([&] { run_all(v); });
  }
  std::vector<Timing> measured = time_in_turns(bodies);
  for (size_t i = 0; i < bodies.size(); ++i) times[body_of[i]].push_back(measured[i]);
  report(c, times, good);
}

void Lab::report(const Case& c, const std::vector<std::vector<Timing>>& times, const std::vector<bool>& good) {
  const Work works[3] = {c.forward, c.backward, c.forward + c.backward};
  // Both passes one after the other: each has its own limit.
  auto floor_of = [&](const Work(&work)[3], size_t pass) {
    return pass < 2 ? floor_ms(work[pass]) : floor_ms(work[0]) + floor_ms(work[1]);
  };
  floor_ms(works[2]);  // the ceilings are measured, and printed, before the table
  bool two_passes = bool(c.variants[0].backward);
  const char* passes[3] = {"fwd", "bwd", "fwdbwd"};
  // Times that a ratio is of: both passes where both variants have them, else the forward pass.
  auto ratio = [&](size_t other, size_t mine) {
    size_t pass = times[other].size() == 3 && times[mine].size() == 3 ? 2 : 0;
    return times[other][pass].median / times[mine][pass].median;
  };
  size_t library = 0;  // none
  for (size_t i = c.variants.size(); i-- > 1;)
    if (c.variants[i].is_library && !times[i].empty()) library = i;

  std::printf("%s %s%s\n", bench_.c_str(), c.shape.c_str(),
              c.target_us > 0 ? (", target " + std::to_string(int(c.target_us)) + " us").c_str() : "");
  int width = 10;
  for (const Variant& v : c.variants) width = std::max(width, int(v.name.size()));
  std::printf("  %-*s %-7s %10s %10s %10s %9s %9s %10s %10s %10s\n", width, "variant", "pass", "ms", "p10", "p90",
              "rate", "% ceiling", "predicted", "x ours", "x library");
  for (size_t i = 0; i < c.variants.size(); ++i) {
    if (times[i].empty()) continue;
    const Variant& v = c.variants[i];
    Record r;
    r.set("bench", bench_).set("shape", c.shape).set("impl", v.impl).set("variant", v.name);
    double percent = 0;
    Work own[3] = {v.forward_work ? v.forward_work : works[0], v.backward_work ? v.backward_work : works[1]};
    own[2] = own[0] + own[1];
    for (size_t pass = 0; pass < times[i].size(); ++pass) {
      const Timing& t = times[i][pass];
      const Work& w = works[pass];
      std::string prefix = two_passes ? std::string(passes[pass]) + "_" : "";
      double rate = w.flops > 0 ? w.flops / t.median * 1e-9 : w.bytes / t.median * 1e-6;
      percent = 100 * floor_of(works, pass) / t.median;
      r.set(prefix + "ms", t.median);
      r.set(w.flops > 0 ? prefix + "tflops" : prefix + "gbps", rate);
      if (two_passes) r.set(prefix + "percent_of_ceiling", percent);
      r.set(prefix + "floor_ms", floor_of(works, pass)).set(prefix + "predicted_ms", floor_of(own, pass));
      r.set(prefix + "predicted_bytes", own[pass].bytes);
      r.set(prefix + "predicted_flops", own[pass].flops + own[pass].fp32_flops);
      std::printf("  %-*s %-7s %10.4f %10.4f %10.4f %7.1f %s %8.1f%% %10.4f", width, v.name.c_str(),
                  two_passes ? passes[pass] : "", t.median, t.p10, t.p90, rate, w.flops > 0 ? "TF" : "GB", percent,
                  floor_of(own, pass));
      if (pass + 1 == times[i].size()) {
        std::printf(" %10.2f", ratio(0, i));
        if (library) std::printf(" %10.2f", ratio(library, i));
        if (!good[i]) std::printf(" FAIL");
      }
      std::printf("\n");
    }
    const Timing& whole = times[i].back();
    r.set("p10_ms", whole.p10).set("p90_ms", whole.p90).set("percent_of_ceiling", percent);
    r.set("ratio_to_production", ratio(0, i));
    if (library) r.set("ratio_to_library", ratio(library, i));
    if (c.target_us > 0) r.set("target_ms", c.target_us * 1e-3);
    if (copy_bandwidth_ > 0) r.set("ceiling_gbps", copy_bandwidth_ * 1e-9);
    if (matmul_rate_ > 0) r.set("ceiling_tflops", matmul_rate_ * 1e-12);
    if (good[i]) write(std::move(r));
  }
  std::fflush(stdout);
}

void Lab::write(Record record) {
  record.set("gpu", short_name(dev.gpu_name)).set("date", utc("%F")).set("run_id", options.run_id);
  nlohmann::ordered_json line;
  for (auto& [key, value] : record.fields) std::visit([&, k = key](const auto& v) { line[k] = v; }, value);
  results_.write(line.dump());
}

Variant copy_floor(Lab& lab, Work forward, Work backward) {
  size_t bytes = size_t(std::max(forward.bytes, backward.bytes) / 2);
  bf16* from = lab.normal<bf16>(int64_t(bytes / sizeof(bf16)) + 1);
  bf16* to = lab.memory<bf16>(int64_t(bytes / sizeof(bf16)) + 1);
  auto copy = [&dev = lab.dev, from, to](double moved) { dev.copy(to, from, size_t(moved / 2)); };
  Variant v{"copy", "cudaMemcpy", [copy, forward] { copy(forward.bytes); }};
  if (backward.bytes > 0) v.backward = [copy, backward] { copy(backward.bytes); };
  v.is_library = true, v.checked = false;
  return v;
}

}  // namespace bench
