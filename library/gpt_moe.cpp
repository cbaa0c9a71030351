// moe/layer.h behind the header that is installed: the layer's ops are planned once, for three programs (a pass that no
// backward follows, forward, backward), and then run on the caller's memory.
#include "library/gpt_moe.h"

#include <array>
#include <cmath>

#include "llmc/gpu.h"
#include "moe/layer.h"
#ifdef GPT_MOE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace moe {

std::int64_t w13_row(std::int64_t f, bool up) { return ::w13_row(f, up); }

struct Layer::Implementation {
  size_t saved_bytes = 0, workspace_bytes = 0;
  virtual ~Implementation() = default;
  virtual void forward(void* out, void* saved, void* workspace, const void* x, const void* residual, const Weights&,
                       const Routing&, CUstream_st* stream) = 0;
  virtual void backward(void* dx, const WeightGradients&, const void* saved, void* workspace, const void* x,
                        const void* dout, const Weights&, CUstream_st* stream) = 0;
};

namespace {

void check(const LayerConfig& c) {
  auto between = [](const char* name, int64_t value, int64_t most) {
    if (value < 1 || value > most) fail("moe::LayerConfig: ", name, " must be from 1 to ", most, ", not ", value);
  };
  between("tokens", c.tokens, int64_t(1) << 30), between("d_model", c.d_model, int64_t(1) << 24);
  between("d_expert", c.d_expert, int64_t(1) << 24), between("n_expert", c.n_expert, 512);
  between("top_k", c.top_k, std::min<int64_t>(16, c.n_expert));
  if (c.tokens * c.top_k >= int64_t(1) << 31)
    fail("moe::LayerConfig: ", c.tokens, " tokens x top_k ", c.top_k, " pass 2^31 rows; use smaller batches");
  if (c.d_expert % 8) fail("moe::LayerConfig: d_expert ", c.d_expert, " is not a multiple of 8");
  if (c.capacity < 0) fail("moe::LayerConfig: capacity must not be negative");
  for (double value : {c.aux_coef, c.z_coef, c.route_scale})
    if (!std::isfinite(value) || value < 0)
      fail("moe::LayerConfig: aux_coef, z_coef and route_scale must be finite and not negative");
  if (c.gate == Gate::softmax && c.route_scale != 1)
    fail("moe::LayerConfig: route_scale belongs to Gate::sigmoid; softmax gates are not scaled");
}

// What an op is given and must not be null, or must stand at a multiple of `alignment`.
void check(const char* name, const void* pointer, size_t alignment, bool required = true) {
  if (!pointer && required) fail("moe::Layer: ", name, " is null");
  if (reinterpret_cast<uintptr_t>(pointer) % alignment)
    fail("moe::Layer: ", name, " is not aligned to ", alignment, " bytes");
}

template <class Device>
Device open(const LayerConfig&) {
  return {};
}
#ifdef GPT_MOE_CUDA
template <class Device>
requires Device::has_graphs Device open(const LayerConfig& c) {
  int devices = 0;
  std::string problem = gpu_problem();
  if (!problem.empty()) fail("moe::Layer: Place::cuda: ", problem);
  if (cudaGetDeviceCount(&devices) != cudaSuccess || c.cuda_device < 0 || c.cuda_device >= devices)
    fail("moe::LayerConfig: cuda_device ", c.cuda_device, ", but ", devices, " GPUs are visible (from 0)");
  return Device(false, c.cuda_device);
}
#endif

}  // namespace

template <class Device>
struct Layer::On final : Implementation {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  enum Program { infer, train, differentiate };

  const LayerConfig config;
  Device dev;
  Plan plan;
  Executor<Device> executor{dev, plan};
  // What the caller has, addresses set in every call; outside of the plan, which has no place for it.
  std::deque<TensorInfo> outside;
  Tensor<Real> x, residual, dout, wg, w13, w2;
  Tensor<Acc> bias;
  Tensor<double> losses;
  Tensor<int32_t> load;
  GradTensor<Device> dwg, dw13, dw2;
  Tensor<StepParams> params;  // the layer's own
  MoeSaved<Device> saved;
  std::array<Tensor<Real>, 3> results;  // out, out, dx

