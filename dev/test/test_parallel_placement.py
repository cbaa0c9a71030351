#!/usr/bin/env python3
"""Experts that are not in order on their ranks (--placement), also on several: TRAINER=build/train_gpt_moe python3
dev/test/test_parallel_placement.py. Standard library only."""

import math
import random
import re
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_parallel import BY_ONE_RULE, LAUNCHERS, MICRO_BATCHES, N, error, routing_bytes, values  # noqa: E402
from test_parallel_tensor import MODEL, TensorTest  # noqa: E402
from trainer import Safetensors  # noqa: E402

E, LAYERS = 8, 2
TOP_1 = [a if MODEL[i - 1] != "--top-k" else "1" for i, a in enumerate(MODEL)]
NO_SUM = ["--norm-topk-prob", "false"]  # with TOP_1: a token has one row, whose gate has a gradient


def in_order(hosts, slots):
    return [e // (E // hosts) * slots + e % (E // hosts) for e in range(E)]


def shuffled(hosts, slots, seed, room=0):
    """A place for each expert, in some `room` (0: all) slots of each host."""
    return random.Random(seed).sample([h * slots + s for h in range(hosts) for s in range(room or slots)], E)


class PlacementTest(TensorTest):
    def placement(self, name, *layers):
        """A file for the two layers with experts: of an expert one place, or one for each source."""
        self.path(name).write_text("\n".join(" ".join(map(str, place)) for layer in layers for place in layer) + "\n")
        return ["--placement", self.path(name)]

    def for_all(self, places, sources):
        return [[place] * sources for place in places]

    def gradients(self, run):
        tensors = Safetensors(self.checkpoint(run) / "optimizer.safetensors").tensors
        return {name: values(t) for name, t in tensors.items() if name.startswith("m.")}

    def check(self, layouts, *more, limit, loss, routes=None):
        """Of each layout (dp, tp, ep, etp, options): losses of some steps, and the gradient of every tensor in the last."""
        common = [*BY_ONE_RULE, "--steps", 20, "--stop-after", 4, "--beta1", 0, "--clip", 0, *more]
        record = self.path("routes")
        if routes:
            record.write_bytes(routes)
        one = self.alone(*common, "--replay-routing" if routes else "--record-routing", record, model=MODEL)
        expected = self.gradients(one)
        for i, (dp, tp, ep, etp, *options) in enumerate(layouts):
            with self.subTest(dp=dp, tp=tp, ep=ep, etp=etp, options=options):
                run = self.on(dp, tp, ep, etp, *common, *options, "--replay-routing", record, out=f"many-{i}", launcher=LAUNCHERS[i % len(LAUNCHERS)])
                self.assert_close(run, one, loss, loss)
                found = self.gradients(run)
                self.assertEqual(list(found), list(expected))
                for name in expected:
                    self.assertLess(error(found[name], expected[name]), limit, name)
                whole = math.sqrt(sum(g * g for gradient in found.values() for g in gradient))
                self.assertLess(abs(self.records(run, "grad_norm")[-1][0] / whole - 1), max(limit, 1e-8))  # logged with 9 digits


class Anywhere(PlacementTest):
    def test_the_same_bits(self):
        """Where a token has one expert, and its rows come in one pass, no sum depends on where that is (in our own products)."""
        for dtype in ("fp32", "bf16"):
            common = [*BY_ONE_RULE, *NO_SUM, "--steps", 4, "--dtype", dtype, "--plain-matmul", "--row-headroom", E]
            for dp, tp, ep, etp, *more in ((4, 1, 4, 1), (4, 1, 2, 1, "--extra-slots", 1, "--shadow-slots", 1), (2, 2, 2, 2), (2, 1, 2, 1, "--pp", 2), (2, 1, 1, 2)):
                slots, sources = E // ep + ("--extra-slots" in more) * 2, ep * etp
                name = f"{dtype} {dp} {tp} {ep} {etp} {len(more)}"
                with self.subTest(name):
                    straight = self.on(dp, tp, ep, etp, *common, *(more if "--pp" in more else ()), model=TOP_1, out=name)
                    for seed in range(2):
                        places = [self.for_all(shuffled(ep, slots, seed + l, slots - (slots > E // ep)), sources) for l in range(LAYERS)]
                        run = self.on(dp, tp, ep, etp, *common, *more, *self.placement(f"places {name} {seed}", *places), model=TOP_1, out=f"{name} {seed}")
                        self.assert_same_files(run, straight)
                        self.assertEqual(self.losses(run), self.losses(straight))

    def test_in_order_it_is_the_same_run(self):
        common = [*BY_ONE_RULE, "--steps", 4]
        a, b = (self.on(2, 2, 4, 1, *common, *options, out=f"run-{i}") for i, options in
                enumerate(((), self.placement("places", *[self.for_all(in_order(4, 2), 4)] * 2))))
        self.assert_same_files(a, b)
        self.assertEqual(*(self.records(run, "loss", "grad_norm", "memory_bytes") for run in (a, b)))

    def layouts(self):
        """Of each a table that has experts on several hosts, and for each source one of these."""
        for i, (dp, tp, ep, etp, *more) in enumerate(((4, 1, 4, 1), (4, 1, 2, 1, "--row-headroom", 0.5), (2, 2, 2, 2, "--recompute", "block"), (8, 1, 2, 2),
                                                      (2, 1, 2, 1, "--pp", 2), (4, 1, 4, 1, "--arena", "separate", "--row-headroom", 0.5, "--recompute", "none"),
                                                      (1, 2, 2, 1, "--dispatch", "materialized"))):
            extra, choose = 1 + i % 3, random.Random(i)
            slots, layers = E // ep + extra, []
            for _ in range(LAYERS):
                free = [(h, s) for h in range(ep) for s in range(slots)]
                choose.shuffle(free)
                copies = [[free.pop()] for _ in range(E)]
                for host, slot in free:
                    if lacking := [c for c in copies if all(h != host for h, _ in c)]:
                        choose.choice(lacking).append((host, slot))
                layers.append([[h * slots + s for h, s in (choose.choice(c) for _ in range(ep * etp))] for c in copies])
            yield (dp, tp, ep, etp, *more, "--extra-slots", extra, *self.placement(f"places-{i}", *layers))

    def test_replicas(self):
        self.check(self.layouts(), limit=1e-5, loss=1e-4)

    def test_replicas_in_double_precision(self):
        self.check(self.layouts(), "--dtype", "fp64", "--tied", "false", limit=1e-9, loss=1e-9)

    def test_a_hot_expert_on_every_rank(self):
        """Each rank has a copy of expert 3, which three of four tokens choose, for its own tokens."""
        choose = random.Random(1)
        token = lambda: [3, choose.choice([0, 1, 2, 4, 5, 6, 7])] if choose.random() < 0.75 else choose.sample(range(E), 2)
        routes = routing_bytes([[sum((token() for _ in range(N)), []) for _ in range(LAYERS)] for _ in range(4 * 8)])
        rows = self.for_all(in_order(4, 3), 4)
        rows[3] = [2, rows[3][0], 3 * 2 + 2, 3 * 3 + 2]
        self.check([(4, 1, 4, 1, "--extra-slots", 1, *self.placement("places", rows, rows))], "--dtype", "fp64", limit=1e-9, loss=1e-9, routes=routes)

    def test_ranks_without_experts(self):
        """All on one host, or on two of four."""
        of_one = self.for_all([1 * 8 + e for e in range(E)], 4)
        of_two = self.for_all([h * 5 + s for h in (0, 3) for s in (4, 0, 2, 1)], 4)
        self.check([(4, 1, 4, 1, "--extra-slots", 6, *self.placement("of one", of_one, of_one)), (4, 1, 4, 1, "--extra-slots", 6, "--row-headroom", 0.25, *self.placement("of one", of_one, of_one)),
                    (2, 2, 4, 1, "--extra-slots", 3, *self.placement("of two", of_two, of_two))], "--dtype", "fp64", limit=1e-9, loss=1e-9)

    def test_another_placement_loads_what_was_saved(self):
        for dtype in ("fp32", "bf16"):
            common = [*BY_ONE_RULE, "--steps", 20, "--dtype", dtype]
            places = [self.placement(f"{dtype} {seed}", *[self.for_all(shuffled(4, 3, seed + l), 4) for l in range(LAYERS)]) for seed in range(2)]
            source = self.on(4, 1, 4, 1, *common, "--extra-slots", 1, *places[0], "--stop-after", 2, out="source-" + dtype)
            for i, options in enumerate((["--extra-slots", 1, *places[1]], [])):
                train = lambda *more, out: self.on(4, 1, 4, 1, *common, "--resume", *options, *more, out=out)
                self.assert_loads_what_was_saved(source, f"{dtype}-{i}", train)


class Plans(PlacementTest):
    def test_slots_are_on_the_plan(self):
        micro = [*MICRO_BATCHES, "--val-data", ""]
        cuts = "--dp 4 --tp 1 --ep 4 --etp 1".split()
        of = lambda text, what: [int(n) for n in re.findall(rf"(?m)^layer \d+ .*{what} (\d+)", text)]
        plan = lambda *more: self.ok(*MODEL, *micro, *cuts, *more, "--dry-run", "--world", 4)
        few, more = plan(), plan("--extra-slots", 2, "--shadow-slots", 1)
        slot = 3 * 32 * 32 * 4  # of three matrices d-expert x d-model in fp32
        for what in ("weights", "gradients"):
            self.assertEqual([b - a for a, b in zip(of(few, what), of(more, what))], [3 * slot, 0, 3 * slot])
        self.assertIn("slots for 5 experts: its share, 2 more to place experts in, and 1 for shadows", more)
        self.assertNotIn("slots", few)
        copied = self.for_all(in_order(4, 5), 4)
        copied[2] = [5, 2, 5, 5]  # rank 1 has its own
        places = self.placement("places", self.for_all(shuffled(4, 5, 1, room=4), 4), copied)
        run = self.on(4, 1, 4, 1, *micro, "--steps", 1, "--extra-slots", 2, "--shadow-slots", 1, *places, out="run")
        planned = plan("--extra-slots", 2, "--shadow-slots", 1, *places)
        self.assertEqual(int(re.search(r"(?m)^total +(\d+) ", planned)[1]), self.records(run, "memory_bytes")[0][0])

    def test_refused(self):
        four = ["--steps", 1, "--dp", 2, "--ep", 2]
        layer = lambda *changes: [[dict(changes).get(e, place)] * 2 for e, place in enumerate(in_order(2, 4))]
        good = layer()
        for words, places in ((("layer 2", "expert 5", "is not host * 4 + slot", "host < 2", "slot < 4"), (good, layer((5, 8)))),
                              (("layer 0", "expert 0", "-1 is not"), (layer((0, -1)), good)),
                              (("layer 0", "experts 1 and 6 are both in slot 1 of host 0"), (layer((6, 1)), good)),
                              (("numbers, not 16 for each of 2 layers",), (good,)),
                              (("numbers, not 16 for each of 2 layers",), (good, good, good))):
            self.refused_job(2, [*four, *self.placement("places", *places)], "--placement" if "layer 0" in words or "layer 2" in words else "places", *words, model=MODEL)
        self.refused_job(2, [*four, "--shadow-slots", 1, *self.placement("places", *[[[e // 4 * 5 + (e + 1) % 4 + (e == 3) * 4] * 2 for e in range(E)]] * 2)], "slot < 4", model=MODEL)
        self.path("places").write_text("0 1 two")
        self.refused_job(2, [*four, "--placement", self.path("places")], "places", "place 3", "not the number of a slot", model=MODEL)
        self.refused_job(2, [*four, "--placement", self.path("nothing")], "nothing", model=MODEL)
        self.refused_job(2, [*four, "--extra-slots", 3, "--shadow-slots", 2], "--extra-slots 3", "--shadow-slots 2", "no use for more than 4", model=MODEL)
        self.refused_job(2, [*four, "--extra-slots", -1], "--extra-slots", "not be negative", model=MODEL)
        for more in (["--placement", self.path("places")], ["--extra-slots", 1], ["--shadow-slots", 1]):
            self.refused(self.training("--steps", 1, *more, model=MODEL), "--placement, --extra-slots and --shadow-slots", "--ep 1")
            self.refused(["--generate", "--checkpoint", "run", *more], "--generate runs as a single process")


if __name__ == "__main__":
    unittest.main()
