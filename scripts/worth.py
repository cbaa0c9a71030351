#!/usr/bin/env python3
"""The results of scripts/worth.sh: the section of README.md and its chart. Standard library only.

    scripts/worth.py table [--check] [--results dev/results/worth.jsonl] [--gpu NAME]

writes what stands in README.md between <!-- worth --> and <!-- end worth -->, and dev/worth.svg, from the newest runs on a GPU
(or on NAME; `cpu` is one) that have the same steps on the same text. Nothing stands there before there are any. With --check
nothing is written: exit 1 with one line where either differs. The other verbs are for scripts/worth.sh."""
import argparse
import datetime
import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "dev" / "reference"))
from compare_curves import short_name  # noqa: E402
from layer_table import COLORS  # noqa: E402
from plot import Svg  # noqa: E402

START, END = "<!-- worth -->", "<!-- end worth -->"
ORDER = ["dense", "8x2", "64x8", "128x8"]
WARM_UP = 10  # steps that do not count for the rate


def fail(message):
    sys.exit(f"worth: {message}")


def read_json_lines(path):
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not text'}")
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError:
                fail(f"{path}:{number}: not JSON")
            if not isinstance(found[-1], dict):
                fail(f"{path}:{number}: not an object")
    return found


def read_results(path):
    """Rows of runs, in the order of the file; none where it is not there."""
    rows = [row for row in read_json_lines(path) if str(row.get("bench", "")).startswith("worth")] if Path(path).exists() else []
    for row in rows:
        missing = [key for key in ("shape", "seed", "gpu", "date", "options", "text", "curve", "steps") if key not in row]
        if missing:
            fail(f"{path}: a run of {row.get('shape')} has no {missing[0]}")
    return rows


def read_text(folder):
    """What data/debian.py made: sizes, and the checksums of its shards."""
    path = Path(folder) / "manifest.json"
    try:
        made = json.loads(path.read_text())
        return {split: {"tokens": made[split]["tokens"], "bytes": made[split]["bytes"], "sha256": sorted(made[split]["shards"].values())}
                for split in ("train", "val")}
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path} is not what data/debian.py writes")


# ---- runs ----


def find(o):
    """Prints "there" where such a run is, else how many seconds the longest one like it took here; 0: nobody knows."""
    rows = [row for row in read_results(o.out) if row["bench"] == o.bench and row["gpu"] == (short_name(o.gpu) or "cpu")]
    text = read_text(o.data)
    if any(row["options"] == o.options and row["text"] == text for row in rows):
        print("there")
        return
    alike = [row for row in rows if row["text"] == text and row["steps"] == steps_of(o.options)]
    print(max([math.ceil(row["wall_s"]) for row in alike if row["shape"] == o.shape] or
              [math.ceil(row["wall_s"]) for row in alike] or [0]))


def steps_of(options):
    return int(re.search(r"--steps (\d+)", options)[1])


def read_run(folder):
    """Of a run's directory and what it printed, DIR.log: its steps, evaluations {step: loss}, and parameters (all, active)."""
    log = read_json_lines(Path(folder) / "log.jsonl")
    steps = {row["step"]: row for row in log if "loss" in row}
    said = re.search(r"(?m)^(\d+) parameters \((\d+) active\)", Path(f"{folder}.log").read_text())
    if not steps or not said:
        fail(f"{folder} holds no run")
    return steps, {row["step"]: row["val_loss"] for row in log if "val_loss" in row}, (int(said[1]), int(said[2]))


def rate(steps):
    return statistics.median(row["tokens_per_s"] for step, row in steps.items() if step > min(WARM_UP, max(steps) - 1))


def record(o):
    steps, losses, (parameters, active) = read_run(o.log)
    last = steps_of(o.options)
    if last not in losses or sorted(steps) != list(range(1, last + 1)):
        fail(f"{o.log}: the run ended before step {last}; make it again")
    if not all(isinstance(loss, (int, float)) and math.isfinite(loss) for loss in losses.values()):
        fail(f"{o.log}: a validation loss is not finite")
    seconds, curve = 0.0, []
    for step in sorted(steps):
        seconds += steps[step]["ms"] / 1e3
        if step in losses:
            curve.append([step, round(seconds, 3), round(losses[step], 5)])
    batch, length, width, vocabulary = (int(re.search(rf"--{name} (\d+)", o.options)[1])
                                        for name in ("batch-size", "seq-len", "d-model", "vocab-size"))
    row = {"bench": o.bench, "shape": o.shape, "seed": o.seed, "lr": o.lr, "steps": last, "tokens_per_step": batch * length,
           "parameters": parameters, "active": active - vocabulary * width, "tokens_per_s": round(rate(steps)),
           "peak_GiB": round(max(row["memory_bytes"] for row in steps.values()) / 2**30, 2),
           "skipped": sum("skipped" in row for row in steps.values()), "wall_s": o.wall, "curve": curve, "text": read_text(o.data),
           "gpu": short_name(o.gpu) or "cpu", "date": datetime.date.today().isoformat(), "commit": o.commit, "run_id": o.run_id,
           "options": o.options}
    with open(o.out, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{o.shape}, seed {o.seed}: validation loss {curve[-1][2]:.4f} after {seconds:.1f} s of training, {o.wall} s in all, "
          f"{row['tokens_per_s']:,} tokens/s")


