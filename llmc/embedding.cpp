#include "llmc/embedding.h"

#include "llmc/cpu_math.h"

template <class Device>
void embedding_forward(Device& dev, typename Device::Real* out, const int32_t* tokens,
                       const typename Device::Real* table, int64_t N, int64_t C, int64_t V) {
#pragma omp parallel for
  for (int64_t n = 0; n < N; ++n) {
    int64_t id = tokens[n];
    if (id < 0 || id >= V) {
#pragma omp critical
      dev.fault(DeviceStatus::token_out_of_range, n, id);
      id = 0;
    }
    std::copy_n(table + id * C, C, out + n * C);
  }
}

// Positions are bucketed by token first (a counting sort, which keeps their order), so that each row of the table is
// written by one thread and once.
template <class Device>
void embedding_backward(Device&, Grad<Device> dtable, void* scratch, const int32_t* tokens,
                        const typename Device::Real* dout, int64_t N, int64_t C, int64_t V) {
  using Acc = typename Device::Acc;
  int64_t* begin = static_cast<int64_t*>(scratch);  // (V+1) first position of each token in `order`
  int64_t* order = begin + V + 1;                   // (N)
  Acc* sums = reinterpret_cast<Acc*>(order + N);    // (threads, C)
  auto valid = [&](int64_t n) { return tokens[n] >= 0 && tokens[n] < V; };
  std::fill_n(begin, V + 1, 0);
  for (int64_t n = 0; n < N; ++n)
    if (valid(n)) ++begin[tokens[n] + 1];
  for (int64_t v = 0; v < V; ++v) begin[v + 1] += begin[v];
  for (int64_t n = 0; n < N; ++n)
    if (valid(n)) order[begin[tokens[n]]++] = n;  // begin[v] ends as the end of v's bucket
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t v = 0; v < V; ++v) {
    int64_t first = v == 0 ? 0 : begin[v - 1], last = begin[v];
    if (first == last) continue;
    Acc* sum = thread_share<Acc>(sums, C);
    std::fill_n(sum, C, Acc(0));
    for (int64_t i = first; i < last; ++i) {
      const auto* row = dout + order[i] * C;
      for (int64_t c = 0; c < C; ++c) sum[c] += Acc(row[c]);
    }
    add_to_gradient(dtable, v * C, sum, C);
  }
}
template <class Device>
size_t embedding_backward_scratch_bytes(int64_t N, int64_t C, int64_t V) {
  return size_t(V + 1 + N) * sizeof(int64_t) + size_t(omp_get_max_threads() * C) * sizeof(typename Device::Acc);
}

#define INSTANTIATE(Real)                                                                                             \
  template void embedding_forward(Cpu<Real>&, Real*, const int32_t*, const Real*, int64_t, int64_t, int64_t);         \
  template void embedding_backward(Cpu<Real>&, Grad<Cpu<Real>>, void*, const int32_t*, const Real*, int64_t, int64_t, \
                                   int64_t);                                                                          \
  template size_t embedding_backward_scratch_bytes<Cpu<Real>>(int64_t, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
