#!/usr/bin/env python3
"""The trainer on a GPU: the same bits again, after a resume, without graphs and under every recompute policy; what the GPU
wrote is read on the CPU; what a GPU cannot do is refused in one line.
TRAINER=build/train_gpt_moe TRAINER_DEVICE=cuda python3 dev/test/test_gpu_trainer.py   (skipped without TRAINER_DEVICE)"""

import json
import re
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from ports import free_port  # noqa: E402
from trainer import DEVICE, ENV, TrainerTest, command  # noqa: E402

BF16 = ("--dtype", "bf16")


def gpus():
    if DEVICE != "cuda" or not shutil.which("nvidia-smi"):
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


class GpuTrainerTest(TrainerTest):
    def assert_same_training(self, one, other):
        """Weights, moments and losses; the memory that a step takes may differ."""
        a, b = self.checkpoint(one), self.checkpoint(other)
        for name in ("model.safetensors", "optimizer.safetensors"):
            self.assertTrue((a / name).read_bytes() == (b / name).read_bytes(), f"{name} of {a} and {b} differ")
        self.assertEqual(self.losses(one), self.losses(other))


@unittest.skipUnless(DEVICE == "cuda", "TRAINER_DEVICE is not cuda")
class OnTheGpu(GpuTrainerTest):
    def test_same_bits_whatever_way(self):
        for dtype in ("bf16", "fp32"):
            steps = ("--dtype", dtype, "--steps", 6, "--total-batch-tokens", 128)
            want = self.trained(*steps, out=f"{dtype} first")
            for more in ((), ("--no-graphs",), ("--arena", "separate"), ("--recompute", "none"), ("--recompute", "up"), ("--recompute", "block"),
                         ("--recompute", "auto", "--memory-budget", 1), ("--dispatch", "materialized")):
                with self.subTest(dtype, more=more):
                    self.assert_same_training(want, self.trained(*steps, *more, out=f"{dtype} {' '.join(map(str, more))}"))

    def test_resume_gives_the_same_bits(self):
        for dtype in ("bf16", "fp32"):
            steps = ("--dtype", dtype, "--steps", 8)
            whole = self.trained(*steps, out=f"{dtype} whole")
            parts = self.trained(*steps, "--stop-after", 3, out=f"{dtype} parts")
            self.ok(*self.training(*steps, "--resume", out=f"{dtype} parts"))
            self.assert_same_training(whole, parts)

    def test_the_cpu_goes_on_from_the_gpus_checkpoint(self):
        run = self.trained("--dtype", "fp32", "--steps", 30, "--lr", "1e-2")
        generate = ["--generate", "--checkpoint", run, "--prompt", "a", "--max-new-tokens", 20, "--temperature", 0, "--dtype", "fp32"]
        texts = [self.ok(*generate, "--device", device) for device in ("cuda", "cpu")]
        self.assertEqual(*texts)
        gpu, cpu = (self.trained("--dtype", "fp32", "--steps", 3, "--init-from", run, "--device", device, out=device) for device in ("cuda", "cpu"))
        for (_, a), (_, b) in zip(self.records(gpu, "step", "loss"), self.records(cpu, "step", "loss")):
            self.assertAlmostEqual(a, b, delta=1e-5 * b)

    def test_memory_is_as_planned_and_the_driver_agrees(self):
        unit = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
        apart = []
        for attempt in range(5):  # another process may take memory of the same GPU between the driver's two answers
            output = self.ok(*self.training(*BF16, "--steps", 1, out=f"memory {attempt}"))
            found = re.search(r"tensors ([0-9.]+ \w+) planned, ([0-9.]+ \w+) by the driver", output).groups()
            planned, by_driver = (float(t.split()[0]) * unit[t.split()[1]] for t in found)
            apart.append(abs(by_driver - planned))
            if apart[-1] < 4 * 2**20:  # the driver hands out pieces of 2 MiB
                return
        self.fail(f"plan and driver are apart by {apart} bytes")

    def test_recompute_auto_says_what_it_costs(self):
        model = "--n-layer 4 --d-model 64 --n-head 2 --n-kv-head 1 --head-dim 32 --n-expert 4 --d-expert 256".split()
        steps = (*BF16, "--steps", 1, "--batch-size", 8, "--seq-len", 64)
        report = self.ok(*self.training(*steps, "--memory-report", "--dry-run", model=model))
        total = int(re.search(r"^total +([0-9]+)", report, re.M).group(1))
        budget = ("--recompute", "auto", "--memory-budget", (total - 2 * 2**20) / 2**30)
        output = self.ok(*self.training(*steps, *budget, model=model, out="auto"))
        self.assertRegex(output, r"recompute auto:.*(up|block).*predicted cost: [0-9.]+ % more operations")
        self.assertRegex(output, r"recomputation: [0-9.]+ % more operations predicted, [0-9.]+ % more time measured")

    def test_profile(self):
        """Steps timed op by op have the bits of those replayed from graphs; their ops add up to them."""
        for dtype in ("bf16", "fp32"):
            steps = ("--dtype", dtype, "--steps", 10)
            want, run = self.trained(*steps, out=f"{dtype} plain"), self.trained(*steps, "--profile", out=f"{dtype} profiled")
            self.assert_same_training(want, run)
            slices = [e for e in json.loads((run / "profile.json").read_text())["traceEvents"] if e["ph"] == "X"]
            whole = [s for s in slices if s["cat"] == "step"]
            self.assertEqual([s["name"] for s in whole], [f"step {n}" for n in range(4, 9)])
            for step in whole:
                ops = [s for s in slices if s["cat"] not in ("step", "layer") and step["ts"] <= s["ts"] < step["ts"] + step["dur"]]
                self.assertAlmostEqual(sum(s["dur"] for s in ops), step["dur"], delta=len(ops))
                self.assertLessEqual({"experts up", "experts dW13", "attention backward", "classifier", "adamw"}, {s["name"] for s in ops})

    def test_what_does_not_fit_is_refused_with_the_nearest_that_does(self):
        before = self.files()
        result = self.execute(*self.training(*BF16, "--preset", "tiny", "--batch-size", 64, "--steps", 1, "--memory-budget", 0.068, model=[]))
        self.one_line(result, "--memory-budget", "would fit")
        self.assertIn("memory plan:", result.stdout)
        self.assertEqual(self.files(), before)
        self.refused(self.training(*BF16, "--batch-size", 2, "--seq-len", 32, "--preset", "qwen3-30b-a3b", "--steps", 1, "--vocab-size", 257, model=[]), "free")

    def test_what_a_gpu_cannot_do(self):
        self.refused(self.training(*BF16, "--head-dim", 24, "--steps", 1), "--head-dim 24", "16, 32, 64, 96 or 128")
        self.refused(self.training("--dtype", "fp64", "--device", "cuda", "--steps", 1), "--dtype fp64", "--device cpu")


