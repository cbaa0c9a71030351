#!/usr/bin/env bash
# Builds and runs every ladder of dev/ on this GPU: checks, tables, and lines appended to dev/results/<gpu>.jsonl, all with
# one run id. Says how long each took. Fails if a check of any fails, but only after running the others; one that this
# machine cannot run (exit code 77) is skipped by name.
#   scripts/bench_dev.sh [--quick] [other options of the programs, such as --out FILE or --check-only]
#   BUILD=folder PREBUILT=1 scripts/bench_dev.sh     with the programs that are there, without building
#   FAMILIES="rmsnorm router" scripts/bench_dev.sh   only these
# A ladder is a folder NAME that holds NAME.cu (or .cpp) and needs a GPU (those named *_cpu do not). They run in the order of
# reading (dev/README.md): products, memory-bound ops, routing, experts, attention; then what is new, by name; last the whole
# layer and the profile of a step. With --quick, or with --shapes or --variants, results go where --out says, or nowhere.
set -uo pipefail
cd "$(dirname "$0")/.."

build=${BUILD:-build}
export RUN_ID=${RUN_ID:-$(date -u +%Y%m%dT%H%M%SZ)}
[ -n "${PREBUILT:-}" ] || make dev BUILD="$build" || exit 1

first=(dense_gemm swiglu rmsnorm rope_qknorm embedding_backward classifier global_norm adamw
  router routing_plan combine grouped_gemm experts down_combine attention_forward attention_backward)
last=(collectives moe_layer step_profile)
is_family() { [ -f "dev/$1/$1.cu" ] || [ -f "dev/$1/$1.cpp" ]; }
order() {
  local folder name
  for name in "${first[@]}"; do if is_family "$name"; then echo "$name"; fi; done
  for folder in dev/*/; do
    name=$(basename "$folder")
    case " ${first[*]} ${last[*]} " in *" $name "*) continue ;; esac
    case $name in *_cpu) continue ;; esac
    if is_family "$name"; then echo "$name"; fi
  done
  for name in "${last[@]}"; do if is_family "$name"; then echo "$name"; fi; done
}
mapfile -t families < <(if [ -n "${FAMILIES:-}" ]; then tr ' ' '\n' <<<"$FAMILIES"; else order; fi)

failed=() times=()
for name in "${families[@]}"; do
  echo "== $name $*"
  begin=$SECONDS
  "$build/$name" "$@"
  status=$? note=
  case $status in 0) ;; 77) note=" (skipped)" ;; *) failed+=("$name") note=" (failed)" ;; esac
  times+=("$(printf '%5d s  %s%s' $((SECONDS - begin)) "$name" "$note")")
done

echo "== seconds"
printf '%s\n' "${times[@]}"
printf '%5d s  in all (run %s)\n' "$SECONDS" "$RUN_ID"
echo "tables and charts from the results: scripts/plot.py dev && scripts/dev_table.py"
if [ ${#failed[@]} -gt 0 ]; then
  echo "bench_dev: failed: ${failed[*]} (run $RUN_ID)" >&2
  exit 1
fi
echo "bench_dev: all checks passed (run $RUN_ID)"
