#!/usr/bin/env python3
"""Tests of --memory-profile and --profile: TRAINER=build/train_gpt_moe python3 dev/test/test_profile.py"""

import itertools
import json
import re
import sys
import unittest
from collections import defaultdict
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from trainer import BATCH, MODEL, TrainerTest  # noqa: E402
from test_parallel import LAUNCHERS, Job  # noqa: E402

PRESETS = ("tiny", "gpt124-8x2", "olmoe-1b-7b-size", "qwen3-30b-a3b", "mixtral-8x7b")
CATEGORIES = ("weights", "gradients", "optimizer", "saved", "routing metadata", "transient workspace")
# Layers of both kinds, shared experts, selection bias.
VARIED = "--n-layer 4 --dense-layers 1 --d-dense 32 --d-shared 16 --d-model 32 --n-head 2 --n-kv-head 2 --head-dim 16 --n-expert 4 --d-expert 16 --gate sigmoid --balance bias".split()


def trace(path):
    """The file as (what it is of, its events by phase)."""
    content = json.loads(Path(path).read_text())
    events = defaultdict(list)
    for e in content["traceEvents"]:
        events[e["ph"]].append(e)
    return content["otherData"], events


def ops(slices):
    """Of all slices those that are ops, in order."""
    return [s for s in sorted(slices, key=lambda s: s["ts"]) if s["cat"] not in ("program", "layer", "step")]


class Nested:
    """Slices of a track as viewers take them: each lies within those around it."""

    def __init__(self, test, slices):
        stack = []
        for s in slices:
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= s["ts"]:
                stack.pop()
            for outer in stack:
                test.assertLessEqual(s["ts"] + s["dur"], outer["ts"] + outer["dur"], (s, outer))
            stack.append(s)


