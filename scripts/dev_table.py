#!/usr/bin/env python3
"""Writes the tables of results in the READMEs of dev/ from dev/results/*.jsonl. A table stands between two markers,

    <!-- table: BENCH [relative=VARIANT] -->
    <!-- end table -->

and shows the newest run that has rows of that bench: a row a variant in the order of the ladder, production last, a
column a shape, smallest first, in TFLOP/s (a rung that this run left out comes with a star from the newest run before it
that has it); then the speed at the largest shape in percent of VARIANT's (default:
production). With --check nothing is written: exit 1 with one line where a table differs. Standard library only."""
import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START = re.compile(r"<!-- table: *(\S+)((?: +\w+=\S+)*) *-->")
END = "<!-- end table -->"
PRODUCTION = "production"
KEYS = ("bench", "shape", "variant", "ms", "run_id", "gpu", "date")


def fail(message):
    sys.exit(f"dev_table: {message}")


def read_text(path):
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not text'}")


def read_results(folder):
    """All rows with a rate, in the order of the files' names and of their lines."""
    rows = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                fail(f"{path}:{number}: not JSON")
            if isinstance(row, dict) and "tflops" in row:
                missing = [key for key in KEYS if key not in row]
                if missing:
                    fail(f"{path}:{number}: no {missing[0]}")
                rows.append(row)
    return rows


def newest_run(rows, bench):
    """Rows of the newest run of this bench on one GPU; of several of a shape and variant the last counts."""
    rows = [row for row in rows if row["bench"] == bench]
    if not rows:
        return []
    newest = max(enumerate(rows), key=lambda item: (item[1]["date"], item[0]))[1]
    return [row for row in rows if (row["run_id"], row["gpu"]) == (newest["run_id"], newest["gpu"])]


def older_rows(rows, bench, newest):
    """Of rungs that the newest run left out: the rows at its shapes, of the newest run that has them."""
    has, shapes = {row["variant"] for row in newest}, {row["shape"] for row in newest}
    others = [row for row in rows if row["bench"] == bench and row["gpu"] == newest[-1]["gpu"]
              and row["variant"][:1].isdigit() and row["variant"] not in has and row["shape"] in shapes]
    return [row for variant in sorted({row["variant"] for row in others})
            for row in newest_run([row for row in others if row["variant"] == variant], bench)]


def table(rows, bench, relative):
    all_rows, rows = rows, newest_run(rows, bench)
    if not rows:
        return ["not measured yet"]
    older = older_rows(all_rows, bench, rows)
    starred, last = {row["variant"] for row in older}, rows[-1]
    rows = older + rows
    rate = {(row["variant"], row["shape"]): row["tflops"] for row in rows}
    work = {row["shape"]: row["tflops"] * row["ms"] for row in rows}
    shapes = sorted(work, key=lambda shape: work[shape])
    variants = sorted({row["variant"] for row in rows})
    rungs = [v for v in variants if v[0].isdigit()]
    variants = rungs + [v for v in variants if v not in rungs and v != PRODUCTION]
    variants += [PRODUCTION] if any(row["variant"] == PRODUCTION for row in rows) else []

    def cell(variant, shape):
        value = rate.get((variant, shape))
        return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.2g}"

    def percent(variant):
        whole, part = rate.get((relative, shapes[-1])), rate.get((variant, shapes[-1]))
        return f"{100 * part / whole:.1f} %" if whole and part else "-"

    heads = ["TFLOP/s", *shapes, f"of {relative} at {shapes[-1]}"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for variant in variants:
        lines.append("| " + " | ".join([variant + "*" * (variant in starred), *(cell(variant, s) for s in shapes), percent(variant)]) + " |")
    star = f"; * of run {', '.join(sorted({row['run_id'] for row in older}))}" if older else ""
    return [*lines, "", f"{last['gpu'].upper()}, {last['date']}, run {last['run_id']}: `build/{bench}`{star}"]


def with_tables(text, rows, path):
    """The text with every marked table made anew."""
    out, lines, at = [], text.splitlines(), 0
    while at < len(lines):
        out.append(lines[at])
        mark = START.fullmatch(lines[at].strip())
        at += 1
        if not mark:
            continue
        if END not in lines[at:]:
            fail(f"{path}: the table of {mark[1]} has no '{END}'")
        options = dict(option.split("=", 1) for option in mark[2].split())
        unknown = sorted(set(options) - {"relative"})
        if unknown:
            fail(f"{path}: the table of {mark[1]} has an option '{unknown[0]}' that is not known")
        out += ["", *table(rows, mark[1], options.get("relative", PRODUCTION)), "", END]
        at = lines.index(END, at) + 1
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Writes the tables of results in the READMEs of dev/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table differs")
    parser.add_argument("--results", default=ROOT / "dev" / "results", help="folder of *.jsonl (default: dev/results)")
    parser.add_argument("readmes", nargs="*", metavar="README", help="default: dev/*/README.md")
    o = parser.parse_args()
    rows = read_results(o.results)
    differ = []
    for path in o.readmes or sorted((ROOT / "dev").glob("*/README.md")):
        text = read_text(path)
        wanted = with_tables(text, rows, path)
        if text == wanted:
            continue
        differ.append(str(path))
        if not o.check:
            Path(path).write_text(wanted)
            print(f"dev_table: wrote {path}")
    if o.check and differ:
        fail(f"not what dev/results says (scripts/dev_table.py writes it): {', '.join(differ)}")


if __name__ == "__main__":
    main()
