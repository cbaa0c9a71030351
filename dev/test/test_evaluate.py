#!/usr/bin/env python3
"""Bits a byte and multiple-choice questions, in training and of a checkpoint by itself, against the same figures made from
logits; data/hellaswag.py. TRAINER=build/train_gpt_moe python3 dev/test/test_evaluate.py"""

import array
import base64
import json
import math
import random
import subprocess
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from ports import free_port  # noqa: E402
from trainer import DEVICE, ENV, EOT, Safetensors, TrainerTest, command, shard_bytes, text  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
RANKS = ROOT / "data" / "gpt2.tiktoken"


def questions(count, seed=5):
    """Such as HellaSwag's: one of four endings is in the training text's words, of different lengths; some are hard."""
    choose = random.Random(seed)
    for i in range(count):
        label = choose.randrange(4)
        endings = ["".join(choose.choice("etaoinshr dlu") for _ in range(choose.randrange(3, 30))) for _ in range(4)]
        endings[label] = text(choose.randrange(1, 5), seed=i).decode()
        if i % 3 == 0:
            endings[(label + 1) % 4] = text(3, seed=1000 + i).decode()
        yield {"ind": i, "ctx": text(choose.randrange(1, 4), seed=50 + i).decode(), "endings": endings, "label": label}


class Questions(TrainerTest):
    def setUp(self):
        super().setUp()
        self.items = list(questions(41))
        self.jsonl, self.bin = self.path("questions.jsonl"), self.path("questions.bin")
        self.write(self.items)

    def write(self, items):
        self.jsonl.write_text("".join(json.dumps(item) + "\n" for item in items))

    def script(self, *args):
        return subprocess.run([sys.executable, str(ROOT / "data" / "hellaswag.py"), "--jsonl", str(self.jsonl), "--out", str(self.bin), *args],
                              capture_output=True, text=True, env={**ENV, "PYTHONDONTWRITEBYTECODE": "1"})

    def made(self, *args):
        result = self.script(*args)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def test_the_file(self):
        self.assertIn("41 questions", self.made("--tokenizer", "bytes"))
        raw = self.bin.read_bytes()
        header, stream = array.array("i", raw[:1024]), list(array.array("H", raw[1024:]))
        want, longest = [], 0
        for i, item in enumerate(self.items):
            one = [65535, 0, i, item["label"], 4]
            for words in (item["ctx"], *(" " + e for e in item["endings"])):
                one += [len(words), *words.encode()]
            one[1] = 2 * len(one)
            want, longest = want + one, max(longest, one[1])
        self.assertEqual(list(header), [20240522, 1, 41, longest, 1] + [0] * 251)
        self.assertEqual(stream, want)

    def test_bad_questions(self):
        good = self.items[0]
        bad = [("not JSON", "{"), ("ctx", json.dumps({**good, "ctx": 3})), ("ctx", "[]"), ("endings", json.dumps({**good, "endings": ["a"] * 3})),
               ("endings", json.dumps({k: v for k, v in good.items() if k != "endings"})), ("label", json.dumps({**good, "label": ""})),
               ("label", json.dumps({**good, "label": 4})), ("65535", json.dumps({**good, "ctx": "x" * 40000}))]
        for expected, line in bad:
            with self.subTest(expected):
                self.jsonl.write_text(json.dumps(good) + "\n" + line + "\n")
                result = self.script("--tokenizer", "bytes")
                self.assertEqual((result.returncode, len(result.stderr.splitlines())), (1, 1), result.stderr)
                self.assertIn(expected, result.stderr)
                self.assertIn("line 2", result.stderr)
                self.assertFalse(self.bin.exists())
        self.jsonl.write_text("")
        self.assertIn("0 questions", self.script("--tokenizer", "bytes").stderr)
        self.jsonl.unlink()
        self.assertIn("cannot read", self.script("--tokenizer", "bytes").stderr)

    def right_by_logits(self, checkpoint, items, T):
        """The answers that are right by the logits of every ending in a shard of its own."""
        folder = self.path("rows")
        folder.mkdir()
        for i, item in enumerate(items):
            for c, ending in enumerate(item["endings"]):
                (folder / f"{i:04}{c}.bin").write_bytes(shard_bytes([*item["ctx"].encode(), *(" " + ending).encode()]))
        path = self.path("logits")
        self.ok("--checkpoint", checkpoint, "--logits", path, "--val-data", folder / "*.bin", "--seq-len", T)
        file = Safetensors(path).tensors
        W, T, V = file["logits"][1]
        self.assertEqual(W, 4 * len(items))
        logits, targets = array.array("f", file["logits"][2]), array.array("i", file["targets"][2])
        right, averages = 0, []
        for w in range(W):
            begin, losses = len(items[w // 4]["ctx"].encode()) - 1, []
            for n in range(w * T + begin, (w + 1) * T):
                if targets[n] >= 0:
                    row = logits[n * V:(n + 1) * V]
                    losses.append(math.log(sum(map(math.exp, row))) - row[targets[n]])
            averages.append(sum(losses) / len(losses))
        for i, item in enumerate(items):
            four = averages[4 * i:4 * i + 4]
            right += four.index(min(four)) == item["label"]
        return right

    def test_answers(self):
        self.made("--tokenizer", "bytes")
        longest = max(len(i["ctx"]) + 1 + len(e) for i in self.items for e in i["endings"]) - 1
        run = self.trained("--steps", 60, "--lr", "1e-2", "--eval-every", 20, "--hellaswag", self.bin, "--seq-len", longest + 2, "--val-data", self.val)
        logged = {r["step"]: r["hellaswag"] for r in self.records(run) if "hellaswag" in r}
        self.assertEqual(list(logged), [20, 40, 60])
        lines = [line for line in (run / "main.log").read_text().splitlines() if "eval:" in line]
        self.assertEqual(lines, [f"s:{s} eval:{a:.4f}" for s, a in logged.items()])
        right = self.right_by_logits(run, self.items, longest)
        self.assertTrue(10 < right < 41, right)  # neither guessing nor trivial
        self.assertEqual(logged[60], float(f"{right / 41:.9g}"))
        for more in (["--batch-size", 4], ["--batch-size", 7, "--seq-len", longest], ["--batch-size", 200], ["--arena", "separate"]):
            self.assertEqual(self.ok("--checkpoint", run, "--hellaswag", self.bin, *more), f"HellaSwag {right}/41 = {right / 41:.4f}\n")
        both = self.ok("--checkpoint", run, "--hellaswag", self.bin, "--val-data", self.val)
        self.assertIn("bits a byte\nHellaSwag", both)
        plain = self.trained("--steps", 60, "--lr", "1e-2", "--eval-every", 20, "--seq-len", longest + 2, "--val-data", self.val, out="plain")
        self.assertEqual(self.weights(run), self.weights(plain))  # looking changes nothing

    @unittest.skipIf(DEVICE == "cuda", "needs two GPUs")
    def test_two_ranks_count_every_question_once(self):
        self.made("--tokenizer", "bytes")
        model = "--n-layer 2 --d-model 32 --n-head 2 --n-kv-head 2 --head-dim 16 --n-expert 4 --d-expert 16".split()
        run = self.trained("--steps", 60, "--lr", "1e-2", out="one", model=model)
        alone = self.ok("--checkpoint", run, "--hellaswag", self.bin, "--seq-len", 64).strip()
        for layout in (["--dp", 2], ["--tp", 2], ["--pp", 2, "--total-batch-tokens", 128], ["--dp", 2, "--ep", 2]):
            with self.subTest(layout):
                args = self.training("--steps", 1, "--batch-size", 1, *layout, "--init-from", run, "--lr", 0, "--hellaswag", self.bin, "--seq-len", 64, model=[], out=" ".join(map(str, layout)))
                env = {**ENV, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
                ranks = [subprocess.Popen(command(args), env={**env, "RANK": str(r)}, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
                outputs = [p.communicate(timeout=120) for p in ranks]
                self.assertEqual([p.returncode for p in ranks], [0, 0], outputs)
                self.assertIn(alone, outputs[0][0])

    def test_refused(self):
        self.made("--tokenizer", "bytes")
        run = self.trained("--steps", 1, out="model")
        evaluate = ["--checkpoint", run, "--hellaswag"]
        whole = self.bin.read_bytes()
        self.refused([*evaluate, self.path("none")], "none")
        self.refused([*evaluate, self.bin, "--seq-len", 9], self.bin, "--seq-len 9 is too short")
        self.refused([*evaluate, self.bin, "--generate"], "--hellaswag", "--generate")
        self.refused([*evaluate, self.bin, "--dp", 2], "")
        self.refused([*evaluate, self.train], self.train, "not a file of multiple-choice questions")
        cut = self.path("cut.bin")
        for data, expected in ((whole[:-1], "truncated"), (whole[:3000], "truncated"), (whole[:1000], "truncated"), (whole + b"\0\0", "more than"), (b"", "not a file")):
            cut.write_bytes(data)
            self.refused([*evaluate, cut], cut, expected)
            self.refused(self.training("--steps", 1, "--hellaswag", cut), cut, expected)
        gpt2 = self.trained("--steps", 1, "--train-data", self.gpt2_shard("gpt2.bin", [1] * 500), "--vocab-size", 300, out="gpt2")
        self.refused(["--checkpoint", gpt2, "--hellaswag", self.bin, "--seq-len", 64], self.bin, "tokenizer 1")

    def gpt2_shard(self, name, ids):
        self.path(name).write_bytes(shard_bytes(ids, tokenizer=0))
        return self.path(name)


class BitsPerByte(TrainerTest):
    def evaluated(self, run):
        return [r for r in self.records(run) if "val_loss" in r][-1]

    def test_bytes(self):
        """End-of-text has a loss and no bytes; the first id is no target."""
        words = text(40)
        self.val.write_bytes(shard_bytes([EOT, *words, EOT, EOT, *words]))
        run = self.trained("--steps", 2, "--val-data", self.val)
        r = self.evaluated(run)
        self.assertAlmostEqual(r["val_bits_per_byte"], r["val_loss"] * (2 * len(words) + 2) / (2 * len(words)) / math.log(2), 6)
        self.assertIn(f" | {r['val_bits_per_byte']:.4f} bits a byte\n", self.ok(*self.training("--steps", 2, "--val-data", self.val, out="again")))
        output = self.ok("--checkpoint", run, "--val-data", self.val)
        self.assertEqual(output, f"val_loss {r['val_loss']:.9g} over {2 * len(words) + 2} tokens | {r['val_bits_per_byte']:.9g} bits a byte\n")

    def test_ids_of_unknown_text(self):
        data = self.path("ids.bin")
        data.write_bytes(shard_bytes([i % 300 for i in range(500)], tokenizer=0))
        run = self.trained("--steps", 1, "--train-data", data, "--val-data", data, "--vocab-size", 300)
        self.assertNotIn("val_bits_per_byte", self.evaluated(run))
        self.assertNotIn("bits", self.ok("--checkpoint", run, "--val-data", data))

    @unittest.skipUnless(RANKS.exists(), "needs data/gpt2.tiktoken")
    def test_gpt2(self):
        tokens = {int(rank): base64.b64decode(token) for token, rank in (line.split() for line in RANKS.read_bytes().splitlines())}
        choose = random.Random(3)
        ids = [50256, *(choose.randrange(50256) for _ in range(300)), 50256, 11]
        data = self.path("gpt2.bin")
        data.write_bytes(shard_bytes(ids, tokenizer=0))
        run = self.trained("--steps", 1, "--train-data", data, "--val-data", data, "--vocab-size", 50257, "--tokenizer-ranks", RANKS)
        r = self.evaluated(run)
        spelled = sum(len(tokens[i]) for i in ids[1:] if i != 50256)
        self.assertAlmostEqual(r["val_bits_per_byte"], r["val_loss"] * (len(ids) - 1) / spelled / math.log(2), 5)
        self.assertIn("bits a byte", self.ok("--checkpoint", run, "--val-data", data, "--tokenizer-ranks", RANKS))
        self.assertNotIn("bits a byte", self.ok("--checkpoint", run, "--val-data", data, "--tokenizer-ranks", self.path("none")))


if __name__ == "__main__":
    unittest.main()
