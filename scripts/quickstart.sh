#!/usr/bin/env bash
# The main job from nothing: installs what is missing, builds, makes token shards of the King James text, trains the
# `tiny` preset on it, and prints text that the model wrote. Everything lands in runs/quickstart/.
#   Hardware: any; two CPU cores take two to three minutes of training.  Expected validation loss: see README.md.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/quickstart
scripts/setup.sh
cuda=1
nvidia-smi >/dev/null 2>&1 || cuda=0
mkdir -p runs
echo "building the trainer: a few minutes (runs/build.log)"
make train_gpt_moe CUDA=$cuda >runs/build.log 2>&1 || { cat runs/build.log >&2; exit 1; }
[ -f data/kjv/kjv_train.bin ] && [ -f data/kjv/kjv_val.bin ] || python3 data/kjv.py

if [ -e "$out" ]; then  # an earlier run is kept once
  rm -rf "$out.old"
  mv "$out" "$out.old"
fi
./train_gpt_moe --preset tiny --out "$out" --steps 1200 --batch-size 8 --seq-len 256 --lr 4e-3 --eval-every 400

./train_gpt_moe --generate --checkpoint "$out" --prompt "In the beginning" --max-new-tokens 2400 --temperature 0.8 --top-p 0.95 >"$out/generated.txt"
echo "--- generated text ($out/generated.txt):"
cat "$out/generated.txt"
