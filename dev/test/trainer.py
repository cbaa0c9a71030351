"""Runs the trainer as a user does, on a tiny model and small shards of bytes. Shared by the tests of the whole program;
the binary is $TRAINER (default ./train_gpt_moe). Standard library only."""

import array
import json
import os
import random
import shutil
import struct
import subprocess
import tempfile
import unittest
from pathlib import Path

TRAINER = Path(os.environ.get("TRAINER", "./train_gpt_moe")).resolve()
# TRAINER_DEVICE=cuda runs the same tests on the GPU, in fp32; otherwise no GPU is seen.
DEVICE = os.environ.get("TRAINER_DEVICE", "cpu")
ENV = {"OMP_NUM_THREADS": "1", **os.environ, **({} if DEVICE == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})}

def command(args):
    """The command line with these arguments."""
    return [str(TRAINER), *map(str, args), *(["--dtype", "fp32"] if DEVICE == "cuda" and "--dtype" not in args else [])]


# A model that trains a step in less than a millisecond.
MODEL = "--n-layer 1 --d-model 32 --n-head 2 --n-kv-head 1 --head-dim 16 --n-expert 4 --d-expert 16".split()
BATCH = "--batch-size 2 --seq-len 32".split()
VOCABULARY, EOT = 257, 256


def text(words, seed=1):
    choose = random.Random(seed)
    vocabulary = "light and God said let there be the earth was without form void".split()
    return " ".join(choose.choice(vocabulary) for _ in range(words)).encode()


def shard_bytes(ids, magic=20240520, version=1, count=None, tokenizer=1):
    header = [magic, version, len(ids) if count is None else count, tokenizer] + [0] * 252
    return struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}{'I' if version == 7 else 'H'}", *ids)


class Safetensors:
    """Tensors of a file by name: (dtype, shape, bytes). write() makes the same file again."""

    def __init__(self, path=None):
        self.tensors = {}
        if path is None:
            return
        raw = Path(path).read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        for name, t in json.loads(raw[8:8 + size]).items():
            if name != "__metadata__":
                begin, end = t["data_offsets"]
                self.tensors[name] = t["dtype"], t["shape"], raw[8 + size + begin:8 + size + end]

    def write(self, path):
        header, at = {}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        Path(path).write_bytes(struct.pack("<Q", len(head)) + head + b"".join(data for _, _, data in self.tensors.values()))

    def change(self, name, function):
        """Replaces the values of an F32 tensor by function(list)."""
        dtype, shape, data = self.tensors[name]
        assert dtype == "F32"
        self.tensors[name] = dtype, shape, array.array("f", function(list(array.array("f", data)))).tobytes()


