#!/usr/bin/env python3
"""Tensor parallelism (--tp) and experts cut by their width (--etp), also in pipelines, against runs of one process:
TRAINER=build/train_gpt_moe python3 dev/test/test_parallel_tensor.py. Standard library only."""

import math
import re
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_parallel import BY_ONE_RULE, LAUNCHERS, ParallelTest, error, values  # noqa: E402
from trainer import Safetensors  # noqa: E402

# Two MoE layers and a dense one, that 4 ranks can share; V 257 over 4 ranks: 65, 65, 65, 62.
MODEL = ("--n-layer 3 --dense-layers 1 --d-dense 64 --d-model 32 --n-head 8 --n-kv-head 4 --head-dim 8 --n-expert 8 --top-k 2 --d-expert 32 "
         "--d-shared 32").split()


def sharing(ranks):
    """(ep, etp) whose product divides so many ranks."""
    return [(ep, etp) for ep in range(1, ranks + 1) for etp in range(1, ranks + 1) if ranks % (ep * etp) == 0]


class TensorTest(ParallelTest):
    def on(self, dp, tp, ep, etp, *more, out, model=MODEL, launcher=LAUNCHERS[0]):
        """Trains on dp * tp processes, times --pp of `more`, and returns the run's directory."""
        args = self.training(*more, model=model, out=out)
        stages = more[more.index("--pp") + 1] if "--pp" in more else 1
        return self.processes(dp * tp * stages, [*args, "--dp", dp, "--tp", tp, "--ep", ep, "--etp", etp], out, launcher)


