#!/usr/bin/env bash
# Speed of training on two GPUs of this machine against one of them, with as many tokens a GPU: each preset on one GPU, with
# --dp 2, and with --dp 2 --ep 2 by either transport, which must give the same losses. Prints a table and appends a line a
# run to dev/results/<gpu>.jsonl: medians over the steps after warm-up; `ratio` is tokens a second over those of one GPU,
# `share_apart` the part of a step that one GPU alone would not have needed. Text of random ids. A run is killed as soon as
# it has its steps, so that no checkpoint is written: that of the larger preset has 100 GB.
#   scripts/bench_parallel.sh [STEPS]     (default 15, the first 5 of which warm up)
#   SHAPES='gpt124-8x2:32x1024 ...'       preset:sequences x tokens of a GPU
#   RUNS='one dp2 ep2-exchange ep2-pull'  which of them; `one` is what the others are measured against
#   TRAINER=FILE                          the binary to use; without it, it is built
#   OPTIONS='...'                         more options for every run
#   DEVICE=cpu RESULTS=FILE               a trial of this script without GPUs
#   LIMIT=120                             seconds that a run may take
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
export STEPS=${1:-15} WARMUP=5 DEVICE=${DEVICE:-cuda} LIMIT=${LIMIT:-120} OPTIONS=${OPTIONS:-} RESULTS=${RESULTS:-}
export SHAPES=${SHAPES:-gpt124-8x2:32x1024 olmoe-1b-7b-size:16x2048} RUNS=${RUNS:-one dp2 ep2-exchange ep2-pull}
export RUN_ID=${RUN_ID:-$(date -u +%Y%m%dT%H%M%SZ)} WORK=runs/bench_parallel
[ "$STEPS" -gt "$WARMUP" ] || { echo "bench_parallel: more than $WARMUP steps are needed; those are the warm-up" >&2; exit 1; }
if [ -z "${TRAINER:-}" ]; then
  make train_gpt_moe
  TRAINER=./train_gpt_moe
fi
export TRAINER
trap 'rm -rf "$WORK"' EXIT
rm -rf "$WORK" && mkdir -p "$WORK"

python3 - <<'PYTHON'
import array, datetime, json, os, random, re, statistics, subprocess, sys, time
sys.dont_write_bytecode = True
sys.path.insert(0, "dev/test")
from ports import free_port
env = os.environ
steps, warmup, limit, device = int(env["STEPS"]), int(env["WARMUP"]), float(env["LIMIT"]), env["DEVICE"]
LAYOUTS = {"one": [], "dp2": ["--dp", "2"], "ep2-exchange": ["--dp", "2", "--ep", "2", "--transport", "exchange"],
           "ep2-pull": ["--dp", "2", "--ep", "2", "--transport", "pull"]}


def gpu_name():
    """As dev/bench.cpp shortens it: "NVIDIA H100 80GB HBM3" is h100."""
    if device == "cpu":
        return "cpu"
    said = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", "0"], capture_output=True, text=True, check=True)
    name = ""
    for word in re.split("[ -]", said.stdout.strip().lower()):
        if word not in ("", "nvidia", "geforce", "tesla"):
            name += word
            if re.search("[0-9]", word):
                break
    return name


def write_tokens(path, count):
    ids = array.array("H", random.Random(1).choices(range(50257), k=count))
    with open(path, "wb") as file:  # 256 int32: magic, version, number of ids, tokenizer (0: GPT-2); then uint16 ids
        file.write(array.array("i", [20240520, 1, count, 0] + [0] * 252).tobytes() + ids.tobytes())


def logged(path):
    """The records of the steps so far. A line that is being written is not there yet."""
    try:
        with open(path) as file:
            return [json.loads(line) for line in file.read().split("\n")[:-1]]
    except FileNotFoundError:
        return []


