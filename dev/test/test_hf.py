#!/usr/bin/env python3
"""Models of transformers, here and back: TRAINER=build/train_gpt_moe python3 dev/test/test_hf.py

dev/test/fixtures/hf holds a small randomly initialised model of each class as transformers saved it (several files, index;
fp32), the config.json that transformers 4 writes for it beside that of 5, and its logits in fp32 and bf16; made by
scripts/hf_roundtrip.py --fixtures, versions in logits.safetensors. Where torch and transformers can be imported, the script
itself is run too. TRAINER_DEVICE=cuda: on the GPU."""

import array
import json
import math
import shutil
import statistics
import subprocess
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from trainer import DEVICE, ENV, TRAINER, Safetensors, TrainerTest, shard_bytes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
FIXTURES = ROOT / "dev" / "test" / "fixtures" / "hf"
KINDS, T, V = ("qwen3_moe", "mixtral"), 24, 128


def values(tensor):
    dtype, _, data = tensor
    if dtype == "BF16":
        data = b"".join(b"\0\0" + data[i:i + 2] for i in range(0, len(data), 2))
    return array.array("i" if dtype == "I32" else "f", data)


def tensors(directory):
    """Those of all model*.safetensors of a directory."""
    return {name: t for file in sorted(directory.glob("model*.safetensors")) for name, t in Safetensors(file).tensors.items()}


