#!/usr/bin/env python3
"""A GitHub table of one run of scripts/bench_layer.sh: ours beside every peer, with our ratio to the best peer and to the
products alone (torch-bmm). A ratio is of speeds: above 1, ours is faster. Standard library only."""
import argparse
import json
import sys

ORDER = ["sonicmoe", "liger", "megablocks", "scattermoe", "torch-gather-compiled", "torch-grouped-compiled", "torch-grouped"]
CEILING = "torch-bmm"
RATES = ("fwd_tflops", "fwdbwd_tflops")


def read(path):
    rows = []
    try:
        with open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    sys.exit(f"layer_table: {path}:{number}: not JSON")
                if isinstance(row, dict) and row.get("bench") == "moe_layer":
                    missing = [key for key in ("shape", "impl", "run_id", *RATES) if key not in row]
                    if missing:
                        sys.exit(f"layer_table: {path}:{number}: no {missing[0]}")
                    rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"layer_table: cannot read {path}: {getattr(error, 'strerror', None) or 'not text'}")
    return rows


def speed(row):
    if not row:
        return "-"
    kept = f", {row['saved_MiB']:.0f}" if row.get("saved_MiB") is not None else ""
    return " / ".join(f"{row[rate]:.0f}" for rate in RATES) + kept


def ratios(ours, others):
    """Ours to the fastest of the others (name -> row), forward / forward+backward; named where there are several."""
    if not ours or not others:
        return "-"
    cells = []
    for rate in RATES:
        best = max(others, key=lambda name: others[name][rate])
        cells.append((f"{ours[rate] / others[best][rate]:.2f}", best))
    if len(others) == 1 and CEILING in others:
        return " / ".join(ratio for ratio, _ in cells)
    if cells[0][1] == cells[1][1]:
        return f"{cells[0][0]} / {cells[1][0]} ({cells[0][1]})"
    return " / ".join(f"{ratio} ({name})" for ratio, name in cells)


def arranged(rows):
    """Rows of one run -> {shape: {implementation: row}}, the last of several rows, the peers in order, GPU and date."""
    shapes = {}
    for row in rows:
        shapes.setdefault(row["shape"], {})[row["impl"]] = row
    found = {impl for by_impl in shapes.values() for impl in by_impl}
    peers = {impl for impl in found if impl != CEILING and impl != "ours" and not impl.startswith("ours-")}
    peers = [p for p in ORDER if p in peers] + sorted(peers - set(ORDER))
    gpu = max((str(row.get("gpu", "")) for row in rows), key=len)  # some rows have its short name only
    return shapes, peers, gpu, max(str(row.get("date", "")) for row in rows)


def table(rows):
    """Rows of one run -> lines."""
    shapes, peers, gpu, date = arranged(rows)
    lines = [f"{gpu}, {date}, run {rows[0]['run_id']}: TFLOP/s forward / forward+backward, MiB kept between the two", ""]
    heads = ["shape", "ours", *peers, "ours to the best peer", "products alone", "ours to these"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for shape, by_impl in shapes.items():
        ours, ceiling = by_impl.get("ours"), by_impl.get(CEILING)
        cells = [shape, speed(ours), *(speed(by_impl.get(p)) for p in peers)]
        cells.append(ratios(ours, {p: by_impl[p] for p in peers if p in by_impl}))
        cells.append(" / ".join(f"{ceiling[rate]:.0f}" for rate in RATES) if ceiling else "-")
        cells.append(ratios(ours, {CEILING: ceiling} if ceiling else {}))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22"]


def chart(rows):
    """The same run as bars of forward+backward TFLOP/s in an SVG, the products alone as a line across each group."""
    shapes, peers, gpu, date = arranged(rows)
    names, rate = ["ours", *peers], RATES[1]
    top = max(row[rate] for by_impl in shapes.values() for name, row in by_impl.items() if name in names or name == CEILING)
    bar, gap, height, left, head = 18, 26, 240, 44, 46
    group = bar * len(names) + gap
    width = left + group * len(shapes) + 10
    y = lambda value: head + height * (1 - value / (top * 1.05))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{head + height + 34}" font-family="sans-serif" font-size="11">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{left}" y="14">One MoE layer, forward+backward, TFLOP/s; {gpu}, {date}</text>']
    x = left
    for i, name in enumerate(names):
        out.append(f'<rect x="{x}" y="24" width="10" height="10" fill="{COLORS[i % len(COLORS)]}"/><text x="{x + 14}" y="33">{name}</text>')
        x += 30 + 7 * len(name)
    out.append(f'<line x1="{x}" y1="29" x2="{x + 14}" y2="29" stroke="black" stroke-dasharray="3 2"/><text x="{x + 18}" y="33">products alone</text>')
    for value in range(0, int(top * 1.05), 100):
        out.append(f'<line x1="{left}" y1="{y(value):.1f}" x2="{width - 10}" y2="{y(value):.1f}" stroke="#ddd"/>'
                   f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>')
    for g, (shape, by_impl) in enumerate(shapes.items()):
        start = left + gap / 2 + g * group
        for i, name in enumerate(names):
            if name in by_impl:
                value = by_impl[name][rate]
                out.append(f'<rect x="{start + i * bar:.1f}" y="{y(value):.1f}" width="{bar - 3}" height="{y(0) - y(value):.1f}" fill="{COLORS[i % len(COLORS)]}"/>'
                           f'<text x="{start + i * bar + (bar - 3) / 2:.1f}" y="{y(value) - 3:.1f}" text-anchor="middle" font-size="8">{value:.0f}</text>')
        if CEILING in by_impl:
            level = y(by_impl[CEILING][rate])
            out.append(f'<line x1="{start - 4:.1f}" y1="{level:.1f}" x2="{start + bar * len(names):.1f}" y2="{level:.1f}" stroke="black" stroke-dasharray="3 2"/>')
        out.append(f'<text x="{start + bar * len(names) / 2:.1f}" y="{head + height + 16}" text-anchor="middle">{shape}</text>')
    return "\n".join(out + ["</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description="Prints a GitHub table of one run of scripts/bench_layer.sh.")
    parser.add_argument("results", metavar="RESULTS.jsonl")
    parser.add_argument("--run-id", help="default: the run of the last MoE layer in the file")
    parser.add_argument("--chart", metavar="FILE.svg", help="also draw it")
    o = parser.parse_args()
    rows = read(o.results)
    if not rows:
        sys.exit(f"layer_table: {o.results} has no line of the bench moe_layer")
    run_id = o.run_id or rows[-1]["run_id"]
    rows = [row for row in rows if row["run_id"] == run_id]
    if not rows:
        sys.exit(f"layer_table: {o.results} has no MoE layer of run {run_id}")
    print("\n".join(table(rows)))
    if o.chart:
        with open(o.chart, "w") as file:
            file.write(chart(rows))


if __name__ == "__main__":
    main()
