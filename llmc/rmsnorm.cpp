#include "llmc/rmsnorm.h"

#include "llmc/cpu_math.h"

namespace {
constexpr int64_t block_rows = 64;  // rows whose weight gradient is summed before the blocks are

template <class Real, class Acc>
Acc norm_row(Real* out, const Real* x, const Real* weight, int64_t C, double eps) {
  Acc sum = sum_of<Acc>(C, [&](int64_t c) { return Acc(x[c]) * Acc(x[c]); });
  Acc rstd = Acc(1) / std::sqrt(sum / Acc(C) + Acc(eps));
  for (int64_t c = 0; c < C; ++c) out[c] = Real(Acc(x[c]) * rstd * Acc(weight[c]));
  return rstd;
}
}  // namespace

template <class Device>
void rmsnorm_forward(Device&, typename Device::Real* out, typename Device::Acc* rstd, const typename Device::Real* x,
                     const typename Device::Real* weight, int64_t N, int64_t C, double eps) {
#pragma omp parallel for
  for (int64_t n = 0; n < N; ++n)
    rstd[n] = norm_row<typename Device::Real, typename Device::Acc>(out + n * C, x + n * C, weight, C, eps);
}

template <class Device>
void residual_rmsnorm_forward(Device&, typename Device::Real* sum, typename Device::Real* out,
                              typename Device::Acc* rstd, const typename Device::Real* residual,
                              const typename Device::Real* branch, const typename Device::Real* weight, int64_t N,
                              int64_t C, double eps) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
#pragma omp parallel for
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t c = n * C; c < (n + 1) * C; ++c) sum[c] = Real(Acc(residual[c]) + Acc(branch[c]));
    rstd[n] = norm_row<Real, Acc>(out + n * C, sum + n * C, weight, C, eps);
  }
}

template <class Device>
void rmsnorm_backward(Device&, typename Device::Real* dx, Grad<Device> dweight, void* scratch,
                      const typename Device::Real* dout, const typename Device::Real* dresidual,
                      const typename Device::Real* x, const typename Device::Real* weight,
                      const typename Device::Acc* rstd, int64_t N, int64_t C) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  Acc* partial = static_cast<Acc*>(scratch);  // (blocks, C)
  int64_t blocks = divide_up(N, block_rows);
#pragma omp parallel for
  for (int64_t block = 0; block < blocks; ++block) {
    Acc* dw = partial + block * C;
    std::fill_n(dw, C, Acc(0));
    for (int64_t n = block * block_rows; n < std::min(N, (block + 1) * block_rows); ++n) {
      const Real *xn = x + n * C, *dn = dout + n * C;
      Acc r = rstd[n];
      Acc mean = sum_of<Acc>(C, [&](int64_t c) { return Acc(dn[c]) * Acc(weight[c]) * Acc(xn[c]); }) * r / Acc(C);
      for (int64_t c = 0; c < C; ++c) {
        Acc xhat = Acc(xn[c]) * r;
        dw[c] += Acc(dn[c]) * xhat;
        Acc d = r * (Acc(dn[c]) * Acc(weight[c]) - xhat * mean);
        dx[n * C + c] = Real(dresidual ? Acc(dresidual[n * C + c]) + d : d);
      }
    }
  }
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t c = 0; c < C; ++c) partial[c] += partial[block * C + c];
  add_to_gradient(dweight, 0, partial, C);
}
template <class Device>
size_t rmsnorm_backward_scratch_bytes(int64_t N, int64_t C) {
  return size_t(divide_up(N, block_rows) * C) * sizeof(typename Device::Acc);
}

template <class Device>
void residual_add(Device&, typename Device::Real* out, const typename Device::Real* a, const typename Device::Real* b,
                  int64_t n) {
  using Acc = typename Device::Acc;
#pragma omp parallel for
  for (int64_t i = 0; i < n; ++i) out[i] = typename Device::Real(Acc(a[i]) + Acc(b[i]));
}

#define INSTANTIATE(Real)                                                                                          \
  template void rmsnorm_forward(Cpu<Real>&, Real*, Cpu<Real>::Acc*, const Real*, const Real*, int64_t, int64_t,    \
                                double);                                                                           \
  template void residual_rmsnorm_forward(Cpu<Real>&, Real*, Real*, Cpu<Real>::Acc*, const Real*, const Real*,      \
                                         const Real*, int64_t, int64_t, double);                                   \
  template void rmsnorm_backward(Cpu<Real>&, Real*, Grad<Cpu<Real>>, void*, const Real*, const Real*, const Real*, \
                                 const Real*, const Cpu<Real>::Acc*, int64_t, int64_t);                            \
  template size_t rmsnorm_backward_scratch_bytes<Cpu<Real>>(int64_t, int64_t);                                     \
  template void residual_add(Cpu<Real>&, Real*, const Real*, const Real*, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
