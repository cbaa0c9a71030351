#!/usr/bin/env bash
# Is MoE worth it? Trains a dense model and MoE models of 8 experts, 2 a token, 64 and 128, 8 a token, on the same text with
# equal compute a token, three seeds each, and appends a line a run to dev/results/worth.jsonl, of which scripts/worth.py
# makes the table and the chart in the README. Runs that are in the file already, with these very options on this GPU, are
# not made again: call it again after an interruption. Exit status 3: some are still to be made (BUDGET_S).
#   data/debian.py                makes the text, once
#   scripts/worth.sh probe        how fast each shape is here, and how long all runs will take (about a minute)
#   scripts/worth.sh sweep        the learning rate: a run of a quarter of the steps for each shape and each of LRS
#   scripts/worth.sh              the runs: about 25 minutes on one H200, by the rates of shorter ones
#   STEPS=3200                    of 32768 tokens: 105 million, 3.6 epochs of data/debian.py
#   SHAPES='dense 8x2 64x8 128x8'  SEEDS='1 2 3'  LRS='1e-3 2e-3 4e-3'
#   LR=1e-3                       or a rate a shape: 'dense=1e-3 8x2=2e-3 64x8=2e-3 128x8=2e-3'
#   BUDGET_S=540                  start no run that would not end within so many seconds from now
#   RUN=/dev/shm/worth            where runs are while they last; their checkpoints (up to 3 GB) are removed
#   SIZE=toy                      2 layers of 64 on 512 tokens a step, to try the script out on a CPU (VOCABULARY=257: on bytes)
#   DATA=data/debian  OUT=dev/results/worth.jsonl  DEVICE=auto  TRAINER=FILE (without it, it is built)  COMMIT=of the source
#
# Equal compute: all shapes have the same attention and the same width of MLP that a token passes through, K*F = 1024 = 2C.
#   a layer's attention   4*C*C    = 4*512*512        = 1,048,576 parameters
#   a layer's MLP         3*C*K*F  = 3*512*1024       = 1,572,864   dense 1x1024, 8x2 2x512, 64x8 and 128x8 8x128
#   8 layers                                           = 20,971,520 active, the embedding (tied to the head) aside
#   the router            E*C a layer: 8*E*512, which is 0.2 % more with 8 experts, 1.2 % with 64, 2.5 % with 128
#   head                  V*C      = 50257*512         = 25,731,584, the same for all
# Gates are DeepSeek-V3's, sigmoids divided by their sum (arXiv 2412.19437, section 2.1.2), times K: K experts of width F then
# add up to as much as one MLP of width K*F does. Gates that sum to 1 begin with a K-th of that, and a short run pays for it
# (4 layers of 128, 64x8, 250 steps of 1024 bytes on a CPU: 2.72 nats a byte with softmax, 2.50 with these).
# Balance losses are the trainer's defaults, 0.01 and 0.001 a layer (Switch Transformer, arXiv 2101.03961; ST-MoE, 2202.08906).
# The learning rate is one for all unless LR says otherwise. The sweep says 5e-4 or 1e-3 (one H200, 330 steps, the last
# validation loss):
#   2.5e-4 5e-4 1e-3 2e-3 4e-3    dense 3.94 3.73 3.78 3.92 4.05    8x2 3.81 3.70 3.80 3.89 3.75
#                                 64x8 3.75 3.55 3.59 3.70 3.83    128x8 3.73 3.55 3.53 3.80 3.97
# (`LRS='2.5e-4 5e-4 1e-3 2e-3 4e-3' STEPS=1320 scripts/worth.sh sweep`), and runs of 1320 steps at 1e-3 ended lower than those at
# 2e-3, with every shape (5e-4 was not tried at that length). 1320 steps are too few: between the 250th and the 600th the loss
# falls from 3.3 to 2.6, probably when attention learns to copy from the context, with more experts a hundred steps later; until
# then the shapes with more experts lead, afterwards they catch up, and at the end of so short a run they lie no further apart
# than seeds do.
set -euo pipefail
cd "$(dirname "$0")/.."

verb=${1:-run}
case $verb in
  run | probe | sweep) ;;
  -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
  *) echo "worth: '$verb' is not one of run, probe, sweep (--help)" >&2; exit 2 ;;
esac
[ $# -le 1 ] || { echo "worth: '$2': only one of run, probe, sweep; options are variables (--help)" >&2; exit 2; }
SIZE=${SIZE:-full} DEVICE=${DEVICE:-auto} DATA=${DATA:-data/debian} OUT=${OUT:-dev/results/worth.jsonl}
SHAPES=${SHAPES:-dense 8x2 64x8 128x8} LRS=${LRS:-1e-3 2e-3 4e-3} RUN=${RUN:-runs/worth} BUDGET_S=${BUDGET_S:-0}
case $SIZE in
  full) layers=8 width=512 heads=8 mlp=1024 batch=32 tokens=1024 STEPS=${STEPS:-3200} LR=${LR:-1e-3} vocabulary=50257 ;;
  toy) layers=2 width=64 heads=2 mlp=128 batch=4 tokens=128 STEPS=${STEPS:-200} LR=${LR:-4e-3} vocabulary=${VOCABULARY:-50257} ;;
  *) echo "worth: SIZE '$SIZE' is neither full nor toy" >&2; exit 2 ;;
esac
[[ $STEPS =~ ^[0-9]+$ && $STEPS -ge 8 ]] || { echo "worth: STEPS '$STEPS' is not a number from 8 on" >&2; exit 2; }
[[ $BUDGET_S =~ ^[0-9]+$ ]] || { echo "worth: BUDGET_S '$BUDGET_S' is not a number of seconds" >&2; exit 2; }
[ -f "$DATA/manifest.json" ] || { echo "worth: no $DATA/manifest.json: data/debian.py makes the text" >&2; exit 1; }
[ $verb != sweep ] || STEPS=$(((STEPS + 3) / 4))