  explicit On(const LayerConfig& c) : config(c), dev(open<Device>(c)) {
    for (auto* t : {&x, &residual, &dout, &wg, &w13, &w2}) declare(*t);
    declare(bias), declare(losses), declare(load), declare(params);
    for (auto* g : {&dwg, &dw13, &dw2}) {
      if (config.wide_gradients)
        declare(g->wide);
      else
        declare(g->narrow);
    }
    dw13.add = dw2.add = config.add_gradients;
    run(infer), run(train), run(differentiate);
    // Its results lie where the caller wants them; what is kept stands side by side before the workspace.
    for (Tensor<Real>& result : results) result.info->bytes = 0;
    for (TensorInfo& t : plan.tensors())
      t.persistent |= t.category == Category::saved || t.category == Category::metadata;
    plan.place();
    saved_bytes = plan.persistent_bytes(), workspace_bytes = plan.arena_bytes() - plan.persistent_bytes();
    executor.run_with(&memory);
    StepParams once;
    params.info->data = dev.allocate(sizeof once);
    dev.to_device(params, &once, sizeof once);
  }
  ~On() { dev.release(params.info->data); }

  void forward(void* out, void* kept, void* workspace, const void* input, const void* addend, const Weights& weights,
               const Routing& routing, CUstream_st* stream) override {
    check("out", out, 16), check("x", input, 16), check("residual", addend, 16, false);
    check("saved", kept, 256, false), check("losses", routing.losses, alignof(double), false);
    check("load", routing.load, alignof(int32_t), false);
    at(residual, addend), at(losses, routing.losses), at(load, routing.load);
    run_on(kept ? train : infer, out, kept, workspace, input, weights, stream);
  }
  void backward(void* dx, const WeightGradients& g, const void* kept, void* workspace, const void* input,
                const void* gradient, const Weights& weights, CUstream_st* stream) override {
    check("dx", dx, 16), check("x", input, 16), check("dout", gradient, 16), check("saved", kept, 256);
    check("gradients.router", g.router, 16), check("gradients.w13", g.w13, 16), check("gradients.w2", g.w2, 16);
    at(dout, gradient);
    dwg.tensor()->data = g.router, dw13.tensor()->data = g.w13, dw2.tensor()->data = g.w2;
    run_on(differentiate, dx, kept, workspace, input, weights, stream);
  }

 private:
  Arena<Device> memory{dev, plan};

  template <class T>
  void declare(Tensor<T>& t) {
    t.info = &outside.emplace_back();
    t.info->persistent = true;
  }
  template <class T>
  static void at(Tensor<T>& t, const void* address) {
    t.info->data = const_cast<void*>(address);
  }

  void run_on(Program program, void* result, const void* kept, void* workspace, const void* input,
              const Weights& weights, CUstream_st* stream) {
    check("workspace", workspace, 256), check("weights.router", weights.router, 16);
    check("weights.w13", weights.w13, 16), check("weights.w2", weights.w2, 16);
    check("weights.bias", weights.bias, 16, false);
    if (weights.bias && config.gate == Gate::softmax) fail("moe::Layer: weights.bias belongs to Gate::sigmoid");
    at(x, input), at(wg, weights.router), at(w13, weights.w13), at(w2, weights.w2), at(bias, weights.bias);
    for (TensorInfo& t : plan.tensors()) {
      auto* base = static_cast<char*>(t.persistent ? const_cast<void*>(kept) : workspace);
      t.data = base ? base + t.offset - (t.persistent ? 0 : saved_bytes) : nullptr;
    }
    at(results[program], result);
    OnStream on(dev, stream);
    run(program);
  }
  // The ops of the scope go to the caller's stream.
  struct OnStream {
    Device& dev;
    CUstream_st* own = nullptr;
    OnStream(Device& dev, CUstream_st* stream) : dev(dev) {
      if constexpr (Device::has_graphs) own = dev.stream, dev.stream = stream;
    }
    ~OnStream() {
      if constexpr (Device::has_graphs) dev.stream = own;
    }
  };

