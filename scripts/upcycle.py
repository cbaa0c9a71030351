#!/usr/bin/env python3
"""A mixture-of-experts start from a dense checkpoint: sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055).

    scripts/upcycle.py --from DENSE --out MOE --n-expert 8 --top-k 2
    ./train_gpt_moe --init-from MOE --train-data ...

DENSE is a Hugging Face directory of a Qwen3 model (becomes Qwen3-MoE) or of a Llama or Mistral one (becomes Mixtral), without
biases. Every expert is a copy of its layer's MLP and routers are random, N(0, 0.02). Gates are renormalised over the chosen
experts and sum to 1, so the result computes what the dense model does until training tells its experts apart.

  --layers 1,3,5     only these layers (from 0) get experts, as in the paper every other one (Qwen3 only: Mixtral has no
                     dense layers)
  --noise X          adds N(0, (X * rms)^2) to a part of each expert's weights, another one for each expert; rms is that of
  --noise-part P     the matrix, P how much of it (0.5). A minute for about 50 million weights; without noise it only copies.

Python's standard library only. Weights keep their dtype (F32, BF16 or F16).
"""

import argparse
import array
import json
import math
import mmap
import os
import random
import shutil
import struct
import sys
from pathlib import Path

SHARD_BYTES = 4 << 30
KINDS = {"qwen3": ("qwen3_moe", "Qwen3MoeForCausalLM"), "llama": ("mixtral", "MixtralForCausalLM"), "mistral": ("mixtral", "MixtralForCausalLM")}
PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # here and in Qwen3-MoE; in Mixtral
BESIDE = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
          "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"]


def fail(line):
    sys.exit(f"{Path(sys.argv[0]).name}: {line}")


class Checkpoint:
    """The tensors of all DIR/model*.safetensors: name -> (dtype, shape, bytes in a mapped file)."""

    def __init__(self, directory):
        index = directory / "model.safetensors.index.json"
        paths = sorted(directory.glob("model*.safetensors"))
        if index.exists():
            try:
                paths = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, TypeError, AttributeError):
                fail(f"{index}: not an index of safetensors files")
        if not paths:
            fail(f"{directory}: no model*.safetensors there")
        self.tensors = {}
        for path in paths:
            self._read(path)

    def _read(self, path):
        try:
            with open(path, "rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            fail(f"cannot read {path}: {error}")
        try:
            begin = 8 + struct.unpack("<Q", data[:8])[0]
            header = json.loads(bytes(data[8:begin]))
            for name, tensor in header.items():
                if name != "__metadata__":
                    first, last = tensor["data_offsets"]
                    if not 0 <= first <= last <= len(data) - begin:
                        fail(f"{path}: truncated: tensor {name} is not all there")
                    self.tensors[name] = tensor["dtype"], tensor["shape"], data[begin + first:begin + last]
        except (ValueError, KeyError, TypeError, AttributeError, struct.error):
            fail(f"{path}: not a safetensors file")


# ---- numbers in bytes ----

def unpack(dtype, data):
    """Bytes -> floats."""
    if dtype == "BF16":
        halves = array.array("H", bytes(data))
        words = array.array("I", (h << 16 for h in halves))
        return array.array("f", words.tobytes())
    return array.array("f", bytes(data)) if dtype == "F32" else array.array("f", struct.unpack(f"<{len(data) // 2}e", data))


def pack(dtype, values):
    """Floats -> bytes, rounded to nearest, ties to even."""
    if dtype == "F32":
        return array.array("f", values).tobytes()
    if dtype == "F16":
        return struct.pack(f"<{len(values)}e", *values)
    words = array.array("I", array.array("f", values).tobytes())
    return array.array("H", ((w + 0x7FFF + (w >> 16 & 1)) >> 16 for w in words)).tobytes()


def noisy(dtype, data, noise, part, number):
    values = unpack(dtype, data)
    rms = math.sqrt(sum(x * x for x in values) / len(values))
    for i in range(len(values)):
        if number.random() < part:
            values[i] += number.gauss(0, noise * rms)
    return pack(dtype, values)


# ---- the model ----

def read_config(directory):
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path}: not a readable config.json ({error})")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        fail(f"{path}: model_type {kind!r} is not a dense model that this can take ({', '.join(KINDS)})")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            fail(f"{path}: {key} is set; models with biases have no place in {KINDS[kind][1]}")
    if config.get("hidden_act", "silu") != "silu":
        fail(f"{path}: hidden_act {config['hidden_act']!r}; experts are SwiGLU (silu)")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            fail(f"{path}: key {key!r} is missing or not a positive number")
    return config


def moe_config(config, args, layers):
    kind, architecture = KINDS[config["model_type"]]
    new = {k: v for k, v in config.items() if k not in ("auto_map", "transformers_version")}
    new.update(architectures=[architecture], model_type=kind, num_experts_per_tok=args.top_k, output_router_logits=False, router_aux_loss_coef=0.001)
    if kind == "mixtral":
        new.update(num_local_experts=args.n_expert)
    else:
        new.update(num_experts=args.n_expert, moe_intermediate_size=config["intermediate_size"], norm_topk_prob=True, decoder_sparse_step=1,
                   mlp_only_layers=[l for l in range(config["num_hidden_layers"]) if l not in layers])
    return new


