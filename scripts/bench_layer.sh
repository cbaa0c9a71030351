#!/usr/bin/env bash
# One MoE layer, router included: ours (build/moe_layer) and those of other projects (dev/moe_layer/peers.py) on this GPU
# in one run, appended to one file of results, then the table that scripts/layer_table.py makes of it. Peers that are not
# installed are named and left out; PyTorch has to be there.
#   scripts/bench_layer.sh [--quick] [--shapes A,B] [--peers A,B] [--out FILE]
#   --out FILE                             default dev/results/<gpu>.jsonl
#   BUILD=folder PREBUILT=1 scripts/bench_layer.sh     with the program that is there, without building
set -euo pipefail
cd "$(dirname "$0")/.."

build=${BUILD:-build} out='' common=() peers=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --quick) common+=("$1"); shift ;;
    --shapes | --peers | --out)
      [ $# -ge 2 ] || { echo "bench_layer: $1 needs a value" >&2; exit 1; }
      case $1 in --shapes) common+=("$1" "$2") ;; --peers) peers+=("$1" "$2") ;; --out) out=$2 ;; esac
      shift 2 ;;
    *) echo "bench_layer: unknown option $1 (--help)" >&2; exit 1 ;;
  esac
done
export RUN_ID=${RUN_ID:-$(date -u +%Y%m%dT%H%M%SZ)}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0 2>/dev/null) ||
  { echo "bench_layer: nvidia-smi finds no GPU" >&2; exit 1; }
short_name='import sys, compare_curves; print(compare_curves.short_name(sys.argv[1]))'
[ -n "$out" ] || out=dev/results/$(PYTHONPATH=dev/reference python3 -B -c "$short_name" "$gpu").jsonl
[ -n "${PREBUILT:-}" ] || make dev BUILD="$build"
[ -x "$build/moe_layer" ] || { echo "bench_layer: no $build/moe_layer (make dev builds it where nvcc is)" >&2; exit 1; }

failed=()
"$build/moe_layer" --variants production "${common[@]}" --out "$out" --run-id "$RUN_ID" || failed+=(moe_layer)
python3 dev/moe_layer/peers.py "${common[@]}" "${peers[@]}" --json "$out" --run-id "$RUN_ID" || failed+=(peers.py)
echo
python3 scripts/layer_table.py "$out" --run-id "$RUN_ID" || failed+=(layer_table.py)
if [ ${#failed[@]} -gt 0 ]; then
  echo "bench_layer: failed: ${failed[*]} (run $RUN_ID)" >&2
  exit 1
fi
