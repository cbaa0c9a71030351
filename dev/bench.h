// What all programs of the kernel laboratory share: options, random inputs, checks, timing, and one way of reporting.
//
// A family of kernels is a program. For each of its shapes it describes a Case: the tensors that come out, the variants
// that compute them (0 is the production launcher, called through its header), what the work is, and how the CPU
// reference computes the same. The frame here does the rest, so that every figure in dev/results/ was made alike:
//
//   1. at a reduced size, every variant against the CPU overload of the op, in double
//   2. at the full size, variant 0 for values that are not finite, the others against variant 0
//   3. the times: events around each run, the caches overwritten before it, median and 10th and 90th percentile
//   4. a table on stdout, and a JSON object a line appended to dev/results/<gpu>.jsonl (not for a part of the family:
//      bench_options.h). Ratios are of speeds: above 1, the variant is faster than production, or than the library.
//
// Outputs are filled with NaN bytes before a checked run, so that what a kernel forgets to write is seen. A variant that
// fails a check prints FAIL, leaves no line in the results, and makes the program exit with 1 once all is done. The last
// line counts: `NAME: N checks, M failed`.
#pragma once
#include <functional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "dev/bench_options.h"
#include "llmc/gpu.h"

namespace bench {

// ---- one line of results ----

struct Record {
  std::vector<std::pair<std::string, std::variant<double, std::string>>> fields;
  Record& set(const std::string& key, double value) { return fields.emplace_back(key, value), *this; }
  Record& set(const std::string& key, const std::string& value) { return fields.emplace_back(key, value), *this; }
};

// ---- a case: one op at one shape ----

// What a tensor holds before a checked run: NaN bytes, a small value that the op adds to, or an input that it replaces.
enum class Before { poison, gradient, input };

// A tensor that variants write. pass: 0 forward, 1 backward. error is |got - expected| / |expected| in the Euclidean norm
// over the tensor; worst is the largest |got - expected| / (|expected| + rms) of an element, which shows a single wrong
// row that drowns in the norm.
struct Output {
  std::string name;
  void* data;
  DType type;
  int64_t n;
  int pass = 0;
  Before before = Before::poison;
  double error_limit = 0.01, worst_limit = 0.1;
};
template <class T>
Output output(std::string name, T* data, int64_t n, int pass = 0, Before before = Before::poison) {
  return {std::move(name), data, dtype_of<T>(), n, pass, before};
}
// Integers, which are right or wrong.
inline Output exact_output(std::string name, int32_t* data, int64_t n) {
  return {std::move(name), data, DType::i32, n, 0, Before::poison, 0, 0};
}

// What has to be done. The floor of the time is the largest of: operations on tensor cores over the rate of a matrix
// product, fp32 operations (a multiply-add is two) over the rate of the CUDA cores, bytes read and written in global
// memory over the rate of a copy.
struct Work {
  double flops = 0, bytes = 0, fp32_flops = 0;
  explicit operator bool() const { return flops > 0 || bytes > 0 || fp32_flops > 0; }
  Work operator+(const Work& o) const { return {flops + o.flops, bytes + o.bytes, fp32_flops + o.fp32_flops}; }
};

struct Variant {
  std::string name, impl;                 // impl: "ours" for variant 0, "ours-..." or a library's name for the others
  std::function<void()> forward;          // the op, or its forward pass
  std::function<void()> backward = {};    // empty: the op has none, or the variant has not
  bool is_library = false;                // the one that ours are measured against
  bool checked = true;                    // false: a floor, which computes something else
  std::vector<std::string> missing = {};  // outputs that it does not make
  // What this variant moves and computes, beyond what the op must: the prediction that its time is held against.
  // Nothing: the case's.
  Work forward_work = {}, backward_work = {};
};

using Values = std::vector<std::vector<double>>;  // one entry an output

struct Case {
  std::string shape;
  std::vector<Output> outputs;
  std::vector<Variant> variants;
  Work forward, backward;
  std::function<Values()> reference;      // by the CPU; of gradients, what is added
  std::function<void()> prepare = [] {};  // before every run, untimed: restores what the op works on in place
  int calls_per_graph = 1;                // above 1: time replays of a graph of that many calls, caches warm
  double target_us = 0;                   // printed beside the time; 0: none
};

// ---- device code of the frame (bench.cu) ----

double fp32_rate(const GpuBase& dev);  // operations a second of the CUDA cores at the highest clock

// p (n) = mean + scale * N(0,1): a function of (stream, index) alone.
void fill_normal(GpuBase& dev, bf16* p, int64_t n, double scale, double mean, uint64_t stream);
void fill_normal(GpuBase& dev, float* p, int64_t n, double scale, double mean, uint64_t stream);

struct Difference {
  double error = 0, worst = 0;  // as at Output
  int64_t not_finite = 0;       // values of `got`
};
// `expected` is of the same type as `got`, or f64.
Difference difference(GpuBase& dev, const void* got, DType type, const void* expected, DType expected_type, int64_t n);

// ---- the laboratory ----

// "NVIDIA H100 80GB HBM3" -> "h100"
std::string short_name(const std::string& gpu_name);

class Lab {
 public:
  Lab(std::string bench, const Options& options);
  ~Lab();

  Gpu<bf16> dev;
  const Options options;

