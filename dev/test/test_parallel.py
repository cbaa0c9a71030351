#!/usr/bin/env python3
"""Runs of several processes against runs of one: TRAINER=build/train_gpt_moe python3 dev/test/test_parallel.py.
Processes are started by mpirun where it and MPI are there, else over TCP. Standard library only."""

import array
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from ports import free_port  # noqa: E402
from trainer import ENV, TRAINER, Safetensors, TrainerTest, command  # noqa: E402

CLEAN = {k: v for k, v in ENV.items() if not re.match("OMPI_|PMI|SLURM_|RANK$|WORLD_SIZE$|MASTER_", k)}
CLEAN.update(OMP_NUM_THREADS="1", ASAN_OPTIONS="detect_leaks=0")
MPIRUN = shutil.which("mpirun")
if MPIRUN and "built without MPI" in subprocess.run([TRAINER, "--help"], env={**CLEAN, "OMPI_COMM_WORLD_SIZE": "1"}, capture_output=True, text=True).stderr:
    MPIRUN = None
LAUNCHERS = ["mpi", "tcp"] if MPIRUN else ["tcp"]
PATIENCE = 20  # seconds within which a job that cannot go on must have ended, on a busy machine

# Two MoE layers and a dense one; N = 32 tokens of a micro-batch.
MODEL = "--n-layer 3 --dense-layers 1 --d-dense 32 --d-model 32 --n-head 2 --n-kv-head 1 --head-dim 16 --n-expert 8 --top-k 2 --d-expert 16".split()
E, K, N, LAYERS = 8, 2, 32, 2
MICRO_BATCHES = ["--batch-size", 2, "--seq-len", 16, "--balance-scope", "sequence"]
BY_ONE_RULE = [*MICRO_BATCHES, "--total-batch-tokens", 8 * N]  # 8 micro-batches a step, however many ranks take them


def values(tensor):
    dtype, _, data = tensor
    return array.array({"F32": "f", "F64": "d"}[dtype], data)


def error(found, expected):
    """|found - expected| / |expected|, of lists; 0 only where they are the same."""
    return 0.0 if found == expected else math.sqrt(sum((x - y) ** 2 for x, y in zip(found, expected)) / sum(y * y for y in expected))


def routing_bytes(choices, k=K):
    """A routing file: for each micro-step and MoE layer, the N*k choices."""
    return struct.pack("<8s5i", b"GPTMOERT", 1, E, k, N, LAYERS) + b"".join(bytes(c) for micro in choices for c in micro)


