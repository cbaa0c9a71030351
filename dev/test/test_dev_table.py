#!/usr/bin/env python3
"""Tests of scripts/dev_table.py: python3 dev/test/test_dev_table.py. Standard library only."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
README = "# A\n\n<!-- table: b{} -->\nold\n<!-- end table -->\nafter\n"


def row(variant, shape, tflops, ms, run_id="r2", date="2026-11-23", bench="b", gpu="h100"):
    return {"bench": bench, "shape": shape, "variant": variant, "tflops": tflops, "ms": ms, "run_id": run_id,
            "gpu": gpu, "date": date}


class DevTable(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.readme = self.folder / "README.md"

    def run_on(self, files, text, *args):
        for name, rows in files.items():
            lines = (r if isinstance(r, str) else json.dumps(r) for r in rows)
            (self.folder / name).write_text("".join(line + "\n" for line in lines))
        self.readme.write_text(text)
        return subprocess.run([sys.executable, str(ROOT / "scripts" / "dev_table.py"), *args, "--results",
                               str(self.folder), str(self.readme)], capture_output=True, text=True)

    def refused(self, result, text):
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        self.assertIn(text, result.stderr)

    # Shapes by their work, rungs by their number, the newest run only, the last of two rows.
    def test_table(self):
        files = {"a.jsonl": [row("production", "big", 800, 2), row("10_last", "big", 1, 1600),
                             row("10_last", "big", 780, 2), row("02_second", "small", 5.25, 1),
                             row("cublaslt", "big", 400, 4), row("production", "small", 700, 0.01),
                             row("other", "big", 9, 9, bench="c"), {"bench": "b", "shape": "big", "gbps": 3}],
                 "b.jsonl": [row("production", "big", 1, 1, run_id="r1", date="2026-11-22", gpu="h200"),
                             row("old", "big", 1, 1, run_id="r1", date="2026-11-22")]}
        result = self.run_on(files, README.format(""))
        self.assertEqual(result.returncode, 0, result.stderr)
        expected = ("# A\n\n<!-- table: b -->\n\n"
                    "| TFLOP/s | small | big | of production at big |\n|---|---:|---:|---:|\n"
                    "| 02_second | 5.2 | - | - |\n| 10_last | - | 780 | 97.5 % |\n| cublaslt | - | 400 | 50.0 % |\n"
                    "| production | 700 | 800 | 100.0 % |\n\nH100, 2026-11-23, run r2: `build/b`\n\n"
                    "<!-- end table -->\nafter\n")
        self.assertEqual(self.readme.read_text(), expected)
        self.assertEqual(self.run_on(files, expected, "--check").returncode, 0)
        self.assertIn("| 10_last | - | 780 | 195.0 % |", self.written(files, README.format(" relative=cublaslt")))

    # A rung that the newest run left out comes from the newest run that has it, at the newest run's shapes.
    def test_older_rungs(self):
        files = {"a.jsonl": [row("01_slow", "big", 1, 9, run_id="r0", date="2026-11-20"),
                             row("01_slow", "big", 2, 9, run_id="r1", date="2026-11-22"),
                             row("01_slow", "huge", 3, 9, run_id="r1", date="2026-11-22"),
                             row("02_fast", "big", 4, 9, run_id="r1", date="2026-11-22"), row("02_fast", "big", 5, 1)]}
        text = self.written(files, README.format(" relative=02_fast"))
        self.assertIn("| TFLOP/s | big | of 02_fast at big |\n|---|---:|---:|\n| 01_slow* | 2 | 40.0 % |\n"
                      "| 02_fast | 5 | 100.0 % |\n\nH100, 2026-11-23, run r2: `build/b`; * of run r1\n", text)

    def written(self, files, text):
        self.assertEqual(self.run_on(files, text).returncode, 0)
        return self.readme.read_text()

    def test_check_writes_nothing(self):
        self.refused(self.run_on({"a.jsonl": [row("production", "big", 1, 1)]}, README.format(""), "--check"),
                     "README.md")
        self.assertEqual(self.readme.read_text(), README.format(""))

    def test_without_results(self):
        self.assertIn("<!-- table: b -->\n\nnot measured yet\n\n<!-- end table -->",
                      self.written({}, README.format("")))

    def test_bad_input(self):
        self.refused(self.run_on({}, "<!-- table: b -->\n"), "no '<!-- end table -->'")
        self.refused(self.run_on({}, README.format(" colour=red")), "'colour'")
        self.refused(self.run_on({"a.jsonl": ["{"]}, ""), ":1: not JSON")
        self.refused(self.run_on({"a.jsonl": [{"tflops": 1}]}, ""), "no bench")

    def test_readmes_are_up_to_date(self):
        result = subprocess.run([sys.executable, str(ROOT / "scripts" / "dev_table.py"), "--check"],
                                capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)


if __name__ == "__main__":
    unittest.main()
