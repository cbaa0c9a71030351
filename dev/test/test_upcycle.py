#!/usr/bin/env python3
"""scripts/upcycle.py: experts that are copies of a dense MLP compute what it computes.
TRAINER=build/train_gpt_moe python3 dev/test/test_upcycle.py"""

import array
import json
import random
import struct
import subprocess
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from trainer import ENV, Safetensors, TrainerTest, shard_bytes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
V, C, HEADS, KV, SIZE, F, LAYERS, T = 300, 32, 4, 2, 16, 48, 3, 16


def bf16(values):
    words = array.array("I", array.array("f", values).tobytes())
    return array.array("H", ((w + 0x7FFF + (w >> 16 & 1)) >> 16 for w in words)).tobytes()


class Upcycle(TrainerTest):
    def dense(self, kind, dtype="F32", name="dense", tied=False, **changes):
        """A random dense model as transformers writes it."""
        directory = self.path(name)
        directory.mkdir()
        config = {"model_type": kind, "architectures": ["DenseForCausalLM"], "vocab_size": V, "hidden_size": C, "intermediate_size": F, "num_hidden_layers": LAYERS,
                  "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": SIZE, "rms_norm_eps": 1e-5, "rope_theta": 20000.0, "hidden_act": "silu",
                  "tie_word_embeddings": tied, "max_position_embeddings": 64, "bos_token_id": 5, "eos_token_id": [7, 8], "attention_bias": False}
        (directory / "config.json").write_text(json.dumps({**config, **changes}))
        shapes = {"model.embed_tokens.weight": [V, C], "model.norm.weight": [C], **({} if tied else {"lm_head.weight": [V, C]})}
        for l in range(LAYERS):
            at = f"model.layers.{l}."
            shapes.update({at + "input_layernorm.weight": [C], at + "post_attention_layernorm.weight": [C], at + "self_attn.q_proj.weight": [HEADS * SIZE, C],
                           at + "self_attn.k_proj.weight": [KV * SIZE, C], at + "self_attn.v_proj.weight": [KV * SIZE, C], at + "self_attn.o_proj.weight": [C, HEADS * SIZE],
                           at + "mlp.gate_proj.weight": [F, C], at + "mlp.up_proj.weight": [F, C], at + "mlp.down_proj.weight": [C, F]})
            if kind == "qwen3":
                shapes.update({at + "self_attn.q_norm.weight": [SIZE], at + "self_attn.k_norm.weight": [SIZE]})
        number, file = random.Random(11), Safetensors()
        for tensor, shape in shapes.items():
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            values = [number.uniform(0.5, 1.5) if len(shape) == 1 else number.gauss(0, 0.2) for _ in range(count)]
            data = {"F32": lambda: array.array("f", values).tobytes(), "BF16": lambda: bf16(values), "F16": lambda: struct.pack(f"<{count}e", *values)}[dtype]()
            file.tensors[tensor] = dtype, shape, data
        file.write(directory / "model.safetensors")
        return directory

    def as_dense_model_here(self, directory, qk_norm, tied=False):
        """The same tensors under a config.json of ours whose layers are all dense."""
        own = self.path("dense here")
        own.mkdir()
        (own / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
        fields = {"n_layer": LAYERS, "d_model": C, "n_head": HEADS, "n_kv_head": KV, "head_dim": SIZE, "vocab_size": V, "n_expert": 1, "top_k": 1, "d_expert": 8, "d_shared": 0,
                  "dense_layers": list(range(LAYERS)), "d_dense": F, "qk_norm": qk_norm, "tied": tied, "gate": "softmax", "norm_topk_prob": True, "route_scale": 1.0,
                  "balance": "none", "balance_scope": "microbatch", "aux_coef": 0.0, "z_coef": 0.0, "bias_rate": 0.0, "capacity_factor": 0.0, "rms_norm_eps": 1e-5,
                  "rope_theta": 20000.0, "tokenizer_id": 0}
        (own / "config.json").write_text(json.dumps({"model_type": "gpt_moe", "max_position_embeddings": 64, "gpt_moe": fields}))
        return own

    def script(self, *args):
        return subprocess.run([sys.executable, str(ROOT / "scripts" / "upcycle.py"), *map(str, args)], capture_output=True, text=True, env={**ENV, "PYTHONDONTWRITEBYTECODE": "1"})

    def upcycled(self, directory, *args, name="moe"):
        result = self.script("--from", directory, "--out", self.path(name), *args)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return self.path(name)

    def data(self):
        number = random.Random(2)
        path = self.path("tokens.bin")
        path.write_bytes(shard_bytes([number.randrange(V) for _ in range(T * 8 + 1)], tokenizer=0))
        return path

    def logits(self, directory, *more):
        path = self.path("logits")
        path.unlink(missing_ok=True)
        self.ok("--checkpoint", directory, "--logits", path, "--val-data", self.data(), "--seq-len", T, *more)
        return array.array("f", Safetensors(path).tensors["logits"][2])

    def check(self, kind, *args, dtype="F32", tied=False, model_type, **changes):
        dense = self.dense(kind, dtype, tied=tied, **changes)
        moe = self.upcycled(dense, *args)
        self.assertEqual(json.loads((moe / "config.json").read_text())["model_type"], model_type)
        own = self.as_dense_model_here(dense, kind == "qwen3", tied)
        for precision in ("fp32", "fp64"):
            want, got = self.logits(own, "--dtype", precision), self.logits(moe, "--dtype", precision)
            scale = max(map(abs, want))
            self.assertTrue(scale > 1, scale)
            self.assertLess(max(abs(a - b) for a, b in zip(want, got)), (1e-5 if precision == "fp32" else 1e-7) * scale)  # the file is F32
        return dense, moe

    def test_qwen3(self):
        dense, moe = self.check("qwen3", "--n-expert", 4, "--top-k", 2, model_type="qwen3_moe")
        run = self.path("run")
        self.ok("--train-data", self.data(), "--val-data", self.data(), "--init-from", moe, "--dtype", "fp32", "--steps", 1, "--lr", 0, "--seq-len", T, "--batch-size", 8, "--out", run)
        step, evaluation = self.records(run)
        loss = float(self.ok("--checkpoint", self.path("dense here"), "--val-data", self.data(), "--seq-len", T).split()[1])
        self.assertAlmostEqual(step["loss"], loss, 5)  # at the start that of the dense model
        self.assertAlmostEqual(evaluation["val_loss"], loss, 5)
        config = json.loads((self.checkpoint(run) / "config.json").read_text())
        self.assertEqual((config["bos_token_id"], config["eos_token_id"]), (5, [7, 8]))

    def test_qwen3_tied_with_dense_layers_in_bf16(self):
        dense, moe = self.check("qwen3", "--n-expert", 8, "--top-k", 3, "--layers", "1", dtype="BF16", tied=True, model_type="qwen3_moe")
        self.assertEqual(json.loads((moe / "config.json").read_text())["mlp_only_layers"], [0, 2])
        tensors = Safetensors(moe / "model.safetensors").tensors
        self.assertEqual({t[0] for t in tensors.values()}, {"BF16"})
        for e in range(8):
            self.assertEqual(tensors[f"model.layers.1.mlp.experts.{e}.up_proj.weight"], Safetensors(dense / "model.safetensors").tensors["model.layers.1.mlp.up_proj.weight"])
        router = array.array("H", tensors["model.layers.1.mlp.gate.weight"][2])
        self.assertGreater(len(set(router)), 100)

    def test_llama_in_f16(self):
        self.check("llama", "--n-expert", 4, "--top-k", 4, dtype="F16", model_type="mixtral")

    def test_mistral(self):
        self.check("mistral", "--top-k", 1, model_type="mixtral", sliding_window=None)

    def test_noise(self):
        dense = self.dense("qwen3")
        before = array.array("f", Safetensors(dense / "model.safetensors").tensors["model.layers.2.mlp.down_proj.weight"][2])
        rms = (sum(x * x for x in before) / len(before)) ** 0.5
        moe = Safetensors(self.upcycled(dense, "--noise", 0.1, "--noise-part", 0.25) / "model.safetensors").tensors
        seen = set()
        for e in range(8):
            after = array.array("f", moe[f"model.layers.2.mlp.experts.{e}.down_proj.weight"][2])
            moved = [b - a for a, b in zip(before, after) if a != b]
            self.assertAlmostEqual(len(moved) / len(before), 0.25, delta=0.05)
            self.assertAlmostEqual((sum(x * x for x in moved) / len(moved)) ** 0.5, 0.1 * rms, delta=0.02 * rms)
            seen.add(after.tobytes())
        self.assertEqual(len(seen), 8)  # no two alike
        again = self.upcycled(dense, "--noise", 0.1, "--noise-part", 0.25, name="again")
        self.assertEqual((again / "model.safetensors").read_bytes(), (self.path("moe") / "model.safetensors").read_bytes())

    def test_tokenizer_files(self):
        dense = self.dense("qwen3")
        (dense / "tokenizer.json").write_text('{"mine": 1}')
        (dense / "tokenizer_config.json").write_text("{}")
        moe = self.upcycled(dense)
        data = self.data()
        run = self.path("run")
        self.ok("--train-data", data, "--val-data", "", "--init-from", moe, "--steps", 4, "--stop-after", 2, "--seq-len", T, "--keep", 1, "--out", run)
        self.ok("--train-data", data, "--val-data", "", "--resume", "--steps", 4, "--seq-len", T, "--keep", 1, "--out", run)
        self.ok("--export", "hf", "--checkpoint", run, "--out", self.path("hf"))
        for directory in (moe, self.checkpoint(run), self.path("hf")):
            self.assertEqual((directory / "tokenizer.json").read_text(), '{"mine": 1}')
            self.assertEqual((directory / "tokenizer_config.json").read_text(), "{}")

    def test_refused(self):
        dense = self.dense("qwen3")

        def refused(args, *expected):
            before = self.files()
            result = self.script(*args)
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (1, 1), result.stderr)
            for word in expected:
                self.assertIn(str(word), result.stderr)
            self.assertEqual(self.files(), before)

        out = ["--out", self.path("moe")]
        good = ["--from", dense, *out]
        refused(["--from", self.path("none"), *out], "none/config.json")
        refused([*good, "--top-k", 9], "--top-k 9")
        refused([*good, "--noise", -1], "--noise")
        refused([*good, "--layers", "3"], "--layers 3", "0 to 2")
        refused([*good, "--layers", "x"], "--layers x")
        refused(["--from", dense, "--out", dense], "exists")
        config = json.loads((dense / "config.json").read_text())
        for key, value in (("model_type", "gpt2"), ("model_type", None), ("attention_bias", True), ("hidden_act", "gelu"), ("hidden_size", "x")):
            (dense / "config.json").write_text(json.dumps({**config, key: value}))
            refused(good, dense / "config.json", key)
        (dense / "config.json").write_text(json.dumps({**config, "intermediate_size": F + 8}))
        refused(good, "shape")
        (dense / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
        refused(good, "model.layers.3.mlp.gate_proj.weight is missing")
        (dense / "config.json").write_text("{")
        refused(good, "config.json")
        (dense / "config.json").write_text(json.dumps(config))
        whole = (dense / "model.safetensors").read_bytes()
        for cut in (0, 7, 100, len(whole) - 1):
            (dense / "model.safetensors").write_bytes(whole[:cut])
            refused(good, dense / "model.safetensors")
        (dense / "model.safetensors").unlink()
        refused(good, "no model*.safetensors")
        llama = self.dense("llama", name="llama")
        refused(["--from", llama, *out, "--layers", "1"], "Mixtral")


if __name__ == "__main__":
    unittest.main()
