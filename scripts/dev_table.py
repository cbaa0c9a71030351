#!/usr/bin/env python3
"""Writes the tables of results in the READMEs of dev/ from dev/results/*.jsonl. The table of a ladder stands between

    <!-- table: FAMILY [shape=SHAPE] [also=SHAPE,SHAPE] [pass=fwd|bwd|fwdbwd] [unit=ms|us|rate] [relative=VARIANT]
        [fields=KEY,KEY] -->
    <!-- end table -->

and shows the newest run of that family that has rungs (variants that begin with a digit): a row a rung in their order, then
libraries and other variants, production last. At SHAPE (default: the most work that most rungs were run at) it says what
time was predicted, what time it took, the rate, how many times as fast as the rung before that is (production: as the last
rung), and the speed in percent of VARIANT's (default: production's); at the other shapes (all, or those named by also=) the
time, or with unit=rate the rate. Families that have a backward pass show both passes, unless pass= names one. A rung that
this run left out comes with a star from the newest run before it that has it. A file FAMILY.svg beside the README
(scripts/plot.py) is shown too. With fields=KEY,KEY the table has no times: a column a shape, in it what the rows say under
these keys (of bytes: in GB), divided by slashes.

Between <!-- families --> and <!-- end families --> stands a row for every family in dev/.

With --check nothing is written: exit 1 with one line where a table differs. Standard library only."""
import argparse
import itertools
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START = re.compile(r"<!-- table: *(\S+)((?: +\w+=\S+)*) *-->")
END = "<!-- end table -->"
FAMILIES, END_FAMILIES = "<!-- families -->", "<!-- end families -->"
NOTHING = "not measured yet"
PRODUCTION = "production"
OPTIONS = {"shape": None, "also": None, "pass": ("fwd", "bwd", "fwdbwd"), "unit": ("ms", "us", "rate"), "relative": None,
           "fields": None}
KEYS = ("bench", "shape", "variant", "run_id", "gpu", "date")
RATES = {"tflops": ("TFLOP/s", 1e9), "gflops": ("GFLOP/s", 1e6), "gbps": ("GB/s", 1e6)}  # unit, and what it is in a ms
PASSES = {"": "", "fwd_": "forward", "bwd_": "backward", "fwdbwd_": "both passes"}  # how a row's keys begin


def fail(message):
    sys.exit(f"dev_table: {message}")


def read_text(path):
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not text'}")


# ---- rows ----


def number(row, key):
    """A positive number, or None."""
    value = row.get(key) if row else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf else None


def key_of(row, which):
    """How the keys of this pass begin in this row; a variant may have one pass where others have two."""
    return "" if which == "fwd_" and row and "fwd_ms" not in row else which


def value(row, which, name):
    return number(row, key_of(row, which) + name)


def rate(row, which):
    """(rate, its kind) or None."""
    found = [(value(row, which, kind), kind) for kind in RATES]
    return next((item for item in found if item[0]), None)


def floor(row, which):
    """The least time that the work could take, in ms."""
    percent, ms = value(row, which, "percent_of_ceiling"), value(row, which, "ms")
    return value(row, which, "floor_ms") or (percent * ms / 100 if percent and ms else None)


def is_rung(variant):
    return re.match(r"\d\d_", variant) is not None


def read_results(folder):
    """All times of variants, in the order of the files' names and of their lines. Rows of other kinds are left out."""
    rows = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line_number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                fail(f"{path}:{line_number}: not JSON")
            if not isinstance(row, dict) or "variant" not in row or not any(number(row, p + "ms") for p in PASSES):
                continue
            missing = [key for key in KEYS if not isinstance(row.get(key), str)]
            if missing:
                fail(f"{path}:{line_number}: no {missing[0]}")
            rows.append(row)
    return rows


def newest_run(rows, bench):
    """Rows of the newest run of this bench that has rungs, on one GPU; of several of a shape and variant the last."""
    rows = [row for row in rows if row["bench"] == bench]
    ladders = {(row["run_id"], row["gpu"]) for row in rows if is_rung(row["variant"])}
    return newest_of([row for row in rows if (row["run_id"], row["gpu"]) in ladders])