class Job:
    """n processes of the trainer. finish(): status of each (of mpirun), and the lines of ours on stderr."""

    def __init__(self, folder, n, args, launcher, patience=2):
        """patience: seconds that a mpirun told to end waits twice, before it passes the signal on and before it kills."""
        self.launcher, self.start = launcher, time.monotonic()
        run = dict(cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
        if launcher == "mpi":
            start = [MPIRUN, "--mca", "odls_base_sigkill_timeout", str(patience), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(n)]
            self.processes = [subprocess.Popen([*start, *command(args)], env=CLEAN, **run)]
        else:
            env = {**CLEAN, "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            self.processes = [subprocess.Popen(command(args), env={**env, "RANK": str(r)}, **run) for r in range(n)]

    def finish(self):
        try:
            texts = [p.communicate(timeout=120) for p in self.processes]
        finally:
            self.kill()
        self.seconds = time.monotonic() - self.start
        self.statuses = [p.returncode for p in self.processes]
        self.out, self.error = "".join(out for out, _ in texts), "".join(error for _, error in texts)
        self.lines = [line for line in self.error.splitlines() if re.match(r"rank \d+: |train_gpt_moe: ", line)]
        return self

    def kill(self):
        for p in self.processes:
            p.kill()

    def pid(self, rank):
        """The process of a rank."""
        if self.launcher == "tcp":
            return self.processes[rank].pid
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == self.processes[0].pid:
                    if f"OMPI_COMM_WORLD_RANK={rank}\0" in (entry / "environ").read_text():
                        return int(entry.name)
            except OSError:  # it has ended
                pass
        raise AssertionError(f"no process of rank {rank}")


class ParallelTest(TrainerTest):
    def arguments(self, dp, ep, *more, out, model=MODEL):
        return [*self.training(*more, model=model, out=out), "--dp", dp, "--ep", ep]

    def job(self, dp, ep, *more, out, launcher=LAUNCHERS[0], **options):
        """Trains on dp processes and returns the run's directory."""
        return self.processes(dp, self.arguments(dp, ep, *more, out=out, **options), out, launcher)

    def processes(self, n, args, out, launcher=LAUNCHERS[0]):
        job = Job(self.folder, n, args, launcher).finish()
        self.assertEqual((set(job.statuses), job.lines), ({0}, []), job.out[-1000:] + job.error)
        return self.path(out)

    def refused_job(self, n, args, *expected, model=MODEL):
        with self.subTest(args=args):
            before = self.files()
            job = Job(self.folder, n, self.training(*args, model=model), "tcp").finish()
            self.assertEqual(job.statuses, [1] * n, job.error)
            self.assertEqual(len(job.lines), 1, job.error)
            self.assertRegex(job.lines[0], r"^rank \d+: train_gpt_moe: ")
            for word in expected:
                self.assertIn(word, job.lines[0])
            self.assertLess(job.seconds, PATIENCE)
            self.assertEqual(self.files(), before, "a refused run has written something")

    def alone(self, *more, out="one", model=MODEL):
        return self.trained(*more, model=model, out=out)

    def assert_close(self, run, one, loss=1e-4, norm=1e-3):
        """The log of a run is that of another, but for rounding."""
        a, b = self.records(run), self.records(one)
        self.assertEqual([r["step"] for r in a], [r["step"] for r in b])
        for r, expected in zip(a, b):
            for key in ("val_loss",) if "val_loss" in expected else ("loss", "aux_loss", "z_loss"):
                self.assertLess(abs(r[key] - expected[key]), loss, f"{key} of step {r['step']}: {r[key]}, not {expected[key]}")
            if "loss" in expected:
                self.assertEqual(r["lr"], expected["lr"])
                self.assertLess(abs(r["grad_norm"] / expected["grad_norm"] - 1), norm, f"step {r['step']}")
                self.assertEqual(r["expert_load"], expected["expert_load"], f"step {r['step']}")

    def assert_same_tensors(self, a, b, file, but=()):
        one, other = (Safetensors(self.checkpoint(run) / file).tensors for run in (a, b))
        self.assertEqual(list(one), list(other))
        different = [name for name in one if one[name] != other[name] and name not in but]
        self.assertEqual(different, [], f"{file} of {a} and {b}")

    def assert_same_files(self, run, one):
        for file in ("model.safetensors", "optimizer.safetensors"):
            self.assert_same_tensors(run, one, file)
            self.assertTrue((self.checkpoint(run) / file).read_bytes() == (self.checkpoint(one) / file).read_bytes(), file)

    def begun(self, job, out):
        """The job, once it has taken a few steps."""
        self.addCleanup(job.kill)
        log, end = self.path(out) / "log.jsonl", time.monotonic() + 60
        while not log.exists() or log.read_text().count("\n") < 3:
            if time.monotonic() > end or any(p.poll() is not None for p in job.processes):
                job.kill()
                self.fail("the job does not begin: " + job.finish().error)
            time.sleep(0.02)
        return job

    def assert_loads_what_was_saved(self, source, out, train):
        """train(*options, out=...) goes on with a copy of a run, and its next checkpoint holds what that of the run does."""
        shutil.copytree(source, self.path(out))
        # As if the window of losses were full of ones: the next step is an outlier, and saves what was loaded.
        outlier = Safetensors(self.checkpoint(source) / "optimizer.safetensors")
        outlier.tensors["detector"] = "F64", [257], array.array("d", [128.0] + [1.0, 1.001] * 128).tobytes()
        outlier.write(self.checkpoint(self.path(out)) / "optimizer.safetensors")
        step = int(self.checkpoint(source).name[5:]) + 1
        train("--stop-after", step, "--skip-loss-z", 1, out=out)
        self.assertEqual(self.checkpoint(self.path(out)).name, f"step_{step:08}")
        self.assertIn("outlier", self.records(self.path(out))[-1]["skipped"])
        self.assert_same_tensors(self.path(out), source, "model.safetensors")
        self.assert_same_tensors(self.path(out), source, "optimizer.safetensors", but=["detector"])


class Layouts(ParallelTest):
    def test_losses(self):
        common = [*BY_ONE_RULE, "--steps", 20, "--val-data", self.val, "--eval-every", 10]
        routes = self.path("routes")
        one = self.alone(*common, "--record-routing", routes)
        for dp in (1, 2, 4, 8):
            for ep in (1, 2, 4, 8):
                if dp % ep == 0 and dp * ep != 1 and (dp, ep) != (8, 4):
                    with self.subTest(dp=dp, ep=ep):
                        launcher = LAUNCHERS[-1] if (dp, ep) in ((2, 2), (4, 1)) else LAUNCHERS[0]
                        run = self.job(dp, ep, *common, "--replay-routing", routes, out=f"{dp}-{ep}", launcher=launcher)
                        self.assert_close(run, one)

    def test_gradients(self):
        """After a step with --beta1 0 the first moment is the gradient."""
        common = [*BY_ONE_RULE, "--steps", 20, "--stop-after", 1, "--beta1", 0, "--clip", 0, "--d-shared", 16]
        for tied, dtype, limit, norm_limit in (("true", "fp32", 1e-5, 4e-6), ("false", "fp64", 1e-12, 2e-9)):
            routes = self.path("routes-" + tied)
            model = [*MODEL, "--tied", tied, "--dtype", dtype]
            one = self.alone(*common, "--record-routing", routes, model=model, out="one-" + tied)
            expected = Safetensors(self.checkpoint(one) / "optimizer.safetensors").tensors
            for dp, ep in ((2, 2), (4, 1), (4, 2), (8, 8)):
                with self.subTest(dp=dp, ep=ep, tied=tied):
                    run = self.job(dp, ep, *common, "--replay-routing", routes, model=model, out=f"{dp}-{ep}-{tied}")
                    found = Safetensors(self.checkpoint(run) / "optimizer.safetensors").tensors
                    self.assertEqual(list(found), list(expected))
                    for name in (n for n in expected if n.startswith("m.")):
                        self.assertLess(error(values(found[name]), values(expected[name])), limit, name)
                    norm = math.sqrt(sum(g * g for n in found if n.startswith("m.") for g in values(found[n])))
                    self.assertLess(abs(self.records(run, "grad_norm")[0][0] / norm - 1), norm_limit)  # no expert is left out

    def test_the_same_bits_as_accumulation(self):
        for dtype, more in (("fp32", []), ("bf16", ["--grad-dtype", "fp32"])):
            for dp in (2, 4):
                with self.subTest(dtype=dtype, dp=dp):
                    common = [*MICRO_BATCHES, "--total-batch-tokens", dp * N, "--steps", 10, "--plain-matmul", "--dtype", dtype, *more]
                    one = self.alone(*common, out=f"one-{dtype}-{dp}")
                    for bucket in (2**30, 1):
                        run = self.job(dp, 1, *common, "--grad-bucket", bucket, out=f"{dtype}-{dp}-{bucket}", launcher=LAUNCHERS[-1] if dp == 2 else LAUNCHERS[0])
                        self.assert_same_files(run, one)
                        self.assertEqual(self.losses(run), self.losses(one))

    def test_the_same_bits_however_gradients_travel(self):
        """Part by part of each layer, while backward goes on, or (but for what follows the layers) all at its end; once a step."""
        settings = ((), ("--recompute", "block", "--dtype", "bf16", "--arena", "separate", "--d-shared", 16), ("--tied", "false", "--grad-dtype", "bf16", "--dtype", "bf16", "--recompute", "none"))
        for i, more in enumerate(settings):
            for micro_steps in (1, 3) if "--grad-dtype" not in more else (1,):
                with self.subTest(more=more, micro_steps=micro_steps):
                    common = ["--batch-size", 2, "--seq-len", 16, "--total-batch-tokens", 2 * N * micro_steps, "--steps", 6, "--val-data", self.val, "--eval-every", 2, *more]
                    all_at_once, parts = (self.job(2, 1, *common, "--grad-bucket", bucket, out=f"{i}-{micro_steps}-{bucket}") for bucket in (2**30, 1))
                    self.assert_same_files(parts, all_at_once)
                    self.assertEqual(self.losses(parts), self.losses(all_at_once))
                    self.assertEqual(*([r["val_loss"] for r in self.records(run) if "val_loss" in r] for run in (parts, all_at_once)))

    def test_the_same_bits_twice(self):
        common = [*BY_ONE_RULE, "--steps", 5]
        self.assert_same_files(self.job(4, 2, *common, out="a"), self.job(4, 2, *common, out="b", launcher=LAUNCHERS[-1]))


class Checkpoints(ParallelTest):
    def test_another_layout(self):
        for dtype in ("fp32", "bf16"):
            common = [*BY_ONE_RULE, "--steps", 20, "--dtype", dtype, "--grad-bucket", 1]
            routes = self.path("routes-" + dtype)
            self.alone(*common, "--record-routing", routes, out="routes of " + dtype)
            common += ["--replay-routing", routes]
            source = self.job(4, 2, *common, "--stop-after", 3, out="source-" + dtype)
            whole = self.job(4, 2, *common, "--stop-after", 6, out="whole-" + dtype)
            for dp, ep in ((1, 1), (2, 2), (4, 1)):
                with self.subTest(dp=dp, ep=ep, dtype=dtype):
                    train = lambda *more, out: self.job(dp, ep, *common, "--resume", *more, out=out) if dp > 1 else self.ok(*self.training(*common, "--resume", *more, model=MODEL, out=out))
                    same, further = (f"{name}-{dp}-{ep}-{dtype}" for name in ("same", "further"))
                    self.assert_loads_what_was_saved(source, same, train)
                    shutil.copytree(source, self.path(further))
                    train("--stop-after", 6, out=further)
                    loss, norm = (1e-4, 1e-3) if dtype == "fp32" else (0.02, 0.05)
                    self.assert_close(self.path(further), whole, loss, norm)


class Difficult(ParallelTest):
    def check(self, layouts, *options, routes=None, steps=6, model=MODEL, **limits):
        """A run of one process, then of each (dp, ep, options)."""
        common = [*BY_ONE_RULE, "--steps", steps, *options]
        record = self.path("recorded")
        if routes is not None:
            record.write_bytes(routes)
        one = self.alone(*common, "--record-routing" if routes is None else "--replay-routing", record, model=model)
        for i, (dp, ep, *more) in enumerate(layouts):
            with self.subTest(dp=dp, ep=ep, more=more):
                replaced = [a for pair in zip(common[::2], common[1::2]) if pair[0] not in more for a in pair]
                run = self.job(dp, ep, *replaced, *more, "--replay-routing", record, model=model, out=f"many-{i}")
                self.assert_close(run, one, **limits)
        return one

    def test_all_tokens_to_one_rank(self):
        """All to the first two experts, or to the last two: other ranks receive nothing."""
        choices = [[[6, 7] * N if last else [0, 1] * N for last in (micro % 3 == 0, micro % 2)] for micro in range(6 * 8)]
        one = self.check([(4, 4, "--row-headroom", 0.5), (4, 4, "--row-headroom", 1.5), (8, 8, "--row-headroom", 0.5), (4, 2, "--row-headroom", 0.5)], routes=routing_bytes(choices))
        self.assertEqual({e for r in self.records(one, "expert_load") for layer in r[0] if layer for e, n in enumerate(layer) if n}, {0, 1, 6, 7})

    def test_one_expert_takes_all(self):
        model = [a if a != "2" or MODEL[i - 1] != "--top-k" else "1" for i, a in enumerate(MODEL)]
        routes = routing_bytes([[[3] * N] * LAYERS] * (6 * 8), k=1)
        self.check([(4, 4, "--row-headroom", 0.5), (2, 2, "--row-headroom", 0.01)], routes=routes, model=model)

    def test_recompute_dispatch_arena(self):
        few = "--row-headroom", 0.5
        self.check([(4, 2, "--recompute", "none"), (4, 2, "--recompute", "up"), (4, 4, "--recompute", "block", *few), (4, 2, "--dispatch", "materialized"),
                    (4, 4, "--dispatch", "materialized", "--recompute", "up", *few), (4, 2, "--arena", "separate", *few)])

    def test_sigmoid_and_shared_expert(self):
        one = self.check([(4, 2), (2, 2, "--recompute", "block")], "--gate", "sigmoid", "--balance", "bias", "--bias-rate", 0.1, "--d-shared", 16)
        bias = Safetensors(self.checkpoint(one) / "model.safetensors").tensors["model.layers.0.mlp.gate.e_score_correction_bias"]
        self.assertTrue(any(values(bias)))
        for i in range(2):
            self.assertEqual(Safetensors(self.checkpoint(self.path(f"many-{i}")) / "model.safetensors").tensors["model.layers.0.mlp.gate.e_score_correction_bias"], bias)

    def test_no_moe_layer(self):
        model = "--n-layer 2 --dense-layers 0,1 --d-dense 32 --d-model 32 --n-head 2 --n-kv-head 1 --head-dim 16 --n-expert 8 --d-expert 16".split()
        common = [*BY_ONE_RULE, "--steps", 6]
        self.assert_close(self.job(4, 2, *common, model=model, out="many"), self.alone(*common, model=model))

    def test_statistics_of_a_micro_batch(self):
        """They are of all ranks: as if one process took the whole as one micro-batch."""
        common = ["--seq-len", 16, "--steps", 6, "--aux-coef", 0.5, "--z-coef", 0.1]
        whole = self.path("whole")
        one = self.alone(*common, "--batch-size", 8, "--record-routing", whole)
        raw, width = whole.read_bytes(), N * K
        steps = [raw[28 + i:28 + i + 8 * width] for i in range(0, len(raw) - 28, 8 * width)]  # two layers of four shares
        routes = self.path("routes")
        routes.write_bytes(routing_bytes([[step[(4 * layer + share) * width:][:width] for layer in range(LAYERS)] for step in steps for share in range(4)]))
        for ep in (1, 4):
            run = self.job(4, ep, *common, "--batch-size", 2, "--replay-routing", routes, out=f"many-{ep}")
            self.assert_close(run, one)

    def test_bf16(self):
        self.check([(4, 2), (8, 1)], "--dtype", "bf16", loss=0.02, norm=0.05)


class Refused(ParallelTest):
    def test_several_processes(self):
        self.refused_job(2, ["--steps", 1], "--dp 1", "2 run")
        self.refused_job(2, ["--steps", 1, "--dp", 4], "--dp 4", "2 run")
        self.refused_job(3, ["--steps", 1, "--dp", 3, "--ep", 3], "--ep 3", "--n-expert 8")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--ep", 4], "--ep 4", "does not divide")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--ep", 2, "--capacity-factor", 1.25], "--capacity-factor")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--sample-every", 1], "--sample-every")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--record-routing", self.path("routes")], "--record-routing")
        self.refused_job(2, ["--dp", 2, "--generate", "--checkpoint", self.path("none")], "--generate")
        self.refused_job(2, ["--dp", 2, "--export", "hf", "--checkpoint", self.path("none")], "--export")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--row-headroom", 0], "--row-headroom")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--grad-bucket", 0], "--grad-bucket")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--train-data", self.path("nothing.bin")], "nothing.bin")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--resume"], "run")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--comm-timeout", 0], "--comm-timeout")
        self.refused_job(2, ["--steps", 1, "--dp", 2, "--nonsense"], "--nonsense")

    def test_one_process(self):
        for more, expected in ((["--dp", 2], "--dp 2"), (["--ep", 2], "--ep 2"), (["--dp", 2, "--world", 2], "--world"), (["--row-headroom", -1], "--row-headroom"),
                               (["--row-headroom", "nan"], "--row-headroom"), (["--dp", 0], "--dp"), (["--ep", -1], "--ep"), (["--dp", 2**31 - 1], "--dp")):
            self.refused(self.training("--steps", 1, *more, model=MODEL), expected)

    def test_the_plan_of_many(self):
        out = self.ok(*MODEL, "--dry-run", "--world", 64, "--dp", 64, "--ep", 8, "--batch-size", 2, "--seq-len", 16)
        self.assertIn("layout: 64 processes, dp 64 tp 1 pp 1; experts edp 8 ep 8 etp 1", out)
        self.assertRegex(out, r"(?m)^  ep: 8 of 8 \(0 1 2 3 4 5 6 7\)")
        self.assertRegex(out, r"(?m)^  edp: 8 of 8 \(0 8 16 24 32 40 48 56\)")
        self.assertRegex(out, r"(?m)^total +\d+ ")
        rank, alone = (int(re.search(r"(?m)^weights +(\d+)", text)[1]) for text in (out, self.ok(*MODEL, "--dry-run", "--batch-size", 2, "--seq-len", 16)))
        self.assertLess(rank, alone)
        self.refused([*MODEL, "--dry-run", "--world", 64, "--dp", 32], "--dp 32", "64 run")