class MemoryProfile(TrainerTest):
    def profile(self, *args):
        """Of a dry run: table of the report, lines of the screen, what the file is of, its events."""
        out = self.ok("--dry-run", "--memory-profile", self.path("memory.json"), *args)
        table = {m[1].strip(): int(m[2]) for m in re.finditer(r"^([a-z ]+?) +(\d+) +[\d.]+ [KMGT]?i?B +\d+$", out, re.M)}
        screen = out[out.index("memory profile:"):].splitlines()
        return table, screen, *trace(self.path("memory.json"))

    def check(self, *args):
        table, screen, about, events = self.profile(*args)
        total = table["total"]
        # The counter: its sum is the arena's extent, which is the plan's total at the peak and never more.
        extents = [sum(c["args"].values()) for c in events["C"]]
        self.assertEqual(max(extents), total)
        self.assertEqual((about["total_bytes"], about["peak"]["bytes"]), (total, total))
        self.assertEqual({m["args"]["bytes"] for m in events["i"]}, {total})
        at = events["i"][0]["ts"]
        self.assertEqual(sum([c for c in events["C"] if c["ts"] <= at][-1]["args"].values()), total)
        self.assertEqual(about["bytes"], {c: table[c] for c in CATEGORIES})

        # The lives of the tensors, added up again: the counter at every op.
        ends = {e["id2"]["local"]: e["ts"] for e in events["e"]}
        changes, placed, sums = defaultdict(lambda: defaultdict(int)), [], defaultdict(int)
        for b in events["b"]:
            always = b["cat"] == "persistent"
            category = b["name"].split(": ")[1] if always else b["cat"]
            self.assertIn(category, CATEGORIES)
            changes[b["ts"]][category] += b["args"]["bytes"]
            changes[ends[b["id2"]["local"]]][category] -= b["args"]["bytes"]
            sums[category] += b["args"]["bytes"]
            if not always:
                placed.append((b["ts"], ends[b["id2"]["local"]], b["args"]["offset"], b["args"]["offset"] + b["args"]["bytes"]))
        for category in CATEGORIES[:-1]:
            self.assertEqual(sums[category], table[category])
        alive, last = defaultdict(int), max(changes)
        counters, now = sorted(events["C"], key=lambda c: c["ts"]), None
        for ts in sorted(changes):
            for category, change in changes[ts].items():
                alive[category] += change
            while counters and counters[0]["ts"] <= ts:  # one an op at which something changes
                now = counters.pop(0)["args"]
            if ts < last:
                self.assertEqual({c: alive[c] for c in CATEGORIES}, {c: now[c] for c in CATEGORIES}, ts)
        self.assertFalse(any(alive.values()))
        for i, (begin, end, low, high) in enumerate(placed[:400]):  # quadratic: of the first ones
            self.assertLessEqual(high, total)
            for other in placed[:i]:
                self.assertFalse(begin < other[1] and other[0] < end and low < other[3] and other[2] < high, (placed[i], other))

        # Slices cover the step, op by op.
        slices = events["X"]
        Nested(self, slices)
        programs = [s for s in slices if s["cat"] == "program"]
        self.assertEqual(sum(p["dur"] for p in programs), last)
        self.assertEqual(len(ops(slices)) * about["us_per_op"], last)

        # The screen: sums to the byte, and little enough to be seen at once.
        self.assertLessEqual(len(screen), 40)
        at_peak = [int(re.match(rf"  {name} +(\d+)", line)[1]) for name in (*CATEGORIES, "between tensors") for line in screen if line.startswith(f"  {name} ")]
        self.assertEqual((len(at_peak), sum(at_peak)), (7, total), screen)
        self.assertIn(f"peak {total} bytes", screen[1])
        kept = 0
        for layers, attention, mlp in re.findall(r"(?m)^  layers? ([\d, -]+) \([a-z]+, [a-z]+\) +(\d+) +(\d+) +\d+$", "\n".join(screen)):
            count = sum(int(b or a) - int(a) + 1 for a, b in re.findall(r"(\d+)(?:-(\d+))?", layers))
            kept += count * (int(attention) + int(mlp))
        outside = int(re.search(r"(?m)^  outside layers +(\d+)", "\n".join(screen))[1])
        self.assertEqual(kept + outside, table["saved"])
        return table, screen, about

    def test_presets(self):
        for name in PRESETS:
            for dtype in ("bf16", "fp32"):
                with self.subTest(name, dtype=dtype):
                    _, screen, _ = self.check("--preset", name, "--dtype", dtype)
                    layers = {"tiny": 4, "gpt124-8x2": 12, "olmoe-1b-7b-size": 16, "qwen3-30b-a3b": 48, "mixtral-8x7b": 32}[name]
                    self.assertRegex("\n".join(screen), rf"(?m)^  layers 0-{layers - 1} \(moe, act\)")  # equal layers in one line
        self.assertEqual([f.name for f in self.folder.iterdir() if f.is_dir()], [])

    def test_layouts_that_are_not_here(self):
        for layout in (["--world", 64, "--dp", 16, "--tp", 2, "--ep", 8, "--pp", 2, "--total-batch-tokens", 2**20], ["--world", 4, "--dp", 4, "--ep", 2, "--etp", 2]):
            for dispatch in ("zero_buffer", "materialized"):
                with self.subTest(layout, dispatch=dispatch):
                    self.check("--preset", "olmoe-1b-7b-size", *layout, "--dispatch", dispatch)

    def test_other_models(self):
        self.check(*VARIED, *BATCH, "--total-batch-tokens", 256, "--sample-every", 5, "--recompute", "up")
        self.check(*VARIED, *BATCH, "--val-data", "", "--recompute", "block", "--dispatch", "materialized")

    def test_alternatives_are_plans(self):
        """The cases of the screen are what a run with these options would take."""
        model = [*VARIED, "--batch-size", 4, "--seq-len", 64]
        table, screen, about = self.check(*model)
        cases = {c["case"]: c["total_bytes"] for c in about["cases"]}
        self.assertEqual(cases.pop("this run"), table["total"])
        for case, total in cases.items():
            option, value = case.split()
            with self.subTest(case):
                self.assertEqual(self.profile(*model, "--" + option, value)[0]["total"], total)
                self.assertRegex("\n".join(screen), rf"(?m)^  {case} +{total} ")
        self.assertEqual(set(cases), {f"recompute {p}" for p in ("none", "act", "up", "block")} | {"dispatch materialized"})
        lowered = {c["case"]: c["bytes"] for c in about["peak"]["lowered_by"]}
        self.assertTrue(lowered)
        for case, saved in lowered.items():
            self.assertEqual(cases[case], table["total"] - saved)
            self.assertTrue(any(line.startswith(f"lowers the peak: {case}, by ") for line in screen))

    def test_operations(self):
        """Of a step: what the literature's 6 operations a parameter and token come to; of recomputation: those of the ops."""
        B, T, L, C, K, F, q = 8, 1024, 12, 768, 2, 2048, 768
        args = ["--preset", "gpt124-8x2", "--batch-size", B, "--seq-len", T]
        table, _, about = self.check(*args)
        active = int(re.search(r"\((\d+) active\)", self.ok("--dry-run", *args))[1])
        cases = {c["case"]: c for c in about["cases"]}
        step = cases["this run"]["flops_of_a_micro_step"]
        self.assertAlmostEqual(step / (B * T * (6 * active + 6 * L * T * q)), 1, delta=0.02)
        self.assertEqual(cases["recompute act"]["flops_repeated"], 0)
        self.assertEqual(cases["recompute up"]["flops_repeated"], L * 4 * B * T * K * C * F)
        self.assertGreater(cases["recompute block"]["flops_repeated"], cases["recompute up"]["flops_repeated"])

    def test_before_training(self):
        """A run that goes on to train: the same file, and the same bits as without."""
        self.profile(*MODEL, *BATCH, "--val-data", "")
        dry = self.path("memory.json").read_bytes()
        plain = self.trained("--steps", 3, out="plain")
        profiled = self.trained("--steps", 3, "--memory-profile", self.path("memory.json"), out="profiled")
        self.assertEqual(self.path("memory.json").read_bytes(), dry)
        self.assertEqual(self.records(profiled)[0]["memory_bytes"], trace(self.path("memory.json"))[0]["total_bytes"])
        self.assert_same_run(plain, profiled)

    def test_refused(self):
        dry = [*MODEL, *BATCH, "--dry-run", "--memory-profile"]
        self.refused([*dry, self.path("nowhere") / "memory.json"], "nowhere/memory.json", "No such file")
        self.refused([*dry, self.folder], "is a directory")
        self.refused([*dry, self.train], "train.bin", "choose another name")  # not one of ours: it stays
        self.refused([*dry, self.path("memory.json"), "--arena", "separate"], "--memory-profile", "--arena separate")
        self.refused(["--generate", "--checkpoint", self.folder, "--memory-profile", self.path("memory.json")], "--memory-profile", "--generate")