def upcycled(config, checkpoint, args, layers):
    """Yields (name, dtype, shape, function that gives the bytes) of every tensor of the result."""
    mixtral = KINDS[config["model_type"]][0] == "mixtral"
    width, hidden = config["hidden_size"], config["intermediate_size"]
    left = dict(checkpoint.tensors)
    for layer in layers:
        prefix = f"model.layers.{layer}."
        moe = prefix + ("block_sparse_moe." if mixtral else "mlp.")
        for projection, renamed in PROJECTIONS.items():
            name = f"{prefix}mlp.{projection}.weight"
            if name not in left:
                fail(f"{args.source}: tensor {name} is missing")
            dtype, shape, data = left.pop(name)
            want = [width, hidden] if projection == "down_proj" else [hidden, width]
            if shape != want:
                fail(f"{args.source}: tensor {name} has shape {shape}, config.json says {want}")
            if dtype not in ("F32", "BF16", "F16"):
                fail(f"{args.source}: tensor {name} is {dtype}; F32, BF16 and F16 can be taken")
            for e in range(args.n_expert):
                to = f"{moe}experts.{e}.{renamed if mixtral else projection}.weight"
                if args.noise:
                    number = random.Random(f"{args.seed} {to}")
                    yield to, dtype, shape, lambda dtype=dtype, data=data, number=number: noisy(dtype, data, args.noise, args.noise_part, number)
                else:
                    yield to, dtype, shape, lambda data=data: data
        number = random.Random(f"{args.seed} {moe}gate")
        router = [number.gauss(0, 0.02) for _ in range(args.n_expert * width)]
        yield f"{moe}gate.weight", dtype, [args.n_expert, width], lambda dtype=dtype, router=router: pack(dtype, router)
    for name, (dtype, shape, data) in left.items():
        yield name, dtype, shape, lambda data=data: data


def write_shards(folder, tensors):
    """model.safetensors, or several files with an index where they pass SHARD_BYTES."""
    def size(tensor):
        return math.prod(tensor[2]) * {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(tensor[1], 1)

    shards, filled = [[]], 0
    for tensor in sorted(tensors, key=lambda t: t[1] != "F32"):  # wider ones first: each begins at a multiple of its size
        if shards[-1] and filled + size(tensor) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size(tensor)
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for tensor in shard:
            header[tensor[0]] = {"dtype": tensor[1], "shape": tensor[2], "data_offsets": [at, at + size(tensor)]}
            at += size(tensor)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in shard:
                file.write(tensor[3]())
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(size, tensors))}, "weight_map": {t[0]: name for name, shard in zip(names, shards) for t in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DENSE")
    parser.add_argument("--out", type=Path, required=True, metavar="MOE", help="directory to make")
    parser.add_argument("--n-expert", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--layers", help="which layers get experts (default: all)")
    parser.add_argument("--noise", type=float, default=0)
    parser.add_argument("--noise-part", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    config = read_config(args.source)
    count = config["num_hidden_layers"]
    if not 1 <= args.top_k <= args.n_expert:
        fail(f"--top-k {args.top_k} is not in 1 to --n-expert {args.n_expert}")
    if not (0 <= args.noise < math.inf and 0 < args.noise_part <= 1):
        fail("--noise must not be negative, --noise-part in (0, 1]")
    try:
        layers = sorted({int(l) for l in args.layers.split(",")}) if args.layers else list(range(count))
    except ValueError:
        fail(f"--layers {args.layers}: expected numbers, e.g. 1,3,5")
    if layers[0] < 0 or layers[-1] >= count:
        fail(f"--layers {args.layers}: the model has layers 0 to {count - 1}")
    if len(layers) < count and KINDS[config["model_type"]][0] == "mixtral":
        fail("--layers: Mixtral has experts in every layer; only a Qwen3 model can keep dense ones")
    if args.out.exists():
        fail(f"--out {args.out}: exists; choose another")
    tensors = list(upcycled(config, Checkpoint(args.source), args, layers))
    partial = args.out.with_name(args.out.name + ".tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_shards(partial, tensors)
        (partial / "config.json").write_text(json.dumps(moe_config(config, args, layers), indent=2) + "\n")
        for name in BESIDE:
            if (args.source / name).is_file():
                shutil.copy(args.source / name, partial / name)
        os.rename(partial, args.out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        fail(f"cannot write {args.out}: {error.strerror}")
    elements = sum(math.prod(t[2]) for t in tensors)
    print(f"{args.out}: {KINDS[config['model_type']][1]}, {elements:,} parameters, {args.n_expert} experts ({args.top_k} a token) in {len(layers)} of {count} layers")


if __name__ == "__main__":
    main()