# The options of a shape that differ from shape to shape.
shape_options() {
  case $1 in
    dense) echo "--dense-layers $(seq -s, 0 $((layers - 1))) --d-dense $mlp" ;;
    8x2) echo "--n-expert 8 --top-k 2 --d-expert $((mlp / 2)) --gate sigmoid --route-scale 2" ;;
    64x8) echo "--n-expert 64 --top-k 8 --d-expert $((mlp / 8)) --gate sigmoid --route-scale 8" ;;
    128x8) echo "--n-expert 128 --top-k 8 --d-expert $((mlp / 8)) --gate sigmoid --route-scale 8" ;;
    *) echo "worth: shape '$1' is not one of dense, 8x2, 64x8, 128x8" >&2; return 1 ;;
  esac
}
# options SHAPE SEED LR: everything that the result depends on, but for the text, whose checksum is recorded.
options() {
  local shape
  shape=$(shape_options "$1") || return 1
  echo "--preset gpt124-8x2 --n-layer $layers --d-model $width --n-head $heads --n-kv-head $heads --head-dim $((width / heads))" \
    "--qk-norm true --tied true --vocab-size $vocabulary $shape --batch-size $batch --seq-len $tokens --steps $STEPS" \
    "--warmup-steps $((STEPS / 12)) --lr $3 --seed $2" \
    "--eval-every $(((STEPS + 15) / 16))"
}
lr_of() {  # lr_of SHAPE, out of LR
  local word
  for word in $LR; do
    case $word in
      "$1"=*) echo "${word#*=}"; return ;;
      *=*) ;;
      *) echo "$word"; return ;;
    esac
  done
  echo "worth: LR '$LR' has no learning rate for $1" >&2
  return 1
}
for shape in $SHAPES; do
  shape_options "$shape" >/dev/null
  lr_of "$shape" >/dev/null
done

if [ -z "${TRAINER:-}" ]; then
  make train_gpt_moe
  TRAINER=./train_gpt_moe
fi
[ -x "$TRAINER" ] || { echo "worth: no program $TRAINER" >&2; exit 1; }
commit=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
gpu=$([ "$DEVICE" = cpu ] || nvidia-smi --query-gpu=name --format=csv,noheader -i 0 2>/dev/null) || gpu=
if [ $SIZE = full ] && [ -z "$gpu" ]; then
  echo "worth: nvidia-smi finds no GPU; SIZE=toy DEVICE=cpu tries the script out without" >&2
  exit 1
fi
began=$SECONDS run_id=${RUN_ID:-$(date -u +%Y%m%dT%H%M%SZ)}
mkdir -p "$RUN" "$(dirname "$OUT")"
RUN=$(mktemp -d "$RUN/XXXXXX")
trap 'rm -rf "$RUN"' EXIT

if [ "$verb" = probe ]; then
  for shape in $SHAPES; do
    "$TRAINER" --device "$DEVICE" $(options "$shape" 1 "$(lr_of "$shape")") --stop-after 40 --train-data "$DATA/debian_train_*.bin" \
      --val-data '' --out "$RUN/$shape" >"$RUN/$shape.log" || { tail -n 3 "$RUN/$shape.log" >&2; exit 1; }
    rm -rf "$RUN/$shape"/step_*
  done
  python3 scripts/worth.py probe --run "$RUN" --steps "$STEPS" --seeds "$(wc -w <<<"${SEEDS:-1 2 3}")" $SHAPES
  exit
fi

bench=worth
[ $verb != sweep ] || bench=worth_sweep SEEDS=${SEEDS:-1}
[ $verb = sweep ] || LRS=own
for seed in ${SEEDS:-1 2 3}; do
  for each in $LRS; do
    for shape in $SHAPES; do
      lr=$each
      [ "$each" != own ] || lr=$(lr_of "$shape")
      given=$(options "$shape" "$seed" "$lr")
      about=(--out "$OUT" --data "$DATA" --gpu "$gpu" --bench $bench --options "$given")
      takes=$(python3 scripts/worth.py find "${about[@]}" --shape "$shape")  # "there", or seconds
      [ "$takes" != there ] || continue
      left=$((BUDGET_S - (SECONDS - began)))
      if [ "$BUDGET_S" -gt 0 ] && { [ $left -le 0 ] || [ "$takes" -gt $left ]; }; then
        echo "worth: stopped before $shape, seed $seed: about $takes s, and $left of $BUDGET_S s are left; call it again to go on"
        exit 3
      fi
      name=$RUN/$shape-$seed-$lr start=$SECONDS
      echo "== $shape, seed $seed, learning rate $lr"
      "$TRAINER" --device "$DEVICE" $given --train-data "$DATA/debian_train_*.bin" --val-data "$DATA/debian_val_*.bin" \
        --out "$name" >"$name.log" || { tail -n 3 "$name.log" >&2; exit 1; }
      rm -rf "$name"/step_*
      python3 scripts/worth.py record "${about[@]}" --shape "$shape" --seed "$seed" --lr "$lr" --log "$name" \
        --wall "$((SECONDS - start))" --commit "$commit" --run-id "$run_id"
    done
  done
done
if [ "$verb" = sweep ]; then
  python3 scripts/worth.py sweep --out "$OUT"
else
  echo "worth: all runs are in $OUT; scripts/worth.py table writes the README's section and its chart"
fi
