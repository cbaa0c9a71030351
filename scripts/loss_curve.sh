#!/usr/bin/env bash
# Trains the preset gpt124-8x2 on this GPU with our trainer and with PyTorch (dev/reference/loss_curve.py), from the
# same initial weights on the same samples, and compares the loss curves (dev/reference/compare_curves.py). Exit status
# 1 where ours leaves the range that other seeds of the reference span. Needs PyTorch, and about 40 GiB of GPU memory.
#   scripts/loss_curve.sh [--out FILE]    one line of results is appended to FILE (default dev/results/<gpu>.jsonl)
#   DATA='data/kjv/kjv_train.bin'  STEPS=200  BATCH=8  SEQ=1024  LR=3e-4
#   SEEDS=42,43,44        of the reference; the trainer's is the first
#   STREAM=fp32           residual stream of the reference: fp32, or bf16 as the trainer's
#   TRAINER=FILE          the binary to use; without it, it is built
#   PYTHON=python3        one that has PyTorch
#   RUN=runs/loss_curve   logs and curves stay there; the trainer's checkpoint (8 GB) is removed
set -euo pipefail
cd "$(dirname "$0")/.."

result=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) result=(--out "${2:?--out needs a file}"); shift 2 ;;
    *) echo "loss_curve: unknown option $1 (only --out FILE)" >&2; exit 2 ;;
  esac
done
DATA=${DATA:-data/kjv/kjv_train.bin} STEPS=${STEPS:-200} BATCH=${BATCH:-8} SEQ=${SEQ:-1024} LR=${LR:-3e-4}
SEEDS=${SEEDS:-42,43,44} STREAM=${STREAM:-fp32} PYTHON=${PYTHON:-python3} RUN=${RUN:-runs/loss_curve}
RUN_ID=${RUN_ID:-$(date -u +%Y%m%dT%H%M%SZ)}
seed=${SEEDS%%,*}
[ "$seed" != "$SEEDS" ] || { echo "loss_curve: SEEDS must name two or more, with commas" >&2; exit 2; }
compgen -G "$DATA" >/dev/null || { echo "loss_curve: no file matches $DATA: set DATA, or run data/kjv.py" >&2; exit 1; }
if [ -z "${TRAINER:-}" ]; then
  make train_gpt_moe
  TRAINER=./train_gpt_moe
fi

ours=$RUN/ours
rm -rf "$ours"
mkdir -p "$RUN"
trap 'rm -rf "$ours"/step_* "$ours"/latest' EXIT
"$TRAINER" --device cuda --dtype bf16 --preset gpt124-8x2 --batch-size "$BATCH" --seq-len "$SEQ" --train-data "$DATA" \
  --val-data '' --steps "$STEPS" --lr "$LR" --seed "$seed" --checkpoint-every 0 --out "$ours"
rm -rf "$ours"/step_* "$ours"/latest

"$PYTHON" dev/reference/loss_curve.py --train-data "$DATA" --steps "$STEPS" --batch-size "$BATCH" --seq-len "$SEQ" \
  --lr "$LR" --seeds "$SEEDS" --stream "$STREAM" --out "$RUN/reference.jsonl"

extra=$(DATA=$DATA BATCH=$BATCH SEQ=$SEQ LR=$LR STREAM=$STREAM python3 - <<'PYTHON'
import json, os
env = os.environ
print(json.dumps({"B": int(env["BATCH"]), "T": int(env["SEQ"]), "lr": float(env["LR"]), "data": env["DATA"],
                  "variant": "reference stream " + env["STREAM"]}))
PYTHON
)
python3 dev/reference/compare_curves.py --ours "$ours/log.jsonl" --reference "$RUN/reference.jsonl" --seed "$seed" \
  --steps-out "$RUN/differences.jsonl" --gpu "$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0)" \
  --run-id "$RUN_ID" --extra "$extra" "${result[@]}"
