"""Compares the trainer's loss curve with those of the reference: see scripts/loss_curve.sh. Standard library only.

Windows of steps are judged by their mean loss. Ours passes a window if it lies between the lowest and the highest
of the reference's seeds, or is nearer to the reference of its own seed than a tenth of the distance of those two.
"""
import argparse
import datetime
import json
import math
import re
import sys


def read(path: str, seed: int | None) -> dict[int, dict[int, dict]]:
    """seed -> step -> record; lines without a loss are left out. seed: of all lines, where they do not say."""
    curves: dict[int, dict[int, dict]] = {}
    with open(path) as file:
        for line in file:
            record = json.loads(line)
            if "loss" not in record:
                continue
            curve = curves.setdefault(record["seed"] if seed is None else seed, {})
            if not isinstance(record["loss"], (int, float)) or not math.isfinite(record["loss"]):
                sys.exit(f"compare_curves: {path}: the loss of step {record['step']} is not finite")
            if record["step"] in curve:
                sys.exit(f"compare_curves: {path}: step {record['step']} is there twice")
            curve[record["step"]] = record
    return curves


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def short_name(gpu: str) -> str:
    """As dev/bench.cpp names a GPU: "NVIDIA H100 80GB HBM3" is h100."""
    name = ""
    for word in re.split("[ -]", gpu.lower()):
        if word not in ("", "nvidia", "geforce", "tesla"):
            name += word
            if re.search("[0-9]", word):
                break
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares loss curves; exit status 1 where they differ too much.")
    parser.add_argument("--ours", required=True, metavar="FILE", help="log.jsonl of the trainer")
    parser.add_argument("--reference", required=True, metavar="FILE", help="what loss_curve.py wrote")
    parser.add_argument("--seed", type=int, required=True, help="of the trainer's run")
    parser.add_argument("--window", type=int, default=20, help="steps of a window")
    parser.add_argument("--steps-out", metavar="FILE", help="every step's difference and spread, as JSON lines")
    parser.add_argument("--out", metavar="FILE", help="append one line of results; default dev/results/<gpu>.jsonl")
    parser.add_argument("--gpu", default="", help="its full name")
    parser.add_argument("--run-id", default="")
    parser.add_argument("--extra", default="{}", metavar="JSON", help="more keys of the line")
    o = parser.parse_args()

    ours = read(o.ours, o.seed).get(o.seed, {})
    reference = read(o.reference, None)
    if o.seed not in reference or len(reference) < 2:
        sys.exit(f"compare_curves: {o.reference} needs seed {o.seed} and at least one other")
    steps = sorted(ours)
    if steps != list(range(1, len(steps) + 1)) or not steps:
        sys.exit(f"compare_curves: {o.ours}: not the steps of a whole run")
    for seed, curve in reference.items():
        if sorted(curve) != steps:
            sys.exit(f"compare_curves: {o.reference}: seed {seed} has other steps than {o.ours}")
        for step in steps:
            if not math.isclose(curve[step]["lr"], ours[step]["lr"], rel_tol=1e-8):
                sys.exit(f"compare_curves: step {step}: learning rate {ours[step]['lr']}, but {curve[step]['lr']} in "
                         f"the reference of seed {seed}")
    same = reference[o.seed]

    difference = {s: ours[s]["loss"] - same[s]["loss"] for s in steps}
    spread = {}
    for s in steps:
        losses = [curve[s]["loss"] for curve in reference.values()]
        spread[s] = max(losses) - min(losses)
    if o.steps_out:
        with open(o.steps_out, "w") as file:
            for s in steps:
                print(json.dumps({"step": s, "ours": ours[s]["loss"], "reference": same[s]["loss"],
                                  "difference": difference[s], "spread": spread[s]}), file=file)

    print(f"mean loss of windows; reference: seed {o.seed}; min, max: over the reference's seeds "
          f"{', '.join(map(str, sorted(reference)))}; spread: mean over the steps of a window of max - min at the step")
    print(f"{'steps':>11} {'ours':>10} {'reference':>10} {'min':>10} {'max':>10} {'difference':>11} {'max-min':>9} "
          f"{'spread':>9}  inside")
    inside = close = 0
    worst_window, worst_ratio, failed = 0.0, 0.0, []
    for begin in range(0, len(steps), o.window):
        window = steps[begin : begin + o.window]
        a, b = mean([ours[s]["loss"] for s in window]), mean([same[s]["loss"] for s in window])
        seeds = [mean([curve[s]["loss"] for s in window]) for curve in reference.values()]
        low, high, d = min(seeds), max(seeds), a - b
        if low <= a <= high:
            verdict, inside = "yes", inside + 1
        elif abs(d) < 0.1 * (high - low):
            verdict, close = "no, but close", close + 1
        else:
            verdict = "NO"
            failed.append(f"{window[0]}-{window[-1]}")
        if abs(d) > abs(worst_window):
            worst_window = d
        if high > low:
            worst_ratio = max(worst_ratio, abs(d) / (high - low))
        print(f"{window[0]:5}-{window[-1]:<5} {a:10.6f} {b:10.6f} {low:10.6f} {high:10.6f} {d:+11.6f} "
              f"{high - low:9.6f} {mean([spread[s] for s in window]):9.6f}  {verdict}")
    worst = max(steps, key=lambda s: abs(difference[s]))
    norm = [abs(ours[s]["grad_norm"] / same[s]["grad_norm"] - 1) for s in steps]
    typical, typical_spread = mean([abs(d) for d in difference.values()]), mean(list(spread.values()))
    print(f"first step: loss {difference[1]:+.6f}, gradient norm {ours[1]['grad_norm']:.6f}, reference "
          f"{same[1]['grad_norm']:.6f}")
    print(f"largest deviation: {difference[worst]:+.6f} at step {worst} (spread {spread[worst]:.6f}); "
          f"{worst_window:+.6f} of a window's mean")
    print(f"mean of |difference| {typical:.6f}, of the spread {typical_spread:.6f}")

    gpu = short_name(o.gpu)
    record = {
        "bench": "loss_curve", "shape": "gpt124-8x2", "impl": "ours", "steps": len(steps), "seed": o.seed,
        "reference_seeds": sorted(reference), "window": o.window, "windows": inside + close + len(failed),
        "windows_inside": inside, "windows_close": close, "passed": not failed,
        "first_loss_difference": difference[1], "max_loss_difference": difference[worst], "max_at_step": worst,
        "spread_there": spread[worst], "max_window_difference": worst_window,
        "max_window_difference_over_range": worst_ratio, "mean_abs_difference": typical, "mean_spread": typical_spread,
        "max_relative_norm_difference": max(norm), "final_loss": ours[steps[-1]]["loss"],
        "final_reference_loss": same[steps[-1]]["loss"], **json.loads(o.extra), "gpu": gpu,
        "date": datetime.date.today().isoformat(), "run_id": o.run_id,
    }
    with open(o.out or f"dev/results/{gpu or 'unknown'}.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    if failed:
        sys.exit(f"compare_curves: outside the reference's seeds, and not close: steps {', '.join(failed)}")
    print(f"passed: {inside} windows inside, {close} close")


if __name__ == "__main__":
    main()
