#!/usr/bin/env python3
"""Runs that end before their time: signals, kills at any moment of a save, a full disk.
TRAINER=build/train_gpt_moe python3 dev/test/test_interruption.py; TRAINER_KILLS=n kills n times (default 60)."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from trainer import ENV, TrainerTest, command  # noqa: E402


class Interrupted(TrainerTest):
    def start(self, *args, **options):
        return subprocess.Popen(command(args), env=ENV, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", **options)

    def test_signals(self):
        common = ["--steps", 1500]
        whole = self.trained(*common, out="whole")
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                process = self.start(*self.training(*common, out=number.name))
                while not process.stdout.readline().startswith("step "):
                    pass
                time.sleep(0.02)
                process.send_signal(number)
                out, error = process.communicate(timeout=60)
                self.assertEqual((process.returncode, error), (0, ""))
                step = re.search(r"stopped by a signal after step (\d+)", out)
                run = self.path(number.name)
                self.assertLess(int(step[1]), 1500)
                self.assertEqual(self.checkpoint(run).name, f"step_{int(step[1]):08}")
                self.assertEqual(self.records(run)[-1]["step"], int(step[1]))
                self.ok(*self.training(*common, "--resume", out=number.name))
                self.assert_same_run(whole, run)

    def test_before_the_first_step(self):
        process = self.start(*self.training("--steps", 1500))
        process.stdout.readline()  # the model's size: training begins
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
        self.assertEqual((process.returncode, error), (0, ""))
        self.assertIn("stopped by a signal", out)
        self.ok(*self.training("--steps", 1500, "--resume"))
        self.assert_same_run(self.trained("--steps", 1500, out="whole"), self.path("run"))

    def test_generation_stops(self):
        self.trained("--steps", 1)
        process = self.start("--generate", "--checkpoint", self.path("run"), "--max-new-tokens", 10**9)
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        self.assertEqual((process.wait(timeout=60), process.stderr.read()), (0, ""))
        process.stdout.close(), process.stderr.close()

    def test_killed_at_any_moment(self):
        common = ["--steps", 100000, "--checkpoint-every", 1, "--keep", 2]
        run, delay, step, cut = self.path("run"), random.Random(5), 0, 0
        for attempt in range(int(os.environ.get("TRAINER_KILLS", 60))):
            exists = (run / "latest").exists()
            process = self.start(*self.training(*common, *(["--resume"] if exists else [])))
            for line in process.stdout:
                if line.startswith("saved"):
                    break
            time.sleep(delay.uniform(0, 0.04))
            process.kill()
            _, error = process.communicate()
            self.assertEqual((process.returncode, error), (-signal.SIGKILL, ""), f"attempt {attempt}")
            now = int(self.checkpoint(run).name[5:])
            self.assertGreater(now, step)
            step = now
            for left in run.glob("step_*.tmp"):
                cut += 1
                self.refused(["--generate", "--checkpoint", left], left, self.checkpoint(run).name)
                self.refused(self.training("--init-from", left, out="other"), left)
        self.assertGreater(cut, 0, "no kill hit a save")
        self.assertEqual(len(self.ok("--generate", "--checkpoint", run, "--max-new-tokens", 5, "--temperature", 0)) > 0, True)
        self.ok(*self.training(*common, "--stop-after", step + 3, "--resume"))
        self.assertEqual(list(run.glob("*.tmp")), [])
        self.assertEqual(len(list(run.glob("step_*"))), 2)
        self.trained("--steps", 100000, "--stop-after", step + 3, out="whole")
        self.assert_same_run(self.path("whole"), run)


class DiskFull(TrainerTest):
    def previous_survives(self, run, before):
        self.assertEqual(self.checkpoint(run).name, before)
        self.assertEqual([p.name for p in run.glob("*.tmp")], [])
        self.ok("--generate", "--checkpoint", run, "--max-new-tokens", 5)

    def test_file_too_large(self):
        whole = self.trained("--steps", 10, out="whole")
        run = self.trained("--steps", 10, "--stop-after", 5)
        sizes = [(self.checkpoint(run) / f"{n}.safetensors").stat().st_size for n in ("model", "optimizer")]
        for limit in (sizes[0] // 2, (sizes[0] + sizes[1]) // 2):
            def restrict():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or the write would kill instead of failing
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            self.one_line(self.execute(*self.training("--steps", 10, "--resume"), preexec_fn=restrict), "step_00000010.tmp", "cannot write")
            self.previous_survives(run, "step_00000005")
        self.ok(*self.training("--steps", 10, "--resume"))
        self.assert_same_run(whole, run)

    def test_disk_full(self):
        disk = self.path("disk")
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
            self.skipTest("cannot mount a small disk here")
        try:
            self.one_line(self.execute(*self.training("--steps", 20, "--checkpoint-every", 2, "--keep", 0, out="disk/run")), "No space left")
            before = self.checkpoint(disk / "run").name
            self.assertLess(before, "step_00000020")
            self.previous_survives(disk / "run", before)
            shutil.rmtree(disk / "run" / "step_00000002")
            self.ok(*self.training("--steps", 20, "--keep", 1, "--resume", out="disk/run"))
            self.assert_same_run(self.trained("--steps", 20, out="whole"), disk / "run")
        finally:
            subprocess.run(["umount", disk], check=True)


if __name__ == "__main__":
    unittest.main()
