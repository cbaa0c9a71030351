#!/usr/bin/env python3
"""Hugging Face models here, and ours there: for Qwen3-MoE and Mixtral, fp32 and bf16,

  theirs -> ours   a small randomly initialised model, saved by transformers into several files with an index, gives the
                   same logits here, trains on here, and goes back by --export hf with every tensor as it was
  ours -> theirs   a checkpoint of a run here opens in transformers as it is, with our logits; so does an export
  dense -> MoE     a dense Qwen3 or Llama model of transformers, made into experts by scripts/upcycle.py, gives the dense
                   model's logits here

    scripts/hf_roundtrip.py [--trainer ./train_gpt_moe] [--device cpu|cuda] [--dtypes fp32,bf16] [--fixtures DIR]

prints the largest difference of logits for each, beside the largest logit. fp32: at most 2e-5 of the largest logit. bf16,
where two correct programs round differently, and so may send a token to different experts: our distance from transformers
in fp32 is at most twice that of transformers in bf16, each being the median over tokens of the root mean square over
the logits. transformers runs on the CPU. Needs torch, transformers and safetensors; exits with 1 if a check fails, with 77 if
one of them is missing. --fixtures writes what dev/test/test_hf.py compares with, and checks nothing.
"""

import argparse
import array
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
except ImportError as error:
    print(f"hf_roundtrip: {error.name} is not installed (pip install torch transformers safetensors)", file=sys.stderr)
    sys.exit(77)

V, T, WINDOWS = 128, 24, 4
TOLERANCE_FP32, TOLERANCE_BF16 = 2e-5, 2.0
COMMON = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
              num_experts_per_tok=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.15, tie_word_embeddings=False)
# Per class: its config's own keys, and the options that describe a model of the class here.
KINDS = {
    "qwen3_moe": (dict(num_experts=8, moe_intermediate_size=16, intermediate_size=48, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[0]),
                  "--n-expert 8 --d-expert 16 --dense-layers 0 --d-dense 48 --qk-norm true --tied true"),
    "mixtral": (dict(num_local_experts=4, intermediate_size=24, sliding_window=None),
                "--n-expert 4 --d-expert 24 --qk-norm false --tied false"),
}
DENSE = {"qwen3_moe": ("Qwen3Config", "Qwen3ForCausalLM"), "mixtral": ("LlamaConfig", "LlamaForCausalLM")}
OURS = "--n-layer 2 --d-model 32 --n-head 4 --n-kv-head 2 --head-dim 16".split() + ["--vocab-size", str(V)]


def their_model(kind, seed=7):
    torch.manual_seed(seed)
    classes = {"qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
               "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM)}
    config, model = classes[kind]
    return shaken(model(config(**COMMON, **KINDS[kind][0])))


def shaken(model):
    model.eval()
    with torch.no_grad():  # norms start at one, where a wrong one would not show
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
    return model


def shard(path, seed=3):
    """Writes a shard of ids: WINDOWS windows, the last of which ends early."""
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (WINDOWS * T - 4,), generator=numbers).tolist()
    path.write_bytes(struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + array.array("H", ids).tobytes())


