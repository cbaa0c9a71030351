"""scripts/plot.py RUN...: the page and the pictures of runs. Standard library only; PNG files are made by rsvg-convert."""
import argparse
import json
import re
import shutil
import statistics
import subprocess
from html import escape
from pathlib import Path

from dev_table import read_text
from run_charts import CSS, DARK, LIGHT, WIDE, charts_of, picture, readable_bytes, short
from run_log import fail, read_runs

HERE = Path(__file__).resolve().parent
MOST = 8  # runs whose colours can be told apart


def result_rows(folder):
    rows = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        for number, line in enumerate(read_text(path).splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                fail(f"{path}:{number}: not JSON")
    return [row for row in rows if isinstance(row, dict) and "impl" in row and "run_id" in row]


def summary_table(runs):
    rounded = lambda value: short(float(f"{value:.3g}"))
    heads = ("run", "steps", "loss", "validation loss", "lowest", "tokens/s", "memory", "parameters (active)")
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for i, run in enumerate(runs):
        loss = next((v for v in reversed(run.scalars["loss"]) if v is not None), None)
        rates = [v for v in run.scalars["tokens_per_s"] if v is not None]
        m = run.memory
        cells = [f"{run.steps[-1]:,}", f"{loss:.4f}" if loss is not None else "not finite", f"{run.val[-1][1]:.4f}" if run.val else "-",
                 f"{min(v for _, v in run.val):.4f}" if run.val else "-", rounded(statistics.median(rates)) if rates else "-",
                 readable_bytes(m["bytes"][m["dispatch"]]["total"]) if m else "-", f"{rounded(m['parameters'])} ({rounded(m['active_parameters'])})" if m else "-"]
        lines.append(f'<tr><td><i style="background:var(--s{i})"></i>{escape(run.name)}</td>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def figure(chart):
    key = "".join(f'<span><i style="background:var(--{kind})"></i>{escape(text)}</span>' for kind, text in chart.legend)
    run = f' data-run="{chart.hover["run"]}"' if "run" in chart.hover else ""
    return (f'<figure class="card{" wide" if chart.width == WIDE else ""}"{run}><figcaption><h3>{escape(chart.title)}</h3><span>{escape(chart.note)}</span></figcaption>'
            + (f'<div class="key">{key}</div>' if key else "") + chart.svg() + "</figure>")


def page(runs, sections, ladders, title):
    """One HTML file that needs nothing else."""
    colors = lambda values: "".join(f"--{name}:{value};" for name, value in values.items())
    style = (f":root{{color-scheme:light;{colors(LIGHT)}}}:root[data-theme=dark]{{color-scheme:dark;{colors(DARK)}}}"
             f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{colors(DARK)}}}}}{CSS}{read_text(HERE / 'run_page.css')}")
    data = {"names": [run.name for run in runs], "charts": {chart.name: chart.hover for _, charts in sections for chart in charts}}
    parts = [f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
             f"<title>{escape(title)}</title><style>{style}</style></head><body><main><header><h1>{escape(title)}</h1>"]
    parts += [f'<button data-run="{i}" aria-pressed="true" title="{escape(str(run.folder))}"><i style="background:var(--s{i})"></i>{escape(run.name)}</button>'
              for i, run in enumerate(runs)]
    parts.append(f'<button id="theme">light / dark</button></header><h2>Runs</h2><div class="card">{summary_table(runs)}</div>')
    parts += [f'<p class="note">{escape(run.note)}</p>' for run in runs if run.note]
    for heading, charts in sections:
        parts.append(f'<h2>{heading}</h2><div class="charts">{"".join(map(figure, charts))}</div>')
    if ladders:
        scaling = lambda svg: re.sub(r'width="(\d+)" height="(\d+)"', r'viewBox="0 0 \1 \2"', svg, count=1)
        drawn = "".join(f'<div class="card{" wide" if name == "roofline" else ""}">{scaling(svg)}</div>' for name, svg in ladders.items())
        parts.append(f"<h2>Kernels</h2><details><summary>{len(ladders)} charts of dev/: every kernel family from its first version to the one that trains</summary>"
                     f'<div class="ladders">{drawn}</div></details>')
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts.append(f'<div id="tip" class="hidden" role="status"></div></main><script type="application/json" id="data">{text}</script>'
                 f"<script>{read_text(HERE / 'run_page.js')}</script></body></html>\n")
    return "".join(parts)


def write_png(svg, path):
    result = subprocess.run(["rsvg-convert", "--output", str(path)], input=svg.encode(), capture_output=True)
    if result.returncode:
        fail(f"{path}: rsvg-convert: {' '.join(result.stderr.decode(errors='replace').split())}")


def main(arguments, ladders_of, root):
    """ladders_of(results, dev): path -> SVG, as scripts/plot.py dev draws it."""
    parser = argparse.ArgumentParser(prog="plot.py", description="Draws training runs: one HTML page that needs no server, and PNG files.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"the --out directory of a run; at most {MOST}, laid over each other")
    parser.add_argument("--html", metavar="FILE", help="the page (default: plot.html in the first RUN)")
    parser.add_argument("--png", metavar="DIR", help="also a PNG file a chart, and all.png with those of the runs (needs rsvg-convert)")
    parser.add_argument("--title", default="Training runs")
    parser.add_argument("--results", default=root / "dev" / "results", help="folder of *.jsonl with peers and kernels (default: dev/results)")
    o = parser.parse_args(arguments)
    if len(o.runs) > MOST:
        fail(f"{len(o.runs)} runs: at most {MOST} can be told apart in one chart")
    if o.png and not shutil.which("rsvg-convert"):
        fail("--png needs rsvg-convert (Debian: apt-get install librsvg2-bin); the HTML page does not")
    runs = read_runs(o.runs)
    for run in runs:
        if run.note:
            print(f"plot: note: {run.note}")
    sections = charts_of(runs, result_rows(o.results))
    drawn = {path.stem: svg for path, svg in ladders_of(o.results, root / "dev").items() if svg}
    ladders = {name: drawn[name] for name in sorted(drawn, key=lambda name: (name != "roofline", name))}
    html = Path(o.html) if o.html else Path(o.runs[0]) / "plot.html"
    try:
        html.write_text(page(runs, sections, ladders, o.title))
        print(f"plot: wrote {html}")
        if o.png:
            Path(o.png).mkdir(parents=True, exist_ok=True)
            charts = [chart for _, group in sections for chart in group]
            pictures = {"all": picture(charts, runs, o.title), **{c.name: picture([c], runs, "") for c in charts}, **{f"ladder-{n}": s for n, s in ladders.items()}}
            for name, svg in pictures.items():
                write_png(svg, Path(o.png) / f"{name}.png")
            print(f"plot: wrote {len(pictures)} PNG files to {o.png}")
    except OSError as error:
        fail(f"cannot write {error.filename}: {error.strerror}")