  // Plans the program, or runs it.
  void run(Program program) {
    const auto& c = config;
    const int64_t N = c.tokens, R = N * c.top_k;
    const RouterShape router{
        N, c.d_model, c.n_expert, c.top_k, 1, ::Gate(c.gate), c.norm_topk_prob, c.route_scale, c.aux_coef, c.z_coef};
    const ExpertShape experts{R, c.top_k, c.n_expert, c.d_model, c.d_expert};
    executor.begin(program);
    plan.set_place(0, "moe");
    Tensor<StepStats> stats;
    if (program != differentiate) stats = executor.template tensor<StepStats>("stats", {int64_t(sizeof(StepStats))});
    MoeLayer<Device> layer{executor,
                           router,
                           {executor,
                            experts,
                            N,
                            R,
                            c.capacity,
                            ::Recompute(c.recompute),
                            Dispatch::zero_buffer,
                            {w13, w2, dw13, dw2},
                            nullptr},
                           wg,
                           dwg,
                           bias,
                           {},  // no shared expert
                           {executor, N, c.d_model},
                           0,
                           load,
                           {},
                           {},
                           stats,
                           params,
                           {1, 0, N, c.top_k, c.n_expert},
                           {},
                           {},
                           {},
                           nullptr};
    if (program == differentiate) {
      if (!c.add_gradients)  // the router's, which its op only adds to
        executor.op("zero", zero, dwg, c.n_expert * c.d_model);
      results[program] = layer.backward(saved, x, dout);
      return;
    }
    MoeSaved<Device> unused;
    executor.op("zero losses", reset_stats<Device>, stats);
    results[program] =
        layer.forward(program == train ? saved : unused, x, residual, program == train, Category::workspace, false);
    executor.op("losses", copy_losses, losses, stats);
  }
  static void zero(Device& dev, Grad<Device> g, int64_t n) {
    g.visit([&](auto* p) { dev.zero(p, size_t(n) * sizeof *p); });
  }
  static void copy_losses(Device& dev, double* losses, const StepStats* stats) {
    if (losses) dev.copy(losses, &stats->aux_loss, 2 * sizeof(double));
  }
};

Layer::Layer(const LayerConfig& config) {
  check(config);
  auto make = [&]<class Device>(Device*) { implementation_ = std::make_unique<On<Device>>(config); };
  if (config.place == Place::cuda) {
#ifdef GPT_MOE_CUDA
    if (config.dtype == Dtype::f64) fail("moe::LayerConfig: Dtype::f64 is for Place::cpu; a GPU takes bf16 and f32");
    config.dtype == Dtype::bf16 ? make((Gpu<bf16>*)nullptr) : make((Gpu<float>*)nullptr);
#else
    fail("moe::Layer: Place::cuda: this library was built without CUDA (nvcc 12.5 or later)");
#endif
  } else {
    config.dtype == Dtype::bf16  ? make((Cpu<bf16>*)nullptr)
    : config.dtype == Dtype::f32 ? make((Cpu<float>*)nullptr)
                                 : make((Cpu<double>*)nullptr);
  }
}
Layer::~Layer() = default;

std::size_t Layer::saved_bytes() const { return implementation_->saved_bytes; }
std::size_t Layer::workspace_bytes() const { return implementation_->workspace_bytes; }
void Layer::forward(void* out, void* saved, void* workspace, const void* x, const void* residual,
                    const Weights& weights, const Routing& routing, CUstream_st* stream) {
  implementation_->forward(out, saved, workspace, x, residual, weights, routing, stream);
}
void Layer::backward(void* dx, const WeightGradients& gradients, const void* saved, void* workspace, const void* x,
                     const void* dout, const Weights& weights, CUstream_st* stream) {
  implementation_->backward(dx, gradients, saved, workspace, x, dout, weights, stream);
}

}  // namespace moe
