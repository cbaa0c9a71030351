#!/usr/bin/env python3
"""Draws training runs and results. Standard library only; the same results give the same bytes.

    scripts/plot.py RUN... [--html FILE] [--png DIR]     from RUN/log.jsonl and RUN/memory.json: one HTML page (scripts/run_page.py)

    scripts/plot.py dev [--check]      from dev/results/*.jsonl:
        dev/FAMILY/FAMILY.svg   a bar a rung, for libraries and production too, at the shape of the family's table, with
                                the floor (what the work could take at best) as a line; a panel a pass
        dev/roofline.svg        production kernels: operations a second over operations a byte, below the rates of a
                                copy and of a matrix product

With --check nothing is written: exit 1 with one line where a file differs from what the results say."""
import argparse
import math
import statistics
import sys
from html import escape
from pathlib import Path

from dev_table import (PASSES, PRODUCTION, RATES, Ladder, families, floor, number, options_in, rate, rate_text, read_results,
                       read_text, significant, value)
import run_page
from layer_table import COLORS

RUNG, LIBRARY, OURS = COLORS[0], COLORS[7], COLORS[2]
ROOT = Path(__file__).resolve().parent.parent


# ---- svg ----


class Svg:
    def __init__(self, width, height):
        self.lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
                      '<rect width="100%" height="100%" fill="white"/>']

    def text(self, x, y, text, anchor="start", size=11, color="black"):
        self.lines.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{escape(text)}</text>')

    def rect(self, x, y, width, height, color):
        self.lines.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>')

    def line(self, x1, y1, x2, y2, color="black", dashed=False):
        dash = ' stroke-dasharray="3 2"' if dashed else ""
        self.lines.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dash}/>')

    def circle(self, x, y, radius, color):
        self.lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"/>')

    def finished(self):
        return "\n".join(self.lines + ["</svg>", ""])


def place(row):
    return row["cpu"] if isinstance(row.get("cpu"), str) else row["gpu"].upper()


# ---- a ladder ----


def ladder_chart(ladder):
    """Bars as long as the variants are fast: all do the same work, so the longest is the shortest time."""
    panels = []
    for which in ladder.passes:
        rows = {v: ladder.rows.get((v, ladder.shape)) for v in ladder.variants}
        timed = [v for v in ladder.variants if value(rows[v], which, "ms")]
        floors = [f for f in (floor(rows[v], which) for v in timed) if f]
        if timed:
            panels.append((which, timed, rows, min(floors) if floors else None))
    if not panels:
        return None
    bar, bars_width, left = 18, 420, 24 + 6.5 * max(len(v) for _, timed, _, _ in panels for v in timed)
    height = 30 + sum(34 + bar * len(timed) for _, timed, _, _ in panels)
    svg = Svg(round(left + bars_width + 150), height)
    svg.text(12, 18, f"{ladder.bench} at {ladder.shape}: speed, longer is faster; {place(ladder.last)}, {ladder.last['date']}", size=12)
    top = 30
    for which, timed, rows, least in panels:
        longest = max([1 / value(rows[v], which, "ms") for v in timed] + ([1 / least] if least else []))
        x = lambda ms: left + bars_width / ms / longest
        svg.text(12, top + 16, PASSES[which])
        end = top + 24 + bar * len(timed)
        for i, variant in enumerate(timed):
            row, y = rows[variant], top + 24 + bar * i
            ms, found = value(row, which, "ms"), rate(row, which)
            color = OURS if variant == PRODUCTION else RUNG if variant in ladder.rungs else LIBRARY
            svg.text(left - 6, y + 11, variant, "end")
            svg.rect(left, y, max(1, x(ms) - left), bar - 4, color)
            svg.text(left + bars_width + 10, y + 10.5, f"{significant(ms)} ms" + (f", {rate_text(found)} {RATES[found[1]][0]}" if found else ""), size=10)
        if least:
            svg.line(x(least), top + 20, x(least), end, dashed=True)
            svg.text(x(least) + (-4 if x(least) > left + bars_width / 2 else 4), top + 20, f"floor {significant(least)} ms", "end" if x(least) > left + bars_width / 2 else "start", 10)
        top = end + 10
    return svg.finished()


# ---- the roofline ----


