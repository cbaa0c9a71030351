"""Charts of runs as SVG: what scripts/plot.py puts on a page and into PNG files. Colours are named in CSS classes, so that
the page can follow the reader's theme. Standard library only."""
import base64
import math
import re
import struct
import zlib
from dataclasses import dataclass, field
from html import escape

from layer_table import CEILING, arranged

POINTS = 150  # of a line at most; each is the mean of the steps around it
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 56, 14, 14, 34
PLOT = WIDTH - LEFT - RIGHT
WIDE = 2 * WIDTH + 40

# ---- colours ----

LIGHT = {"page": "#f6f6f3", "card": "#ffffff", "ink": "#14140f", "soft": "#52514e", "mute": "#80807a", "grid": "#e6e5df", "axis": "#bdbcb3",
         "s0": "#2a78d6", "s1": "#e0620d", "s2": "#159c6b", "s3": "#c2398a", "s4": "#6f56c9", "s5": "#b58900", "s6": "#d63a3a", "s7": "#5d6b78",
         "less": "#2a78d6", "more": "#d93f2b", "m0": "#7fb0ea", "m1": "#4a8fdf", "m2": "#1f5fb0", "m3": "#eb7434", "m4": "#8a3d0c", "m5": "#f2c078", "peer": "#a9a8a0"}
DARK = {"page": "#0f0f0e", "card": "#1b1b1a", "ink": "#f4f4ef", "soft": "#c3c2b7", "mute": "#94938a", "grid": "#2e2e2b", "axis": "#55544e",
        "s0": "#4a95ee", "s1": "#ee7c35", "s2": "#2fb583", "s3": "#e36aae", "s4": "#9b87ee", "s5": "#d0a52a", "s6": "#ec6a62", "s7": "#98a6b3",
        "less": "#4a95ee", "more": "#f0604b", "m0": "#8db9ee", "m1": "#4a8fdf", "m2": "#2a68b8", "m3": "#ee7c35", "m4": "#b5622c", "m5": "#f0c88a", "peer": "#7d7c75"}
CSS = "".join([
    "svg{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;font-size:11px}",
    "svg text{fill:var(--soft)}svg .mute{fill:var(--mute)}svg .ink{fill:var(--ink)}svg .title{fill:var(--ink);font-size:14px;font-weight:600}",
    ".grid{stroke:var(--grid)}.axis{stroke:var(--axis)}.frame{fill:var(--card)}.back{fill:var(--page)}",
    ".line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}.band{stroke:none;opacity:.16}.dot{stroke:var(--card);stroke-width:1.5}.halo{paint-order:stroke;stroke:var(--card);stroke-width:4px}",
    "svg .on{fill:#fff}svg .dark{fill:#14140f}.less{fill:var(--less)}.more{fill:var(--more)}.peer{fill:var(--peer)}.border{fill:none;stroke:var(--grid)}",
    *(f".s{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}" for i in range(8)), *(f".m{i}{{fill:var(--m{i})}}" for i in range(6))])


def themed(css, colors):
    return re.sub(r"var\(--(\w+)\)", lambda m: colors[m[1]], css)


# ---- numbers ----


def ticks(low, high, about=5):
    """Round numbers within [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= about)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value):
    """12000 -> 12k, 0.0030000001 -> 0.003."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def readable_bytes(n):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            break
        n, unit = n / 1024, {"B": "KiB", "KiB": "MiB", "MiB": "GiB", "GiB": "TiB"}[unit]
    return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"


def thinned(steps, values):
    """At most POINTS of (mean step, mean, lowest, highest); None for the three where no value of a stretch is finite."""
    size, out = max(1, -(-len(steps) // POINTS)), []
    for at in range(0, len(steps), size):
        known = [v for v in values[at:at + size] if v is not None]
        where = sum(steps[at:at + size]) / len(steps[at:at + size])
        out.append((where, sum(known) / len(known), min(known), max(known)) if known else (where, None, None, None))
    return out


# ---- svg ----


@dataclass
class Chart:
    """body: SVG elements of a picture of width x height. hover: what the page's script needs to say values."""
    name: str
    title: str
    note: str
    width: int
    height: int
    body: list = field(default_factory=list)
    hover: dict = field(default_factory=dict)
    legend: list = field(default_factory=list)  # (class of the swatch, text); empty: that of the runs

    def text(self, x, y, text, kind="", anchor="start"):
        self.body.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(str(text))}</text>')

    def line(self, x1, y1, x2, y2, kind):
        self.body.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def rect(self, x, y, width, height, kind, says=""):
        tip = f' data-tip="{escape(says)}"' if says else ""
        self.body.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" class="{kind}"{tip}/>')

    def svg(self):
        return (f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}" data-chart="{self.name}">'
                + "".join(self.body) + "</svg>")