def measure(shape, B, T, run):
    """Records of the steps, or None (and says why)."""
    out = f"{env['WORK']}/{shape}-{run}"
    n = 1 if run == "one" else 2
    command = [env["TRAINER"], "--device", device, "--preset", shape, "--batch-size", B, "--seq-len", T, "--train-data", data,
               "--val-data", "", "--steps", str(4 * steps), "--out", out, *LAYOUTS[run], *env["OPTIONS"].split()]
    clean = {k: v for k, v in env.items() if not re.match("OMPI_|PMI|SLURM_|RANK$|WORLD_SIZE$|MASTER_", k)}
    if n > 1:
        clean.update(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    began, records = time.monotonic(), []
    with open(out + ".txt", "w") as said:
        ranks = [subprocess.Popen(command, env={**clean, "RANK": str(r)} if n > 1 else clean, stdout=said, stderr=said) for r in range(n)]
        try:
            while len(records) < steps and time.monotonic() - began < limit and all(p.poll() is None for p in ranks):
                time.sleep(0.05)
                records = logged(out + "/log.jsonl")
        finally:
            for p in ranks:
                p.kill()
            for p in ranks:
                p.wait()
    if len(records) < steps:
        with open(out + ".txt") as said:
            lines = [line for line in said.read().splitlines() if line]
        why = next((line for line in lines if re.match(r"(rank \d+: )?train_gpt_moe: |rank \d+: ", line)), (lines or ["no output"])[-1])
        print(f"{shape} {run}: {len(records)} of {steps} steps in {time.monotonic() - began:.0f} s: {why}", flush=True)
        return None
    print(f"{shape} {run}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return records[:steps]


gpu = gpu_name()
results = env["RESULTS"] or f"dev/results/{gpu}.jsonl"
failed = False
for item in env["SHAPES"].split():
    shape, B, T = re.fullmatch(r"([^:]+):(\d+)x(\d+)", item).groups()
    data = f"{env['WORK']}/{shape}.bin"
    write_tokens(data, (steps + 2) * 2 * int(B) * (int(T) + 1))
    alone, losses = None, {}
    for run in env["RUNS"].split():
        records = measure(shape, B, T, run)
        if records is None:
            failed = True
            continue
        losses[run] = [r["loss"] for r in records]
        records = records[warmup:]
        middle = {key: statistics.median(r[key] for r in records) for key in ("tokens_per_s", "ms", "mfu", "load_max_over_mean")}
        row = {"bench": "train", "shape": shape, "impl": "ours" if run == "one" else "ours-" + run, "variant": "act",
               "ranks": 1 if run == "one" else 2, "tokens_per_s": middle["tokens_per_s"], "ms": middle["ms"],
               "mfu_of_measured_peak": middle["mfu"], "peak_GiB": max(r["memory_bytes"] for r in records) / 2**30,
               "load_max_over_mean": middle["load_max_over_mean"], "loss": records[-1]["loss"], "steps": len(records), "B": int(B), "T": int(T), "gpu": gpu,
               "date": datetime.date.today().isoformat(), "run_id": env["RUN_ID"]}
        if run == "one":
            alone = row
        elif alone:
            row["ratio"] = row["tokens_per_s"] / alone["tokens_per_s"]
            row["share_apart"] = 1 - alone["ms"] / row["ms"]
        with open(results, "a") as file:
            file.write(json.dumps(row) + "\n")
        against = f"{row['ratio']:.3f} times one, {100 * row['share_apart']:5.1f} % of the step apart" if "ratio" in row else ""
        print(f"{shape:18} {run:13} {row['tokens_per_s']:12,.0f} tokens/s {row['ms']:9.1f} ms {row['peak_GiB']:7.2f} GiB a rank  "
              f"load {row['load_max_over_mean']:.2f}  {against}", flush=True)
    if "ep2-exchange" in losses and "ep2-pull" in losses:
        same = losses["ep2-exchange"] == losses["ep2-pull"]
        failed |= not same
        print(f"{shape}: the losses of the two transports are {'the same' if same else 'NOT the same'}", flush=True)
sys.exit(failed)
PYTHON
