// The host's part of Hopper kernels: whether this GPU runs them, and descriptions of tensors for TMA. The driver makes
// these; its function is looked up while the program runs, so that a machine without a driver can start it.
#include "llmc/hopper.cuh"

namespace hopper {

namespace {
__global__ void probe() {}
}  // namespace

bool is_compiled() {
  static const bool compiled = [] {
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, probe));
    return attributes.ptxVersion >= 90;
  }();
  return compiled;
}
bool usable(const GpuBase& dev) { return dev.capability == 90 && is_compiled(); }

TensorMap tensor_map(const bf16* data, int64_t batches, int64_t rows, int64_t width, int64_t batch_stride, int box_rows,
                     int box_columns) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || !function)
      fail(
          "CUDA: the driver has no cuTensorMapEncodeTiled: it is too old for Hopper's kernels; update it or use "
          "--experts portable");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t sizes[3] = {cuuint64_t(width), cuuint64_t(rows), cuuint64_t(batches)};
  const cuuint64_t strides[2] = {cuuint64_t(width) * 2, cuuint64_t(batch_stride) * 2};  // bytes; of rows, of batches
  const cuuint32_t box[3] = {cuuint32_t(box_columns), cuuint32_t(box_rows), 1}, every[3] = {1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<bf16*>(data), sizes, strides, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    fail("CUDA: cuTensorMapEncodeTiled refused a tensor of ", batches, " x ", rows, " x ", width, " bf16 at ",
         static_cast<const void*>(data), " (error ", int(result),
         "): it takes 16-byte aligned data, rows of whole 16 bytes");
  return map;
}

}  // namespace hopper