def probe(o):
    total = 0.0
    for shape in o.shapes:
        steps, _, (parameters, active) = read_run(Path(o.run) / shape)
        seconds = o.steps * statistics.median(row["ms"] for step, row in steps.items() if step > WARM_UP) / 1e3
        total += o.seeds * seconds
        print(f"{shape}: {parameters:,} parameters ({active:,} active, the head among them), {rate(steps):,.0f} tokens/s, "
              f"{max(row['memory_bytes'] for row in steps.values()) / 2**30:.1f} GiB: {o.steps} steps in {seconds:.0f} s")
    print(f"{o.seeds * len(o.shapes)} runs: {total / 60:.1f} minutes of training; start, evaluation and checkpoint come on top")


def sweep(o):
    rows = [row for row in read_results(o.out) if row["bench"] == "worth_sweep"]
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in ("gpu", "steps", "text", "seed"))]
    rates = sorted({row["lr"] for row in rows})
    print("| last validation loss | " + " | ".join(f"{lr:g}" for lr in rates) + " |\n|---|" + "---:|" * len(rates))
    for shape in ORDER:
        loss = {row["lr"]: f"{row['curve'][-1][2]:.4f}" for row in rows if row["shape"] == shape}
        if loss:
            print(f"| {shape} | " + " | ".join(loss.get(lr, "-") for lr in rates) + " |")


# ---- what the runs say ----


class Shape:
    """The runs of a shape: a seed each, evaluated after the same steps."""

    def __init__(self, name, rows):
        self.name, self.rows = name, rows
        self.steps = [point[0] for point in rows[0]["curve"]]
        if any([point[0] for point in row["curve"]] != self.steps for row in rows):
            fail(f"the runs of {name} were evaluated after different steps")
        column = lambda which: [[row["curve"][i][which] for row in rows] for i in range(len(self.steps))]
        self.tokens = [step * rows[0]["tokens_per_step"] for step in self.steps]
        self.seconds = [statistics.fmean(values) for values in column(1)]
        self.low, self.high = [min(v) for v in column(2)], [max(v) for v in column(2)]
        self.mean = [statistics.fmean(values) for values in column(2)]

    def reaches(self, loss, axis):
        """Where on this axis (self.tokens or self.seconds) the mean of the losses first is `loss`, or None."""
        for i, value in enumerate(self.mean):
            if value <= loss:
                if i == 0:
                    return axis[0]
                part = (self.mean[i - 1] - loss) / (self.mean[i - 1] - value)
                return axis[i - 1] + part * (axis[i] - axis[i - 1])
        return None


def newest(rows, gpu):
    """The shapes of the newest runs that can be compared, in order; a seed that was run twice counts once."""
    rows = [row for row in rows if row["bench"] == "worth" and (row["gpu"] == gpu if gpu else row["gpu"] != "cpu")]
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in ("gpu", "steps", "tokens_per_step", "text"))]
    shapes = {}
    for row in rows:
        shapes.setdefault(row["shape"], {})[row["seed"]] = row
    return [Shape(name, [seeds[seed] for seed in sorted(seeds)]) for name, seeds in sorted(shapes.items(), key=lambda s: ORDER.index(s[0]))]


def millions(n):
    return f"{n / 1e6:,.1f} M"


def seeds_text(shapes):
    counts = {len(shape.rows) for shape in shapes}
    return "a seed each" if counts == {1} else f"{counts.pop()} seeds each" if len(counts) == 1 else f"{min(counts)} to {max(counts)} seeds each"


def verdict(shapes):
    """Whether what lies between the shapes is more than what lies between the seeds."""
    ranked = sorted(shapes, key=lambda shape: shape.mean[-1])
    mixed = [f"{a.name} and {b.name}" for a, b in zip(ranked, ranked[1:]) if a.high[-1] >= b.low[-1]]
    widest = max(shape.high[-1] - shape.low[-1] for shape in shapes)
    if mixed:
        return f"The seeds of {', of '.join(mixed)} overlap at the end: of these two, neither is shown to be better."
    gap = min(b.low[-1] - a.high[-1] for a, b in zip(ranked, ranked[1:]))
    return (f"No seed of a shape ends within the range of another's: the ranges are {gap:.3f} apart or more, and the widest is "
            f"{widest:.3f}.")


