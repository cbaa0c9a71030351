#!/usr/bin/env bash
# Everything that needs a GPU: every op against the CPU in double precision, the whole model against the PyTorch
# reference and against itself, the trainer end to end, models to transformers and back, compute-sanitizer's four checkers on them, and two of these on
# every rung of dev/. Closes with the names of the tests that were skipped, if any, and 'N passed, M failed'; fails if
# any did. On an H100 with 16 cores the tests take two and a half minutes, each of the first three checkers one, the race
# checker several.
#   scripts/test_gpu.sh            BUILD=folder  where to build (default build-test)
#   PREBUILT=1                     test what BUILD holds, without building
#   CHECKERS="memcheck racecheck"  only these of memcheck, initcheck, synccheck, racecheck
set -uo pipefail
cd "$(dirname "$0")/.."

build=${BUILD:-build-test} work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PREBUILT:-}" ]; then
  jobs=$(nproc 2>/dev/null || echo 2)
  [ -f "$build/CMakeCache.txt" ] || cmake --preset release -B "$build" >/dev/null || exit 1
  cmake --build "$build" -j "$jobs" && cmake --build "$build" -j "$jobs" --target dev_cuda || exit 1
fi
ops=(test_gpu_device test_gpu_matmul test_gpu_ops test_gpu_update test_gpu_router test_gpu_dispatch test_gpu_experts test_gpu_attention test_gpu_parallel test_gpu_vocabulary test_gpu_pull test_gpu_library)
[ -x "$build/${ops[0]}" ] || { echo "test_gpu: $build has no GPU tests: it was built without CUDA (nvcc 12.5 or later)" >&2; exit 1; }
if "$build/test_gpu_device" --gtest_brief=1 2>/dev/null | grep -q "no GPU:"; then
  "$build/test_gpu_device" 2>/dev/null | grep -m1 "no GPU:" >&2
  exit 1
fi