@unittest.skipUnless(gpus() >= 2, "there are no two GPUs")
class OnTwoGpus(GpuTrainerTest):
    """The same bits with graphs and without and whatever is kept for backward: of experts on two GPUs by either transport, also
    where rows take several passes; of gradients that travel while backward goes on, however many at a time."""

    def on_two(self, *more, out, ep=2):
        """Output of rank 0, and the run's directory."""
        args = self.training("--dp", 2, "--ep", ep, "--comm-timeout", 60, *more, out=out)
        env = {**ENV, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [subprocess.Popen(command(args), env={**env, "RANK": str(r)}, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for r in range(2)]
        try:
            texts = [p.communicate(timeout=120) for p in ranks]
        finally:
            for p in ranks:
                p.kill()
        self.assertEqual([(p.returncode, error) for p, (_, error) in zip(ranks, texts)], [(0, ""), (0, "")], args)
        return texts[0][0], self.path(out)

    def test_same_bits_by_either_transport(self):
        settings = [(*BF16, *more) for more in ((), ("--recompute", "none"), ("--recompute", "up"), ("--recompute", "block"), ("--dispatch", "materialized"),
                                                ("--row-headroom", 0.4), ("--total-batch-tokens", 512), ("--d-shared", 16, "--d-model", 40))]
        settings += [("--dtype", "fp32", *more) for more in ((), ("--recompute", "block"), ("--row-headroom", 0.4))]
        for setting in settings:
            steps, name = ("--steps", 6, "--val-data", self.val, *setting), " ".join(map(str, setting))
            output, want = self.on_two(*steps, "--transport", "exchange", out=name + " exchange")
            self.assertIn("tokens to experts: exchange", output)
            for more in ((), ("--no-graphs",)) if len(setting) == 2 else ((),):
                with self.subTest(setting=setting, more=more):
                    output, run = self.on_two(*steps, "--transport", "pull", *more, out=name + " ".join(more))
                    self.assertIn("tokens to experts: pull", output)
                    self.assert_same_training(want, run)
                    self.assertEqual(self.validation(want), self.validation(run))

    def test_same_bits_however_gradients_travel(self):
        for micro_steps, *setting in ((1, *BF16), (1, *BF16, "--grad-dtype", "bf16"), (3, *BF16, "--tied", "false", "--d-shared", 16), (3, "--dtype", "fp32", "--balance-scope", "sequence")):
            steps = ("--steps", 6, "--n-layer", 3, "--val-data", self.val, "--eval-every", 2, "--total-batch-tokens", 128 * micro_steps, *setting)
            name = " ".join(map(str, setting))
            _, want = self.on_two(*steps, "--grad-bucket", 2**30, "--no-graphs", out=name, ep=1)
            for i, more in enumerate(((), ("--grad-bucket", 1), ("--grad-bucket", 1, "--no-graphs"), ("--grad-bucket", 1, "--recompute", "block"), ("--grad-bucket", 1, "--recompute", "none"))):
                with self.subTest(setting=setting, more=more):
                    _, run = self.on_two(*steps, *more, out=f"{name} {i}", ep=1)
                    self.assert_same_training(want, run)
                    self.assertEqual(self.validation(want), self.validation(run))

    def validation(self, run):
        return [r["val_loss"] for r in self.records(run) if "val_loss" in r]


if __name__ == "__main__":
    unittest.main()
