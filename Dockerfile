# gpt-moe.cu for machines with NVIDIA GPUs: CUDA and NCCL of NVIDIA's image (Docker Hub), the rest from its distribution.
#   docker build -t gpt-moe .
#   docker run --rm --gpus all --ipc host -v "$PWD/data:/gpt-moe/data" -v "$PWD/runs:/gpt-moe/runs" gpt-moe train_gpt_moe --preset tiny
# scripts/launch/container.sh trains on all GPUs of a machine in the bare image, building as it starts; IMAGE=gpt-moe spares it
# installing the packages.
ARG IMAGE=nvidia/cuda:13.0.0-devel-ubuntu24.04
FROM ${IMAGE}
WORKDIR /gpt-moe
COPY scripts/setup.sh scripts/setup.sh
RUN scripts/setup.sh && rm -rf /var/lib/apt/lists/*
COPY . .
# Host code for any processor of the architecture: an image travels.
RUN cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DGPT_MOE_TESTS=OFF -DGPT_MOE_NATIVE=OFF \
  && cmake --build build -j "$(nproc)" && cmake --install build --prefix /usr/local && ldconfig && rm -rf build
CMD ["train_gpt_moe", "--help"]
