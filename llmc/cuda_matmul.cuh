// One dense product on the GPU with the types of its operands free: what matmul.cu and the router are made of.
#pragma once
#include "llmc/gpu.h"

// A row-major matrix; stride: elements from row to row.
struct MatrixView {
  void* data;
  int64_t stride;
  bool is_bf16;
};
template <class T>
MatrixView view(const T* data, int64_t stride) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, float>);
  return {const_cast<T*>(data), stride, std::is_same_v<T, bf16>};
}

// C (M,N) = op(A) (M,K) * op(B) (K,N), or C += where accumulate is set, summed in fp32 and rounded once; else C is
// not read. A and B have the same type. A transposed operand is stored with its dimensions exchanged. Through cuBLASLt,
// or a plain kernel where that is asked for (--plain-matmul) or the library has no algorithm. scratch:
// dense_scratch_bytes().
void dense_product(GpuBase& dev, const MatrixView& c, void* scratch, const MatrixView& a, bool transpose_a,
                   const MatrixView& b, bool transpose_b, int64_t M, int64_t N, int64_t K, bool accumulate);
size_t dense_scratch_bytes();
