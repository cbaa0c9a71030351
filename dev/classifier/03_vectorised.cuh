// Rung 3: rung 2 with 16 bytes a load, and four loads asked for before the first is looked at. A thread compares the
// largest of eight logits with its maximum, not each: one test in eight elements, and the eight exponentials do not
// wait for one another.
//
// Predicted: bytes as rung 2's, 4 to 6 a logit (counted: 4), and now near them: 64 bytes of each of 1024 threads of a
// multiprocessor are on their way, more than memory's latency asks for. Two exponentials a logit, 16 a clock and
// multiprocessor, take less than half the floor and hide behind the loads. What is left above 4 bytes a logit is the
// second reading.
//
// Sizes: Vp a multiple of 8.
#pragma once
#include "llmc/cuda_common.cuh"
#include "llmc/step.h"

namespace vectorised {

constexpr int threads = 512, width = 8, batch = 4;
using Chunk = Pack<bf16>;

__global__ void __launch_bounds__(threads)
    rows(float* losses, bf16* logits, const int32_t* targets, const StepParams* params, int V, int Vp) {
  bf16* row = logits + int64_t(blockIdx.x) * Vp;
  Chunk* chunks = reinterpret_cast<Chunk*>(row);
  const int n_chunks = Vp / width, target = targets[blockIdx.x];
  float largest = -INFINITY, sum = 0;
  for (int i0 = threadIdx.x; i0 < n_chunks; i0 += batch * threads) {
    Chunk chunk[batch] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b)
      if (i0 + b * threads < n_chunks) chunk[b] = chunks[i0 + b * threads];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int v0 = (i0 + b * threads) * width;  // V or more: nothing of this chunk counts
      float x[width], most = largest;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        x[j] = v0 + j < V ? chunk[b][j] : -INFINITY;
        most = fmaxf(most, x[j]);
      }
      if (most == -INFINITY) continue;  // no logit so far
      if (most > largest) sum *= __expf(largest - most), largest = most;
#pragma unroll
      for (int j = 0; j < width; ++j) sum += __expf(x[j] - most);
    }
  }
  const float all = block_max(largest);
  sum = block_sum(sum == 0 ? 0.0f : sum * __expf(largest - all));
  const float scale = float(params->loss_scale), factor = scale / sum;
  if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0 : logf(sum) + (all - to_float(row[target]));
  __syncthreads();  // the target's logit has been read
#pragma unroll 4
  for (int i = threadIdx.x; i < n_chunks; i += threads) {
    Chunk chunk = chunks[i];
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const int v = i * width + j;
      float d = __expf(chunk[j] - all) * factor - (v == target ? scale : 0.0f);
      chunk.set(j, v < V && target >= 0 ? d : 0.0f);
    }
    chunks[i] = chunk;
  }
}

// As cross_entropy(). Targets are in [-1,V), logits finite.
inline void cross_entropy(GpuBase& dev, float* losses, bf16* logits, const int32_t* targets, const StepParams* params,
                          int64_t N, int64_t V, int64_t Vp) {
  if (Vp % width) fail("classifier 03_vectorised: Vp must be a multiple of 8, not ", Vp);
  launch(dev, rows, unsigned(N), threads, 0, losses, logits, targets, params, int(V), int(Vp));
}

}  // namespace vectorised
