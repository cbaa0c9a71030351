#!/usr/bin/env python3
"""Tests of scripts/worth.sh and scripts/worth.py: TRAINER=build/train_gpt_moe python3 dev/test/test_worth.py. The four
shapes are trained for a few steps on the CPU."""

import json
import os
import random
import subprocess
import sys
import unittest
import xml.etree.ElementTree as xml
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "dev" / "test")]
from test_data_scripts import InFolder  # noqa: E402
from trainer import TRAINER, shard_bytes, text  # noqa: E402

SHAPES = ["dense", "8x2", "64x8", "128x8"]


def run_row(shape, seed, end, gpu="h100", **more):
    """A row as `record` writes it: the loss falls from 6 to `end` in four evaluations of 10 steps and 5 seconds each."""
    curve = [[10 * i, 5.0 * i, 6 + (end - 6) * i / 4] for i in (1, 2, 3, 4)]
    return {"bench": "worth", "shape": shape, "seed": seed, "lr": 0.002, "steps": 40, "tokens_per_step": 100_000,
            "parameters": 50_000_000, "active": 20_000_000, "tokens_per_s": 500_000, "peak_GiB": 6.0, "skipped": 0, "wall_s": 30,
            "curve": curve, "gpu": gpu, "date": "2026-11-22", "commit": "abc", "run_id": "r", "options": f"--steps 40 {shape} {seed}",
            "text": {"train": {"tokens": 2_000_000, "bytes": 8, "sha256": ["a"]},
                     "val": {"tokens": 1000, "bytes": 3000, "sha256": ["b"]}}, **more}


class Table(InFolder):
    def setUp(self):
        super().setUp()
        self.readme, self.results, self.chart = (self.folder / name for name in ("README.md", "worth.jsonl", "worth.svg"))
        self.readme.write_text("# Title\n<!-- worth -->\nold\n<!-- end worth -->\nthe rest\n")

    def table(self, rows, *args):
        if rows is not None:
            self.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return subprocess.run([sys.executable, str(ROOT / "scripts" / "worth.py"), "table", "--results", str(self.results),
                               "--readme", str(self.readme), "--chart", str(self.chart), *args], capture_output=True, text=True)

    ROWS = [run_row("dense", 1, 4.0), run_row("dense", 2, 4.02), run_row("64x8", 1, 3.6), run_row("64x8", 2, 3.62)]

    def test_section(self):
        result = self.table(self.ROWS)
        self.assertEqual(result.returncode, 0, result.stderr)
        written = self.readme.read_text()
        self.assertTrue(written.startswith("# Title\n<!-- worth -->\n\n## Is it worth it?\n"))
        self.assertTrue(written.endswith("\n<!-- end worth -->\nthe rest\n"))
        self.assertNotIn("old", written)
        # 4.01 nats a token of 3 bytes; from 6 at a straight line to 3.61, of which 4.01 is at 83 %.
        self.assertIn("| dense | 50.0 M | 4.010 (4.000 to 4.020) | 1.928 | 500,000 | 6.0 | 4.0 M tokens, 20 s |", written)
        self.assertIn("83 % of the tokens, 83 % of the seconds |", written)
        self.assertIn("2 seeds each, gates that sum to the number of experts a token, learning rate 0.002; H100, 2026-11-22, commit abc", written)
        self.assertIn("4.0 M were trained on, 2 epochs", written)
        self.assertIn("the ranges are 0.380 apart or more, and the widest is 0.020.", written)
        texts = [e.text for e in xml.fromstring(self.chart.read_text()).iter() if e.tag.endswith("text")]
        for wanted in "dense, 50.0 M", "64x8, 50.0 M", "million tokens", "seconds of training":
            self.assertIn(wanted, texts)
        self.assertEqual(self.table(None, "--check").returncode, 0)
        self.chart.write_text("other")
        self.refused(self.table(None, "--check"), "worth.svg")
        self.assertEqual(self.table([]).returncode, 0)  # results that are gone are not shown any longer
        self.assertFalse(self.chart.exists())
        self.assertEqual(self.readme.read_text(), "# Title\n<!-- worth -->\n<!-- end worth -->\nthe rest\n")

    def test_what_is_shown(self):
        worse = [run_row("8x2", 1, 4.5, lr=0.001), run_row("8x2", 2, 4.01, lr=0.001)]
        self.table(self.ROWS + worse)
        written = self.readme.read_text()
        self.assertIn("learning rate 0.002 (dense), 0.001 (8x2), 0.002 (64x8);", written)
        self.assertIn("The seeds of dense and 8x2 overlap", written)
        self.assertRegex(written, r"\| 8x2 .*\| not \|")
        self.assertLess(written.index("| 8x2 |"), written.index("| 64x8 |"))
        # Of a seed that was run twice the last counts; runs on a CPU, of another length, and sweeps do not.
        others = [run_row("64x8", 1, 1.0, gpu="cpu"), run_row("64x8", 1, 1.0, bench="worth_sweep")]
        self.table([run_row("64x8", 1, 1.0, steps=80), run_row("64x8", 1, 1.0), *self.ROWS, *others])
        self.assertIn("| 64x8 | 50.0 M | 3.610 (3.600 to 3.620)", self.readme.read_text())
        self.assertIn("nothing is shown", self.table([run_row("dense", 1, 4, gpu="cpu"), run_row("8x2", 1, 3, gpu="cpu")]).stdout)
        self.assertIn("wrote", self.table(None, "--gpu", "cpu").stdout)

    def test_refusals(self):
        self.refused(self.table([{"bench": "worth", "shape": "dense"}]), "worth.jsonl", "dense has no seed")
        self.results.write_text('{"bench": "wor')
        self.refused(self.table(None), "worth.jsonl:1: not JSON")
        self.results.write_text("[]")
        self.refused(self.table(None), "worth.jsonl:1: not an object")
        other = run_row("dense", 2, 4)
        other["curve"] = other["curve"][1:]
        self.refused(self.table([*self.ROWS[:1], *self.ROWS[2:], other]), "evaluated after different steps")
        self.readme.write_text("# Title\n")
        self.refused(self.table(self.ROWS), "<!-- worth -->")

    def test_the_readme_is_what_the_results_say(self):
        result = subprocess.run([sys.executable, str(ROOT / "scripts" / "worth.py"), "table", "--check"], capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)


