// Rung 3, beside production: its 16 bytes a lane, but only as many blocks as run at a time. Each goes along the tensor
// from chunk to chunk, and has asked for the next one before it computes this one. What production gets from starting a
// hundred thousand blocks, a new one whenever one ends, is here in a loop that can be read.
//
// Predicted: 6NF and 10NF bytes again. With 4 blocks of 256 threads on a multiprocessor and 32 bytes ahead for each
// thread (48 backward) there are 32 to 48 KB on their way, more than enough, though half as many warps run as could. So
// no faster than production, which is at the floor: the question is whether starting blocks costs anything. A block
// lives for a few microseconds, and others run on the multiprocessor meanwhile: it should not.
//
// In a loop a write to a or dh stands between a read of h and the next. The reads come first because the text says so:
// the compiler may not move them there, since it cannot know that the tensors are apart.
#pragma once
#include <algorithm>

#include "llmc/cuda_common.cuh"
#include "llmc/swiglu.h"

namespace resident_blocks {

constexpr int threads = 256, blocks_of_sm = 4;
using Chunk = Pack<bf16>;
static_assert(Chunk::n == swiglu_interleave);

// h: chunks of gates and of up projections by turns; groups of one each.
__global__ void __launch_bounds__(threads, blocks_of_sm) activate(Chunk* a, const Chunk* h, int64_t groups) {
  const int64_t step = int64_t(gridDim.x) * threads;
  int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= groups) return;
  Chunk gate = h[2 * i], up = h[2 * i + 1];
  while (true) {
    const int64_t next = i + step;
    Chunk next_gate = {}, next_up = {};
    if (next < groups) next_gate = h[2 * next], next_up = h[2 * next + 1];
#pragma unroll
    for (int j = 0; j < Chunk::n; ++j) {
      const float g = gate[j];
      gate.set(j, g * sigmoid_of(g) * up[j]);
    }
    a[i] = gate;
    if (next >= groups) return;
    i = next, gate = next_gate, up = next_up;
  }
}

__global__ void __launch_bounds__(threads, blocks_of_sm)
    activate_backward(Chunk* dh, const Chunk* da, const Chunk* h, int64_t groups) {
  const int64_t step = int64_t(gridDim.x) * threads;
  int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= groups) return;
  Chunk gate = h[2 * i], up = h[2 * i + 1], d = da[i];
  while (true) {
    const int64_t next = i + step;
    Chunk next_gate = {}, next_up = {}, next_d = {};
    if (next < groups) next_gate = h[2 * next], next_up = h[2 * next + 1], next_d = da[next];
#pragma unroll
    for (int j = 0; j < Chunk::n; ++j) {
      const float g = gate[j], s = sigmoid_of(g), dv = d[j];
      gate.set(j, dv * up[j] * s * (1 + g * (1 - s)));
      up.set(j, dv * g * s);
    }
    dh[2 * i] = gate, dh[2 * i + 1] = up;
    if (next >= groups) return;
    i = next, gate = next_gate, up = next_up, d = next_d;
  }
}

inline unsigned blocks_for(const GpuBase& dev, int64_t groups) {
  return unsigned(std::min<int64_t>(ceil_div(groups, threads), int64_t(dev.multiprocessors) * blocks_of_sm));
}
inline void forward(GpuBase& dev, bf16* a, const bf16* h, int64_t N, int64_t F) {
  const int64_t groups = N * F / Chunk::n;
  launch(dev, activate, blocks_for(dev, groups), threads, 0, reinterpret_cast<Chunk*>(a),
         reinterpret_cast<const Chunk*>(h), groups);
}
inline void backward(GpuBase& dev, bf16* dh, const bf16* da, const bf16* h, int64_t N, int64_t F) {
  const int64_t groups = N * F / Chunk::n;
  launch(dev, activate_backward, blocks_for(dev, groups), threads, 0, reinterpret_cast<Chunk*>(dh),
         reinterpret_cast<const Chunk*>(da), reinterpret_cast<const Chunk*>(h), groups);
}

}  // namespace resident_blocks
