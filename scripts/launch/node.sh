#!/usr/bin/env bash
# Training on all GPUs (or processes) of this machine: one process each.
#   scripts/launch/node.sh N OPTIONS...        e.g. scripts/launch/node.sh 8 --preset olmoe-1b-7b-size --dp 8 --ep 8 ...
# With mpirun where it is installed, else over TCP on this machine. What goes wrong on a rank ends the whole job.
#   TRAINER=FILE   the binary (default ./train_gpt_moe, built if it is not there)
set -euo pipefail
cd "$(dirname "$0")/../.."
case ${1:-} in '' | -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
n=$1; shift
case $n in *[!0-9]* | 0*) echo "node.sh: the number of processes must be a number, not '$n' (--help)" >&2; exit 1 ;; esac
TRAINER=${TRAINER:-./train_gpt_moe}
[ -x "$TRAINER" ] || make train_gpt_moe
if command -v mpirun >/dev/null; then
  root=(); [ "$(id -u)" -ne 0 ] || root=(--allow-run-as-root)
  exec mpirun "${root[@]}" --oversubscribe --bind-to none -np "$n" "$TRAINER" "$@"
fi
export WORLD_SIZE=$n MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29500}
pids=()
for ((rank = 0; rank < n; ++rank)); do RANK=$rank "$TRAINER" "$@" & pids+=($!); done
trap 'kill "${pids[@]}" 2>/dev/null' INT TERM
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
