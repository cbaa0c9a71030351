# The short verbs. CMakeLists.txt describes the build; this only calls it.
#   CUDA=0      build for the CPU even where nvcc is found
BUILD ?= build
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
GENERATOR := $(shell command -v ninja >/dev/null 2>&1 && echo "-G Ninja")
CUDA ?= 1

.PHONY: help train_gpt_moe test test_gpu quickstart lint clean dev
help:
	@echo "make train_gpt_moe   build the trainer (leaves ./train_gpt_moe)"
	@echo "make quickstart      set-up, data, training, generated text  (scripts/quickstart.sh)"
	@echo "make test            set-up, all tests that this machine can run  (scripts/test.sh)"
	@echo "make test_gpu        the tests that need a GPU  (scripts/test_gpu.sh)"
	@echo "make dev             build the benchmarks in dev/"
	@echo "make lint            include arrows, formatting (clang-format)"
	@echo "make clean           remove build folders and the binary"

train_gpt_moe:
	@cmake -S . -B $(BUILD) $(if $(wildcard $(BUILD)/CMakeCache.txt),,$(GENERATOR)) -DGPT_MOE_TESTS=OFF -DGPT_MOE_CUDA=$(CUDA)
	@cmake --build $(BUILD) --target train_gpt_moe -j $(JOBS)
	@cp $(BUILD)/train_gpt_moe train_gpt_moe

dev:
	@cmake -S . -B $(BUILD) $(if $(wildcard $(BUILD)/CMakeCache.txt),,$(GENERATOR)) -DGPT_MOE_TESTS=OFF -DGPT_MOE_CUDA=$(CUDA)
	@cmake --build $(BUILD) --target dev -j $(JOBS)

test:
	@scripts/test.sh

test_gpu:
	@scripts/test_gpu.sh

quickstart:
	@scripts/quickstart.sh

lint:
	@dev/check_layers.sh
	@dev/check_format.sh

clean:
	rm -rf build build-* train_gpt_moe
