// The down projection and the combine that follows it, together: out (N,C) = residual + sum over k of gate * A W2^T, and
// how much memory lies between the two. 0: production, by way of Y (R,C). atomic: rows are added to their tokens as they
// are made (atomic.cuh), which does not repeat its bits. chunked: Y a few columns at a time (chunked.cuh). Both need
// Hopper. down alone: production's product without the combine, what the best fusion could come to.
//
//   build/down_combine [--shapes olmoe-64x8,...] [--variants atomic,chunked] [--chunk 256] [--quick]
#include <algorithm>
#include <cstdio>

#include "dev/down_combine/atomic.cuh"
#include "dev/down_combine/chunked.cuh"
#include "dev/moe_shapes.h"
#include "dev/routing.h"
#include "moe/combine.h"
#include "moe/experts_hopper_kernels.h"

namespace {
using namespace bench;

std::vector<MoeShape> shapes() {
  std::vector<MoeShape> some;
  for (const MoeShape& s : moe_shapes())
    for (const char* name : {"gpt124-8x2", "olmoe-64x8", "fine-128x8", "fine-64x4", "mixtral-8x2"})
      if (s.name == name) some.push_back(s);
  return some;
}

Case make(Lab& lab, const MoeShape& shape, int64_t chunk) {
  auto& dev = lab.dev;
  const ExpertShape s = shape.experts();
  const int64_t N = shape.T, K = s.K, C = s.C, E = s.E, F = s.F;
  const Routing routing = make_routing(lab, N, K, E);
  const int32_t *offsets = routing.plan.offsets, *row_slot = routing.plan.row_slot, *slot_row = routing.plan.slot_row;
  // The residual stream is small, so that it does not hide the experts' share of the output from the check.
  const bf16 *a = lab.normal<bf16>(s.R * F, 0.3), *w2 = lab.normal<bf16>(E * C * F, 0.02),
             *residual = lab.normal<bf16>(N * C, 0.05);
  const float* gates = lab.normal<float>(s.R, 0.1, 0.5);
  bf16 *out = lab.memory<bf16>(N * C), *y = lab.memory<bf16>(s.R * C);
  char* scratch = lab.memory<char>(int64_t(experts_scratch_bytes<Gpu<bf16>>(s)));

  Case c;
  c.shape = shape.name;
  c.forward.flops = 2.0 * double(s.R) * double(C) * double(F);
  c.outputs = {output("out", out, N * C)};
  c.variants.push_back({"production", "ours", [=, &dev] {
                          experts_down(dev, y, scratch, a, w2, offsets, s);
                          combine(dev, out, y, residual, gates, slot_row, N, K, C);
                        }});
  if (hopper::usable(dev, s)) {
    float* sum = lab.memory<float>(N * C);
    bf16* columns = lab.memory<bf16>(s.R * std::min(chunk, C));
    c.variants.push_back({"atomic", "ours-nondeterministic-atomic", [=, &dev] {
                            down_combine::atomic(dev, out, sum, a, w2, residual, gates, offsets, row_slot, s);
                          }});
    c.variants.push_back(
        {"chunked", "ours-chunked-" + std::to_string(chunk),
         [=, &dev] { down_combine::chunked(dev, out, columns, a, w2, residual, gates, offsets, slot_row, s, chunk); }});
  }
  Variant product{"down alone", "ours-down-alone", [=, &dev] { experts_down(dev, y, scratch, a, w2, offsets, s); }};
  product.checked = false;
  c.variants.push_back(product);
  c.reference = [=, &lab] {
    Cpu<double> cpu;
    auto a_host = lab.host(a, s.R * F), w_host = lab.host(w2, E * C * F), g = lab.host(gates, s.R),
         stream = lab.host(residual, N * C);
    std::vector<double> rows(s.R * C), result(N * C);
    std::vector<char> work(experts_scratch_bytes<Cpu<double>>(s));
    experts_down(cpu, rows.data(), work.data(), a_host.data(), w_host.data(), routing.offsets.data(), s);
    combine(cpu, result.data(), rows.data(), stream.data(), g.data(), routing.slot_row.data(), N, K, C);
    return Values{result};
  };
  return c;
}

void print_memory(const MoeShape& shape, int64_t chunk) {
  const double MiB = double(1 << 20), rows = double(shape.rows()), C = double(shape.d);
  std::printf("  memory between the two: production %.1f MiB, atomic %.1f, chunked %.1f\n", rows * C * 2 / MiB,
              double(shape.T) * C * 4 / MiB, rows * double(std::min(chunk, shape.d)) * 2 / MiB);
}

int run(int argc, char** argv) {
  Lab lab("down_combine", parse_options(argc, argv, {{"chunk", "256"}}));
  const int64_t chunk = lab.options.number("chunk");
  if (chunk % 64) fail("--chunk must be a multiple of 64, not ", chunk);
  if (!hopper::usable(lab.dev, shapes()[0].experts()))
    std::printf("atomic and chunked are left out: they need a Hopper GPU and code for sm_90a\n");
  else
    std::printf("atomic does not repeat its bits\n");
  for (const MoeShape& shape : shapes()) {
    if (!lab.wants_shape(shape.name)) continue;
    try {
      lab.check_reference(make(lab, reduced_moe(shape), chunk));
      lab.release();
      if (lab.options.check_only) continue;
      lab.check_and_measure(make(lab, shape, chunk));
      print_memory(shape, chunk);
    } catch (const std::bad_alloc&) { lab.fail_with("down_combine " + shape.name + ": this GPU has no room for it"); }
    lab.release();
  }
  return lab.exit_code();
}
}  // namespace

int main(int argc, char** argv) {
  return guarded("down_combine", [&] { return run(argc, argv); });
}