def newest_of(rows):
    """Those of the newest run among these."""
    if not rows:
        return []
    newest = max(enumerate(rows), key=lambda item: (item[1]["date"], item[0]))[1]
    return [row for row in rows if (row["run_id"], row["gpu"]) == (newest["run_id"], newest["gpu"])]


def other_rows(rows, bench, newest):
    """Of rungs and production, where the newest run left them out: the rows at its shapes, of the newest run that has
    them."""
    has, shapes = {row["variant"] for row in newest}, {row["shape"] for row in newest}
    others = [row for row in rows if row["bench"] == bench and row["gpu"] == newest[-1]["gpu"]
              and (is_rung(row["variant"]) or row["variant"] == PRODUCTION) and row["variant"] not in has
              and row["shape"] in shapes]
    return [row for variant in sorted({row["variant"] for row in others})
            for row in newest_of([row for row in others if row["variant"] == variant])]


class Ladder:
    """What a table or a chart of a family shows: rows by variant and shape, both in order. Empty: not measured."""

    def __init__(self, rows, bench, options):
        newest = newest_run(rows, bench)
        others = other_rows(rows, bench, newest) if newest else []
        self.bench, self.last = bench, newest[-1] if newest else None
        self.starred, self.star_runs = {row["variant"] for row in others}, sorted({row["run_id"] for row in others})
        self.rows = {(row["variant"], row["shape"]): row for row in others + newest}
        names = sorted({variant for variant, _ in self.rows})
        self.rungs = [name for name in names if is_rung(name)]
        self.others = [name for name in names if not is_rung(name) and name != PRODUCTION]
        self.variants = self.rungs + self.others + [PRODUCTION] * (PRODUCTION in names)
        has = [p for p in ("fwd_", "bwd_", "fwdbwd_") if any(number(row, p + "ms") for row in self.rows.values())]
        self.passes = [options["pass"] + "_"] if has and "pass" in options else has[:2] or [""]
        self.shapes = self.by_work() if newest else []
        climbed = [s for s in self.shapes if 2 * sum((rung, s) in self.rows for rung in self.rungs) > len(self.rungs)]
        self.shape = options.get("shape") or next(reversed(climbed or self.shapes), None)
        if newest and self.shape not in self.shapes:
            fail(f"the table of {bench}: no shape '{self.shape}' in run {self.last['run_id']}: {', '.join(self.shapes)}")

    def by_work(self):
        """Shapes, those with the least work first: of operations or bytes where all tell these, else by time."""
        work, times, kinds = {}, {}, set()
        for (_, shape), row in self.rows.items():
            found, ms = rate(row, self.passes[0]), value(row, self.passes[0], "ms")
            work.setdefault(shape, 0), times.setdefault(shape, 0)
            if ms:
                kinds.add(found[1] if found else None)
                work[shape] = max(work[shape], found[0] * ms if found else 0)
                times[shape] = min(times[shape] or ms, ms)
        by = work if len(kinds) == 1 and None not in kinds else times
        return sorted(by, key=lambda shape: (by[shape], shape))

    def before(self, variant, shape, which):
        """The time of the nearest rung before this one that has this pass at this shape, or None."""
        at = len(self.rungs) if variant == PRODUCTION else self.rungs.index(variant) if variant in self.rungs else 0
        return next((ms for rung in reversed(self.rungs[:at]) if (ms := self.ms(rung, shape, which))), None)

    def ms(self, variant, shape, which):
        return value(self.rows.get((variant, shape)), which, "ms")

    def relative_speed(self, variant, to):
        """At the table's shape, over the passes that this variant has."""
        passes = self.passes[-1:] if "fwdbwd_" in self.passes else self.passes
        passes = [p for p in passes if self.ms(variant, self.shape, p)] or self.passes[:1]
        mine, other = ([self.ms(v, self.shape, p) for p in passes] for v in (variant, to))
        return sum(other) / sum(mine) if all(mine) and all(other) else None


# ---- cells ----


def significant(x, digits=3):
    if not x:
        return "-"
    return f"{x:.{max(0, digits - 1 - math.floor(math.log10(x)))}f}"


def rate_text(found):
    return "-" if not found else f"{found[0]:.0f}" if found[0] >= 10 else f"{found[0]:.2g}"


