"""Logs as the trainer writes them, and scripts/plot.py run on them. Shared by the tests of its page."""
import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
import unittest
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MEMORY = {"preset": "tiny", "parameters": 2004736, "active_parameters": 825088, "batch_size": 4, "seq_len": 256, "micro_steps": 1, "ranks": 1,
          "dispatch": "zero_buffer", "recompute": ["act"],
          "bytes": {name: {"weights": 8000, "gradients": 8000, "optimizer": 16000, "saved": saved, "routing metadata": 100, "transient workspace": 4000,
                           "total": 36100 + saved} for name, saved in (("zero_buffer", 28000), ("materialized", 32000))}}


def step_record(step, seed=0, layers=2, experts=4, **more):
    """Loss 2 + 3/step + seed; expert e of layer l is chosen e + l times as often as expert 0 of layer 0, plus one."""
    load = [[100 * (e + l + 1) for e in range(experts)] for l in range(layers)]
    return {"step": step, "loss": 2 + 3 / step + seed, "aux_loss": 0.04, "lr": 1e-3, "grad_norm": 1 / step, "tokens_per_s": 1000.0 + step,
            "load_max_over_mean": 1.5, "expert_load": load, **more}


def colors_of(png):
    """How many different colours a true-colour PNG file has; rows that are coded by difference count too."""
    raw, at, data = png.read_bytes(), 8, b""
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at:at + 8])
        data += raw[at + 8:at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    pixels = zlib.decompress(data)
    return len({pixels[i:i + 3] for i in range(1, len(pixels), 3)})


class PageTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def run_of(self, name, records, memory=MEMORY, end="\n"):
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + end)
        if memory:
            (folder / "memory.json").write_text(json.dumps(memory))
        return folder

    def long_run(self, name, steps, seed):
        """Noise around a falling loss, a validation loss twenty times."""
        noise, folder = random.Random(seed), self.folder / name
        folder.mkdir()
        with open(folder / "log.jsonl", "w") as file:
            for step in range(1, steps + 1):
                falling = math.exp(-8 * step / steps)
                load = [[noise.randrange(50, 150 + int(1000 * falling)) for _ in range(4)] for _ in range(2)]
                record = step_record(step, expert_load=load, loss=2 + 0.1 * seed + 4 * falling + noise.gauss(0, 0.05), lr=1e-3 * (1 - step / steps))
                file.write(json.dumps(record) + "\n")
                if step % (steps // 20) == 0:
                    file.write(json.dumps({"step": step, "val_loss": 2.1 + 0.1 * seed + 4 * falling}) + "\n")
        return folder

    def plot(self, *args, path=None):
        """path: another PATH, to find programs."""
        env = {**os.environ, **({} if path is None else {"PATH": path})}
        return subprocess.run([sys.executable, str(ROOT / "scripts" / "plot.py"), *map(str, args)], capture_output=True, text=True, env=env)

    def drawn(self, *args):
        """The page as text."""
        path = self.folder / "page.html"
        result = self.plot(*args, "--html", path)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return path.read_text()
