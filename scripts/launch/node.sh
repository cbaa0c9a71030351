#!/usr/bin/env bash
# Training on all GPUs (or processes) of this machine: one process each.
#   scripts/launch/node.sh N OPTIONS...        e.g. scripts/launch/node.sh 8 --preset olmoe-1b-7b-size --dp 8 --ep 8 ...
# With mpirun where it is installed, else over TCP on this machine. What goes wrong on a rank ends the whole job; Ctrl-C or
# SIGTERM ends it after a step, with a checkpoint.
#   TRAINER=FILE   the binary (default ./train_gpt_moe, built if it is not there)
set -euo pipefail
cd "$(dirname "$0")/../.."
case ${1:-} in '' | -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
n=$1; shift
case $n in *[!0-9]* | 0*) echo "node.sh: the number of processes must be a number, not '$n' (--help)" >&2; exit 1 ;; esac
TRAINER=${TRAINER:-./train_gpt_moe}
[ -x "$TRAINER" ] || make train_gpt_moe
# Ranks that each took all processors would wait for each other's threads.
threads=$(($(nproc 2>/dev/null || echo "$n") / n))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
pids=()
if command -v mpirun >/dev/null; then
  root=(); [ "$(id -u)" -ne 0 ] || root=(--allow-run-as-root)
  setsid mpirun "${root[@]}" --oversubscribe --bind-to none -np "$n" "$TRAINER" "$@" & pids+=($!)
else
  export WORLD_SIZE=$n MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29500}
  for ((rank = 0; rank < n; ++rank)); do RANK=$rank setsid "$TRAINER" "$@" & pids+=($!); done
fi
# mpirun would kill the ranks two seconds after it was told to stop; SIGUSR1 it hands on, and they stop after a step.
trap 'kill -USR1 "${pids[@]}" 2>/dev/null' INT TERM
status=0
for pid in "${pids[@]}"; do
  wait "$pid" && one=0 || one=$?
  while [ "$one" -gt 128 ] && kill -0 "$pid" 2>/dev/null; do wait "$pid" && one=0 || one=$?; done
  [ "$one" -eq 0 ] || status=$one
done
exit "$status"
