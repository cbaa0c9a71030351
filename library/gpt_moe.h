// The mixture-of-experts layer of gpt-moe.cu for other programs: router, routing plan, experts and their sum, forward and
// backward, on memory that the caller has. C++17 or later; nothing else is needed to compile or to link against it.
//
//   find_package(gpt_moe REQUIRED)
//   target_link_libraries(my_program PRIVATE moe::layer)
//
// Letters: N tokens, C model width, E experts, K experts a token, F expert width, R = N*K rows. All arrays are dense, the
// last index fastest. "Real" is config.dtype; "sums" are float, or double with Dtype::f64. With Place::cuda every pointer is
// to memory of that GPU, else of the host.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__GNUC__)
#define GPT_MOE_PUBLIC __attribute__((visibility("default")))
#else
#define GPT_MOE_PUBLIC
#endif

struct CUstream_st;  // a cudaStream_t is a pointer to it

namespace moe {

enum class Place { cpu, cuda };
// cuda: bf16 (tensor cores) and f32 (plain kernels, to debug with). cpu: all, bf16 rounded where the GPU rounds.
enum class Dtype { bf16, f32, f64 };
// softmax: p = softmax(x Wg^T), the K largest; sigmoid: p = sigmoid(x Wg^T), the K largest of p + bias (DeepSeek-V3).
enum class Gate { softmax, sigmoid };
// What backward computes again instead of forward keeping it: nothing (H and A are kept); A; H and A. The same bits.
enum class Recompute { none, act, up };

struct LayerConfig {
  std::int64_t tokens = 0;    // N, of every call
  std::int64_t d_model = 0;   // C
  std::int64_t d_expert = 0;  // F, a multiple of 8
  std::int64_t n_expert = 0;  // E, at most 512
  std::int64_t top_k = 0;     // K, at most 16
  Gate gate = Gate::softmax;
  bool norm_topk_prob = true;  // gates are divided by their sum over the K chosen
  double route_scale = 1;      // factor on sigmoid gates
  std::int64_t capacity = 0;   // rows that an expert keeps, in the order of tokens; 0: all of them
  // Balance loss, aux_coef * E * sum_e f_e P_e (1 at balance), and z-loss, z_coef * mean(logsumexp^2), over the N tokens:
  // backward adds their gradients, of the losses themselves: to take 1/n of them, give 1/n of the coefficients.
  double aux_coef = 0, z_coef = 0;
  Place place = Place::cpu;
  Dtype dtype = Dtype::f32;
  int cuda_device = 0;  // the calling thread's current device, at construction and in every call
  Recompute recompute = Recompute::act;
  bool wide_gradients = true;  // of weights: sums; else Real
  bool add_gradients = true;   // to what stands there; else they are written
};

// Row of W13, within an expert, that holds row f of its gate (up = false) or of its up projection: 8 of the one, 8 of the
// other, and so on, so that a kernel's thread has both halves of a SwiGLU.
GPT_MOE_PUBLIC std::int64_t w13_row(std::int64_t f, bool up);

struct Weights {
  const void* router = nullptr;  // Wg (E,C)
  const void* w13 = nullptr;     // (E,2F,C), rows as w13_row() says
  const void* w2 = nullptr;      // (E,C,F)
  const void* bias = nullptr;    // (E), sums: selection bias of the sigmoid gate, or null
};
struct WeightGradients {  // shapes as the weights
  void *router = nullptr, *w13 = nullptr, *w2 = nullptr;
};
struct Routing {                 // what forward tells besides, where not null
  double* losses = nullptr;      // (2) aux loss and z-loss, coefficients included
  std::int32_t* load = nullptr;  // (E) += the tokens that chose each expert, before any dropping
};

// A layer of fixed shape. It holds a plan and, with Place::cuda, a library handle and a few bytes of the GPU, no weights and
// no activations: one Layer serves all layers of a model that are alike. Not by two threads at a time.
// Errors, here and in calls: std::runtime_error with one line that says what is wrong; nothing has been launched then.
class GPT_MOE_PUBLIC Layer {
 public:
  explicit Layer(const LayerConfig& config);
  ~Layer();
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  // Multiples of 256, known before anything is allocated. saved: from a forward pass to its backward pass, a block a layer
  // and micro-batch; by default H, 4*N*K*F bytes in bf16, and about 20 bytes a row of integers and gates. What else
  // backward reads is x, 2*N*C bytes, which stays the caller's. workspace: during a call only, one block for all layers.
  std::size_t saved_bytes() const;
  std::size_t workspace_bytes() const;

  // out (N,C) = residual (N,C) + sum over the K chosen e of gate_e * W2_e swiglu(W13_e x). residual: null is 0, and may be
  // out. saved: null where no backward pass follows, which spares writing H. saved and workspace are aligned to 256 bytes
  // (as cudaMalloc does), the rest to 16.
  // Place::cuda: work is put on `stream`, and nothing waits; calls can be captured in a graph. The same input gives the
  // same bits. Place::cpu: done on return; stream is ignored.
  void forward(void* out, void* saved, void* workspace, const void* x, const void* residual, const Weights& weights,
               const Routing& routing = {}, CUstream_st* stream = nullptr);

  // dx (N,C) = the gradient that reaches x through the experts, the gates and the losses, of a later function whose gradient
  // by `out` is dout (N,C); the residual's own gradient is dout. x, saved and weights as forward had them and left them.
  void backward(void* dx, const WeightGradients& gradients, const void* saved, void* workspace, const void* x,
                const void* dout, const Weights& weights, CUstream_st* stream = nullptr);

 private:
  struct Implementation;
  template <class Device>
  struct On;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace moe
