#!/usr/bin/env python3
"""PNG files of scripts/plot.py RUN... --png DIR. They are made by rsvg-convert (Debian: librsvg2-bin); without it the test is
skipped, with exit code 77, which ctest reports by name."""
import shutil
import struct
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page_test import PageTest, colors_of, step_record  # noqa: E402


@unittest.skipUnless(shutil.which("rsvg-convert"), "no rsvg-convert")
class Pictures(PageTest):
    def test_png(self):
        runs = [self.run_of(name, [step_record(s) for s in range(1, 11)] + [{"step": 10, "val_loss": 2.5}]) for name in "ab"]
        result = self.plot(*runs, "--html", self.folder / "p.html", "--png", self.folder / "png")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        pictures = {path.stem: path for path in (self.folder / "png").iterdir()}
        self.assertLessEqual({"all", "loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "load_max_over_mean", "load-0", "load-1", "memory",
                              "layer-memory", "ladder-roofline", "ladder-combine"}, set(pictures))
        sizes = {name: struct.unpack(">II", path.read_bytes()[16:24]) for name, path in pictures.items()}
        self.assertEqual(sizes["loss"], (600, 360))
        self.assertEqual(sizes["all"][0], 1200)
        self.assertGreater(sizes["all"][1], 1500)
        for name in ("loss", "load-0", "memory", "all"):
            self.assertGreater(colors_of(pictures[name]), 100, name)


if __name__ == "__main__":
    if not shutil.which("rsvg-convert"):
        print("SKIPPED: PNG files of runs (no rsvg-convert here; Debian: apt-get install librsvg2-bin)")
        sys.exit(77)
    unittest.main()
