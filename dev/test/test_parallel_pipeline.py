#!/usr/bin/env python3
"""Layers over several processes against all of them in one: TRAINER=build/train_gpt_moe python3 dev/test/test_parallel_pipeline.py.
Stages do the same work in the same order, so everything is compared to the bit. Standard library only."""

import os
import re
import shutil
import signal
import sys
import time
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_parallel import BY_ONE_RULE, LAUNCHERS, MICRO_BATCHES, MODEL, N, PATIENCE, Job, ParallelTest  # noqa: E402

EXACT = [*BY_ONE_RULE, "--plain-matmul"]  # 8 micro-batches of a step of one rank
FOUR_LAYERS = ["4" if MODEL[i - 1] == "--n-layer" else a for i, a in enumerate(MODEL)]
GiB = 2**30


def micro_steps(n):
    return [*MICRO_BATCHES, "--total-batch-tokens", n * N, "--plain-matmul"]


class PipelineTest(ParallelTest):
    def stages(self, pp, *more, out, dp=1, ep=1, launcher=LAUNCHERS[0], model=MODEL):
        """Trains on dp * pp processes and returns the run's directory; its output is self.out."""
        job = Job(self.folder, dp * pp, [*self.arguments(dp, ep, *more, out=out, model=model), "--pp", pp], launcher).finish()
        self.assertEqual((set(job.statuses), job.lines), ({0}, []), job.out[-1000:] + job.error)
        self.out = job.out
        return self.path(out)

    def assert_same_bits(self, run, one):
        self.assert_same_files(run, one)
        self.assertEqual(self.losses(run), self.losses(one))
        self.assertEqual(*([r["val_loss"] for r in self.records(path) if "val_loss" in r] for path in (run, one)))

    def check(self, pps, *options, model=MODEL, dp=1, ep=1):
        """dp processes, then dp * pp of them, and the bits of both."""
        one = self.job(dp, ep, *options, model=model, out="one") if dp > 1 else self.alone(*options, model=model)
        for i, pp in enumerate(pps):
            with self.subTest(pp=pp, dp=dp, ep=ep, options=options):
                self.assert_same_bits(self.stages(pp, *options, model=model, dp=dp, ep=ep, out=f"pp-{pp}", launcher=LAUNCHERS[i % len(LAUNCHERS)]), one)
        for run in ("one", *(f"pp-{pp}" for pp in pps)):
            shutil.rmtree(self.path(run))


class Bits(PipelineTest):
    def test_stages(self):
        """The layer in the middle has no experts; two and three stages of three layers, three and four of four."""
        evaluated = ["--steps", 6, "--val-data", self.val, "--eval-every", 3]
        self.check((2, 3), *EXACT, *evaluated)
        self.check((3, 4), *EXACT, "--steps", 4, model=[*FOUR_LAYERS, "--tied", "false"])

    def test_numbers_of_micro_batches(self):
        """Fewer than stages, as many, one more; a single one writes its gradients."""
        for n in (1, 2, 3, 4):
            self.check((3,), *micro_steps(n), "--steps", 4)

    def test_policies(self):
        for policy in ("none", "up", "block"):
            self.check((2,), *EXACT, "--steps", 3, "--recompute", policy)
        self.check((2,), *EXACT, "--steps", 3, "--recompute", "block", "--dispatch", "materialized", "--arena", "separate")

    def test_bf16_and_bias(self):
        """The router's bias is of one stage, the checkpoint is of all."""
        self.check((3,), *EXACT, "--steps", 4, "--dtype", "bf16", "--gate", "sigmoid", "--balance", "bias", "--bias-rate", 0.1, "--d-shared", 16)

    def test_with_data_and_expert_parallelism(self):
        common = ["--batch-size", 2, "--seq-len", 16, "--total-batch-tokens", 8 * N, "--plain-matmul", "--steps", 4, "--grad-bucket", 1]
        self.check((2,), *common, dp=2)  # statistics over the tokens of a stage's ranks; without stages gradients travel during backward
        self.check((2,), *EXACT, "--steps", 4, "--val-data", self.val, "--row-headroom", 0.5, dp=2, ep=2)

    def test_replayed_choices(self):
        for policy in ("act", "block"):
            routes = self.path("routes-" + policy)
            common = [*EXACT, "--steps", 3, "--recompute", policy]
            self.alone(*common, "--record-routing", routes, out="recorded-" + policy)
            raw = routes.read_bytes()
            routes.write_bytes(raw[:28] + raw[28:][::-1])  # other choices than the router's
            self.check((2, 3), *common, "--replay-routing", routes)


class Checkpoints(PipelineTest):
    def test_another_number_of_stages(self):
        common = [*EXACT, "--steps", 20]
        source = self.stages(2, *common, "--stop-after", 3, out="source")
        whole = self.alone(*common, "--stop-after", 6, out="whole")
        for pp in (1, 3):
            copy = f"copy-{pp}"
            shutil.copytree(source, self.path(copy))
            more = [*common, "--stop-after", 6, "--resume"]
            self.stages(pp, *more, out=copy) if pp > 1 else self.ok(*self.training(*more, model=MODEL, out=copy))
            self.assert_same_bits(self.path(copy), whole)