class Profile(TrainerTest):
    def step_ops(self, *args):
        """Names of the ops of the three programs of a step, in order, by the plan."""
        self.ok(*args, "--dry-run", "--memory-profile", self.path("plan.json"))
        slices = trace(self.path("plan.json"))[1]["X"]
        programs = [[o["name"] for o in ops(slices) if p["ts"] <= o["ts"] < p["ts"] + p["dur"]] for p in slices if p["cat"] == "program"]
        return programs[:3]

    def check(self, run, ms_of_step):
        about, events = trace(run / "profile.json")
        steps = [s for s in events["X"] if s["cat"] == "step"]
        self.assertEqual([s["name"] for s in steps], [f"step {n}" for n in range(4, 4 + len(steps))])
        Nested(self, events["X"])
        by_step = []
        for s, ms in zip(steps, about["step_ms"], strict=True):
            # By place in the file: an op that took no time begins where the step ends and the next begins.
            first = events["X"].index(s) + 1
            inside = ops(itertools.takewhile(lambda e: e["cat"] != "step", events["X"][first:]))
            self.assertTrue(all(s["ts"] <= o["ts"] <= o["ts"] + o["dur"] <= s["ts"] + s["dur"] for o in inside))
            self.assertAlmostEqual(sum(o["dur"] for o in inside), s["dur"], delta=len(inside))  # to a microsecond an op
            self.assertAlmostEqual(s["dur"], 1000 * ms, delta=1)
            logged = ms_of_step[int(s["name"].split()[1])]
            self.assertTrue(0.5 * logged < ms <= logged + 1, (ms, logged))  # the rest is what the host does after the step
            by_step.append(inside)
        self.assertEqual({o["op"].removesuffix(" (recomputed)") for o in about["ops"]}, {o["name"] for inside in by_step for o in inside})
        for o in about["ops"]:
            self.assertGreaterEqual(o["ms"], 0)
            self.assertEqual(o["floor_ms"] > 0, o["flops"] > 0 or o["bytes"] > 0, o)
        for name, kind in {(o["name"], o["cat"]) for inside in by_step for o in inside}:
            self.assertEqual(kind == "host", name == "batch")
        return about, by_step

    def ms(self, run):
        return dict(self.records(run, "step", "ms"))

    def test_covers_the_step(self):
        for more in (["--total-batch-tokens", 256], ["--recompute", "block", "--dispatch", "materialized", "--dtype", "bf16", "--total-batch-tokens", 256]):
            with self.subTest(more):
                args = self.training("--steps", 9, "--profile", "--batch-size", 4, *more, model=VARIED, out="run" + str(len(more)))
                out = self.ok(*args)
                run = args[args.index("--out") + 1]
                about, by_step = self.check(run, self.ms(run))
                start, micro, update = self.step_ops(*[a for a in args if a not in ("--profile", "--steps", 9)])
                self.assertEqual(len(by_step), 5)
                for inside in by_step:  # op for op what was planned
                    self.assertEqual([o["name"] for o in inside], start + 2 * ["batch", *micro] + update)
                # The screen has a line for every op, and shares of the sum.
                lines = re.findall(r"(?m)^  (\S.*?) +(\d*) +[\d.]+ +([\d.]+)% +\S+ +\S+ +\S+$", out)
                self.assertEqual({name for name, _, _ in lines}, {o["op"] for o in about["ops"]} | {"sum of the ops"})
                self.assertAlmostEqual(sum(float(share) for name, calls, share in lines if calls), 100, delta=0.05 * len(lines))
                self.assertEqual(sum(int(calls) for _, calls, _ in lines if calls), len(by_step[0]))
                again = [o for o in about["ops"] if o["op"].endswith(" (recomputed)")]
                self.assertEqual(bool(again), True)  # dense MLPs at least

    def test_work(self):
        """Operations and bytes of ops whose shapes are easily counted."""
        N, C, K, F, L = 64, 32, 2, 16, 1
        run = self.trained("--steps", 4, "--profile")
        about, _ = self.check(run, self.ms(run))
        work = {o["op"]: o for o in about["ops"]}
        self.assertEqual(work["experts up"]["flops"], L * 4 * N * K * C * F)
        self.assertEqual(work["experts dW2"]["flops"], L * 2 * N * K * C * F)
        self.assertEqual(work["attention out dX"]["flops"], 2 * N * C * 32)
        self.assertEqual(work["classifier"]["flops"], 6 * N * C * 320)  # 257 ids, in rows of 64
        self.ok(*MODEL, *BATCH, "--val-data", "", "--dry-run", "--memory-profile", self.path("memory.json"))
        plan = trace(self.path("memory.json"))[0]["bytes"]
        self.assertEqual(work["adamw"]["bytes"], 2 * plan["optimizer"] + plan["weights"] + plan["gradients"])
        self.assertEqual(work["global norm"]["bytes"], plan["gradients"])

    def test_same_bits(self):
        common = ["--eval-every", 5, "--val-data", self.val, "--sample-every", 6, "--prompt", "And"]
        options = [*common, "--steps", 12]
        plain, profiled = self.trained(*options, out="plain"), self.trained(*options, "--profile", out="profiled")
        self.assert_same_run(plain, profiled)
        self.assertFalse((plain / "profile.json").exists())
        # Steps are counted from where a run goes on; an earlier profile gives way.
        first = (profiled / "profile.json").read_text()
        self.ok(*self.training(*common, "--resume", "--steps", 20, out="plain"))
        self.ok(*self.training(*common, "--resume", "--steps", 20, "--profile", out="profiled"))
        self.assert_same_run(plain, profiled)
        self.assertNotEqual((profiled / "profile.json").read_text(), first)
        self.assertEqual([s["name"] for s in trace(profiled / "profile.json")[1]["X"] if s["cat"] == "step"], [f"step {n}" for n in range(16, 21)])

    def test_several_processes(self):
        micro = ["--batch-size", 2, "--seq-len", 16, "--total-batch-tokens", 128, "--steps", 6, "--balance", "none"]
        model = [a for a in VARIED if a not in ("--gate", "sigmoid", "--balance", "bias")]
        for layout, expected in ((["--dp", 2, "--ep", 2], {"to experts", "from experts", "exchange gradients", "return weights", "gather choices"}),
                                 (["--tp", 2], {"gather tokens", "sum partial rows", "sum over ranks"}),
                                 (["--pp", 2], {"pass activations"})):
            with self.subTest(layout):
                runs = []
                for more in ([], ["--profile"]):
                    name = layout[0].strip("-") + ("-profiled" if more else "")
                    job = Job(self.folder, 2, self.training(*micro, *layout, *more, model=model, out=name), LAUNCHERS[0]).finish()
                    self.assertEqual((set(job.statuses), job.lines), ({0}, []), job.out[-1000:] + job.error)
                    runs.append(self.path(name))
                self.assert_same_run(*runs)
                _, by_step = self.check(runs[1], self.ms(runs[1]))
                found = {o["name"] for inside in by_step for o in inside if o["cat"] == "communication"}
                self.assertTrue(expected <= found, found)
                self.assertEqual(job.out.count("profile: steps 4 to 6"), 1)  # of rank 0

    def test_what_cannot_be_written_ends_no_run(self):
        (self.path("run") / "profile.json.tmp").mkdir(parents=True)  # in the way
        self.assertIn("no profile is written: ", self.ok(*self.training("--steps", 8, "--profile")))
        self.assertEqual(self.checkpoint(self.path("run")).name, "step_00000008")

    def test_refused(self):
        run = self.training("--steps", 8, "--profile")
        self.refused(self.training("--steps", 3, "--profile"), "--profile", "3 are to be run")
        self.refused([*run, "--stop-after", 3], "--profile", "3 are to be run")
        self.refused([*run, "--dry-run"], "--profile", "--dry-run")
        self.refused([*run, "--arena", "separate"], "--profile", "--arena separate")
        self.refused(["--export", "hf", "--checkpoint", self.folder, "--profile"], "--profile", "--export")
        self.trained("--steps", 8, "--stop-after", 1)
        (self.path("run") / "profile.json").write_text("mine")
        self.refused([*run, "--resume"], "profile.json", "choose another name")


if __name__ == "__main__":
    unittest.main()
