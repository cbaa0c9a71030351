// How close the expert op comes to the library's plain matrix product on the CPU.
//
// For each number of rows an expert: the whole op (gather + up with SwiGLU + down, as experts.h does it from routed
// tokens) against the same two products an expert on rows that are already gathered, nothing else. Both run on the same
// threads, in turns, many times; medians of the times and of the ratio of neighbours. The result is checked against
// plain loops in double.
//
//   dev/experts_cpu/experts_cpu - [rows64] [--quick] [--threads N] ...     (dev/bench_cpu.h; the op is the only variant)
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>

#include "dev/bench_cpu.h"
#include "llmc/cpu_math.h"
#include "moe/experts.h"

namespace {
using namespace bench_cpu;

constexpr int64_t C = 256, F = 128, E = 8, K = 2;

struct Problem {
  ExpertShape shape;
  std::vector<int32_t> offsets, row_slot;
  Array<float> x, gathered, w13, w2, h, a, y, library_h, library_y;
  Array<char> scratch;
  Cpu<float> dev;

  explicit Problem(int64_t rows) : shape{rows * E, K, E, C, F} {
    int64_t R = shape.R, N = R / K;
    // Token t goes to expert p % E and to another; p walks the tokens out of order; every expert gets the same number.
    std::vector<std::vector<int32_t>> slots(E);
    for (int64_t t = 0; t < N; ++t) {
      int64_t p = (t * 37 + 11) % N, first = p % E, second = (first + 1 + p / E % (E - 1)) % E;
      slots[first].push_back(int32_t(t * K));
      slots[second].push_back(int32_t(t * K + 1));
    }
    offsets.push_back(0);
    for (const auto& s : slots) {
      row_slot.insert(row_slot.end(), s.begin(), s.end());
      offsets.push_back(int32_t(row_slot.size()));
    }
    x = normal_values(N * C, 1), w13 = normal_values(E * 2 * F * C, 2, 0.06), w2 = normal_values(E * C * F, 3, 0.09);
    gathered.resize(R * C), h.resize(R * 2 * F), a.resize(R * F), y.resize(R * C);
    library_h = h, library_y = y;
    for (int64_t r = 0; r < R; ++r) std::copy_n(&x[row_slot[r] / K * C], C, &gathered[r * C]);
    scratch.resize(experts_scratch_bytes<Cpu<float>>(shape));
  }
  void op() {
    experts_up(dev, h.data(), a.data(), scratch.data(), x.data(), w13.data(), offsets.data(), row_slot.data(), shape);
    experts_down(dev, y.data(), scratch.data(), a.data(), w2.data(), offsets.data(), shape);
  }
  void plain_products() {
    int64_t rows = shape.R / E;
#pragma omp parallel for schedule(dynamic)
    for (int64_t e = 0; e < E; ++e)
      gemm<float>(false, false, true, rows, 2 * F, C, 1, &gathered[e * rows * C], C, &w13[e * 2 * F * C], C, 0,
                  &library_h[e * rows * 2 * F], 2 * F);
#pragma omp parallel for schedule(dynamic)
    for (int64_t e = 0; e < E; ++e)
      gemm<float>(false, false, true, rows, C, F, 1, &a[e * rows * F], F, &w2[e * C * F], F, 0,
                  &library_y[e * rows * C], C);
  }
  // Norm of the error of y relative to the norm of y, from plain loops in double.
  double error() const {
    double difference = 0, norm = 0;
    std::vector<double> act(F);
    for (int64_t e = 0; e < E; ++e)
      for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
        const float* token = &x[row_slot[r] / K * C];
        auto dot = [&](int64_t row) {
          return std::inner_product(token, token + C, &w13[(e * 2 * F + row) * C], 0.0, std::plus<>(),
                                    [](float p, float q) { return double(p) * double(q); });
        };
        for (int64_t f = 0; f < F; ++f) {
          double gate = dot(w13_row(f, false)), up = dot(w13_row(f, true));
          act[f] = gate / (1 + std::exp(-gate)) * up;
        }
        for (int64_t c = 0; c < C; ++c) {
          double value = 0;
          for (int64_t f = 0; f < F; ++f) value += act[f] * double(w2[(e * C + c) * F + f]);
          difference += (value - y[r * C + c]) * (value - y[r * C + c]);
          norm += value * value;
        }
      }
    return std::sqrt(difference / norm);
  }
};

std::string name_of(int64_t rows) { return "rows" + std::to_string(rows); }

int run(int argc, char** argv) {
  const std::vector<int64_t> all_rows = {8, 16, 32, 64, 128, 256, 512};
  std::vector<std::string> names;
  for (int64_t rows : all_rows) names.push_back(name_of(rows));
  Options options = parse_options(argc, argv);
  if (settle_names(options, {"production"}, names)) return 0;
  Lab lab("experts_cpu", options);
  const int threads = omp_get_max_threads();
  if (!lab.options.check_only) {
    std::printf("%d threads, C %ld, F %ld, E %ld, top_k %ld, float\n", threads, long(C), long(F), long(E), long(K));
    std::printf("  rows an expert   expert op us  GFLOP/s   library us  GFLOP/s   op / library   error\n");
  }
  for (int64_t rows : all_rows) {
    if (!lab.wants_shape(name_of(rows)) || (lab.options.check_only && rows > 32)) continue;
    Problem p(rows);
    p.op();
    const double error = p.error();
    const bool good = lab.accept("experts_cpu " + name_of(rows),
                                 error < 1e-5 ? "" : "the op differs from plain loops");  // also where it is NaN
    if (lab.options.check_only) {
      if (good) std::printf("experts_cpu %s: right\n", name_of(rows).c_str());
      continue;
    }
    const auto times = lab.time_in_turns({[&] { p.op(); }, [&] { p.plain_products(); }});
    std::vector<double> ratios;
    for (size_t i = 0; i < times[0].size(); ++i) ratios.push_back(times[1][i] / times[0][i]);
    const double t = percentiles(times[0]).median, l = percentiles(times[1]).median, ratio = percentiles(ratios).median;
    const double flop = 2.0 * double(p.shape.R) * 3 * C * F;
    std::printf("  %14ld %14.1f %8.1f %12.1f %8.1f %13.0f%% %9.1e\n", long(rows), t * 1e6, flop / t * 1e-9, l * 1e6,
                flop / l * 1e-9, 100 * ratio, error);
    if (good)
      lab.write({{"bench", "experts_cpu"},
                 {"shape", "C256 F128 E8 " + name_of(rows)},
                 {"impl", "ours"},
                 {"ms", t * 1e3},
                 {"library_ms", l * 1e3},
                 {"ratio", ratio}},
                threads);
  }
  return lab.exit_code();
}
}  // namespace

int main(int argc, char** argv) {
  return guarded("experts_cpu", [&] { return run(argc, argv); });
}