def section(shapes):
    """The lines of the section; none without a dense shape and another."""
    if len(shapes) < 2 or shapes[0].name != "dense":
        return []
    dense, row = shapes[0], shapes[0].rows[-1]
    text, tokens = row["text"], dense.tokens[-1]
    rates = {shape.name: "/".join(sorted({f"{r['lr']:g}" for r in shape.rows})) for shape in shapes}
    rates_text = rates["dense"] if len(set(rates.values())) == 1 else ", ".join(f"{rate} ({name})" for name, rate in rates.items())
    commits = sorted({r["commit"] for shape in shapes for r in shape.rows})
    active = [r["active"] for shape in shapes for r in shape.rows]
    lines = [
        "## Is it worth it?", "",
        f"A dense model and MoE models of the same compute a token ({millions(min(active))} active parameters without embeddings, up to "
        f"{millions(max(active))} with routers), on the same text (`data/debian.py`: {millions(text['train']['tokens'])} tokens of "
        f"documentation and source code; {millions(tokens)} were trained on, {tokens / text['train']['tokens']:.2g} epochs), "
        f"{seeds_text(shapes)}, gates that sum to the number of experts a token, learning rate {rates_text}; {row['gpu'].upper() if row['gpu'] != 'cpu' else 'CPU'}, {row['date']}, "
        f"commit {', '.join(commits)}. `scripts/worth.sh` runs it all; the results are in `dev/results/worth.jsonl`.", "",
        "| | parameters | validation loss, mean (range) | bits a byte | tokens/s | GiB | dense's last loss is reached after |",
        "|---|---:|---:|---:|---:|---:|---:|"]
    bits = text["val"]["tokens"] / text["val"]["bytes"] / math.log(2)
    for shape in shapes:
        rows = shape.rows
        cells = [shape.name, millions(rows[-1]["parameters"]), f"{shape.mean[-1]:.3f} ({shape.low[-1]:.3f} to {shape.high[-1]:.3f})",
                 f"{shape.mean[-1] * bits:.3f}", f"{statistics.median(r['tokens_per_s'] for r in rows):,.0f}",
                 f"{max(r['peak_GiB'] for r in rows):.1f}"]
        at = [shape.reaches(dense.mean[-1], axis) for axis in (shape.tokens, shape.seconds)]
        if shape is dense:
            cells.append(f"{millions(tokens)} tokens, {dense.seconds[-1]:.0f} s")
        elif at[0] is None:
            cells.append("not")
        else:
            cells.append(f"{100 * at[0] / dense.tokens[-1]:.0f} % of the tokens, {100 * at[1] / dense.seconds[-1]:.0f} % of the seconds")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", verdict(shapes) + " Seconds are of training alone, without evaluation.", "",
            "![Validation loss over tokens and over seconds](dev/worth.svg)"]