def ratio_text(slow, fast):
    return f"{slow / fast:.2f}" if slow and fast and slow / fast < 10 else f"{slow / fast:.0f}" if slow and fast else "-"


def table(rows, bench, options):
    ladder = Ladder(rows, bench, options)
    if not ladder.rows:
        return [NOTHING]
    shape, passes, relative = ladder.shape, ladder.passes, options.get("relative", PRODUCTION)
    factor, unit = (1e3, "us") if options.get("unit") == "us" else (1, "ms")
    others = [s for s in (options["also"].split(",") if "also" in options else ladder.shapes) if s != shape]

    def rate_unit(which, at):
        kinds = {found[1] for (_, s), row in ladder.rows.items() if s == at and (found := rate(row, which))}
        return RATES[kinds.pop()][0] if len(kinds) == 1 else "rate"

    heads = [f"at {shape}"]
    for which in passes:
        prefix = f"{PASSES[which]}: " if PASSES[which] else ""
        heads += [f"{prefix}predicted {unit}", unit, rate_unit(which, shape), "x before"]
    by_rate = options.get("unit") == "rate"
    heads += [f"of {relative}", *(f"{s}, {rate_unit(passes[0], s) if by_rate else unit}" for s in others)]

    def time_text(ms):
        return significant(ms * factor) if ms else "-"

    def cells(variant):
        row, out = ladder.rows.get((variant, shape)), [variant + "*" * (variant in ladder.starred)]
        for which in passes:
            out += [time_text(value(row, which, "predicted_ms")), time_text(value(row, which, "ms")), rate_text(rate(row, which)),
                    ratio_text(ladder.before(variant, shape, which), value(row, which, "ms"))]
        speed = ladder.relative_speed(variant, relative)
        out.append(f"{100 * speed:.1f} %" if speed else "-")
        for other in others:
            at = ladder.rows.get((variant, other))
            texts = [rate_text(rate(at, p)) if by_rate else time_text(value(at, p, "ms")) for p in passes]
            out.append("-" if set(texts) == {"-"} else " / ".join(texts))
        return out

    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    shown = [v for v in ladder.variants if any((v, s) in ladder.rows for s in [shape, *others])]
    lines += ["| " + " | ".join(cells(variant)) + " |" for variant in shown]
    last = ladder.last
    where = last["cpu"] if isinstance(last.get("cpu"), str) else last["gpu"].upper()
    star = f"; * of run {', '.join(ladder.star_runs)}" if ladder.starred & set(shown) else ""
    return [*lines, "", f"{where}, {last['date']}, run {last['run_id']}: `dev/{bench}/{bench}`{star}"]


def field_table(rows, bench, options):
    """What rows say besides times: a row a rung, a column a shape."""
    ladder = Ladder(rows, bench, options)
    if not ladder.rows:
        return [NOTHING]
    keys = options["fields"].split(",")

    def text(row, key):
        found = number(row, key) if row else None
        return "-" if found is None else f"{found * 1e-9:.1f}" if key.endswith("bytes") else f"{found:.0f}"

    def cell(row):
        texts = [text(row, key) for key in keys]
        return "-" if set(texts) == {"-"} else " / ".join(texts)

    variants = [v for v in ladder.variants if any(cell(ladder.rows.get((v, s))) != "-" for s in ladder.shapes)]
    lines = ["| | " + " | ".join(ladder.shapes) + " |", "|---|" + "---:|" * len(ladder.shapes)]
    return lines + ["| " + " | ".join([v, *(cell(ladder.rows.get((v, s))) for s in ladder.shapes)]) + " |" for v in variants]


# ---- families ----


def families(dev):
    """Names of the folders of dev/ that hold a program of their name."""
    return sorted(path.name for path in Path(dev).iterdir()
                  if any((path / (path.name + end)).is_file() for end in (".cu", ".cpp")))


def rung_files(folder):
    return sorted(path.stem for path in Path(folder).iterdir() if re.fullmatch(r"\d\d_\w+\.(cuh|h|hpp)", path.name))