class Runs(InFolder):
    def setUp(self):
        super().setUp()
        self.data, self.out = self.folder / "data", self.folder / "worth.jsonl"
        self.data.mkdir()
        manifest = {"tokenizer": "bytes"}
        for split, words in ("train", 4000), ("val", 60):
            raw = text(words)
            (self.data / f"debian_{split}_000000.bin").write_bytes(shard_bytes([256, *raw]))
            manifest[split] = {"tokens": len(raw) + 1, "bytes": len(raw), "shards": {f"debian_{split}_000000.bin": f"sum of {split}"}}
        (self.data / "manifest.json").write_text(json.dumps(manifest))

    def worth(self, *args, **variables):
        environment = dict(os.environ, TRAINER=str(TRAINER), SIZE="toy", DEVICE="cpu", VOCABULARY="257", STEPS="16", SEEDS="1",
                           DATA=str(self.data), OUT=str(self.out), RUN=str(self.folder / "run"), COMMIT="abc", OMP_NUM_THREADS="1")
        environment.update(variables)
        return subprocess.run([str(ROOT / "scripts" / "worth.sh"), *args], capture_output=True, text=True, env=environment)

    def rows(self):
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def test_all_shapes(self):
        result = self.worth(SHAPES="dense 8x2", LR="8x2=3e-3 5e-3")
        self.assertEqual(result.returncode, 0, result.stderr)
        result = self.worth(LR="8x2=3e-3 5e-3")  # goes on with the others
        self.assertEqual(result.returncode, 0, result.stderr)
        rows = self.rows()
        self.assertEqual([row["shape"] for row in rows], SHAPES)
        for row in rows:
            self.assertEqual([point[0] for point in row["curve"]], list(range(1, 17)))
            self.assertLess(row["curve"][-1][2], row["curve"][0][2])
            self.assertEqual((row["gpu"], row["tokens_per_step"], row["commit"]), ("cpu", 512, "abc"))
        # Equal compute: the active parameters differ by the routers, E*C in each of two layers, alone.
        dense = rows[0]["active"]
        self.assertEqual([row["active"] - dense for row in rows], [0, 2 * 8 * 64, 2 * 64 * 64, 2 * 128 * 64])
        self.assertEqual(list((self.folder / "run").iterdir()), [])
        self.assertEqual([row["lr"] for row in rows], [5e-3, 3e-3, 5e-3, 5e-3])
        self.assertNotIn("==", self.worth(LR="8x2=3e-3 5e-3").stdout)  # all are there
        self.assertEqual(self.rows(), rows)

    def test_budget(self):
        self.assertEqual(self.worth(SHAPES="dense").returncode, 0)
        rows = self.rows()
        self.out.write_text(json.dumps({**rows[0], "wall_s": 700}) + "\n")
        result = self.worth(BUDGET_S="600")
        self.assertEqual(result.returncode, 3, result.stderr)
        self.assertIn("stopped before 8x2, seed 1: about 700 s", result.stdout)
        self.assertEqual(len(self.rows()), 1)

    def test_probe_and_sweep(self):
        result = self.worth("probe", SHAPES="dense 128x8", STEPS="64")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("2 runs: ", result.stdout)
        self.assertFalse(self.out.exists())
        result = self.worth("sweep", SHAPES="dense 8x2", LRS="1e-3 4e-3", STEPS="32")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual({(row["bench"], row["steps"]) for row in self.rows()}, {("worth_sweep", 8)})
        self.assertIn("| last validation loss | 0.001 | 0.004 |", result.stdout)
        self.assertRegex(result.stdout, r"\| 8x2 \| \d\.\d{4} \| \d\.\d{4} \|")

    def test_refusals(self):
        for arguments, variables, status, line in (
                (["fly"], {}, 2, "'fly' is not one of run, probe, sweep"), (["run", "--fast"], {}, 2, "'--fast'"),
                ([], {"SIZE": "huge"}, 2, "SIZE 'huge'"), ([], {"SIZE": "full"}, 1, "finds no GPU"), ([], {"STEPS": "4"}, 2, "STEPS '4'"), ([], {"BUDGET_S": "soon"}, 2, "BUDGET_S"),
                ([], {"SHAPES": "dense 9x9"}, 1, "'9x9'"), ([], {"LR": "dense=1e-3"}, 1, "no learning rate for 8x2"), ([], {"DATA": str(self.folder)}, 1, "data/debian.py makes the text"),
                ([], {"TRAINER": str(self.folder / "none")}, 1, "no program")):
            result = self.worth(*arguments, **variables)
            self.assertEqual(result.returncode, status, result.stderr)
            self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
            self.assertIn(line, result.stderr)
        (self.data / "debian_train_000000.bin").write_bytes(b"")
        result = self.worth(SHAPES="dense")
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("debian_train_000000.bin", result.stderr)
        self.assertFalse(self.out.exists())
        (self.data / "manifest.json").write_text("{}")
        self.assertIn("is not what data/debian.py writes", self.worth(SHAPES="dense").stderr)


if __name__ == "__main__":
    unittest.main()