def step_axis(chart, first, last, bottom):
    """The axis of steps that all charts of runs share; returns step -> x."""
    x = lambda step: LEFT + PLOT * (step - first) / (last - first)
    for step in ticks(first, last, 6):
        if step == int(step):
            chart.text(x(step), bottom + 16, short(step), "mute", "middle")
    chart.text(LEFT + PLOT, bottom + 30, "step", "mute", "end")
    return x


def line_chart(name, title, note, series, span, zero=False, clip=False, dots=False):
    """series: [(index of the run, points)]. clip: the frame follows the steps after the first few percent, so that a high
    start does not flatten the rest; what is above is cut off, and said."""
    chart = Chart(name, title, note, WIDTH, 250)
    bottom = chart.height - BOTTOM
    known = [p for _, points in series for p in points if p[1] is not None]
    if not known:
        chart.text(WIDTH / 2, bottom / 2, "no finite value was logged", "mute", "middle")
        return chart
    bands = len(series) <= 4
    highest, lowest = (lambda p: p[3] if bands else p[1]), (lambda p: p[2] if bands else p[1])
    settled = [p for p in known if p[0] > span[0] + 0.04 * (span[1] - span[0])] if clip else []
    low, high = 0 if zero else min(map(lowest, known)), max(map(highest, settled or known))
    if low >= high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    pad = 0.05 * (high - low)
    low, high = low if zero else low - pad, high + pad
    y = lambda value: TOP + (bottom - TOP) * (1 - (value - low) / (high - low))
    for value in ticks(low, high):
        chart.line(LEFT, y(value), LEFT + PLOT, y(value), "grid")
        chart.text(LEFT - 7, y(value) + 4, short(value), "mute", "end")
    chart.line(LEFT, bottom, LEFT + PLOT, bottom, "axis")
    x = step_axis(chart, *span, bottom)
    chart.body.append(f'<clipPath id="clip-{name}"><rect x="{LEFT - 4}" y="{TOP - 4}" width="{PLOT + 8}" height="{bottom - TOP + 8}"/></clipPath>')
    chart.body.append(f'<g clip-path="url(#clip-{name})">')
    at = lambda p, value: f"{x(p[0]):.1f} {y(max(min(value, high + 9 * (high - low)), low)):.1f}"
    for run, points in series:
        pieces, last = [], None  # a value that is not finite leaves a gap
        for p in points:
            if p[1] is not None:
                pieces.append([p]) if last is None else pieces[-1].append(p)
            last = p[1]
        chart.body.append(f'<g data-run="{run}">')
        for piece in pieces:
            if bands and any(p[2] < p[3] for p in piece):
                outline = [at(p, p[3]) for p in piece] + [at(p, p[2]) for p in reversed(piece)]
                chart.body.append(f'<path class="band f{run}" d="M{"L".join(outline)}Z"/>')
            if len(piece) > 1:
                chart.body.append(f'<path class="line s{run}" d="M{"L".join(at(p, p[1]) for p in piece)}"/>')
            if dots and len(points) <= 40 or len(piece) == 1:
                chart.body += [f'<circle class="dot f{run}" cx="{x(p[0]):.1f}" cy="{y(p[1]):.1f}" r="{4 if bands else 3}"/>' for p in piece]
        chart.body.append("</g>")
    chart.body.append("</g>")
    above = max(known, key=highest)
    if highest(above) > high:
        chart.text(LEFT + PLOT - 4, TOP + 8, f"cut off above: up to {short(highest(above))}, near step {above[0]:.0f}", "mute halo", "end")
    digits = lambda value: None if value is None else float(f"{value:.6g}")
    chart.hover = {"kind": "line", "first": span[0], "last": span[1], "left": LEFT, "plot": PLOT, "top": TOP, "bottom": bottom, "low": low, "high": high,
                   "runs": [{"run": run, "points": [[digits(v) for v in (p if p[2] != p[3] else p[:2])] for p in points]} for run, points in series]}
    return chart