def their_logits(directory, tokens, dtype):
    """(W,T,V) of the model that a directory holds."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, torch_dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids=tokens.long()).logits.float()


class Roundtrip:
    def __init__(self, args, work):
        self.args, self.work = args, work
        self.passed = self.failed = self.files = 0
        self.data = work / "tokens.bin"
        shard(self.data)

    def count(self, what, good, note):
        self.passed, self.failed = self.passed + bool(good), self.failed + (not good)
        print(f"{'ok    ' if good else 'FAILED'} {what:58} {note}", flush=True)

    def ours(self, *options):
        command = [self.args.trainer, "--device", self.args.device, *map(str, options)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"hf_roundtrip: {' '.join(command)}\n{result.stdout[-1000:]}{result.stderr}")
        return result.stdout

    def our_logits(self, directory, dtype):
        self.files += 1
        path = self.work / f"logits{self.files}.safetensors"
        self.ours("--checkpoint", directory, "--dtype", dtype, "--logits", path, "--val-data", self.data, "--seq-len", T, "--batch-size", 2)
        file = load_file(path)
        return file["tokens"], file["targets"], file["logits"]

    def compare(self, what, directory, dtype, there=None):
        """Logits of one directory here and there (in directory `there`, if another), where there is a token."""
        tokens, targets, mine = self.our_logits(directory, dtype)
        directory = there or directory
        here = targets.reshape(-1) >= 0
        flat = lambda logits: logits.reshape(-1, V)[here].double()
        mine, truth = flat(mine), flat(their_logits(directory, tokens, torch.float32))
        largest, scale = (mine - truth).abs().max().item(), truth.abs().max().item()
        note = f"largest difference {largest:.2e} of logits up to {scale:.2f}"
        if dtype == "fp32":
            good = largest <= TOLERANCE_FP32 * scale
        else:
            distance = lambda a: (a - truth).square().mean(1).sqrt().median().item()
            theirs = flat(their_logits(directory, tokens, torch.bfloat16))
            good = distance(mine) <= TOLERANCE_BF16 * distance(theirs)
            note += f" (transformers' own bf16: {(theirs - truth).abs().max().item():.2e}); distance {distance(mine):.2e} (theirs {distance(theirs):.2e})"
        self.count(f"{what}, {dtype}", good and torch.isfinite(mine).all(), note)

    def train(self, out, dtype, *more):
        """Trains here on a few tokens until it knows them; returns the checkpoint's directory and the first and last loss."""
        self.ours("--train-data", self.data, "--val-data", "", "--dtype", dtype, "--steps", 30, "--batch-size", 2, "--seq-len", T,
                  "--lr", 1e-2, "--warmup-steps", 2, "--overfit-one-batch", "--out", out, *more)
        losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        return out / (out / "latest").read_text().strip(), losses[0], losses[-1]

    def theirs_to_ours(self, kind, dtype):
        source = self.work / f"{kind}.{dtype}.theirs"
        model = their_model(kind).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
        model.save_pretrained(source, max_shard_size="40KB")
        files = sorted(source.glob("model*.safetensors"))
        self.count(f"{kind}: transformers saved several files", len(files) > 1 and (source / "model.safetensors.index.json").exists(), f"{len(files)} files")
        self.compare(f"{kind} of transformers, loaded here", source, dtype)
        back = self.work / f"{kind}.{dtype}.back"
        self.ours("--export", "hf", "--checkpoint", source, "--dtype", dtype, "--out", back)
        tensors = lambda directory: {name: t for f in directory.glob("model*.safetensors") for name, t in load_file(f).items()}
        before, after = tensors(source), tensors(back)
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
        self.count(f"{kind} of transformers, exported again, {dtype}", same, f"{len(after)} tensors the same bits")
        self.compare(f"{kind} of transformers, exported again", back, dtype)
        trained, first, last = self.train(self.work / f"{kind}.{dtype}.on", dtype, "--init-from", source)
        self.count(f"{kind} of transformers, trained on here, {dtype}", last < 0.5 * first, f"loss {first:.3f} -> {last:.3f}")
        self.compare(f"{kind} of transformers, trained on here", trained, dtype)

    def ours_to_theirs(self, kind, dtype):
        trained, first, last = self.train(self.work / f"{kind}.{dtype}.ours", dtype, *OURS, *KINDS[kind][1].split())
        self.count(f"{kind} made here, trained, {dtype}", last < 0.5 * first, f"loss {first:.3f} -> {last:.3f}")
        self.compare(f"{kind} made here, the checkpoint as it is", trained, dtype)
        exported = self.work / f"{kind}.{dtype}.exported"
        self.ours("--export", "hf", "--checkpoint", trained, "--dtype", dtype, "--out", exported)
        self.compare(f"{kind} made here, exported", exported, dtype)


    def dense_to_moe(self, kind):
        config, model = (getattr(transformers, name) for name in DENSE[kind])
        torch.manual_seed(5)
        source, moe = self.work / f"{kind}.dense", self.work / f"{kind}.upcycled"
        keys = {k: v for k, v in COMMON.items() if k != "num_experts_per_tok"}
        shaken(model(config(**keys, intermediate_size=48))).save_pretrained(source, max_shard_size="40KB")
        script = Path(__file__).resolve().parent / "upcycle.py"
        subprocess.run([sys.executable, script, "--from", source, "--out", moe, "--n-expert", "4"], check=True, stdout=subprocess.DEVNULL)
        self.compare(f"{DENSE[kind][1]} upcycled, with the dense model", moe, "fp32", there=source)
        self.compare(f"{DENSE[kind][1]} upcycled, with itself", moe, "fp32")


def write_fixtures(folder, work):
    """DIR/KIND: the model as this version of transformers saves it, with its logits of tokens.bin in fp32 and bf16."""
    shard(work / "tokens.bin")
    raw = (work / "tokens.bin").read_bytes()[1024:]
    ids = list(array.array("H", raw))
    tokens = torch.tensor(ids[:(len(ids) - 1) // T * T]).reshape(-1, T)  # the whole windows
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(work / "tokens.bin", folder / "tokens.bin")
    for kind in KINDS:
        directory = folder / kind
        shutil.rmtree(directory, ignore_errors=True)
        their_model(kind).save_pretrained(directory, max_shard_size="64KB")
        logits = {name: their_logits(directory, tokens, dtype).to(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        save_file({name: t.contiguous() for name, t in logits.items()}, directory / "logits.safetensors", metadata=versions)
        print(f"{directory}: {sum(f.stat().st_size for f in directory.iterdir()):,} bytes {versions}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default="./train_gpt_moe")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--fixtures", type=Path, metavar="DIR")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as work:
        if args.fixtures:
            return write_fixtures(args.fixtures, Path(work))
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.trainer} on {args.device}")
        roundtrip = Roundtrip(args, Path(work))
        for kind in KINDS:
            for dtype in args.dtypes.split(","):
                roundtrip.theirs_to_ours(kind, dtype)
                roundtrip.ours_to_theirs(kind, dtype)
            roundtrip.dense_to_moe(kind)
        print(f"{roundtrip.passed} passed, {roundtrip.failed} failed")
        sys.exit(roundtrip.failed > 0)


if __name__ == "__main__":
    main()
