#!/usr/bin/env python3
"""Tests of scripts/layer_table.py, and of what dev/moe_layer/peers.py does without a GPU: python3
dev/test/test_layer_table.py. Standard library only."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "dev" / "moe_layer"))


def run(script, *args):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True)


def row(shape, impl, forward, both, saved=None, run_id="b", gpu="NVIDIA H100 80GB HBM3"):
    r = {"bench": "moe_layer", "shape": shape, "impl": impl, "fwd_tflops": forward, "fwdbwd_tflops": both, "gpu": gpu,
         "date": "2026-11-22", "run_id": run_id}
    return r if saved is None else {**r, "saved_MiB": saved}


class LayerTable(unittest.TestCase):
    def setUp(self):
        handle, name = tempfile.mkstemp()
        os.close(handle)
        self.file = Path(name)
        self.addCleanup(self.file.unlink)

    def table(self, rows, *args):
        self.file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return run("scripts/layer_table.py", self.file, *args)

    def refused(self, result, text):
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        self.assertIn(text, result.stderr)

    def test_ratios_and_the_best_peer(self):
        result = self.table([
            row("s1", "ours", 999, 999, run_id="a"), {"bench": "train", "run_id": "b"},
            row("s1", "ours", 1, 1, 10, gpu="h100"), row("s1", "ours", 500, 400, 10.4, gpu="h100"),
            row("s1", "ours-materialized", 9, 9, 9),
            row("s1", "liger", 400, 300, 20), row("s1", "sonicmoe", 450, 250, 11), row("s1", "torch-bmm", 1000, 800),
            row("s2", "ours", 300, 200, 5), row("s2", "liger", 200, 250, 6)])
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(result.stdout.splitlines(), [
            "NVIDIA H100 80GB HBM3, 2026-11-22, run b: TFLOP/s forward / forward+backward, MiB kept between the two", "",
            "| shape | ours | sonicmoe | liger | ours to the best peer | products alone | ours to these |",
            "|---|---|---|---|---|---|---|",
            "| s1 | 500 / 400, 10 | 450 / 250, 11 | 400 / 300, 20 | 1.11 (sonicmoe) / 1.33 (liger) | 1000 / 800 | "
            "0.50 / 0.50 |",
            "| s2 | 300 / 200, 5 | - | 200 / 250, 6 | 1.50 / 0.80 (liger) | - | - |"])

    def test_without_ours_and_an_earlier_run(self):
        rows = [row("s", "liger", 100, 100, 1, run_id="a"), row("s", "ours", 100, 100, 1)]
        self.assertIn("| s | - | 100 / 100, 1 | - | - | - |", self.table(rows, "--run-id", "a").stdout)

    def test_bad_input(self):
        self.refused(run("scripts/layer_table.py", self.file.with_name("missing")), "No such file")
        self.refused(self.table([]), "no line")
        self.refused(self.table([row("s", "ours", 1, 1), "{"]), ":2: not JSON")
        self.refused(self.table([{"bench": "moe_layer", "shape": "s", "impl": "ours"}]), "no run_id")
        self.refused(self.table([row("s", "ours", 1, 1)], "--run-id", "z"), "run z")


class Peers(unittest.TestCase):
    def test_shapes_are_those_of_the_header(self):
        import peers
        shapes = peers.moe_shapes()
        self.assertEqual(shapes["mixtral-8x2"], (16384, 4096, 14336, 8, 2))
        self.assertEqual(len(shapes), peers.SHAPES_HEADER.read_text().count('{"'))

    def test_options(self):
        self.assertIn("--peers", run("dev/moe_layer/peers.py", "--help").stdout)
        for option, first in (("--shapes", "gpt124-8x2"), ("--peers", "torch-bmm")):
            result = run("dev/moe_layer/peers.py", option, "none")
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (1, 1), result.stderr)
            self.assertIn(f"{option} 'none' is not one of {first}", result.stderr)


if __name__ == "__main__":
    unittest.main()
