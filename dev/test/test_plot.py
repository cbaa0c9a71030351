#!/usr/bin/env python3
"""Tests of scripts/plot.py: python3 dev/test/test_plot.py. Standard library only."""

import json
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def row(bench, variant, ms, shape="s", **more):
    return {"bench": bench, "shape": shape, "variant": variant, "ms": ms, "run_id": "r", "gpu": "h100",
            "date": "2026-11-23", **more}


# A production row as the frame writes it: 1 ms at best.
def production(bench, ms, flops=0.0, moved=0.0):
    return row(bench, "production", ms, floor_ms=1, predicted_ms=1, predicted_flops=flops, predicted_bytes=moved,
               ceiling_gbps=3000, ceiling_tflops=700)


class DevCharts(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.dev = Path(temporary.name)
        (self.dev / "results").mkdir()
        for name in ("memory", "products", "moves", "idle"):
            (self.dev / name).mkdir()
            (self.dev / name / f"{name}.cu").write_text("")

    def run_on(self, rows, *args):
        (self.dev / "results" / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return subprocess.run([sys.executable, str(ROOT / "scripts" / "plot.py"), "dev", "--dev", str(self.dev), "--results",
                               str(self.dev / "results"), *args], capture_output=True, text=True)

    def drawn(self, rows):
        result = self.run_on(rows)
        self.assertEqual(result.returncode, 0, result.stderr)
        return {path.stem: path.read_text() for path in sorted(self.dev.rglob("*.svg"))}

    ROWS = [row("memory", "01_a<b", 4, gbps=750), production("memory", 1.25, 6e9, 3e9), row("memory", "copy", 1.1, gbps=2700),
            row("products", "01_x", 9), production("products", 1.4, 7e11, 1e8),
            row("moves", "01_x", 9), production("moves", 2, 0, 3e9)]

    def test_ladder(self):
        chart = xml.fromstring(self.drawn(self.ROWS)["memory"])
        texts = [element.text for element in chart.iter() if element.tag.endswith("text")]
        self.assertIn("memory at s: speed, longer is faster; H100, 2026-11-23", texts)
        self.assertEqual([t for t in texts if t in ("01_a<b", "copy", "production")], ["01_a<b", "copy", "production"])
        self.assertIn("4.00 ms, 750 GB/s", texts)
        self.assertIn("floor 1.00 ms", texts)
        widths = [float(e.get("width")) for e in chart.iter() if e.tag.endswith("rect") and e.get("width") != "100%"]
        self.assertAlmostEqual(widths[0] * 4, widths[2] * 1.25, delta=1)  # as long as it is fast

    # Nothing is drawn for a family without rungs.
    def test_which_charts(self):
        self.assertEqual(list(self.drawn(self.ROWS)), ["memory", "moves", "products", "roofline"])
        self.assertEqual(list(self.drawn([production("memory", 2, 1, 1)])), [])  # and what was there is removed

    def test_roofline(self):
        chart = self.drawn(self.ROWS)["roofline"]
        xml.fromstring(chart)
        self.assertIn("memory (s): 80 % of the roof", chart)
        self.assertIn("products (s): 71 % of the roof", chart)
        self.assertIn("moves (s): 50 % of a copy", chart)
        self.assertEqual(chart.count("<circle"), 2)

    def test_two_passes(self):
        rows = [dict(row("memory", v, None), fwd_ms=f, bwd_ms=b, fwd_floor_ms=1, bwd_floor_ms=2)
                for v, f, b in (("01_a", 5, 9), ("02_b", 3, None), ("production", 2, 4))]
        chart = self.drawn(rows)["memory"]
        self.assertIn(">forward<", chart)
        self.assertIn(">backward<", chart)
        self.assertEqual(chart.count(">01_a<"), 2)
        self.assertEqual(chart.count(">02_b<"), 1)

    def test_check(self):
        result = self.run_on(self.ROWS, "--check")
        self.assertEqual(result.returncode, 1)
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        self.assertEqual(list(self.dev.rglob("*.svg")), [])
        self.drawn(self.ROWS)
        self.assertEqual(self.run_on(self.ROWS, "--check").returncode, 0)
        self.assertEqual(self.run_on(self.ROWS + [row("memory", "02_y", 2)], "--check").returncode, 1)

    def test_charts_are_up_to_date(self):
        result = subprocess.run([sys.executable, str(ROOT / "scripts" / "plot.py"), "dev", "--check"], capture_output=True,
                                text=True)
        self.assertEqual(result.returncode, 0, result.stderr)


if __name__ == "__main__":
    unittest.main()
