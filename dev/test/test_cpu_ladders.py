#!/usr/bin/env python3
"""Tests of the ladders that need no GPU (dev/*_cpu): CPU_LADDERS=build python3 dev/test/test_cpu_ladders.py, where
CPU_LADDERS is the folder of the programs. Standard library only."""

import json
import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(os.environ.get("CPU_LADDERS", ROOT / "build")).resolve()
LADDERS = {"matmul_cpu": "8x256x128", "routing_plan_cpu": "4096x2x8", "attention_cpu": "b4t256h64"}
FIELDS = ["bench", "shape", "impl", "variant", "ms", "p10_ms", "p90_ms", "predicted_ms", "gpu", "threads", "date", "run_id"]


class CpuLadders(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()  # which holds no dev/results that could be written to
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def run_program(self, name, *args):
        return subprocess.run([str(PROGRAMS / name), *args], capture_output=True, text=True, cwd=self.folder)

    # Every variant of every shape is right, on one thread and on three.
    def test_checks(self):
        for name in [*LADDERS, "experts_cpu"]:
            for threads in ("1", "3"):
                with self.subTest(program=name, threads=threads):
                    result = self.run_program(name, "--quick", "--check-only", "--threads", threads)
                    self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
                    self.assertIn("right", result.stdout)
                    self.assertEqual(result.stderr, "")
        self.assertEqual(list(self.folder.iterdir()), [])

    # With --json stdout is rows alone, the same as those of --out: one a rung, production first.
    def test_rows(self):
        for name, shape in LADDERS.items():
            with self.subTest(program=name):
                out = self.folder / f"{name}.jsonl"
                result = self.run_program(name, "-", shape, "--quick", "--json", "--out", str(out), "--run-id", "r")
                self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
                self.assertEqual(out.read_text(), result.stdout)
                rows = [json.loads(line) for line in result.stdout.splitlines()]
                self.assertEqual(rows[0]["variant"], "production")
                for rung in sorted(path.stem for path in (ROOT / "dev" / name).glob("[0-9]*.h")):
                    self.assertTrue(any(row["variant"] == rung for row in rows), rung)
                for row in rows:
                    self.assertEqual([field for field in FIELDS if field not in row], [])
                    self.assertTrue("gflops" in row or "gbps" in row)
                    self.assertEqual((row["bench"], row["shape"], row["gpu"], row["run_id"]), (name, shape, "cpu", "r"))
                    self.assertGreater(row["predicted_ms"], 0)

    # Rungs by number, variants and shapes by the beginning; production beside them.
    def test_parts(self):
        for args, variants in [(["3", "8x"], ["production", "03_vectorised"]),
                               (["02_t,1", "8x256x128"], ["production", "01_naive", "02_tiled"]),
                               (["--variants", "0", "--shapes", "8x"], ["production"]),
                               (["-", "8x"], None)]:
            with self.subTest(args=args):
                result = self.run_program("matmul_cpu", *args, "--quick", "--json")
                self.assertEqual(result.returncode, 0, result.stderr)
                rows = [json.loads(line) for line in result.stdout.splitlines()]
                self.assertEqual({row["shape"] for row in rows}, {"8x256x128"})
                if variants:
                    self.assertEqual([row["variant"] for row in rows], variants)
                else:
                    self.assertGreaterEqual(len(rows), 5)
                self.assertIn("not recorded", result.stderr)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_list(self):
        for name in [*LADDERS, "experts_cpu"]:
            result = self.run_program(name, "--list")
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            shapes, variants = result.stdout.splitlines()
            self.assertIn(LADDERS.get(name, "rows64"), shapes.removeprefix("shapes: ").split())
            self.assertTrue(variants.startswith("variants: production"), variants)

    # A run of everything is recorded in the dev/results above the folder that it is started from, with all its threads.
    def test_whole_run_is_recorded(self):
        results = self.folder / "dev" / "results"
        results.mkdir(parents=True)
        below = self.folder / "below"
        below.mkdir()
        result = subprocess.run([str(PROGRAMS / "routing_plan_cpu"), "--threads", "2"], capture_output=True, text=True,
                                cwd=below)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertRegex(result.stdout.splitlines()[-1], r"^routing_plan_cpu: \d+ checks, 0 failed$")
        rows = [json.loads(line) for line in (results / "cpu.jsonl").read_text().splitlines()]
        self.assertEqual(len({row["shape"] for row in rows}), 3)
        self.assertEqual({row["threads"] for row in rows}, {1, 2})

    def test_nowhere_to_record(self):
        program = shutil.copy(PROGRAMS / "matmul_cpu", self.folder)  # from where no dev/results is above
        result = subprocess.run([program], capture_output=True, text=True, cwd=self.folder)
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        self.assertIn("no folder dev/results", result.stderr)

    def test_wrong_use(self):
        for name, args, words in [("matmul_cpu", ["05_magic"], "'05_magic'; there are: production 01_naive 02_tiled"),
                                  ("matmul_cpu", ["7"], "'7'"),
                                  ("routing_plan_cpu", ["2", "1x1x1"], "'1x1x1'; there are: 4096x2x8 32768x2x8"),
                                  ("routing_plan_cpu", ["-", "32768"], "could be any of: 32768x2x8 32768x8x128"),
                                  ("attention_cpu", ["03_tiles", "01_scores_matrix"], "'01_scores_matrix'"),
                                  ("attention_cpu", ["3", "b4", "b1"], "'b1'"), ("experts_cpu", ["rows8"], "'rows8'"),
                                  ("matmul_cpu", ["--fast"], "'--fast'"),
                                  ("matmul_cpu", ["--threads", "none"], "'none'"),
                                  ("matmul_cpu", ["--threads", "0"], "'0'"),
                                  ("matmul_cpu", ["--threads", "5000"], "4096"),
                                  ("matmul_cpu", ["--out"], "--out"),
                                  ("matmul_cpu", ["--quick", "--out", "no/such/folder"], "no/such/folder")]:
            with self.subTest(program=name, args=args):
                result = self.run_program(name, *args)
                self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
                self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
                self.assertTrue(result.stderr.startswith(name + ": "), result.stderr)
                self.assertIn(words, result.stderr)
                self.assertEqual(result.stdout, "")


if __name__ == "__main__":
    unittest.main()
