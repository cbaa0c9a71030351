#!/usr/bin/env python3
"""Tests of scripts/dev_table.py: python3 dev/test/test_dev_table.py. Standard library only."""

import json
import re
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


# A row of two passes: forward, and backward unless it is left out.
def passes(variant, forward, backward=None):
    made = dict(row(variant, "s", 0, 0), fwd_ms=forward, fwd_gbps=300, fwd_predicted_ms=1)
    if backward:
        made.update(bwd_ms=backward, bwd_gbps=300, bwd_predicted_ms=1)
    del made["ms"], made["tflops"]
    return made


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

    # Shapes by their work, rungs by their number, the newest run only, the last of two rows. Rows without predictions.
    def test_table(self):
        files = {"a.jsonl": [row("production", "big", 800, 2), row("10_last", "big", 1, 1600),
                             row("10_last", "big", 780, 2.05), row("02_second", "small", 5.25, 1),
                             row("cublaslt", "big", 400, 4), row("production", "small", 700, 0.0071),
                             row("02_second", "big", 100, 16), row("other", "big", 9, 9, bench="c"),
                             {"bench": "b", "shape": "big", "gbps": 3}],
                 "b.jsonl": [row("01_old", "big", 1, 1, run_id="r1", date="2026-11-22", gpu="h200")]}
        result = self.run_on(files, README.format(""))
        self.assertEqual(result.returncode, 0, result.stderr)
        expected = ("# A\n\n<!-- table: b -->\n\n"
                    "| at big | predicted ms | ms | TFLOP/s | x before | of production | small, ms |\n"
                    "|---|---:|---:|---:|---:|---:|---:|\n"
                    "| 02_second | - | 16.0 | 100 | - | 12.5 % | 1.00 |\n"
                    "| 10_last | - | 2.05 | 780 | 7.80 | 97.6 % | - |\n"
                    "| cublaslt | - | 4.00 | 400 | - | 50.0 % | - |\n"
                    "| production | - | 2.00 | 800 | 1.02 | 100.0 % | 0.00710 |\n\n"
                    "H100, 2026-11-23, run r2: `dev/b/b`\n\n<!-- end table -->\nafter\n")
        self.assertEqual(self.readme.read_text(), expected)
        self.assertEqual(self.run_on(files, expected, "--check").returncode, 0)
        self.assertIn("| 10_last | - | 2.05 | 780 | 7.80 | 195.1 % | - |",
                      self.written(files, README.format(" relative=cublaslt")))

    def test_fields(self):
        files = {"a.jsonl": [dict(row("01_x", "big", 2, 1), saved_MiB=12.4, moved_bytes=3.2e9), row("01_x", "small", 1, 1),
                             dict(row("production", "small", 4, 0.5), saved_MiB=7)]}
        text = self.written(files, README.format(" fields=saved_MiB,moved_bytes"))
        self.assertIn("| | big | small |\n|---|---:|---:|\n| 01_x | 12 / 3.2 | - |\n| production | - | 7 / - |\n", text)
        self.assertNotIn(" ms", text)

    def test_options(self):
        files = {"a.jsonl": [dict(row("01_x", "big", 2, 1), predicted_ms=0.5), row("01_x", "middle", 10, 0.1),
                             row("01_x", "small", 1, 0.01)]}
        text = self.written(files, README.format(" shape=middle also=big unit=us relative=01_x"))
        self.assertIn("| at middle | predicted us | us | TFLOP/s | x before | of 01_x | big, us |", text)
        self.assertIn("| 01_x | - | 100 | 10 | - | 100.0 % | 1000 |", text)
        text = self.written(files, README.format(" unit=rate"))
        self.assertIn("| at big | predicted ms | ms | TFLOP/s | x before | of production | small, TFLOP/s | middle, TFLOP/s |", text)
        self.assertIn("| 01_x | 0.500 | 1.00 | 2 | - | - | 1 | 10 |", text)

    # Two passes; a rung has only one of them.
    def test_two_passes(self):
        files = {"a.jsonl": [passes("01_a", 4, 8), passes("02_b", 2), passes("copy", 1, 1), passes("production", 1, 2)]}
        text = self.written(files, README.format(""))
        self.assertIn("| at s | forward: predicted ms | ms | GB/s | x before | backward: predicted ms | ms | GB/s | "
                      "x before | of production |\n", text)
        for line in ("| 01_a | 1.00 | 4.00 | 300 | - | 1.00 | 8.00 | 300 | - | 25.0 % |",
                     "| 02_b | 1.00 | 2.00 | 300 | 2.00 | - | - | - | - | 50.0 % |",
                     "| copy | 1.00 | 1.00 | 300 | - | 1.00 | 1.00 | 300 | - | 150.0 % |",
                     "| production | 1.00 | 1.00 | 300 | 2.00 | 1.00 | 2.00 | 300 | 4.00 | 100.0 % |"):
            self.assertIn(line, text)
        text = self.written(files, README.format(" pass=bwd"))
        self.assertIn("| at s | backward: predicted ms | ms | GB/s | x before | of production |", text)
        self.assertIn("| 02_b | - | - | - | - | - |", text)

    # The layer: forward, and forward with backward.
    def test_forward_and_whole(self):
        rows = [dict(row(v, "s", 0, 0), fwd_ms=f, fwd_tflops=50, fwdbwd_ms=b, fwdbwd_tflops=60)
                for v, f, b in (("01_a", 4, 9), ("production", 2, 3))]
        text = self.written({"a.jsonl": rows}, README.format(""))
        self.assertIn("| at s | forward: predicted ms | ms | TFLOP/s | x before | both passes: predicted ms | ms |", text)
        self.assertIn("| 01_a | - | 4.00 | 50 | - | - | 9.00 | 60 | - | 33.3 % |", text)

    # Rows of the CPU ladders; a run without rungs is none; rows of other kinds.
    def test_rows_of_other_kinds(self):
        cpu = dict(row("01_loop", "s", 1, 4, gpu="cpu"), cpu="A processor", gflops=7)
        del cpu["tflops"]
        other = [{"bench": "b", "tokens_per_s": 3}, {"bench": "b", "shape": "s", "ms": 3}, [1], 5,
                 {"bench": "b", "variant": "x", "ms": None}, row("production", "s", 1, 1, date="2026-12-01", run_id="r9")]
        text = self.written({"a.jsonl": [cpu, *other]}, README.format(""))
        self.assertIn("| 01_loop | - | 4.00 | 7 | - | - |\n\nA processor, 2026-11-23, run r2: `dev/b/b`", text)

    # By itself the largest shape that most rungs were run at; variants of other shapes are left out.
    def test_shape_of_the_rungs(self):
        files = {"a.jsonl": [row("01_x", "plain", 1, 1), row("02_y", "plain", 1, 1), row("production", "plain", 1, 1),
                             row("02_y", "fused", 1, 5), row("production", "fused", 1, 5), row("other", "fused", 1, 6)]}
        text = self.written(files, README.format(""))
        self.assertIn("| at plain | predicted ms | ms | TFLOP/s | x before | of production | fused, ms |", text)
        self.assertIn("| other | - | - | - | - | - | 6.00 |", text)
        text = self.written(files, README.format(" also=plain"))
        self.assertNotIn("other", text)
        self.assertIn("| at fused |", self.written(files, README.format(" shape=fused also=fused")))

    # A rung that the newest run left out comes from the newest run that has it, at the newest run's shapes.
    def test_older_rungs(self):
        files = {"a.jsonl": [row("01_slow", "big", 1, 9, run_id="r0", date="2026-11-20"),
                             row("01_slow", "big", 2, 5, run_id="r1", date="2026-11-22"),
                             row("01_slow", "huge", 3, 9, run_id="r1", date="2026-11-22"),
                             row("02_fast", "big", 4, 9, run_id="r1", date="2026-11-22"), row("02_fast", "big", 5, 2)]}
        text = self.written(files, README.format(" relative=02_fast"))
        self.assertIn("| 01_slow* | - | 5.00 | 2 | - | 40.0 % |\n| 02_fast | - | 2.00 | 5 | 2.50 | 100.0 % |\n\n"
                      "H100, 2026-11-23, run r2: `dev/b/b`; * of run r1\n", text)
        self.assertNotIn("huge", text)

    # Production that was measured again by itself: the row of that run, with its star.
    def test_production_of_another_run(self):
        files = {"a.jsonl": [row("01_slow", "big", 2, 5), row("production", "big", 10, 1, run_id="r3", date="2026-11-24")]}
        text = self.written(files, README.format(""))
        self.assertIn("| production* | - | 1.00 | 10 | 5.00 | 100.0 % |\n\n"
                      "H100, 2026-11-23, run r2: `dev/b/b`; * of run r3\n", text)

    def test_chart_is_shown_where_there_is_one(self):
        files = {"a.jsonl": [row("01_x", "s", 1, 1)]}
        self.assertNotIn("b.svg", self.written(files, README.format("")))
        (self.folder / "b.svg").write_text("<svg/>")
        self.assertIn("\n\n![b: the rungs beside their floor](b.svg)\n\n<!-- end table -->",
                      self.written(files, README.format("")))
        self.assertNotIn("b.svg", self.written({"a.jsonl": []}, README.format("")))

    def test_families(self):
        for name, title in (("measured", "# measured: what it is about\n"), ("other", "# Another thing\n"), ("bare", None)):
            (self.folder / name).mkdir()
            (self.folder / name / f"{name}.cu").write_text("// Its first\n// sentence. Another.\nint x;\n")
            if title:
                (self.folder / name / "README.md").write_text(title)
        (self.folder / "no_family").mkdir()
        (self.folder / "measured" / "01_one.cuh").write_text("")
        (self.folder / "measured" / "helper.cuh").write_text("")
        rows = [dict(row(v, "s", 100, ms, bench="measured"), floor_ms=1) for v, ms in (("01_one", 20), ("production", 2))]
        text = self.written({"a.jsonl": rows}, "<!-- families -->\n<!-- end families -->\n", "--dev", str(self.folder))
        table = [line for line in text.splitlines() if line.startswith("|")][2:]
        self.assertEqual(table, [
            "| bare | Its first sentence | - | - | - | - | - |",
            "| [measured](measured/README.md) | what it is about | 1 | s | 2.00 ms, 100 TFLOP/s | 50 % | 10 |",
            "| [other](other/README.md) | Another thing | - | - | - | - | - |"])

    def written(self, files, text, *args):
        result = self.run_on(files, text, *args)
        self.assertEqual(result.returncode, 0, result.stderr)
        return self.readme.read_text()

    def test_check_writes_nothing(self):
        self.refused(self.run_on({"a.jsonl": [row("01_x", "big", 1, 1)]}, README.format(""), "--check"),
                     "README.md")
        self.assertEqual(self.readme.read_text(), README.format(""))

    def test_without_results(self):
        self.assertIn("<!-- table: b -->\n\nnot measured yet\n\n<!-- end table -->",
                      self.written({}, README.format("")))

    def test_bad_input(self):
        self.refused(self.run_on({}, "<!-- table: b -->\n"), "no '<!-- end table -->'")
        self.refused(self.run_on({}, README.format(" colour=red")), "'colour'")
        self.refused(self.run_on({"a.jsonl": ["{"]}, ""), ":1: not JSON")
        self.refused(self.run_on({"a.jsonl": []}, README.format(" pass=both")), "pass=both")
        self.refused(self.run_on({}, "<!-- families -->\n"), "no '<!-- end families -->'")
        self.refused(self.run_on({"a.jsonl": [{"bench": "b", "variant": "01_x", "ms": 1}]}, ""), "no shape")
        self.refused(self.run_on({"a.jsonl": [row("01_x", "big", 1, 1)]}, README.format(" shape=large")), "'large'")

    def test_readmes_are_up_to_date(self):
        result = subprocess.run([sys.executable, str(ROOT / "scripts" / "dev_table.py"), "--check"],
                                capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)

    # The course and the reading order of the layer: files and programs that they send the reader to are there.
    def test_guides(self):
        dev, missing = ROOT / "dev", []
        for guide in (dev / "README.md", ROOT / "moe" / "README.md"):
            text = guide.read_text()
            missing += [f"{guide.parent.name}: {link}" for link in re.findall(r"\]\(([^)#]+)", text)
                        if not (guide.parent / link).exists()]
            missing += [f"{guide.parent.name}: {name}" for name in re.findall(r"\bdev/(\w+)/\1\b", text)
                        if name != "NAME" and not any((dev / name / f"{name}.{end}").exists() for end in ("cu", "cpp"))]
        self.assertEqual(missing, [])


if __name__ == "__main__":
    unittest.main()