class TrainerTest(unittest.TestCase):
    """A folder of its own for every test, with train.bin (200 windows of 32 tokens) and val.bin."""

    maxDiff = 4000

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.train, self.val = self.folder / "train.bin", self.folder / "val.bin"
        self.train.write_bytes(shard_bytes([EOT, *text(1300)]))
        self.val.write_bytes(shard_bytes([EOT, *text(60, seed=2)]))

    def path(self, name):
        return self.folder / name

    def execute(self, *args, **options):
        """The program with these arguments, as they are; fails the test if a signal ended it."""
        result = subprocess.run(command(args), env=ENV, cwd=self.folder, capture_output=True, timeout=120, **options)
        result.stdout, result.stderr = result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace")
        self.assertIn(result.returncode, (0, 1), f"{args}\n{result.stderr[-3000:]}")
        return result

    def ok(self, *args, **options):
        """Output of the program, which must succeed without complaint."""
        result = self.execute(*args, **options)
        self.assertEqual((result.returncode, result.stderr), (0, ""), args)
        return result.stdout

    def one_line(self, result, *expected):
        self.assertEqual(result.returncode, 1, result.stdout[-500:] + result.stderr)
        self.assertEqual((result.stderr.count("\n"), result.stderr[-1]), (1, "\n"), result.stderr)
        self.assertTrue(result.stderr.startswith("train_gpt_moe: "), result.stderr)
        for word in expected:
            self.assertIn(str(word), result.stderr)

    def refused(self, args, *expected, **options):
        """Exit code 1, one line with the expected words, and no file made, changed or removed."""
        before = self.files()
        self.one_line(self.execute(*args, **options), *expected)
        self.assertEqual(self.files(), before, "a refused run has written something")

    def files(self):
        return {str(p.relative_to(self.folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in sorted(self.folder.rglob("*"))}

    def training(self, *more, model=MODEL, out="run"):
        """Arguments that train; `more` replaces defaults and adds to them."""
        defaults = ["--train-data", self.train, "--val-data", "", *model, *BATCH, "--out", self.path(out)]
        return [a for pair in zip(defaults[::2], defaults[1::2]) if pair[0] not in more for a in pair] + list(more)

    def trained(self, *more, **options):
        """Trains and returns the run's directory."""
        args = self.training(*more, **options)
        self.ok(*args)
        return args[args.index("--out") + 1]

    def records(self, run, *keys):
        """The objects of log.jsonl; with keys, only those values of each training step."""
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [[r[k] for k in keys] for r in lines if "loss" in r] if keys else lines

    def losses(self, run):
        return self.records(run, "step", "loss", "aux_loss", "z_loss", "lr", "grad_norm", "clip", "expert_load")

    def checkpoint(self, run):
        return run / (run / "latest").read_text().strip()

    def weights(self, run):
        return (self.checkpoint(run) / "model.safetensors").read_bytes()

    def assert_same_run(self, one, other):
        """Same bytes of weights, moments and losses."""
        a, b = self.checkpoint(one), self.checkpoint(other)
        self.assertEqual(a.name, b.name)
        for name in ("model.safetensors", "optimizer.safetensors", "config.json", "trainer.json"):
            self.assertTrue((a / name).read_bytes() == (b / name).read_bytes(), f"{name} of {a} and {b} differ")
        self.assertEqual((one / "main.log").read_text(), (other / "main.log").read_text())
        varying = ("ms", "tokens_per_s", "mfu")
        strip = [[{k: v for k, v in r.items() if k not in varying} for r in self.records(run)] for run in (one, other)]
        self.assertEqual(*strip)

    # ---- models of other programs ----

    def hf_directory(self, kind, dtype="F32", **changes):
        """A small model as transformers writes it: config.json without keys of ours, model.safetensors."""
        C, heads, kv, size, experts, F, layers = 32, 2, 1, 16, 4, 16, 1
        config = {"model_type": kind, "hidden_size": C, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
                  "head_dim": size, "vocab_size": VOCABULARY, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                  "tie_word_embeddings": False, "router_aux_loss_coef": 0.01, "max_position_embeddings": 64, "hidden_act": "silu"}
        mixtral = kind == "mixtral"
        config.update({"num_local_experts": experts, "intermediate_size": F} if mixtral else
                      {"num_experts": experts, "moe_intermediate_size": F, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []})
        config.update(changes)
        shapes = {"model.embed_tokens.weight": [VOCABULARY, C], "lm_head.weight": [VOCABULARY, C], "model.norm.weight": [C]}
        for l in range(layers):
            at = f"model.layers.{l}."
            moe = at + ("block_sparse_moe." if mixtral else "mlp.")
            shapes.update({at + "input_layernorm.weight": [C], at + "post_attention_layernorm.weight": [C], moe + "gate.weight": [experts, C],
                           at + "self_attn.q_proj.weight": [heads * size, C], at + "self_attn.k_proj.weight": [kv * size, C],
                           at + "self_attn.v_proj.weight": [kv * size, C], at + "self_attn.o_proj.weight": [C, heads * size]})
            if not mixtral:
                shapes.update({at + "self_attn.q_norm.weight": [size], at + "self_attn.k_norm.weight": [size]})
            for e in range(experts):
                gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
                shapes.update({f"{moe}experts.{e}.{gate}.weight": [F, C], f"{moe}experts.{e}.{up}.weight": [F, C], f"{moe}experts.{e}.{down}.weight": [C, F]})
        directory = Path(tempfile.mkdtemp(dir=self.folder))
        (directory / "config.json").write_text(json.dumps(config))
        number, file = random.Random(3), Safetensors()
        for name, shape in shapes.items():
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            values = array.array("f", [1.0 if len(shape) == 1 else number.gauss(0, 0.05) for _ in range(count)])
            data = values.tobytes() if dtype == "F32" else b"".join(values.tobytes()[i + 2:i + 4] for i in range(0, 4 * count, 4))  # truncated to BF16
            file.tensors[name] = dtype, shape, data
        file.write(directory / "model.safetensors")
        return directory