class Memory(PipelineTest):
    """Six equal layers: the first of two stages has the activations of two micro-batches."""

    model = "--n-layer 6 --d-model 32 --n-head 2 --n-kv-head 1 --head-dim 16 --n-expert 8 --top-k 2 --d-expert 64".split()

    batch = ["--batch-size", 2, "--seq-len", 64, "--balance-scope", "sequence"]

    def plan(self, pp, *more):
        return self.ok(*self.model, "--dry-run", "--world", pp, "--pp", pp, *self.batch, *more)

    def test_the_plan(self):
        saved = lambda text: {int(layer): (int(attention), int(moe), int(metadata)) for layer, attention, moe, metadata in re.findall(r"(?m)^layer (\d+) attention saved (\d+)\nlayer \d+ moe saved (\d+) metadata (\d+)", text)}
        one = saved(self.plan(1, "--total-batch-tokens", 8 * 128))
        for steps, slots in ((8, 2), (1, 1)):
            text = self.plan(2, "--total-batch-tokens", steps * 128)
            stage, first, last, under_way = map(int, re.search(r"a rank of stage (\d) of 2: layers (\d) to (\d), micro-batches under way: (\d)", text).groups())
            self.assertEqual((first, last), (3 * stage, 3 * stage + 2))
            if steps == 8:
                self.assertEqual((stage, under_way), (0, slots))
            self.assertEqual(sorted(saved(text)), [first, first + 1, last])
            self.assertEqual(saved(text)[last - 1], tuple(under_way * n for n in one[last - 1]))
            # The plan is of the rank that needs most, and is what is allocated.
            run = self.stages(2, *self.batch, "--total-batch-tokens", steps * 128, "--steps", 1, out=f"run-{steps}", model=self.model)
            self.assertEqual(self.records(run, "memory_bytes")[0][0], int(re.search(r"(?m)^total +(\d+)", text)[1]))

    def test_each_stage_has_policies_of_its_own(self):
        tokens = ["--total-batch-tokens", 8 * 128]
        total = int(re.search(r"(?m)^total +(\d+)", self.plan(2, *tokens, "--recompute", "none"))[1])
        budget = ["--recompute", "auto", "--memory-budget", f"{(total - 1) / GiB:.15f}"]
        chosen = r"recompute auto: act x 1 none x 5 "  # the first stage is the larger one, by far
        self.assertRegex(self.plan(2, *tokens, *budget), chosen)
        common = [*self.batch, "--plain-matmul", *tokens, "--steps", 2]
        one = self.alone(*common, model=self.model)
        run = self.stages(2, *common, *budget, out="run", model=self.model)
        self.assertRegex(self.out, chosen)
        self.assert_same_bits(run, one)


class Ends(PipelineTest):
    def test_a_rank_is_killed(self):
        for launcher in LAUNCHERS:
            for rank in (0, 1, 2):
                with self.subTest(launcher=launcher, rank=rank):
                    out = f"{launcher}-{rank}"
                    args = [*EXACT, "--steps", 100000, "--comm-timeout", 10, "--checkpoint-every", 1, "--pp", 3]
                    job = self.begun(Job(self.folder, 3, self.training(*args, model=MODEL, out=out), launcher), out)
                    began = time.monotonic()
                    os.kill(job.pid(rank), signal.SIGKILL)
                    job.finish()
                    self.assertLess(time.monotonic() - began, PATIENCE)
                    self.assertNotIn(0, job.statuses, job.error)
                    self.assertEqual(len(job.lines), 1, job.error)
                    self.assertRegex(job.lines[0], rf"^rank \d+: .*rank {rank} is gone")
        step = int(self.checkpoint(self.path(out)).name[5:])  # complete: two stages go on with it
        self.stages(2, *EXACT, "--steps", 100000, "--stop-after", step + 1, "--resume", out=out)

    def test_a_rank_hangs(self):
        args = [*EXACT, "--steps", 100000, "--comm-timeout", 2, "--pp", 3]
        job = self.begun(Job(self.folder, 3, self.training(*args, model=MODEL, out="run"), "tcp"), "run")
        os.kill(job.pid(1), signal.SIGSTOP)
        time.sleep(3)
        os.kill(job.pid(1), signal.SIGCONT)  # so that it can be told to end
        job.finish()
        self.assertNotIn(0, job.statuses, job.error)
        self.assertTrue(any("--comm-timeout" in line for line in job.lines), job.error)

    def test_a_rank_is_stopped(self):
        args = [*EXACT, "--steps", 100000, "--comm-timeout", 10, "--pp", 3]
        job = self.begun(Job(self.folder, 3, self.training(*args, model=MODEL, out="run"), "tcp"), "run")
        os.kill(job.pid(1), signal.SIGTERM)
        job.finish()
        self.assertEqual((set(job.statuses), job.lines), ({0}, []), job.error)
        self.assertEqual(self.records(self.path("run"))[-1]["step"], int(self.checkpoint(self.path("run")).name[5:]))

    def test_refused(self):
        self.refused(self.training("--steps", 1, "--pp", 2, model=MODEL), "--pp 2", "1 runs")
        self.refused([*MODEL, "--dry-run", "--world", 4, "--pp", 4], "--pp 4", "3 layers")
        self.refused([*MODEL, "--dry-run", "--world", 6, "--pp", 4], "--pp 4", "6 run")
        self.refused([*MODEL, "--dry-run", "--pp", 0], "--pp")


if __name__ == "__main__":
    unittest.main()
