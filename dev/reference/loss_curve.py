"""Trains the preset gpt124-8x2 with the reference model on one GPU: the loss curve that the trainer's is held against.

    python3 dev/reference/loss_curve.py --train-data 'data/kjv/kjv_train.bin' --steps 200 --seeds 42,43,44 --out FILE

What a seed decides is what the trainer makes of it: initial weights (llmc/random.h, Model::initialise) and the order of
samples (llmc/dataloader.cpp); the schedule is the trainer's too (llmc/schedule.h). The network is gpt_moe.py's, with
attention and experts written in faster ways. Products are in bf16 (autocast), the router's and all else in fp32.
FILE gets one JSON object a step: seed, step (from 1), loss (cross-entropy), aux_loss, z_loss, grad_norm (before
clipping), lr. scripts/loss_curve.sh runs this and the trainer, and compares.
"""
import argparse
import bisect
import glob
import json
import math
import mmap
import os
import struct
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_moe import Attention, GptMoe, Model, MoE, Routing, rope

PRESET = Model(n_layer=12, d_model=768, n_head=12, n_kv_head=12, head_dim=64, vocab_size=50257, n_expert=8, top_k=2,
               d_expert=2048, qk_norm=False, tied=False, aux_coef=0.01, z_coef=0.001)
WARMUP_STEPS, FINAL_LR_FRACTION = 100, 0.1
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0

# ---- random numbers (llmc/random.h) ---------------------------------------------------------------------------------

MASK = (1 << 64) - 1
STEP, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
STREAM, INDEX = 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7


def mix64(z: int) -> int:
    z = (z ^ (z >> 30)) * MIX1 & MASK
    z = (z ^ (z >> 27)) * MIX2 & MASK
    return z ^ (z >> 31)


def stream_key(seed: int, stream: int) -> int:
    """What random_bits() has before the index comes in."""
    return mix64(mix64((seed + STEP) & MASK) ^ ((stream + STREAM) & MASK))


def random_bits(seed: int, stream: int, index: int) -> int:
    return mix64(stream_key(seed, stream) ^ ((index * STEP + INDEX) & MASK))


def hash_name(name: str) -> int:
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 & MASK
    return h


# The same on int64 tensors, whose sums and products wrap around as those of uint64.


def signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # >> alone drags the sign in


def uniform(key: int, index: Tensor) -> Tensor:
    """random_uniform() of a stream: float64 in [0, 1)."""
    z = (index * signed(STEP) + signed(INDEX)) ^ signed(key)
    z = (z ^ shift_right(z, 30)) * signed(MIX1)
    z = (z ^ shift_right(z, 27)) * signed(MIX2)
    z = z ^ shift_right(z, 31)
    return shift_right(z, 11).to(torch.float64) * 2.0**-53


def normal(key: int, index: Tensor) -> Tensor:
    u = 1.0 - uniform(key, 2 * index)
    v = uniform(key, 2 * index + 1)
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * math.pi * v)


def initial_scale(name: str, n_layer: int) -> float:
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return 0.02 / math.sqrt(2.0 * n_layer) if residual else 0.02


@torch.no_grad()
def initialise(model: GptMoe, seed: int) -> None:
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(1.0)
            continue
        key, flat, piece = stream_key(seed, hash_name(name)), p.view(-1), 1 << 24  # a piece at a time: float64 is large
        for begin in range(0, flat.numel(), piece):
            end = min(begin + piece, flat.numel())
            values = initial_scale(name, model.m.n_layer) * normal(key, torch.arange(begin, end))
            flat[begin:end].copy_(values)  # rounds to fp32


# ---- data (llmc/dataloader.cpp) -------------------------------------------------------------------------------------


def permuted(index: int, n: int, seed: int, epoch: int) -> int:
    key = random_bits(seed, hash_name("order of training windows"), epoch)
    h = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, x = (1 << h) - 1, index
    while True:
        left, right = x >> h, x & mask
        for turn in range(6):
            left, right = right, left ^ (random_bits(key, turn, right) & mask)
        x = left << h | right
        if x < n:
            return x


