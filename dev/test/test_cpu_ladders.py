#!/usr/bin/env python3
"""Tests of the ladders that need no GPU (dev/*_cpu): CPU_LADDERS=build python3 dev/test/test_cpu_ladders.py, where
CPU_LADDERS is the folder of the programs. Standard library only."""

import json
import os
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
                result = self.run_program(name, shape, "--quick", "--json", "--out", str(out), "--run-id", "r")
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

    def test_one_variant(self):
        result = self.run_program("matmul_cpu", "03_vectorised", "8x256x128", "--quick", "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual([json.loads(line)["variant"] for line in result.stdout.splitlines()], ["03_vectorised"])

    def test_wrong_use(self):
        for name, args, words in [("matmul_cpu", ["05_magic"], "'05_magic'"),
                                  ("routing_plan_cpu", ["02_counting_sort", "1x1x1"], "'1x1x1'"),
                                  ("attention_cpu", ["03_tiles", "01_scores_matrix"], "'01_scores_matrix'"),
                                  ("experts_cpu", ["production"], "'production'"),
                                  ("matmul_cpu", ["--fast"], "'--fast'"), ("matmul_cpu", ["--threads", "none"], "'none'"),
                                  ("matmul_cpu", ["--threads", "0"], "'0'"), ("matmul_cpu", ["--out"], "--out"),
                                  ("matmul_cpu", ["--quick", "--out", "no/such/folder"], "no/such/folder"),
                                  ("matmul_cpu", [], "dev/results/cpu.jsonl")]:
            with self.subTest(program=name, args=args):
                result = self.run_program(name, *args)
                self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
                self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
                self.assertTrue(result.stderr.startswith(name + ": "), result.stderr)
                self.assertIn(words, result.stderr)
                self.assertEqual(result.stdout, "")


if __name__ == "__main__":
    unittest.main()