# ---- expert load ----

RANGE, STRONG = 3.0, 2.0  # log2 of load over mean: what a byte can say, and where colour is full


def png_of(indices, width, height, wide, tall):
    """An indexed PNG with a palette of red above the mean, blue below, and the background showing through at it; a cell is
    wide x tall pixels, so that programs that smooth what they enlarge leave it a rectangle."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    palette, alpha = b"", b""
    for i in range(256):
        level = (i - 127) / 127 * RANGE / STRONG if i < 255 else 0
        color = LIGHT["more"] if level > 0 else LIGHT["less"]
        palette += bytes.fromhex(color[1:])
        alpha += bytes([round(255 * min(1, abs(level)))])
    rows = b"".join((b"\0" + b"".join(bytes([i]) * wide for i in indices[r * width:(r + 1) * width])) * tall for r in range(height))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width * wide, height * tall, 8, 3, 0, 0, 0)) + chunk(b"PLTE", palette)
            + chunk(b"tRNS", alpha) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def index_of(count, mean):
    if not mean:
        return 255
    level = math.log2(count / mean) if count else -RANGE
    return round(127 + 127 * max(-RANGE, min(RANGE, level)) / RANGE)


def load_chart(number, run, span):
    """Steps from left to right, layers from top to bottom, in each layer a row an expert; None for a run without experts."""
    stretches = run.load.stretches
    if not stretches:
        return None
    layers = [l for l, counts in enumerate(stretches[0][3]) if counts]
    experts = max(len(stretches[0][3][l]) for l in layers)
    tall = max(8, min(6 * experts, 48, 620 // len(layers) - 3))
    chart = Chart(f"load-{number}", f"Expert load: {run.name}", "", WIDTH, TOP + len(layers) * (tall + 3) + BOTTOM + 26)
    bottom = chart.height - BOTTOM - 26
    x = step_axis(chart, *span, bottom)
    every = math.ceil(len(layers) * 13 / (bottom - TOP))
    left = x(stretches[0][0] - 1)  # a step is from the end of the one before to its own
    right = x(stretches[0][0] - 1 + run.load.width * len(stretches))
    rows = {}
    for i, layer in enumerate(layers):
        top, indices = TOP + i * (tall + 3), []
        count = len(stretches[0][3][layer])
        for e in range(count):
            for _, _, _, counts in stretches:
                indices.append(index_of(counts[layer][e], sum(counts[layer]) / count))
        if i % every == 0:
            chart.text(LEFT - 7, top + tall / 2 + 4, f"layer {layer}" if len(layers) < 10 else layer, "mute", "end")
        cell = (6, math.ceil(tall / count)) if count <= tall else (1, 1)
        image = base64.b64encode(png_of(indices, len(stretches), count, *cell)).decode()
        chart.rect(left, top, right - left, tall, "border")
        chart.body.append(f'<image x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{tall}" preserveAspectRatio="none" '
                          f'href="data:image/png;base64,{image}"/>')
        rows[layer] = {"top": top, "experts": count, "bytes": base64.b64encode(bytes(indices)).decode()}
    chart.line(LEFT, bottom, LEFT + PLOT, bottom, "axis")
    y, cell = chart.height - 18, 24
    chart.text(LEFT, y + 9, "of an expert's equal share:", "mute")
    for i, (level, label) in enumerate(((-2, "\u00bc"), (-1, "\u00bd"), (0, "1"), (1, "2"), (2, "4"))):
        at = LEFT + 160 + i * 66
        chart.rect(at, y - 1, cell, 12, "border")
        chart.body.append(f'<rect x="{at}" y="{y - 1}" width="{cell}" height="12" class="{"more" if level > 0 else "less"}" style="opacity:{abs(level) / STRONG}"/>')
        chart.text(at + cell + 5, y + 9, ("\u2264 " if level == -2 else "\u2265 " if level == 2 else "") + label + "\u00d7", "mute")
    chart.hover = {"kind": "load", "run": number, "left": left, "right": right, "tall": tall, "range": RANGE,
                   "steps": [[s[0], s[1]] for s in stretches], "layers": rows}
    chart.note = "a row an expert; selections over the mean of its layer"
    return chart


# ---- memory ----

STATE = ("weights", "gradients", "optimizer", "saved", "routing metadata", "transient workspace")
SAID = dict(zip(STATE, ("weights", "gradients", "optimizer state", "activations saved", "routing metadata", "workspace")))


def bars(chart, rows, top, left, right, tall):
    """rows: (label, [(class, bytes, text)], total text, gap before). Returns the height taken."""
    longest = max(sum(n for _, n, _ in parts) for _, parts, _, _ in rows)
    y = top
    for label, parts, total, gap in rows:
        y += gap
        chart.text(left - 8, y + tall / 2 + 4, label, "", "end")
        at = left
        for kind, n, says in parts:
            width = (right - left) * n / longest
            chart.rect(at, y, max(0, width - 1), tall, kind, says)  # a hair of background between parts
            inside = readable_bytes(n) if len(parts) > 1 else ""
            if inside and width > 6.6 * len(inside):
                chart.text(at + width / 2, y + tall / 2 + 4, inside, "dark" if kind in ("m0", "m3", "m5") else "on", "middle")
            at += width
        chart.text(at + 7, y + tall / 2 + 4, total, "ink")
        y += tall
    return y - top


def memory_chart(runs, results):
    """The plan of each run, and the same with the other --dispatch; runs of one plan share their bars. Beside a preset that
    dev/results has whole-model peers of at the same batch: the peak that these took."""
    plans = {}
    for run in runs:
        if run.memory:
            plans.setdefault(repr([run.memory["bytes"], run.memory["dispatch"]]), []).append(run)
    if not plans:
        return None
    rows = []
    for same in plans.values():
        memory, name = same[0].memory, ", ".join(run.name for run in same)
        name = name if len(name) <= 34 else f"{same[0].name[:24]} and {len(same) - 1} more" if len(same) > 1 else name[:32] + "\u2026"
        own = memory["dispatch"]
        for dispatch in sorted(memory["bytes"], key=lambda d: d != own):
            plan = memory["bytes"][dispatch]
            parts = [(f"m{i}", plan[key], f"{SAID[key]}: {readable_bytes(plan[key])}") for i, key in enumerate(STATE) if plan.get(key)]
            label = f"{name}: {dispatch}" if dispatch == own else f"if {dispatch}"
            rows.append((label, parts, readable_bytes(plan["total"]), 16 if dispatch == own and rows else 6))
        for row in results:
            like = (row.get("bench"), row.get("shape"), row.get("B"), row.get("T")) == ("train", memory.get("preset"), memory.get("batch_size"), memory.get("seq_len"))
            if like and not row["impl"].startswith("ours") and row.get("peak_GiB") and memory.get("ranks") == 1:
                total = row["peak_GiB"] * 2**30
                rows.append((row["impl"], [("peer", total, f"{row['impl']}: peak, measured on {row['gpu']}, run {row['run_id']}")], f"{readable_bytes(total)} at its peak", 6))
    chart = Chart("memory", "Memory of a run", "planned, rank 0; below it the same with the other way to dispatch tokens", WIDE, 0)
    left = min(330, 30 + 6.6 * max(len(row[0]) for row in rows))
    chart.height = round(12 + bars(chart, rows, 2, left, WIDE - 150, 20))
    chart.legend = [(f"m{i}", SAID[key]) for i, key in enumerate(STATE)] + ([("peer", "peak of others, measured")] if any(row[1][0][0] == "peer" for row in rows) else [])
    return chart


def layer_chart(results):
    """What a MoE layer keeps between the passes, ours beside peers, from the newest run in dev/results that has peers."""
    rows = [row for row in results if row.get("bench") == "moe_layer" and row.get("saved_MiB") and row["impl"] != CEILING]
    runs = {row["run_id"] for row in rows if row["impl"] == "ours"}
    counts = {r: len({(row["shape"], row["impl"]) for row in rows if row["run_id"] == r and not row["impl"].startswith("ours")}) for r in runs}
    if not counts or not max(counts.values()):
        return None
    best = max(sorted(counts), key=lambda r: counts[r])
    rows = [row for row in rows if row["run_id"] == best]
    shapes, peers, gpu, date = arranged(rows)
    names = ["ours", *peers]
    chart = Chart("layer-memory", "What one MoE layer keeps for backward", f"{gpu}, {date}, run {best}", WIDE, 0)
    lines = []
    for shape, by_impl in shapes.items():
        for i, name in enumerate(names):
            if name in by_impl:
                mib = by_impl[name]["saved_MiB"]
                kind = ("m3", "m2", "m0", "m5", "m4", "m1")[min(i, 5)]
                lines.append((shape if name == "ours" else "", [(kind, mib * 2**20, f"{shape}, {name}: {mib:,.0f} MiB")],
                              readable_bytes(mib * 2**20), 9 if name == "ours" and lines else 1))
    chart.height = round(12 + bars(chart, lines, 4, 130, WIDE - 90, 11))
    chart.legend = [(("m3", "m2", "m0", "m5", "m4", "m1")[min(i, 5)], name) for i, name in enumerate(names)]
    return chart


# ---- all of them ----


def charts_of(runs, results):
    """Sections: (title, charts)."""
    last = max(run.steps[-1] for run in runs)
    span = (0, max(1, last, *(step for run in runs for step, _ in run.val)))
    lines = lambda key: [(i, thinned(run.steps, run.scalars[key])) for i, run in enumerate(runs)]
    thin = any(len(run.steps) > POINTS for run in runs)
    note = "line: mean of nearby steps" + ("; band: lowest to highest" if len(runs) <= 4 else "") if thin else ""
    val = [(i, [(step, loss, loss, loss) for step, loss in run.val]) for i, run in enumerate(runs) if run.val]
    training = [line_chart("loss", "Training loss", note, lines("loss"), span, clip=True),
                *([line_chart("val_loss", "Validation loss", "", val, span, clip=True, dots=True)] if val else []),
                line_chart("lr", "Learning rate", "", lines("lr"), span, zero=True),
                line_chart("grad_norm", "Gradient norm", "before clipping", lines("grad_norm"), span, zero=True, clip=True),
                line_chart("tokens_per_s", "Tokens a second", "", lines("tokens_per_s"), span, zero=True)]
    experts = [chart for i, run in enumerate(runs) if (chart := load_chart(i, run, span))]
    if experts:
        training.append(line_chart("load_max_over_mean", "Busiest expert", "its load over the mean, in the worst layer; 1 at balance", lines("load_max_over_mean"), span, clip=True))
    memory = [chart for chart in (memory_chart(runs, results), layer_chart(results)) if chart]
    return [(title, charts) for title, charts in (("Training", training), ("Experts", experts), ("Memory", memory)) if charts]


# ---- pictures ----


def picture(charts, runs, heading):
    """One SVG document of these charts in the light theme, two beside each other, with their legends."""
    body, pad, y = [], 20, 20
    if heading:
        body.append(f'<text x="{pad}" y="{y + 16}" class="title">{escape(heading)}</text>')
        y += 30

    def legend(entries, x, y):
        for kind, text in entries:
            body.append(f'<rect x="{x}" y="{y}" width="11" height="11" rx="2" class="{kind}"/><text x="{x + 16}" y="{y + 10}">{escape(text)}</text>')
            x += 34 + 6.6 * len(text)

    width = pad + (WIDE if len(charts) > 1 or charts[0].width == WIDE else WIDTH) + pad
    if any(chart.hover.get("kind") == "line" for chart in charts):
        legend([(f"f{i}", run.name) for i, run in enumerate(runs)], pad, y)
        y += 26
    row = []

    def flush():
        nonlocal y
        if row:
            tall = 44 + max(c.height + (22 if c.legend else 0) for c in row)
            for i, c in enumerate(row):
                x = pad + i * (WIDTH + 40)
                body.append(f'<rect x="{x - 8}" y="{y}" width="{c.width + 16}" height="{tall}" rx="6" class="frame"/>')
                body.append(f'<text x="{x + 4}" y="{y + 22}" class="title">{escape(c.title)}</text>')
                body.append(f'<text x="{x + c.width - 4}" y="{y + 22}" class="mute" text-anchor="end">{escape(c.note)}</text>')
                if c.legend:
                    legend(c.legend, x + 6, y + 34)
                body.append(f'<g transform="translate({x} {y + 36 + (22 if c.legend else 0)})">{"".join(c.body)}</g>')
            y += tall + 14
            row.clear()

    for chart in charts:
        if chart.width == WIDE or len(row) == 2:
            flush()
        row.append(chart)
        if chart.width == WIDE:
            flush()
    flush()
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 6:.0f}"><style>{themed(CSS, LIGHT)}</style>'
            f'<rect width="100%" height="100%" class="back"/>{"".join(body)}</svg>')
