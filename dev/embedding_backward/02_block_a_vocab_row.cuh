// Rung 2: a block a row of the vocabulary. It looks through all tokens for its own, 256 at a time, and adds what it
// finds in the order of the positions. Each row is written by one block and once: the same bits every time, plainly.
//
// Predicted: memory sees what the op must move; but V blocks read N tokens each, 4VN bytes, out of the L2 cache at some
// 5 TB/s. That is the limit, and grows with the vocabulary. Rows of tokens that do not occur cost as much as others.
// The block of the most frequent token adds N/16 rows one after the other, each a trip to memory: a few milliseconds
// too, behind which the search of the others hides. (Counted: the bytes of the op alone, since those of the cache have
// no rate here.)
//
// Sizes: C a multiple of 8, at most 2048: 8 columns a thread.
#pragma once
#include "llmc/cuda_common.cuh"

namespace block_a_vocab_row {

constexpr int threads = 256, warps = threads / 32, width = 8;

__global__ void __launch_bounds__(threads)
    add_rows(float* dtable, const int32_t* tokens, const bf16* dout, int64_t N, int64_t C) {
  __shared__ unsigned hits[warps];  // a bit for each token of a round that is this block's
  const int id = int(blockIdx.x), c = int(threadIdx.x) * width;
  const bool live = c < C;
  float sum[width] = {};
  bool any = false;
  for (int64_t n0 = 0; n0 < N; n0 += threads) {
    const int64_t mine = n0 + threadIdx.x;
    const unsigned found = __ballot_sync(~0u, mine < N && tokens[mine] == id);
    if (!__syncthreads_or(int(found != 0))) continue;  // also: all have read the hits of an earlier round
    if (threadIdx.x % 32 == 0) hits[threadIdx.x / 32] = found;
    __syncthreads();
    any = true;
    for (int w = 0; w < warps; ++w)
      for (unsigned left = hits[w]; left; left &= left - 1) {
        const int64_t n = n0 + w * 32 + __ffs(int(left)) - 1;
        if (!live) continue;
        const Pack<bf16> row = *reinterpret_cast<const Pack<bf16>*>(dout + n * C + c);
#pragma unroll
        for (int j = 0; j < width; ++j) sum[j] += row[j];
      }
  }
  if (!any || !live) return;
  for (int j = 0; j < width; ++j) dtable[int64_t(id) * C + c + j] += sum[j];
}

// dtable (V,C) += the sum of dout (N,C) over the positions of each token.
inline void backward(GpuBase& dev, float* dtable, const int32_t* tokens, const bf16* dout, int64_t N, int64_t C,
                     int64_t V) {
  if (C % width || C > threads * width)
    fail("embedding_backward 02_block_a_vocab_row: C must be a multiple of 8 and at most 2048, not ", C);
  launch(dev, add_rows, unsigned(V), threads, 0, dtable, tokens, dout, N, C);
}

}  // namespace block_a_vocab_row