  // Device memory that lives until release(). memory() is filled with NaN bytes; every normal() is a new sample.
  template <class T>
  T* memory(int64_t n) {
    T* p = static_cast<T*>(dev.allocate(size_t(n) * sizeof(T)));
    owned_.push_back(p);
    dev.fill_byte(p, 0xFF, size_t(n) * sizeof(T));
    return p;
  }
  template <class T>
  T* normal(int64_t n, double scale = 1, double mean = 0) {
    T* p = memory<T>(n);
    fill_normal(dev, p, n, scale, mean, ++stream_);
    return p;
  }
  template <class T>
  T* upload(const std::vector<T>& values) {
    T* p = memory<T>(int64_t(values.size()));
    dev.to_device(p, values.data(), values.size() * sizeof(T));
    return p;
  }
  template <class T>
  T* copy_of(const T* source, int64_t n) {
    T* p = memory<T>(n);
    dev.copy(p, source, size_t(n) * sizeof(T));
    return p;
  }
  void release();

  // A device array as host values of another type.
  template <class To = double, class T>
  std::vector<To> host(const T* device, int64_t n) {
    std::vector<T> raw(n);
    dev.to_host(raw.data(), device, raw.size() * sizeof(T));
    return to<To>(raw);
  }
  template <class To = double, class T>
  static std::vector<To> to(const std::vector<T>& raw) {
    std::vector<To> values(raw.size());
    for (size_t i = 0; i < raw.size(); ++i) {
      if constexpr (std::is_same_v<T, bf16>)
        values[i] = To(float(raw[i]));
      else
        values[i] = To(raw[i]);
    }
    return values;
  }

  // Whether the options ask for it. A shape "a.b" is also asked for by "a". With --list it prints the shape's name and
  // says no.
  bool wants_shape(const std::string& shape);
  bool wants_variant(const Variant& v) const;  // of the case that was checked or measured last; variant 0 always

  // Ceilings, measured on first use: bytes a second of a device-to-device copy of 1 GiB, read and written counted, and
  // operations a second of a bf16 product of 8192 x 8192 x 8192 through matmul_forward().
  double copy_bandwidth();
  double matmul_rate();
  double floor_ms(Work work);

  // What is timed: body, after prepare, `calls` times as one graph where that is more than one.
  struct Timed {
    std::function<void()> body, prepare = [] {};
    int calls = 1;
  };
  // Milliseconds of one call of each, in this order; their runs take turns.
  std::vector<Timing> time_in_turns(const std::vector<Timed>& all);
  Timing time(
      const std::function<void()>& body, const std::function<void()>& prepare = [] {}, int calls = 1);

  // Step 1 above. The variants that it finds wrong are remembered for the case of that shape that is measured next.
  // False: the options ask for variants, and the case has none of them.
  bool check_reference(const Case& c);
  void check_and_measure(const Case& c);  // steps 2 to 4; nothing with --check-only
  // Prints FAIL and remembers it unless the difference is within the limits.
  bool accept(const std::string& what, const Output& limits, const Difference& d);
  void fail_with(const std::string& line);
  // Adds gpu, date and run_id, and appends the line where results are recorded.
  void write(Record record);
  // Prints the count of checks. 0 if all passed; throws where shapes or variants were asked for that nobody knows.
  int exit_code();
  const std::string& bench() const { return bench_; }

 private:
  bool select(const Case& c);  // the variants that are asked for; false: none of them is here
  void run_checked(const Case& c, const Variant& v);
  void report(const Case& c, const std::vector<std::vector<Timing>>& times, const std::vector<bool>& good);

  std::string bench_;
  std::vector<void*> owned_;
  void* flush_ = nullptr;
  uint64_t stream_ = 0;
  double copy_bandwidth_ = 0, matmul_rate_ = 0;
  int checks_ = 0, failures_ = 0;
  bool any_shape_ = false;
  std::vector<std::string> wrong_;                          // variants that failed check_reference()
  std::vector<std::string> chosen_;                         // variants of this case that are asked for
  std::vector<std::string> known_shapes_, known_variants_;  // all that came by
  std::vector<std::string> answered_;                       // what was asked for and found
  Results results_;
};

// The floor of an op that is bound by memory: a copy that moves as many bytes, read and written together.
Variant copy_floor(Lab& lab, Work forward, Work backward = {});

// The main() of a family. make describes a case at a shape (which has a member `name`); reduced gives the shape at which
// the CPU reference is quick enough, with the same widths wherever these choose the kernel.
template <class Shape>
int run_family(int argc, char** argv, const char* name, const std::vector<Shape>& shapes,
               Case (*make)(Lab&, const Shape&), Shape (*reduced)(Shape)) {
  return guarded(name, [&] {
    Options options = parse_options(argc, argv);
    std::vector<std::string> names;
    for (const Shape& shape : shapes) names.push_back(shape.name);
    options.shapes = match_shapes(options.shapes, names);
    if (options.list) std::printf("shapes: %s\n", joined(names).c_str());
    Lab lab(name, options);
    if (options.list) {
      std::vector<std::string> variants;
      for (const Shape& shape : shapes) {
        for (const Variant& v : make(lab, reduced(shape)).variants) add_once(variants, v.name);
        lab.release();
      }
      std::printf("variants: %s\n", joined(variants).c_str());
      return 0;
    }
    for (const Shape& shape : shapes) {
      if (!lab.wants_shape(shape.name)) continue;
      try {
        bool wanted = lab.check_reference(make(lab, reduced(shape)));
        lab.release();
        if (wanted && !lab.options.check_only) lab.check_and_measure(make(lab, shape));
      } catch (const std::bad_alloc&) {
        lab.fail_with(std::string(name) + " " + shape.name + ": this GPU has no room for it");
      }
      lab.release();
    }
    return lab.exit_code();
  });
}

}  // namespace bench