class HfTest(TrainerTest):
    def copy(self, kind, config="config.json"):
        directory = self.path(f"{kind} {config}")
        shutil.copytree(FIXTURES / kind, directory)
        shutil.copy(FIXTURES / kind / config, directory / "config.json")
        return directory

    def logits(self, directory, *more):
        """Our logits of the whole windows of tokens.bin, by token."""
        path = self.path("logits.safetensors")
        path.unlink(missing_ok=True)
        self.ok("--checkpoint", directory, "--logits", path, "--val-data", FIXTURES / "tokens.bin", "--seq-len", T, "--batch-size", 2, *more)
        file = Safetensors(path).tensors
        windows = file["logits"][1][0]
        self.assertEqual([t[1] for t in (file["logits"], file["tokens"], file["targets"])], [[windows, T, V], [windows, T], [windows, T]])
        ids = list(array.array("H", (FIXTURES / "tokens.bin").read_bytes()[1024:]))
        rest = windows * T - (len(ids) - 1)
        self.assertEqual(list(values(file["tokens"])), ids[:-1] + [0] * rest)
        self.assertEqual(list(values(file["targets"])), ids[1:] + [-1] * rest)
        return self.rows(file["logits"])[:len(ids) // T * T]

    @staticmethod
    def rows(tensor):
        flat = values(tensor)
        return [flat[i:i + V] for i in range(0, len(flat), V)]


class Fixtures(HfTest):
    def test_logits_in_fp32(self):
        for kind in KINDS:
            want = self.rows(Safetensors(FIXTURES / kind / "logits.safetensors").tensors["fp32"])
            largest = max(abs(x) for row in want for x in row)
            for config in ("config.json", "config.transformers4.json"):
                with self.subTest(kind, config=config):
                    got = self.logits(self.copy(kind, config), "--dtype", "fp32")
                    self.assertEqual(len(got), len(want))
                    self.assertLess(max(abs(a - b) for x, y in zip(got, want) for a, b in zip(x, y)), 2e-5 * largest)

    def test_logits_in_bf16(self):
        for kind in KINDS:
            with self.subTest(kind):
                file = Safetensors(FIXTURES / kind / "logits.safetensors").tensors
                truth, theirs = self.rows(file["fp32"]), self.rows(file["bf16"])
                distance = lambda rows: statistics.median(sum((a - b) ** 2 for a, b in zip(x, y)) ** 0.5 for x, y in zip(rows, truth))
                self.assertLess(distance(self.logits(self.copy(kind), "--dtype", "bf16")), 2 * distance(theirs))

    def test_export_gives_every_tensor_back(self):
        for kind in KINDS:
            source = FIXTURES / kind
            self.ok("--export", "hf", "--checkpoint", source, "--dtype", "fp32", "--out", self.path(kind))
            self.assertTrue(tensors(self.path(kind)) == tensors(source), kind)
            ours, theirs = (json.loads((d / "config.json").read_text()) for d in (self.path(kind), source))
            for key in ("architectures", "model_type", "hidden_size", "num_experts_per_tok", "head_dim", "vocab_size", "intermediate_size", "rope_parameters",
                        "rms_norm_eps", "tie_word_embeddings", "router_aux_loss_coef", "num_key_value_heads", "num_attention_heads", "num_hidden_layers"):
                self.assertEqual(ours[key], theirs[key], key)

    def test_trains_on_and_the_checkpoint_is_of_the_same_form(self):
        train = self.path("train.bin")
        train.write_bytes(shard_bytes([i * i % 97 for i in range(1000)], tokenizer=0))
        for kind in KINDS:
            run = self.path(f"{kind} run")
            self.ok("--train-data", train, "--val-data", "", "--init-from", FIXTURES / kind, "--dtype", "fp32", "--steps", 20, "--lr", "1e-2", "--warmup-steps", 1,
                    "--batch-size", 2, "--seq-len", T, "--out", run)
            losses = [r[0] for r in self.records(run, "loss")]
            self.assertLess(losses[-1], 0.7 * losses[0])
            shapes = lambda all: {name: t[:2] for name, t in all.items()}
            self.assertEqual(shapes(tensors(self.checkpoint(run))), shapes(tensors(FIXTURES / kind)))
            self.assertEqual(json.loads((self.checkpoint(run) / "config.json").read_text())["model_type"], kind)

    def test_evaluation_is_that_of_the_logits(self):
        """--checkpoint by itself, against the loss made of the logits."""
        for kind in KINDS:
            directory = self.copy(kind)
            path = self.path("logits.safetensors")
            data = ["--val-data", FIXTURES / "tokens.bin", "--seq-len", T, "--dtype", "fp32"]
            self.ok("--checkpoint", directory, "--logits", path, *data)
            file = Safetensors(path).tensors
            losses = [math.log(sum(map(math.exp, row))) - row[t] for row, t in zip(self.rows(file["logits"]), values(file["targets"])) if t >= 0]
            output = self.ok("--checkpoint", directory, *data, "--batch-size", 3)
            self.assertAlmostEqual(float(output.split()[1]), sum(losses) / len(losses), 5)
            self.assertIn(f"over {len(losses)} tokens", output)
            path.unlink()


class Damaged(HfTest):
    def test_one_clear_line(self):
        source = FIXTURES / "qwen3_moe"
        everything = tensors(source)
        config = json.loads((source / "config.json").read_text())
        norm, expert = "model.layers.1.self_attn.q_norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"

        def directory(change=lambda all: None, **keys):
            path = self.path("model")
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            (path / "config.json").write_text(json.dumps({**config, **keys}))
            file = Safetensors()
            file.tensors = dict(everything)
            change(file.tensors)
            file.write(path / "model.safetensors")
            return path

        def halve(all):
            dtype, shape, data = all[expert]
            all[expert] = dtype, [shape[0] // 2, shape[1]], data[:len(data) // 2]

        cases = [(lambda all: all.pop(norm), {}, norm), (lambda all: all.pop(expert), {}, expert), (halve, {}, expert),
                 (lambda all: all.update({"model.layers.0.self_attn.q_proj.bias": ("F32", [1], b"0000")}), {}, "q_proj.bias"),
                 (lambda all: None, {"model_type": "llama"}, "llama"), (lambda all: None, {"num_local_experts": 9}, "gate.weight"),
                 (lambda all: None, {"decoder_sparse_step": 2}, "decoder_sparse_step"), (lambda all: None, {"hidden_act": "gelu"}, "gelu"),
                 (lambda all: None, {"rope_parameters": {"rope_type": "yarn"}}, "yarn")]
        for change, keys, expected in cases:
            with self.subTest(expected):
                path = directory(change, **keys)
                for args in (["--checkpoint", path, "--logits", self.path("x"), "--val-data", FIXTURES / "tokens.bin"], self.training("--init-from", path, "--train-data", FIXTURES / "tokens.bin", model=[]),
                             ["--export", "hf", "--checkpoint", path, "--out", self.path("x")]):
                    self.refused(args, path, expected)
        shards = self.copy("mixtral")
        next(shards.glob("model-00002*")).unlink()
        self.refused(["--checkpoint", shards, "--val-data", FIXTURES / "tokens.bin"], "model-00002-of-00003")

    def test_logits_options(self):
        model, data = FIXTURES / "mixtral", FIXTURES / "tokens.bin"
        there = self.path("there")
        there.write_text("mine")
        self.refused(["--checkpoint", model, "--logits", there, "--val-data", data], there, "exists")
        self.refused(["--checkpoint", model, "--logits", self.path("none/x"), "--val-data", data], "none/x")
        self.refused(["--checkpoint", model, "--logits", self.path("x")], "--val-data")
        self.refused(["--logits", self.path("x"), "--val-data", data], "--checkpoint")
        self.refused(["--checkpoint", model, "--logits", self.path("x"), "--generate"], "exclude")
        self.refused(["--checkpoint", model], "--val-data", "--hellaswag")
        self.refused(["--checkpoint", model, "--val-data", self.train], self.train, "128")  # a byte shard


def transformers():
    try:
        import transformers
        return transformers
    except ImportError:
        return None


@unittest.skipUnless(transformers(), "needs transformers")
class Tokenizers(TrainerTest):
    """AutoTokenizer opens a checkpoint's tokenizer, with the ids of its shards."""

    def opened(self, *more):
        run = self.trained("--steps", 1, *more)
        self.ok("--export", "hf", "--checkpoint", run, "--out", self.path("hf"))
        both = [transformers().AutoTokenizer.from_pretrained(d) for d in (self.checkpoint(run), self.path("hf"))]
        self.assertEqual(both[0].get_vocab(), both[1].get_vocab())
        return both[0]

    def test_bytes(self):
        tokenizer = self.opened()
        self.assertEqual((len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id), (257, 256, 256))
        for words in ("In the beginning", "  two  spaces \n\n\ttab", "Füße, 3 €, 世界 \U0001F600", "".join(map(chr, range(256)))):
            self.assertEqual(tokenizer.encode(words, add_special_tokens=False), list(words.encode()))
            self.assertEqual(tokenizer.decode(list(words.encode())), words)
        self.assertEqual(tokenizer.encode("<|endoftext|>a"), [256, 97])

    @unittest.skipUnless((ROOT / "data" / "gpt2.tiktoken").exists(), "needs data/gpt2.tiktoken")
    def test_gpt2(self):
        data = self.path("gpt2.bin")
        data.write_bytes(shard_bytes([1] * 100, tokenizer=0))
        tokenizer = self.opened("--train-data", data, "--vocab-size", 50257, "--tokenizer-ranks", ROOT / "data" / "gpt2.tiktoken")
        self.assertEqual((len(tokenizer), tokenizer.eos_token_id), (50257, 50256))
        cases = json.loads((FIXTURES.parent / "gpt2_strings.json").read_text())
        self.assertGreater(len(cases), 20)
        for case in cases:
            words, ids = case["text"], case["ids"]
            if "<|endoftext|>" not in words:  # which transformers takes for the token
                self.assertEqual(tokenizer.encode(words, add_special_tokens=False), ids, words)
                self.assertEqual(tokenizer.decode(ids), words)


@unittest.skipIf(DEVICE == "cuda", "scripts/test_gpu.sh runs the script by itself")
class WithTransformers(unittest.TestCase):
    def test_round_trip(self):
        run = subprocess.run([sys.executable, str(ROOT / "scripts" / "hf_roundtrip.py"), "--trainer", str(TRAINER), "--device", DEVICE],
                             env={**ENV, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True)
        if run.returncode == 77:
            self.skipTest(run.stderr.strip())
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        self.assertRegex(run.stdout, r"\n\d\d passed, 0 failed")


if __name__ == "__main__":
    unittest.main()
