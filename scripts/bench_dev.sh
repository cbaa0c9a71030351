#!/usr/bin/env bash
# Builds and runs every program of the kernel laboratory on this GPU: checks, tables, and lines appended to
# dev/results/<gpu>.jsonl, all with one run id. Fails if a check of any program fails, but only after running the others.
#   scripts/bench_dev.sh [--quick] [other options of the programs, such as --out FILE]
#   BUILD=folder PREBUILT=1 scripts/bench_dev.sh     with the programs that are there, without building
set -uo pipefail
cd "$(dirname "$0")/.."

build=${BUILD:-build}
export RUN_ID=${RUN_ID:-$(date -u +%Y%m%dT%H%M%SZ)}
[ -n "${PREBUILT:-}" ] || make dev BUILD="$build" || exit 1

failed=()
run() {  # run PROGRAM OPTIONS...
  echo "== $*"
  "$build/$1" "${@:2}" || failed+=("$1")
}
for program in routing_plan router swiglu rmsnorm rope combine embedding classifier adamw attention dense_gemm grouped_gemm experts down_combine; do
  run "$program" "$@"
done
run moe_layer --dispatch materialized "$@"
run step_profile "$@"

if [ ${#failed[@]} -gt 0 ]; then
  echo "bench_dev: failed: ${failed[*]} (run $RUN_ID)" >&2
  exit 1
fi
echo "bench_dev: all checks passed (run $RUN_ID)"