class Shards:
    """llm.c's .bin files that a glob matches: windows of seq_len + 1 ids, and the order in which a seed takes them."""

    def __init__(self, pattern: str, seq_len: int):
        self.seq_len, self.shards, self.first_window = seq_len, [], [0]
        paths = sorted(glob.glob(os.path.expanduser(pattern)), key=os.fsencode)
        if not paths:
            sys.exit(f"loss_curve: no file matches {pattern}")
        for path in paths:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            magic, version, count = struct.unpack_from("<3i", data)
            letter = {(20240520, 1): "H", (20240801, 7): "I"}.get((magic, version))
            if letter is None or len(data) != 1024 + count * struct.calcsize("<" + letter):
                sys.exit(f"loss_curve: {path}: not a token shard, or a truncated one")
            self.shards.append((data, letter))
            self.first_window.append(self.first_window[-1] + (count - 1) // seq_len)
        if self.windows() == 0:
            sys.exit(f"loss_curve: {pattern}: no shard holds {seq_len + 1} tokens")

    def windows(self) -> int:
        return self.first_window[-1]

    def sample(self, number: int, seed: int) -> list[int]:
        """The seq_len inputs of training sample `number`, and one id more: the targets are the same, one further."""
        epoch, position = divmod(number, self.windows())
        window = permuted(position, self.windows(), seed, epoch)
        s = bisect.bisect_right(self.first_window, window) - 1
        data, letter = self.shards[s]
        start = (window - self.first_window[s]) * self.seq_len
        at = 1024 + start * struct.calcsize("<" + letter)
        return list(struct.unpack_from(f"<{self.seq_len + 1}{letter}", data, at))


# ---- learning rate (llmc/schedule.h, cosine) ------------------------------------------------------------------------


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Of step 0, 1, ..."""
    warmup = min(WARMUP_STEPS, steps // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = 1.0 if step >= steps else (step - warmup) / (steps - warmup)
    remaining = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * remaining)


# ---- the model: what gpt_moe.py spells out, made fast ---------------------------------------------------------------


class FastAttention(Attention):
    """The preset has as many key/value heads as query heads, and no QK-norm."""

    def forward(self, x: Tensor) -> Tensor:
        m, (B, T, _) = self.m, x.shape
        q = self.q_proj(x).view(B, T, m.n_head, m.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, m.n_head, m.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, m.n_head, m.head_dim).transpose(1, 2)
        with torch.autocast("cuda", enabled=False):  # angles in fp32
            q, k = rope(q, m.rope_theta).to(v.dtype), rope(k, m.rope_theta).to(v.dtype)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, m.n_head * m.head_dim))


class FastMoE(MoE):
    def route(self, x: Tensor) -> Routing:
        with torch.autocast("cuda", enabled=False):
            return super().route(x.float())

    def apply_experts(self, x: Tensor, routing: Routing) -> Tensor:  # x (N, C)
        K = routing.top_k_index.shape[1]
        out = torch.zeros_like(x, dtype=torch.float32)
        x, gate = x.to(torch.bfloat16), routing.gate.flatten()
        slots = routing.top_k_index.flatten().argsort(stable=True)  # slot t*K + k is the k-th choice of token t
        for expert, slot in zip(self.experts, slots.split(routing.load.tolist())):
            token = slot // K
            y = expert(x.index_select(0, token)).float()
            out.index_add_(0, token, gate.index_select(0, slot)[:, None] * y)
        return out


def build(seed: int, stream: str) -> GptMoe:
    model = GptMoe(PRESET)
    initialise(model, seed)
    for layer in model.model.layers:
        layer.self_attn.__class__, layer.mlp.__class__ = FastAttention, FastMoE
    if stream == "bf16":  # the residual stream is rounded wherever it is written
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: out.to(torch.bfloat16))
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, inputs, out: (out[0].to(torch.bfloat16), out[1]))
    return model


def losses(model: GptMoe, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy; balance and z loss as they enter the objective: with coefficient, summed over layers."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        x, routings = model.model(tokens)
        V = model.m.vocab_size
        head = F.pad(model.lm_head.weight, (0, 0, 0, -V % 64))  # an odd V makes a slow product
        logits = F.linear(x, head)[..., :V]
        cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    aux_loss = sum(r.aux_loss for r in routings.values())
    z_loss = sum(r.z_loss for r in routings.values())
    return cross_entropy, aux_loss, z_loss


def train(seed: int, shards: Shards, options: argparse.Namespace, out) -> None:
    B, T = options.batch_size, options.seq_len
    began = time.monotonic()
    model = build(seed, options.stream)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=options.lr, betas=BETAS, eps=EPS, fused=True)
    torch.cuda.synchronize()
    count = sum(p.numel() for p in model.parameters())
    print(f"seed {seed} | {count} parameters | {shards.windows()} training windows of {T} tokens | ready after "
          f"{time.monotonic() - began:.1f} s", flush=True)
    for step in range(options.steps):
        began = time.monotonic()
        text = torch.tensor([shards.sample(step * B + b, seed) for b in range(B)])  # (B, T+1)
        cross_entropy, aux_loss, z_loss = losses(model, text[:, :-1], text[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        (cross_entropy + aux_loss + z_loss).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        lr = learning_rate(options.lr, step, options.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        record = {"seed": seed, "step": step + 1, "loss": cross_entropy.item(), "aux_loss": aux_loss.item(),
                  "z_loss": z_loss.item(), "grad_norm": norm.item(), "lr": lr}
        torch.cuda.synchronize()
        print(json.dumps(record), file=out, flush=True)
        if step == 0 or (step + 1) % 10 == 0 or step + 1 == options.steps:
            print(f"seed {seed} step {step + 1:5}/{options.steps} | loss {record['loss']:.7f} | aux "
                  f"{record['aux_loss']:.6f} z {record['z_loss']:.6f} | norm {record['grad_norm']:.4f} | lr {lr:.3e} | "
                  f"{1e3 * (time.monotonic() - began):.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves of the preset gpt124-8x2 in PyTorch, on one GPU.")
    parser.add_argument("--train-data", required=True, metavar="GLOB", help="token shards (.bin)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--seeds", default="42,43,44", help="one run each")
    parser.add_argument("--stream", choices=("fp32", "bf16"), default="fp32",
                        help="residual stream: fp32, as autocast leaves it, or bf16, as the trainer's")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    shards = Shards(options.train_data, options.seq_len)
    if not torch.cuda.is_available():
        sys.exit("loss_curve: PyTorch sees no GPU")
    torch.set_default_device("cuda")
    torch.set_float32_matmul_precision("highest")  # the router's product: no TF32
    with open(options.out, "w") as out:
        for seed in seeds:
            train(seed, shards, options, out)
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