passed=0 failed=0 skipped=()
count() {  # count NAME STATUS: one test that is not GoogleTest's or unittest's
  if [ "$2" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAILED: $1"; fi
}
count_tests() {  # count_tests PROGRAM STATUS RAN FAILED SKIPPED...: those of a program, the skipped ones by name
  local name=$1 status=$2 ran=$3 bad=$4 test
  shift 4
  [ "$status" -eq 0 ] || [ "$bad" -gt 0 ] || bad=1  # it died
  [ $((bad + $#)) -le "$ran" ] || ran=$((bad + $#))  # of one test several cases may fail
  passed=$((passed + ran - bad - $#)) failed=$((failed + bad))
  for test in "$@"; do skipped+=("$name $test"); done
  echo "$name: $((ran - bad - $#)) of $ran passed${1:+, $# skipped}"
  [ "$bad" -eq 0 ] || cat "$work/$name.log"
}
gtest() {  # gtest PROGRAM FILTER
  "$build/$1" --gtest_brief=1 --gtest_filter="$2" --gtest_output="json:$work/$1.json" >"$work/$1.log" 2>&1
  local status=$?
  count_tests "$1" $status $(python3 - "$work/$1.json" <<'PYTHON' 2>/dev/null || echo 1 1
import json, sys
result = json.load(open(sys.argv[1]))
skipped = [suite["name"] + "." + test["name"] for suite in result["testsuites"] for test in suite["testsuite"]
           if test["result"] != "COMPLETED"]
print(result["tests"], result["failures"] + result["errors"], *skipped)
PYTHON
  )
}

trainer=(test_trainer test_interruption test_evaluate test_hf test_gpu_trainer)
for name in "${trainer[@]}"; do  # many short processes: beside the rest
  (TRAINER=$build/train_gpt_moe TRAINER_DEVICE=cuda python3 "dev/test/$name.py" -v >"$work/$name.log" 2>&1
    echo $? >"$work/$name.status") &
done

for program in "${ops[@]}"; do gtest "$program" '*'; done
gtest test_gpt_moe '*Gpu*:*OnTheGpu*:SameBits/2.*:SameBits/3.*:Training/2.*:Training/3.*:Faults/2.*:Faults/3.*:BadNumbers/2.*:BadNumbers/3.*:Graphs/*'

wait
for name in "${trainer[@]}"; do
  ran=$(sed -n 's/^Ran \([0-9]*\) tests\{0,1\} .*/\1/p' "$work/$name.log")
  bad=$(grep -cE '^(FAIL|ERROR): ' "$work/$name.log")
  mapfile -t names < <(awk '/^[A-Za-z_0-9]+ \(/ { name = $1 } /(^|\.\.\. )skipped ["\047]/ { print name }' "$work/$name.log")
  count_tests "$name" "$(cat "$work/$name.status")" "${ran:-1}" "$bad" "${names[@]}"
done

echo "== transformers"
python3 scripts/hf_roundtrip.py --trainer "$build/train_gpt_moe" --device cuda >"$work/hf_roundtrip.log" 2>&1
status=$?
cat "$work/hf_roundtrip.log"
if [ $status -eq 77 ]; then skipped+=("scripts/hf_roundtrip.py"); else count "scripts/hf_roundtrip.py" $status; fi

echo "== compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -z "$sanitizer" ]; then
  count "compute-sanitizer is not installed" 1
else
  python3 - "$work/tokens.bin" <<'PYTHON'
import array, sys
ids = array.array("H", [256] + [(i * i) % 251 for i in range(4000)])
with open(sys.argv[1], "wb") as file:
    file.write(array.array("i", [20240520, 1, len(ids), 1] + [0] * 252).tobytes() + ids.tobytes())
PYTHON
  check() {  # check NAME TOOL COMMAND...: in the background
    local name=$1 tool=$2
    shift 2
    (timeout 900 "$sanitizer" --tool "$tool" --error-exitcode 9 "$@" >"$work/$tool.$name.log" 2>&1
      echo $? >"$work/$tool.$name.status") &
  }
  results() {  # results TOOL NAME...: waits, and counts each
    local tool=$1 name status
    shift
    wait
    for name in "$@"; do
      status=$(cat "$work/$tool.$name.status")
      if [ "$status" -eq 0 ] && grep -q '^\[  PASSED  \] 0 tests' "$work/$tool.$name.log"; then  # GoogleTest skipped all
        skipped+=("$tool $name")
      else
        count "$tool $name (status $status)" "$status"
      fi
      [ "$status" -eq 0 ] || tail -n 30 "$work/$tool.$name.log"
    done
    echo "$tool: done"
  }
  train() {  # a short training run whose tensors are allocations of their own
    echo "$build/train_gpt_moe" --device cuda --preset tiny --batch-size 2 --seq-len 64 --max-new-tokens 8 --arena separate \
      --train-data "$work/tokens.bin" --val-data "$work/tokens.bin" --out "$work/$1" "${@:2}"
  }
  for tool in ${CHECKERS:-memcheck initcheck synccheck racecheck}; do
    # The race checker follows every access to shared memory: the smallest shapes, and our own products.
    for program in "${ops[@]}"; do
      filter='*Small*'
      [ $tool = racecheck ] && [ "$program" = test_gpu_experts ] && filter='All/HopperTile.Tiny/*'
      [ $tool = racecheck ] && [ "$program" = test_gpu_router ] && filter='GpuRouter/0.FreeChoiceSmall:GpuRouter/0.BiasUpdateSmall:GpuRouter/0.TiesGoToTheLowerIndexSmall'
      [ $tool = racecheck ] && [ "$program" = test_gpu_matmul ] && filter='GpuClassifier/0.CrossEntropySmall:GpuClassifier/0.LossSumSmall'
      [ $tool = racecheck ] && [ "$program" = test_gpu_update ] && filter='GpuUpdate/0.NormAndClippingSmall:GpuUpdate/0.AdamWSmall:GpuUpdate/0.OutliersSmall'
      check "$program" $tool "$build/$program" --gtest_brief=1 --gtest_filter="$filter"
    done
    small=(--n-layer 2 --steps 2 --sample-every 2)
    [ $tool = racecheck ] && small=(--plain-matmul --n-layer 1 --d-model 32 --d-expert 16 --n-head 1 --n-kv-head 1 --steps 1 --sample-every 0)
    check train_bf16 $tool $(train "$tool.bf16" --recompute up "${small[@]}")
    check train_fp32 $tool $(train "$tool.fp32" --dtype fp32 --dispatch materialized "${small[@]}")
    results $tool "${ops[@]}" train_bf16 train_fp32
  done

  # Every rung at its reduced size. Two kernels that wait for each other (collectives) do not run under a checker.
  ladders=()
  for rung in dev/*/01_*.cuh; do
    name=$(basename "$(dirname "$rung")")
    [ "$name" = collectives ] || ladders+=("$name")
  done
  for tool in ${CHECKERS:-memcheck racecheck}; do
    case $tool in memcheck | racecheck) ;; *) continue ;; esac
    for name in "${ladders[@]}"; do
      select=()  # the race checker keeps gigabytes for products with many tiles: one shape, and no loop over experts
      [ $tool$name = racecheckgrouped_gemm ] && select=(all fine-128x8)
      [ $tool$name = racecheckmoe_layer ] && select=(production,02,03,04,05,07 fine-128x8)
      [ $tool$name = racecheckattention_backward ] && select=(all b4t1024h64,b8t4096h128)
      check "$name" $tool "$build/$name" "${select[@]}" --check-only
    done
    results $tool "${ladders[@]}"
  done
fi

for name in "${skipped[@]}"; do echo "SKIPPED: $name"; done
echo "$passed passed, $failed failed${skipped:+, ${#skipped[@]} skipped}"
[ "$failed" -eq 0 ]
