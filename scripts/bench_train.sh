#!/usr/bin/env bash
# Speed of training the preset gpt124-8x2 at 32 x 1024 tokens a step on this GPU: the median over the steps after warm-up,
# one line appended to dev/results/<gpu>.jsonl.
#   scripts/bench_train.sh [STEPS]                 (default 60)
#   DATA='data/fineweb_edu/*_train_*.bin'  shards of GPT-2 tokens; without it, shards of random ids are written first
#   RECOMPUTE=act                          policy: none, act, up, block or auto (MEMORY_BUDGET=18: GiB that auto may use)
#   TRAINER=FILE                           the binary to use; without it, it is built
# The trainer ends with a checkpoint: 8 GB are written to runs/bench_train, and removed again.
set -euo pipefail
cd "$(dirname "$0")/.."

export STEPS=${1:-60} WARMUP=10 RECOMPUTE=${RECOMPUTE:-act} OUT=runs/bench_train
export RUN_ID=${RUN_ID:-$(date -u +%Y%m%dT%H%M%SZ)}
export B=32 T=1024
[ "$STEPS" -gt "$WARMUP" ] || { echo "bench_train: more than $WARMUP steps are needed; those are the warm-up" >&2; exit 1; }
if [ -z "${TRAINER:-}" ]; then
  make train_gpt_moe
  TRAINER=./train_gpt_moe
fi
budget=()
[ -z "${MEMORY_BUDGET:-}" ] || budget=(--memory-budget "$MEMORY_BUDGET")
trap 'rm -rf "$OUT" "$OUT.data"' EXIT
rm -rf "$OUT" && mkdir -p "$OUT.data"

if [ -z "${DATA:-}" ]; then
  DATA=$OUT.data/random_000000.bin
  python3 - "$DATA" <<'PYTHON'
import array, os, random, sys
count = (int(os.environ["STEPS"]) + 1) * int(os.environ["B"]) * (int(os.environ["T"]) + 1)
ids = array.array("H", random.Random(1).choices(range(50257), k=count))
with open(sys.argv[1], "wb") as file:  # 256 int32: magic, version, number of ids, tokenizer (0: GPT-2); then uint16 ids
    file.write(array.array("i", [20240520, 1, count, 0] + [0] * 252).tobytes() + ids.tobytes())
PYTHON
fi

"$TRAINER" --device cuda --dtype bf16 --preset gpt124-8x2 --batch-size $B --seq-len $T --train-data "$DATA" \
  --steps "$STEPS" --recompute "$RECOMPUTE" "${budget[@]}" --val-data '' --out "$OUT"

GPU_NAME=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0) python3 - <<'PYTHON'
import datetime, json, os, re, statistics
env = os.environ
B, T = int(env["B"]), int(env["T"])
with open(env["OUT"] + "/log.jsonl") as file:
    steps = [s for s in map(json.loads, file) if "loss" in s and s["step"] > int(env["WARMUP"])]
tokens_per_s = statistics.median(s["tokens_per_s"] for s in steps)

# Operations a token, as training_flops_per_token() of moe/step_log.h counts them: 6 a parameter that the token passes
# through, and attention over half of the sequence. L 12, C 768, F 2048, 8 experts, 2 a token, V 50257.
L, C, F, E, K, V = 12, 768, 2048, 8, 2, 50257
active = V * C + C + L * (2 * C + 4 * C * C + E * C + 3 * C * K * F)
flops = 6 * active + 6 * L * T * C

# The name that dev/bench.cpp gives a GPU: "NVIDIA H100 80GB HBM3" is h100.
gpu = ""
for word in re.split("[ -]", env["GPU_NAME"].lower()):
    if word not in ("", "nvidia", "geforce", "tesla"):
        gpu += word
        if re.search("[0-9]", word):
            break
record = {
    "bench": "train", "shape": "gpt124-8x2", "impl": "ours" if env["RECOMPUTE"] == "act" else "ours-" + env["RECOMPUTE"], "variant": env["RECOMPUTE"] + (" " + env["MEMORY_BUDGET"] + " GiB" if env.get("MEMORY_BUDGET") else ""),
    "tokens_per_s": tokens_per_s, "ms": statistics.median(s["ms"] for s in steps),
    "mfu_of_measured_peak": statistics.median(s["mfu"] for s in steps),
    "peak_GiB": max(s["memory_bytes"] for s in steps) / 2**30, "steps": len(steps),
    "B": B, "T": T, "gpu": gpu, "date": datetime.date.today().isoformat(), "run_id": env["RUN_ID"],
}
if gpu == "h100":  # whose dense bf16 peak this is
    record["mfu"] = tokens_per_s * flops / 989.4e12
with open(f"dev/results/{gpu}.jsonl", "a") as file:
    file.write(json.dumps(record) + "\n")
print(f"{tokens_per_s:,.0f} tokens/s, {record['ms']:.1f} ms a step, {100 * tokens_per_s * flops / 989.4e12:.1f}% of 989.4 TFLOP/s, "
      f"{100 * record['mfu_of_measured_peak']:.1f}% of the measured product, {record['peak_GiB']:.2f} GiB")
PYTHON