class Layouts(TensorTest):
    def check(self, layouts, *more, gradient=None, loss=1e-5, norm=1e-4, steps=5):
        """Losses, norms and (gradient: their largest error) gradients of some steps. Of these with
        --beta1 0, so that the first moment is the gradient of the last."""
        common = [*BY_ONE_RULE, "--steps", 20, "--stop-after", steps, "--val-data", self.val, "--grad-bucket", 1, *more]
        if gradient:
            common += ["--beta1", 0, "--clip", 0]
        routes = self.path("routes")
        one = self.alone(*common, "--record-routing", routes, model=MODEL)
        expected = Safetensors(self.checkpoint(one) / "optimizer.safetensors").tensors
        for i, (dp, tp, ep, etp, *options) in enumerate(layouts):
            with self.subTest(dp=dp, tp=tp, ep=ep, etp=etp, options=options):
                run = self.on(dp, tp, ep, etp, *common, *options, "--replay-routing", routes, out=f"many-{i}", launcher=LAUNCHERS[i % len(LAUNCHERS)])
                self.assert_close(run, one, loss, norm)
                if gradient is None:
                    continue
                found = Safetensors(self.checkpoint(run) / "optimizer.safetensors").tensors
                self.assertEqual(list(found), list(expected))
                moments = [name for name in expected if name.startswith("m.")]
                for name in moments:
                    self.assertLess(error(values(found[name]), values(expected[name])), gradient, name)
                whole = math.sqrt(sum(g * g for name in moments for g in values(found[name])))
                self.assertLess(abs(self.records(run, "grad_norm")[-1][0] / whole - 1), 2e-9)  # no part is left out

    def test_gradients_of_two(self):
        self.check([(1, 2, *s) for s in sharing(2)] + [(2, 1, 1, 2)], "--dtype", "fp64", "--tied", "false", gradient=1e-9)

    def test_gradients_of_four(self):
        self.check([(dp, 4 // dp, *s) for dp in (1, 2) for s in sharing(4)] + [(4, 1, 2, 2), (4, 1, 1, 4)], "--dtype", "fp64", gradient=1e-9)

    def test_gradients_in_pipelines(self):
        of_four = [(dp, 2 // dp, *s, "--pp", 2) for dp in (1, 2) for s in sharing(2)]
        of_more = [(2, 2, 2, 2, "--pp", 2), (1, 4, 2, 2, "--pp", 2), (4, 1, 1, 4, "--pp", 2), (1, 2, 2, 1, "--pp", 3)]
        self.check(of_four + of_more, "--dtype", "fp64", gradient=1e-9)

    def test_losses_of_twenty_steps(self):
        self.check([(1, 4, 2, 2), (2, 2, 1, 2), (2, 2, 4, 1), (4, 1, 2, 1), (2, 1, 1, 1, "--pp", 2), (2, 2, 2, 2, "--pp", 2)],
                   "--qk-norm", "false", "--tied", "false", loss=1e-4, norm=1e-3, steps=20)

    def test_bf16(self):
        self.check([(1, 4, 2, 2), (2, 2, 1, 1)], "--dtype", "bf16", loss=0.02, norm=0.05)

    def test_recompute_dispatch_arena(self):
        few = "--row-headroom", 0.5
        self.check([(1, 2, 1, 2, "--recompute", "none"), (2, 2, 2, 2, "--recompute", "up", *few), (2, 2, 4, 1, "--recompute", "block", *few),
                    (1, 4, 2, 2, "--dispatch", "materialized", *few), (1, 2, 1, 2, "--arena", "separate"), (1, 4, 4, 1, "--arena", "separate", "--recompute", "block")])

    def test_selection_bias(self):
        self.check([(2, 2, 2, 2), (1, 4, 1, 1)], "--gate", "sigmoid", "--balance", "bias", "--bias-rate", 0.1)

    def test_statistics(self):
        """Of a micro-batch, and of sequences: whole ones on each rank, or one on several."""
        for scope, sequences, tokens in (("microbatch", 2, 16), ("sequence", 4, 8), ("sequence", 2, 16), ("sequence", 1, 32)):
            common = ["--batch-size", sequences, "--seq-len", tokens, "--balance-scope", scope, "--aux-coef", 0.5, "--z-coef", 0.1, "--steps", 5]
            routes = self.path(f"routes of {scope} {sequences}")
            one = self.alone(*common, "--record-routing", routes, model=MODEL, out=f"one {scope} {sequences}")
            for tp, ep, etp in ((4, 1, 1), (4, 2, 2), (2, 1, 2)):
                with self.subTest(scope=scope, sequences=sequences, tp=tp):
                    run = self.on(1, tp, ep, etp, *common, "--replay-routing", routes, out=f"{scope} {sequences} {tp} {ep}")
                    self.assert_close(run, one, 1e-5, 1e-4)

    def test_the_same_bits_twice(self):
        common = [*BY_ONE_RULE, "--steps", 5]
        self.assert_same_files(self.on(2, 2, 2, 2, *common, out="a"), self.on(2, 2, 2, 2, *common, out="b", launcher=LAUNCHERS[-1]))

    def test_another_layout_loads_what_was_saved(self):
        for dtype, source_layout in (("fp32", (2, 2, 2, 2)), ("bf16", (1, 4, 1, 2))):
            common = [*BY_ONE_RULE, "--steps", 20, "--dtype", dtype, "--tied", "false"]
            source = self.on(*source_layout, *common, "--stop-after", 2, out="source-" + dtype)
            for layout in ((1, 1, 1, 1), (1, 2, 2, 1), (1, 4, 1, 4), (4, 1, 2, 2)):
                with self.subTest(layout=layout, dtype=dtype):
                    out = "-".join(map(str, layout)) + dtype
                    if layout == (1, 1, 1, 1):
                        train = lambda *more, out: self.ok(*self.training(*common, "--resume", *more, model=MODEL, out=out))
                    else:
                        train = lambda *more, out: self.on(*layout, *common, "--resume", *more, out=out)
                    self.assert_loads_what_was_saved(source, out, train)


class Plans(TensorTest):
    def test_refused(self):
        steps = ["--steps", 1]
        small = lambda option, value: [value if MODEL[i - 1] == option else a for i, a in enumerate(MODEL)]
        self.refused_job(2, [*steps, "--tp", 2, "--batch-size", 1, "--seq-len", 15], "--tp 2", "15 tokens", model=MODEL)
        self.refused_job(2, [*steps, "--tp", 2, "--batch-size", 3, "--balance-scope", "sequence"], "--balance-scope sequence", "--tp 2", "--batch-size 3", model=MODEL)
        self.refused_job(2, [*steps, "--tp", 2, "--capacity-factor", 1.25], "--capacity-factor", "--tp 2", model=MODEL)
        self.refused_job(2, [*steps, "--dp", 2, "--etp", 2, "--capacity-factor", 1.25], "--capacity-factor", "--etp 2", model=MODEL)
        self.refused_job(2, [*steps, "--tp", 2], "--tp 2", "--n-kv-head 1", model=small("--n-kv-head", "1"))
        self.refused_job(2, [*steps, "--tp", 2], "--tp 2", "--d-shared 8", model=small("--d-shared", "8"))
        self.refused_job(2, [*steps, "--tp", 2], "--tp 2", "--d-dense 24", model=small("--d-dense", "24"))
        self.refused_job(2, [*steps, "--tp", 2, "--etp", 2], "--etp 2", "--d-expert 24", model=small("--d-expert", "24"))
        self.refused_job(2, [*steps, "--tp", 2, "--etp", 2, "--ep", 2], "--etp 2", "does not divide", model=MODEL)

    def test_the_plan_is_what_is_allocated(self):
        for layout in ((1, 2, 1, 1), (2, 2, 2, 2), (1, 4, 1, 2)):
            with self.subTest(layout=layout):
                cuts = [a for pair in zip(("--dp", "--tp", "--ep", "--etp"), layout) for a in pair]
                micro = ["--batch-size", 2, "--seq-len", 16, "--balance-scope", "sequence"]
                plan = self.ok(*MODEL, *micro, *cuts, "--dry-run", "--world", layout[0] * layout[1], "--val-data", "")
                self.assertIn("dp {} tp {} pp 1; experts edp".format(*layout), plan)
                run = self.on(*layout, *micro, "--steps", 1, out="-".join(map(str, layout)))
                self.assertEqual(int(re.search(r"(?m)^total +(\d+) ", plan)[1]), self.records(run, "memory_bytes")[0][0])
                rank, alone = (int(re.search(r"(?m)^weights +(\d+)", text)[1]) for text in (plan, self.ok(*MODEL, *micro, "--dry-run", "--val-data", "")))
                self.assertLess(rank, alone)


if __name__ == "__main__":
    unittest.main()