def chart(shapes):
    """Loss over tokens and over seconds: the mean of the seeds as a line, their range as a band."""
    row, width, height, left, head, gap = shapes[0].rows[-1], 380, 300, 50, 56, 60
    later = max(1, len(shapes[0].steps) // 4)  # the beginning, where all fall alike, is cut off above
    top = max(shape.high[min(later, len(shape.high) - 1)] for shape in shapes)
    bottom = min(shape.low[-1] for shape in shapes)
    margin = 0.04 * (top - bottom or 1)
    top, bottom = top + margin, bottom - margin
    svg = Svg(left + 2 * width + gap + 20, head + height + 46)
    svg.text(12, 18, f"Validation loss at equal compute a token, {seeds_text(shapes)} (line: mean, band: range); "
             f"{row['gpu'].upper()}, {row['date']}", size=12)
    tick = 10 ** math.floor(math.log10((top - bottom) / 2))
    tick *= next(m for m in (1, 2, 5, 10) if (top - bottom) / (m * tick) <= 8)
    for panel, (label, axis) in enumerate((("million tokens", lambda s: [t / 1e6 for t in s.tokens]), ("seconds of training", lambda s: s.seconds))):
        start, end = left + panel * (width + gap), max(axis(shape)[-1] for shape in shapes)
        x = lambda value: start + width * value / end
        y = lambda value: head + height * (top - value) / (top - bottom)
        for i in range(math.ceil(bottom / tick), math.floor(top / tick) + 1):
            svg.line(start, y(i * tick), start + width, y(i * tick), "#ddd")
            svg.text(start - 6, y(i * tick) + 4, f"{i * tick:.10g}", "end")
        step = 10 ** math.floor(math.log10(end))
        step *= next(m for m in (0.1, 0.2, 0.5, 1) if end / (m * step) <= 6 or m == 1)
        for i in range(0, math.floor(end / step) + 1):
            svg.text(x(i * step), head + height + 15, f"{i * step:.10g}", "middle")
        svg.line(start, head + height, start + width, head + height)
        svg.text(start + width / 2, head + height + 34, label, "middle")
        svg.lines.append(f'<clipPath id="panel{panel}"><rect x="{start}" y="{head}" width="{width}" height="{height}"/></clipPath>')
        for i, shape in enumerate(shapes):
            at, color = axis(shape), COLORS[i]
            points = lambda values: [f"{x(a):.1f},{y(v):.1f}" for a, v in zip(at, values)]
            svg.lines.append(f'<g clip-path="url(#panel{panel})"><polygon points="{" ".join(points(shape.low) + points(shape.high)[::-1])}" '
                             f'fill="{color}" fill-opacity="0.25"/><polyline points="{" ".join(points(shape.mean))}" fill="none" '
                             f'stroke="{color}" stroke-width="1.5"/></g>')
    for i, shape in enumerate(shapes):
        svg.rect(left + 130 * i, 30, 10, 10, COLORS[i])
        svg.text(left + 14 + 130 * i, 39, f"{shape.name}, {millions(shape.rows[-1]['parameters'])}")
    return svg.finished()


def with_section(text, lines, path):
    """The README's text with these lines between the marks."""
    before, mark, rest = text.partition(START + "\n")
    old, end, after = rest.partition(END + "\n")
    if not mark or not end:
        fail(f"{path} has no lines '{START}' and '{END}'")
    return before + mark + ("\n" + "\n".join(lines) + "\n\n" if lines else "") + end + after


def table(o):
    shapes = newest(read_results(o.results), o.gpu)
    lines = section(shapes)
    try:
        readme = o.readme.read_text()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {o.readme}: {getattr(error, 'strerror', None) or 'not text'}")
    wanted = {o.readme: with_section(readme, lines, o.readme), o.chart: chart(shapes) if lines else None}
    differ = [path for path, text in wanted.items() if text != (path.read_text() if path.is_file() else None)]
    if o.check:
        if differ:
            fail(f"not what {o.results} says (scripts/worth.py table writes it): {', '.join(map(str, differ))}")
        return
    for path in differ:
        if wanted[path] is None:
            path.unlink()
        else:
            path.write_text(wanted[path])
        print(f"worth: {'removed' if wanted[path] is None else 'wrote'} {path}")
    if not lines:
        print(f"worth: {o.results} has no runs of a dense shape and another{f' on {o.gpu}' if o.gpu else ' on a GPU'}: nothing is shown")


def main():
    parser = argparse.ArgumentParser(description="The results of scripts/worth.sh.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    parsers = {f.__name__: verbs.add_parser(f.__name__, help=text) for f, text in (
        (table, "the section of README.md and its chart"), (find, "is a run there?"), (record, "append a run"),
        (probe, "how long the runs will take"), (sweep, "losses by learning rate"))}
    for name in "find", "record":
        for option in "out", "data", "gpu", "bench", "options", "shape":
            parsers[name].add_argument(f"--{option}", required=True)
    for option, kind in (("seed", int), ("lr", float), ("log", str), ("wall", int), ("commit", str), ("run-id", str)):
        parsers["record"].add_argument(f"--{option}", type=kind, required=True)
    for option, kind in (("run", str), ("steps", int), ("seeds", int)):
        parsers["probe"].add_argument(f"--{option}", type=kind, required=True)
    parsers["probe"].add_argument("shapes", nargs="+")
    parsers["sweep"].add_argument("--out", required=True)
    parsers["table"].add_argument("--check", action="store_true", help="write nothing; fail where something differs")
    parsers["table"].add_argument("--results", type=Path, default=ROOT / "dev" / "results" / "worth.jsonl")
    parsers["table"].add_argument("--readme", type=Path, default=ROOT / "README.md")
    parsers["table"].add_argument("--chart", type=Path, default=ROOT / "dev" / "worth.svg")
    parsers["table"].add_argument("--gpu", help="default: the one that was run on last")
    for f in table, find, record, probe, sweep:
        parsers[f.__name__].set_defaults(run_verb=f)
    o = parser.parse_args()
    o.run_verb(o)


if __name__ == "__main__":
    main()