def subject(folder):
    """What the title of a family's README says that it is about, else the first sentence of its program."""
    readme = folder / "README.md"
    if readme.is_file():
        title = read_text(readme).splitlines()[:1]
        return re.sub(rf"^#\s*({re.escape(folder.name)}\s*:)?\s*", "", title[0]) if title else "-"
    source = next(path for end in (".cu", ".cpp") if (path := folder / (folder.name + end)).is_file())
    comment = " ".join(line[2:].strip() for line in itertools.takewhile(lambda l: l.startswith("//"), read_text(source).splitlines()))
    return re.split(r"[.:](?: |$)", comment)[0] or "-"


def options_in(text, bench, path):
    """The options of this family's table in a README."""
    for line in text.splitlines():
        mark = START.fullmatch(line.strip())
        if mark and mark[1] == bench:
            return parse_options(mark, path)
    return {}


def family_table(rows, dev):
    heads = ["family", "about", "rungs", "at", "production", "of its floor", "x the first rung"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---:|---|---:|---:|---:|"]
    for name in families(dev):
        folder, readme = Path(dev) / name, Path(dev) / name / "README.md"
        options = options_in(read_text(readme), name, readme) if readme.is_file() else {}
        ladder = Ladder(rows, name, options)
        rungs = len(rung_files(folder))
        link = f"[{name}]({name}/README.md)" if readme.is_file() else name
        cells = [link, subject(folder), str(rungs) if rungs else "-"]
        row = ladder.rows.get((PRODUCTION, ladder.shape))
        if row is None:
            lines.append("| " + " | ".join([*cells, "-", "-", "-", "-"]) + " |")
            continue

        def each(text):
            return " / ".join(text(which) for which in ladder.passes)

        def speed(which):
            found = rate(row, which)
            return f"{significant(value(row, which, 'ms'))} ms" + (f", {rate_text(found)} {RATES[found[1]][0]}" if found else "")

        def of_floor(which):
            least, ms = floor(row, which), value(row, which, "ms")
            return f"{100 * least / ms:.0f} %" if least and ms else "-"

        first = next((r for r in ladder.rungs if (r, ladder.shape) in ladder.rows), None)
        cells += [ladder.shape, each(speed), each(of_floor),
                  each(lambda which: ratio_text(first and ladder.ms(first, ladder.shape, which), value(row, which, "ms")))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# ---- text ----


def parse_options(mark, path):
    options = dict(option.split("=", 1) for option in mark[2].split())
    for name, given in options.items():
        if name not in OPTIONS:
            fail(f"{path}: the table of {mark[1]} has an option '{name}' that is not known")
        if OPTIONS[name] and given not in OPTIONS[name]:
            fail(f"{path}: the table of {mark[1]}: {name}={given} is not one of {', '.join(OPTIONS[name])}")
    return options


def with_tables(text, rows, path, dev):
    """The text with every marked table made anew."""
    out, lines, at = [], text.splitlines(), 0
    while at < len(lines):
        line = lines[at].strip()
        out.append(lines[at])
        at += 1
        mark = START.fullmatch(line)
        if not mark and line != FAMILIES:
            continue
        end = END if mark else END_FAMILIES
        if end not in lines[at:]:
            fail(f"{path}: the table of {mark[1] if mark else 'families'} has no '{end}'")
        if mark:
            options = parse_options(mark, path)
            made = (field_table if "fields" in options else table)(rows, mark[1], options)
            if "fields" not in options and made != [NOTHING] and (Path(path).parent / f"{mark[1]}.svg").is_file():
                made += ["", f"![{mark[1]}: the rungs beside their floor]({mark[1]}.svg)"]
        else:
            made = family_table(rows, dev)
        out += ["", *made, "", end]
        at = lines.index(end, at) + 1
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Writes the tables of results in the READMEs of dev/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table differs")
    parser.add_argument("--results", default=ROOT / "dev" / "results", help="folder of *.jsonl (default: dev/results)")
    parser.add_argument("--dev", default=ROOT / "dev", help="folder of the families (default: dev)")
    parser.add_argument("readmes", nargs="*", metavar="README", help="default: dev/README.md dev/*/README.md")
    o = parser.parse_args()
    rows = read_results(o.results)
    differ = []
    for path in o.readmes or [p for p in [Path(o.dev) / "README.md", *sorted(Path(o.dev).glob("*/README.md"))] if p.is_file()]:
        text = read_text(path)
        wanted = with_tables(text, rows, path, o.dev)
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
