#!/usr/bin/env python3
"""--tensorboard DIR: what a training run writes is what its log says. Standard library only; test_tensorboard_reader.py asks
TensorBoard itself."""
import struct
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from event_files import crc32c, records, values  # noqa: E402
from trainer import TrainerTest  # noqa: E402

LAYERS = ["--n-layer", 3, "--dense-layers", 1, "--d-dense", 16]
SCALARS = ("loss", "aux_loss", "z_loss", "lr", "grad_norm", "tokens_per_s", "load_max_over_mean")


class EventFiles(TrainerTest):
    def events(self, name="events"):
        return sorted(self.path(name).iterdir())

    def as_logged(self, run, files):
        """Every record of log.jsonl in the events, its numbers in fp32, and nothing else."""
        found = {}
        for file in files:
            for event in records(file)[2:]:
                found.setdefault(event[2], {}).update(values(event))
        fp32 = lambda x: struct.unpack("<f", struct.pack("<f", x))[0]
        expected = {}
        for r in self.records(run):
            into = expected.setdefault(r["step"], {})
            into.update({k: r[k] for k in (*SCALARS, "val_loss") if k in r})
            for l, load in enumerate(r.get("expert_load", [])):
                if load:
                    used = [e for e, n in enumerate(load) if n]
                    into[f"expert_load/layer_{l}"] = {"min": used[0], "max": used[-1] + 1, "num": sum(load), "limits": [e + 1 for e in range(used[0], used[-1] + 1)],
                                                      "counts": load[used[0]:used[-1] + 1]}
        self.assertEqual({s: set(v) for s, v in found.items()}, {s: set(v) for s, v in expected.items()})
        for step, tags in expected.items():
            for tag, value in tags.items():
                if isinstance(value, dict):
                    self.assertEqual(found[step][tag], value)
                else:
                    self.assertAlmostEqual(found[step][tag], fp32(value), delta=2.5e-7 * abs(value) + 1e-12)  # the log has nine digits

    def test_what_is_logged(self):
        run = self.trained("--steps", 6, "--eval-every", 3, "--val-data", self.val, "--tensorboard", self.path("deep/events"), *LAYERS)
        files = self.events("deep/events")
        self.assertEqual(len(files), 1)
        self.assertRegex(files[0].name, r"^events\.out\.tfevents\.\d{10}\..+\.\d+$")
        first, second = records(files[0])[:2]
        self.assertEqual((first[3], second[2], second[7]), (b"brain.Event:2", 1, b"\x08\x01"))
        self.as_logged(run, files)

    def test_resume(self):
        args = ["--steps", 12, "--checkpoint-every", 4, "--tensorboard", self.path("events")]
        run = self.trained("--stop-after", 6, *args)  # which saves step 6 too
        (run / "latest").write_text("step_00000004\n")  # as if it had been killed before that
        self.ok(*self.training("--resume", *args))
        first, second = self.events()
        start = records(second)[1]
        self.assertEqual((start[2], start[7]), (5, b"\x08\x01"))
        self.assertEqual([e[2] for e in records(first)[2:]], [1, 2, 3, 4, 5, 6])
        self.assertEqual([e[2] for e in records(second)[2:]], [5, 6, 7, 8, 9, 10, 11, 12])
        self.as_logged(run, [first, second])

    # A long run has a histogram now and then only: about as many as TensorBoard keeps.
    def test_histograms_of_long_runs(self):
        self.trained("--steps", 5000, "--stop-after", 31, "--tensorboard", self.path("events"))
        events = records(self.events()[0])[2:]
        self.assertEqual([e[2] for e in events if "expert_load/layer_0" in values(e)], [10, 20, 30])
        self.assertEqual(len(events), 31)

    def test_same_bits(self):
        self.assert_same_run(self.trained("--steps", 5, "--tensorboard", self.path("events")), self.trained("--steps", 5, out="other"))

    def test_refused(self):
        file = self.path("file")
        file.write_text("")
        for path in (file, file / "below"):
            self.refused(self.training("--steps", 1, "--tensorboard", path), f"--tensorboard {path}: cannot ")

    def test_checksum(self):
        self.assertEqual(crc32c(b"123456789"), 0xE3069283)


if __name__ == "__main__":
    unittest.main()
