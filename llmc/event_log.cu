#include "llmc/event_log.h"

#include <nvtx3/nvToolsExt.h>

#include "llmc/cuda_common.cuh"

GpuEvents::~GpuEvents() {
  for (cudaEvent_t e : events_) cudaEventDestroy(e);
}
size_t GpuEvents::mark() {
  if (used_ == events_.size()) {
    cudaEvent_t e;
    CUDA_CHECK(cudaEventCreate(&e));
    events_.push_back(e);
  }
  CUDA_CHECK(cudaEventRecord(events_[used_], dev_.stream));
  return used_++;
}
double GpuEvents::ms(size_t from, size_t to) const {
  float ms = 0;
  CUDA_CHECK(cudaEventSynchronize(events_[to]));
  CUDA_CHECK(cudaEventElapsedTime(&ms, events_[from], events_[to]));
  return ms;
}
void GpuEvents::begin_range(const char* name) { nvtxRangePushA(name); }
void GpuEvents::end_range() { nvtxRangePop(); }
