// Rung 3: nobody searches. Positions are sorted by their token first, stably, so that the positions of a token follow
// one another in ascending order; then one block a token adds its list. The sort is a radix sort in digits of 8 bits,
// each a bucket pass of two small launches (llmc/cuda_bucket.cuh).
//
// Predicted: the sort moves a few N integers, nothing beside N rows; its 4 launches take some 12 microseconds. Then
// dout is read once, and each row that occurs read and written once: the floor of the op. But one block adds the N/16
// rows of the most frequent token, one after the other, each behind two loads that say which row it is: N/16 times
// about a microsecond, long after all others are done. Where all tokens are equally frequent nothing of that shows.
//
// Sizes: C a multiple of 8.
#pragma once
#include "llmc/cuda_bucket.cuh"

namespace sorted {

constexpr int width = 8, digit_bits = 8, buckets = 1 << digit_bits;

struct DigitOf {  // of position order[i]'s token; before the first pass order is null and positions ascend
  const int32_t *tokens, *order;
  int shift;
  __device__ int operator()(int64_t i) const { return tokens[order ? order[i] : i] >> shift & (buckets - 1); }
};
struct Place {
  int32_t* sorted;
  const int32_t* order;
  __device__ void operator()(int64_t i, const InBucket& digit) const {
    sorted[digit.first + digit.rank] = order ? order[i] : int32_t(i);
  }
};

// Block b adds the list that begins at place b of the order; most places begin none.
__global__ void __launch_bounds__(256)
    add_lists(float* dtable, const int32_t* order, const int32_t* tokens, const bf16* dout, int64_t N, int64_t C) {
  const int64_t first = blockIdx.x;
  const int id = tokens[order[first]];
  if (first > 0 && tokens[order[first - 1]] == id) return;
  for (int64_t c = int64_t(threadIdx.x) * width; c < C; c += int64_t(blockDim.x) * width) {
    float sum[width] = {};
    for (int64_t i = first; i < N; ++i) {
      const int64_t n = order[i];
      if (tokens[n] != id) break;
      const Pack<bf16> row = *reinterpret_cast<const Pack<bf16>*>(dout + n * C + c);
#pragma unroll
      for (int j = 0; j < width; ++j) sum[j] += row[j];
    }
    float4* to = reinterpret_cast<float4*>(dtable + int64_t(id) * C + c);
    const float4 low = to[0], high = to[1];
    to[0] = {low.x + sum[0], low.y + sum[1], low.z + sum[2], low.w + sum[3]};
    to[1] = {high.x + sum[4], high.y + sum[5], high.z + sum[6], high.w + sum[7]};
  }
}

inline int64_t scratch_bytes(int64_t N) {
  return int64_t(bucket_scratch_bytes(N, buckets)) + 2 * N * int64_t(sizeof(int32_t));
}

// dtable (V,C) += the sum of dout (N,C) over the positions of each token.
inline void backward(GpuBase& dev, float* dtable, void* scratch, const int32_t* tokens, const bf16* dout, int64_t N,
                     int64_t C, int64_t V) {
  if (C % width) fail("embedding_backward 03_sorted: C must be a multiple of 8, not ", C);
  int32_t* orders = static_cast<int32_t*>(scratch) + bucket_scratch_bytes(N, buckets) / sizeof(int32_t);
  const int32_t* order = nullptr;
  for (int pass = 0; pass == 0 || (V - 1) >> (pass * digit_bits) > 0; ++pass) {
    int32_t* next = orders + pass % 2 * N;
    bucket_items(dev, nullptr, nullptr, scratch, N, buckets, 0, DigitOf{tokens, order, pass * digit_bits},
                 Place{next, order});
    order = next;
  }
  const int64_t threads = std::min<int64_t>(256, ceil_div(C / width, 32) * 32);
  launch(dev, add_lists, unsigned(N), unsigned(threads), 0, dtable, order, tokens, dout, N, C);
}

}  // namespace sorted
