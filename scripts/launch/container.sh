#!/usr/bin/env bash
# Training in a container on this machine, with its GPUs: CUDA and NCCL come from NVIDIA's image, the rest from its
# distribution. The repository is mounted: data, runs and the container's own build (build-container/) stay outside.
#   scripts/launch/container.sh N OPTIONS...   as node.sh
#   IMAGE=...   default nvidia/cuda:13.0.0-devel-ubuntu24.04;  ENGINE=podman   default docker
set -euo pipefail
cd "$(dirname "$0")/../.."
case ${1:-} in '' | -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
exec "${ENGINE:-docker}" run --rm --gpus all --ipc host --ulimit memlock=-1 -v "$PWD:/gpt-moe" -w /gpt-moe \
  "${IMAGE:-nvidia/cuda:13.0.0-devel-ubuntu24.04}" bash -c '
  scripts/setup.sh && cmake -S . -B build-container -DCMAKE_BUILD_TYPE=Release -DGPT_MOE_TESTS=OFF &&
    cmake --build build-container --target train_gpt_moe -j &&
    TRAINER=build-container/train_gpt_moe exec scripts/launch/node.sh "$@"' -- "$@"