class Ends(ParallelTest):
    def start(self, launcher, dp, ep, *more, out, **options):
        """A long run, once it has taken a few steps."""
        args = [*BY_ONE_RULE, "--steps", 100000, *(["--comm-timeout", 10] if "--comm-timeout" not in more else []), *more]
        return self.begun(Job(self.folder, dp, self.arguments(dp, ep, *args, out=out), launcher, **options), out)

    def resumes(self, out, ep=1):
        """What the newest checkpoint holds is complete: fewer ranks go on with it, for two steps."""
        step = int(self.checkpoint(self.path(out)).name[5:])
        self.job(2, ep, *BY_ONE_RULE, "--steps", 100000, "--stop-after", step + 2, "--resume", out=out)
        self.assertEqual(self.checkpoint(self.path(out)).name, f"step_{step + 2:08}")
        self.assertEqual([r["step"] for r in self.records(self.path(out))], list(range(1, step + 3)))

    def test_a_rank_is_killed(self):
        for launcher in LAUNCHERS:
            for rank, ep in ((2, 2), (0, 1)):
                with self.subTest(launcher=launcher, rank=rank, ep=ep):
                    out = f"{launcher}-{rank}"
                    job, began = self.start(launcher, 4, ep, "--checkpoint-every", 1, out=out), time.monotonic()
                    os.kill(job.pid(rank), signal.SIGKILL)
                    job.finish()
                    self.assertLess(time.monotonic() - began, PATIENCE)
                    self.assertNotIn(0, job.statuses, job.error)
                    self.assertEqual(len(job.lines), 1, job.error)
                    self.assertRegex(job.lines[0], rf"^rank \d+: .*rank {rank} is gone")
                    self.resumes(out, ep=ep)

    def test_a_rank_hangs(self):
        job = self.start("tcp", 2, 2, "--comm-timeout", 2, "--checkpoint-every", 1, out="run")
        os.kill(job.pid(1), signal.SIGSTOP)
        time.sleep(3)
        os.kill(job.pid(1), signal.SIGCONT)  # so that it can be told to end
        job.finish()
        self.assertNotIn(0, job.statuses, job.error)
        self.assertTrue(any("--comm-timeout" in line for line in job.lines), job.error)
        self.resumes("run")

    def test_a_rank_is_stopped(self):
        for launcher in LAUNCHERS:
            with self.subTest(launcher):
                job = self.start(launcher, 4, 2, out=launcher)
                os.kill(job.pid(3), signal.SIGTERM)
                job.finish()
                self.assertEqual((set(job.statuses), job.lines), ({0}, []), job.error)
                step = int(re.search(r"stopped by a signal after step (\d+)", job.out)[1])
                self.assertEqual(self.checkpoint(self.path(launcher)).name, f"step_{step:08}")
                self.assertEqual(self.records(self.path(launcher))[-1]["step"], step)
                self.resumes(launcher)

    # About mpirun itself; every other test here goes over TCP where there is none.
    @unittest.skipIf(not MPIRUN, "no mpirun, or built without MPI")
    def test_the_launcher_is_stopped(self):
        """mpirun stops reading what is printed, waits for a while, passes the signal on, waits again, and kills."""
        job = self.start("mpi", 4, 2, out="run", patience=10)  # the ranks' checkpoint may take seconds on a loaded machine
        job.processes[0].send_signal(signal.SIGTERM)
        job.finish()
        self.assertLess(job.seconds, 60)
        self.assertEqual(self.records(self.path("run"))[-1]["step"], int(self.checkpoint(self.path("run")).name[5:]))
        self.resumes("run")


if __name__ == "__main__":
    unittest.main()
