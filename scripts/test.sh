#!/usr/bin/env bash
# All tests that this machine can run: include arrows, unit tests and whole-model tests, end-to-end runs of the trainer,
# and everything that reads files or options once more under AddressSanitizer and UndefinedBehaviorSanitizer (of the runs
# of several processes a part).
# Where nvcc (12.5 or later) is, the CUDA backend, its tests and the benchmarks in dev/ are compiled and linked for sm_80 and
# sm_90a too; what needs a GPU is skipped by name (scripts/test_gpu.sh runs it). Closes with ctest's summary.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
dev/check_layers.sh

jobs=$(nproc 2>/dev/null || echo 2)  # before OMP_NUM_THREADS, which nproc heeds
export OMP_NUM_THREADS=1             # tests run side by side, one thread each
generator=()
command -v ninja >/dev/null 2>&1 && generator=(-G Ninja)
build() {  # build PRESET FOLDER-SUFFIX
  [ -f "build-$2/CMakeCache.txt" ] && cmake --preset "$1" >/dev/null || cmake --preset "$1" "${generator[@]}" >/dev/null
  cmake --build "build-$2" -j "$jobs"
}

build sanitize sanitize
ctest --test-dir build-sanitize -j "$jobs" --output-on-failure --no-tests=error

build release test
with_cuda() { grep -q '^GPT_MOE_WITH_CUDA:INTERNAL=ON' build-test/CMakeCache.txt; }
! with_cuda || cmake --build build-test --target dev -j "$jobs"
ctest --test-dir build-test -j "$jobs" --output-on-failure --no-tests=error

if with_cuda; then
  echo "CUDA backend: compiled and linked for sm_80 and sm_90a, with the benchmarks in dev/"
  echo "SKIPPED: what runs on a GPU (scripts/test_gpu.sh)"
else
  echo "SKIPPED: compiling the CUDA backend (no nvcc 12.5 or later here)"
fi
