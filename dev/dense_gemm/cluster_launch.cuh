// launch() of llmc/cuda_common.cuh for a grid whose blocks form clusters of `cluster` neighbours: grid.x is a multiple
// of it. (__cluster_dims__ on the kernel would do the same, but does not compile for GPUs without clusters.)
#pragma once
#include "llmc/cuda_common.cuh"

template <class... Params, class... Args>
void launch_clusters(GpuBase& dev, void (*kernel)(Params...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                     const Args&... args) {
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = dev.stream;
  config.attrs = &size, config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}
