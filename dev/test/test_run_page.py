#!/usr/bin/env python3
"""Tests of scripts/plot.py RUN... but for what needs a browser (test_run_page_browser.py) or makes PNG files
(test_run_page_png.py). Standard library only."""
import base64
import json
import re
import sys
import unittest
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent.parent / "scripts")]
from run_charts import POINTS, thinned, ticks  # noqa: E402
from run_log import Load  # noqa: E402
from page_test import MEMORY, PageTest, step_record  # noqa: E402


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def svgs_of(page):
    return {name: xml.fromstring(svg) for svg, name in re.findall(r'(<svg viewBox[^>]*data-chart="([^"]+)">.*?</svg>)', page, re.S)}


class Links(HTMLParser):
    """Addresses that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "srcset") or tag == "link"]


class Page(PageTest):
    def test_what_it_says(self):
        a = self.run_of("a", [step_record(s) for s in range(1, 11)] + [{"step": 10, "val_loss": 2.5}])
        b = self.run_of("b", [step_record(s, seed=1) for s in range(1, 6)], memory=None)
        page = self.drawn(a, b)
        data, svgs = data_of(page), svgs_of(page)
        self.assertEqual(data["names"], ["a", "b"])
        self.assertEqual(list(data["charts"]), ["loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "load_max_over_mean", "load-0", "load-1",
                                                "memory", "layer-memory"])
        self.assertEqual(set(svgs), set(data["charts"]))
        loss = data["charts"]["loss"]["runs"]
        self.assertEqual(loss[0]["points"], [[s, float(f"{2 + 3 / s:.6g}")] for s in range(1, 11)])
        self.assertEqual([r["run"] for r in loss], [0, 1])
        self.assertEqual(data["charts"]["val_loss"]["runs"], [{"run": 0, "points": [[10, 2.5]]}])
        self.assertEqual(len(svgs["loss"].findall(".//path[@class='line s0']")), 1)
        self.assertTrue("<td>2.3000</td><td>2.5000</td>" in page)
        self.assertEqual(page.count("<svg"), page.count("</svg>"))
        self.assertTrue("combine" in page and "Production kernels" in page)

    def test_a_high_start_is_cut_and_said(self):
        svg = svgs_of(self.drawn(self.run_of("a", [step_record(s) for s in range(1, 101)])))["loss"]
        self.assertIn("cut off above: up to 5, near step 1", [e.text for e in svg.iter("text")])

    # Nothing is fetched: no address but data: in an image, and no style sheet or script from elsewhere.
    def test_self_contained(self):
        page = self.drawn(self.run_of("a", [step_record(s) for s in range(1, 11)]))
        links = Links()
        links.feed(page)
        self.assertTrue(links.found)
        self.assertEqual([link for link in links.found if not link.startswith("data:image/png;base64,")], [])
        self.assertEqual(re.findall(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|WebSocket|import\(", page), [])
        self.assertEqual(set(re.findall(r"https?://[^\"'<> ]+", page)), {"http://www.w3.org/2000/svg"})

    def test_the_same_bytes_twice(self):
        a = self.run_of("a", [step_record(s) for s in range(1, 400)])
        self.assertEqual(self.drawn(a), self.drawn(a))

    def test_names(self):
        runs = [self.run_of(name, [step_record(1)]) for name in ("x/lr<1>&", "y/lr<1>&", "z")]
        page = self.drawn(*runs)
        self.assertEqual(data_of(page)["names"], ["x/lr<1>&", "y/lr<1>&", "z"])
        self.assertTrue("lr<1>" not in page and "x/lr&lt;1&gt;&amp;" in page)
        svgs_of(page)

    def test_load(self):
        run = self.run_of("a", [step_record(s, expert_load=[[], [0, 100, 200, 100], [0, 0, 0, 0]]) for s in range(1, 4)])
        chart = data_of(self.drawn(run))["charts"]["load-0"]
        rows = {layer: list(base64.b64decode(row["bytes"])) for layer, row in chart["layers"].items()}
        self.assertEqual(rows["1"], [0, 0, 0, 127, 127, 127, 169, 169, 169, 127, 127, 127])  # 127 the mean, 127 / 3 a doubling
        self.assertEqual(set(rows["2"]), {255})
        self.assertNotIn("0", rows)  # a dense layer
        self.assertEqual(chart["steps"], [[1, 1], [2, 2], [3, 3]])

    def test_load_of_long_logs(self):
        load = Load()
        for step in range(1, 1001):
            load.add(step, [[1, step]])
        self.assertTrue(64 <= len(load.stretches) <= 128, len(load.stretches))
        self.assertEqual(sum(s[3][0][0] for s in load.stretches), 1000)
        self.assertEqual(sum(s[3][0][1] for s in load.stretches), 500500)
        self.assertEqual([s[0] for s in load.stretches[1:]], [s[1] + 1 for s in load.stretches[:-1]])
        self.assertEqual({s[2] for s in load.stretches[:-1]}, {load.width})

    def test_memory(self):
        peers = self.folder / "results"
        peers.mkdir()
        row = {"bench": "train", "shape": "tiny", "B": 4, "T": 256, "peak_GiB": 0.5, "gpu": "h100", "run_id": "r", "date": "2026-11-22"}
        (peers / "a.jsonl").write_text("".join(json.dumps(dict(row, **more)) + "\n" for more in (
            {"impl": "ours"}, {"impl": "their-framework"}, {"impl": "another-batch", "B": 8})))
        a, b = (self.run_of(name, [step_record(1)]) for name in "ab")
        page = self.drawn(a, b, "--results", peers)
        texts = [e.text for e in svgs_of(page)["memory"].iter("text")]
        self.assertEqual([t for t in texts if ":" in t or "if" in t or "their" in t], ["a, b: zero_buffer", "if materialized", "their-framework"])
        self.assertEqual([t for t in texts if t in ("62.6 KiB", "66.5 KiB", "512 MiB at its peak")], ["62.6 KiB", "66.5 KiB", "512 MiB at its peak"])
        self.assertFalse('data-chart="layer-memory"' in page or "another-batch" in page)
        tips = [e.get("data-tip") for e in svgs_of(page)["memory"].iter("rect")]
        self.assertIn("activations saved: 27.3 KiB", tips)

    def test_not_finite(self):
        page = self.drawn(self.run_of("a", [step_record(s, loss=None if 4 <= s <= 6 else 1.0, grad_norm=None) for s in range(1, 11)]))
        self.assertEqual(len(svgs_of(page)["loss"].findall(".//path[@class='line s0']")), 2)  # a gap between
        self.assertTrue("no finite value was logged" in page)
        data_of(page)  # is JSON still

    def test_one_step(self):
        self.assertEqual(len(svgs_of(self.drawn(self.run_of("a", [step_record(1)])))["loss"].findall(".//circle")), 1)

    def test_thin(self):
        for n in (1, 149, 150, 151, 1000, 100000):
            points = thinned(range(1, n + 1), [float(s) for s in range(1, n + 1)])
            self.assertLessEqual(len(points), POINTS)
            self.assertGreaterEqual(len(points), min(n, POINTS / 2))
            self.assertEqual((points[0][2], points[-1][3]), (1, n))
        self.assertEqual(thinned([1, 2], [None, None]), [(1, None, None, None), (2, None, None, None)])

    def test_ticks(self):
        for low, high in ((0, 1), (0, 400), (1.29, 5.6), (-3e-5, 4e-5), (0, 353999), (2.0, 2.1)):
            values = ticks(low, high)
            self.assertTrue(2 <= len(values) <= 6, (low, high, values))
            self.assertTrue(all(low - 1e-12 <= v <= high + 1e-12 for v in values))


class Refused(PageTest):
    def refused(self, *args, **environment):
        result = self.plot(*args, **environment)
        self.assertEqual((result.returncode, result.stdout, result.stderr.count("\n")), (1, "", 1), result.stderr)
        self.assertEqual(list(self.folder.rglob("*.html")), [])
        return result.stderr.strip()

    GOOD = [step_record(s) for s in (1, 2, 3)]

    def test_torn_last_line(self):
        for end in ('\n{"step": 4, "lo', '\n{"step": 4, "loss": 1.0}', "\n\0\0\n"):  # the second lacks only its end
            run = self.run_of(f"torn{len(end)}", self.GOOD, end=end)
            result = self.plot(run, "--html", self.folder / "page")
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            self.assertIn(f"plot: note: {run}/log.jsonl:4: the last line is torn, and left out", result.stdout)
            page = (self.folder / "page").read_text()
            self.assertTrue("log.jsonl:4: the last line is torn" in page)
            self.assertEqual(len(data_of(page)["charts"]["loss"]["runs"][0]["points"]), 3)

    def test_torn_in_the_middle(self):
        for i, line in enumerate(('{"step": 2, "lo{"step": 3}', "", "[1]", "\0\0\0")):
            run = self.run_of(f"run{i}", self.GOOD[:1], end=f"\n{line}\n{json.dumps(self.GOOD[2])}\n")
            self.assertEqual(self.refused(run), f"plot: {run}/log.jsonl:2: not a JSON object, and not the last line; the log is damaged there")

    def test_empty(self):
        run = self.folder / "run"
        run.mkdir()
        self.assertEqual(self.refused(run), f"plot: {run}: no log.jsonl there; give the --out directory of a run")
        (run / "log.jsonl").write_text("")
        self.assertEqual(self.refused(run), f"plot: {run}/log.jsonl: is empty; has the run begun?")
        (run / "log.jsonl").write_text('{"step": 1')
        self.assertEqual(self.refused(run), f"plot: {run}/log.jsonl: holds no training step; has the run begun?")
        (run / "log.jsonl").write_text('{"loss": 1}\n')
        self.assertEqual(self.refused(run), f"plot: {run}/log.jsonl:1: no step")
        self.assertIn("no log.jsonl there", self.refused(self.folder / "nowhere"))

    def test_others(self):
        run = self.run_of("a", self.GOOD)
        self.assertIn("is named twice", self.refused(run, run))
        self.assertIn("at most 8", self.refused(*[run] * 9))
        self.assertIn("librsvg2-bin", self.refused(run, "--png", self.folder / "png", path=""))
        self.assertIn("cannot write", self.refused(run, "--html", self.folder / "none" / "page"))
        for text in ("{", "[]", json.dumps(dict(MEMORY, dispatch="x")), json.dumps(dict(MEMORY, bytes={"zero_buffer": {"weights": "1"}}))):
            (run / "memory.json").write_text(text)
            self.assertEqual(self.refused(run), f"plot: {run}/memory.json: not the memory plan of a run; remove the file to plot without it")


if __name__ == "__main__":
    unittest.main()