def roofline(ladders):
    """Production of all ladders of the GPU measured last."""
    found = [(ladder, ladder.rows.get((PRODUCTION, ladder.shape))) for ladder in ladders if ladder.last and ladder.last["gpu"] != "cpu"]
    found = [(ladder, row) for ladder, row in found if row and (number(row, "ceiling_gbps") or number(row, "ceiling_tflops"))]
    if not found:
        return None
    gpu, date = max(((row["gpu"], row["date"]) for _, row in found), key=lambda item: (item[1], item[0]))
    found = [(ladder, row) for ladder, row in found if row["gpu"] == gpu]
    bandwidth = [row["ceiling_gbps"] for _, row in found if number(row, "ceiling_gbps")]
    products = [row["ceiling_tflops"] for _, row in found if number(row, "ceiling_tflops")]
    if not bandwidth or not products:
        return None
    bandwidth, products = statistics.median(bandwidth), statistics.median(products)

    points, others = [], []
    for ladder, row in found:
        for which in ladder.passes:
            ms, flops, moved = (value(row, which, key) for key in ("ms", "predicted_flops", "predicted_bytes"))
            if not ms:
                continue
            name = " ".join(filter(None, [ladder.bench, PASSES[which]])) + f" ({ladder.shape})"
            if flops and moved:
                x, y = flops / moved, flops / ms * 1e-9
                points.append((x, y, f"{name}: {100 * y / min(products, bandwidth * x * 1e-3):.0f} % of the roof"))
            elif moved:
                others.append(f"{name}: {100 * moved / ms * 1e-6 / bandwidth:.0f} % of a copy")
            elif flops:
                others.append(f"{name}: {100 * flops / ms * 1e-9 / products:.0f} % of a matrix product")
    if not points:
        return None

    points.sort()
    decades = lambda low, high: (math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ridge = products / bandwidth * 1e3  # operations a byte where the two ceilings meet
    x0, x1 = decades(min(points[0][0], ridge / 10), max(points[-1][0], ridge) * 1.01)
    y0, y1 = decades(min(min(p[1] for p in points), bandwidth * 10**x0 * 1e-3), products * 1.01)
    left, head, width, height = 52, 40, 520, 360
    x = lambda value: left + width * (math.log10(value) - x0) / (x1 - x0)
    y = lambda value: head + height * (1 - (math.log10(value) - y0) / (y1 - y0))
    legend = [f"{i}  {label}" for i, (_, _, label) in enumerate(points, 1)]
    legend += (["", "no point: operations or bytes not counted", *others] if others else [])
    svg = Svg(round(left + width + 30 + 6 * max(map(len, legend))), max(head + height + 44, head + 16 * len(legend) + 20))
    svg.text(12, 18, f"Production kernels, each at the shape of its table; {gpu.upper()}, {date}", size=12)
    for decade in range(x0, x1 + 1):
        svg.line(x(10**decade), head, x(10**decade), head + height, "#ddd")
        svg.text(x(10**decade), head + height + 15, f"{10**decade:g}", "middle")
    for decade in range(y0, y1 + 1):
        svg.line(left, y(10**decade), left + width, y(10**decade), "#ddd")
        svg.text(left - 6, y(10**decade) + 4, f"{10**decade:g}", "end")
    svg.text(left + width / 2, head + height + 34, "operations a byte of memory traffic", "middle")
    svg.text(left - 40, head - 8, "TFLOP/s")
    start = max(10**x0, 10**y0 / bandwidth * 1e3)
    svg.line(x(start), y(bandwidth * start * 1e-3), x(ridge), y(products))
    svg.line(x(ridge), y(products), left + width, y(products))
    svg.text(left + width - 4, y(products) - 6, f"matrix product {products:.0f} TFLOP/s", "end", 10)
    svg.text(x(start * 2) + 10, y(bandwidth * start * 2e-3) + 6, f"copy {bandwidth:.0f} GB/s", size=10)
    for i, (operations, speed, _) in enumerate(points, 1):
        svg.circle(x(operations), y(speed), 8, OURS)
        svg.text(x(operations), y(speed) + 4, str(i), "middle", 10, "white")
    for i, line in enumerate(legend):
        svg.text(left + width + 20, head + 10 + 16 * i, line, size=10)
    return svg.finished()


# ---- verbs ----


def dev_charts(results, dev):
    """Path -> text of every chart there should be; None where there is nothing to draw."""
    rows, ladders, charts = read_results(results), [], {}
    for name in families(dev):
        readme = Path(dev) / name / "README.md"
        ladder = Ladder(rows, name, options_in(read_text(readme), name, readme) if readme.is_file() else {})
        if ladder.rows:
            ladders.append(ladder)
        charts[Path(dev) / name / f"{name}.svg"] = ladder_chart(ladder) if ladder.rows else None
    charts[Path(dev) / "roofline.svg"] = roofline(ladders)
    return charts


def dev_verb(o):
    differ = []
    for path, wanted in sorted(dev_charts(o.results, o.dev).items()):
        if wanted == (read_text(path) if path.is_file() else None):
            continue
        differ.append(str(path))
        if o.check:
            continue
        if wanted is None:
            path.unlink()
        else:
            path.write_text(wanted)
        print(f"plot: {'removed' if wanted is None else 'wrote'} {path}")
    if o.check and differ:
        sys.exit(f"plot: not what dev/results says (scripts/plot.py dev writes it): {', '.join(differ)}")


def main():
    if sys.argv[1:] and sys.argv[1] not in ("dev", "-h", "--help"):
        return run_page.main(sys.argv[1:], dev_charts, ROOT)
    parser = argparse.ArgumentParser(description="Draws results as SVG files, and training runs: plot.py RUN... (plot.py RUN --help).")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    dev = verbs.add_parser("dev", help="the ladders of dev/ and their roofline")
    dev.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    dev.add_argument("--results", default=ROOT / "dev" / "results", help="folder of *.jsonl (default: dev/results)")
    dev.add_argument("--dev", default=ROOT / "dev", help="folder of the families (default: dev)")
    dev.set_defaults(run=dev_verb)
    o = parser.parse_args()
    o.run(o)


if __name__ == "__main__":
    main()
