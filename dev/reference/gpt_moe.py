"""A GPT with mixture-of-experts layers in plain PyTorch: every option of the router, written to be read.

It is also the oracle of the C++ code. Run as a program it writes the reference state, computed in float64: weights, a
batch, logits, losses, every gradient, every choice of expert and the losses of ten AdamW steps, for a few small
configurations (CONFIGS below) that between them use every option.

    python3 dev/reference/gpt_moe.py --out dev/reference/state.safetensors     writes the state (needs torch)
    python3 dev/reference/gpt_moe.py --check                                   runs check_gpt_moe.py

Letters: B batch, T sequence, N = B*T tokens, C model width, NH query heads, NKV key/value heads, HD head size,
V vocabulary, E experts, K experts per token, F expert hidden width.

Read it from top to bottom: the blocks of the model, the router and its experts, the training step, then the
configurations and the file that is written. Modules and parameters carry the names that Hugging Face checkpoints use.
"""
import argparse
import dataclasses
import json
import math
import os
import random
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

# ---- options --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    n_layer: int = 1
    d_model: int = 64
    n_head: int = 2
    n_kv_head: int = 1
    head_dim: int = 64
    vocab_size: int = 96
    n_expert: int = 4
    top_k: int = 2
    d_expert: int = 64
    d_shared: int = 0  # width of the shared expert, a dense MLP beside the routed ones; 0: none
    dense_layers: tuple[int, ...] = ()  # layers whose MLP is dense instead of a mixture
    d_dense: int = 0
    qk_norm: bool = False
    tied: bool = True  # the head is the token embedding
    gate: str = "softmax"  # softmax | sigmoid
    norm_topk_prob: bool = True
    route_scale: float = 1.0  # sigmoid gate only
    balance: str = "aux"  # aux: a loss | bias: b moves against the load (sigmoid gate) | none
    balance_scope: str = "microbatch"  # microbatch | sequence
    aux_coef: float = 0.0
    z_coef: float = 0.0
    bias_rate: float = 0.0
    capacity_factor: float = 0.0  # 0: dropless
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


# ---- blocks that every GPT has --------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Divides a vector by its root mean square, then scales each channel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight


def rope(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of x (..., T, HD): turns the pair (x[i], x[i + HD/2]) by the angle t * theta^(-2i/HD).

    The dot product of a query at t and a key at s then depends on t - s only.
    """
    T, HD = x.shape[-2:]
    frequency = theta ** (-2 * torch.arange(HD // 2) / HD)  # (HD/2)
    angle = torch.outer(torch.arange(T).to(frequency), frequency)  # (T, HD/2)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention; NH/NKV neighbouring query heads share one key/value head."""

    def __init__(self, m: Model):
        super().__init__()
        self.m = m
        self.q_proj = nn.Linear(m.d_model, m.n_head * m.head_dim, bias=False)
        self.k_proj = nn.Linear(m.d_model, m.n_kv_head * m.head_dim, bias=False)
        self.v_proj = nn.Linear(m.d_model, m.n_kv_head * m.head_dim, bias=False)
        self.o_proj = nn.Linear(m.n_head * m.head_dim, m.d_model, bias=False)
        if m.qk_norm:
            self.q_norm = RMSNorm(m.head_dim, m.rms_norm_eps)
            self.k_norm = RMSNorm(m.head_dim, m.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        m, (B, T, _) = self.m, x.shape
        q = self.q_proj(x).view(B, T, m.n_head, m.head_dim)
        k = self.k_proj(x).view(B, T, m.n_kv_head, m.head_dim)
        v = self.v_proj(x).view(B, T, m.n_kv_head, m.head_dim)
        if m.qk_norm:  # each head by itself, one weight (HD) for all heads
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, HD)
        q, k = rope(q, m.rope_theta), rope(k, m.rope_theta)
        k = k.repeat_interleave(m.n_head // m.n_kv_head, dim=1)  # query head h reads key/value head h // (NH/NKV)
        v = v.repeat_interleave(m.n_head // m.n_kv_head, dim=1)
        score = q @ k.transpose(-2, -1) / math.sqrt(m.head_dim)  # (B, NH, T, T)
        future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
        weight = score.masked_fill(future, -math.inf).softmax(dim=-1)
        return self.o_proj((weight @ v).transpose(1, 2).reshape(B, T, m.n_head * m.head_dim))


class SwiGLU(nn.Module):
    """The MLP of a dense layer, of the shared expert, and of each routed expert."""

    def __init__(self, d_model: int, d_hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.up_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


# ---- the mixture of experts -----------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """What the router of one layer decided about the N tokens of a micro-batch."""

    top_k_index: Tensor  # (N, K) chosen experts, best first
    gate: Tensor  # (N, K) the weight of each chosen expert's output
    load: Tensor  # (E) how many of the N*K choices fell on each expert, counted before capacity drops any
    margin: float  # smallest gap between a chosen and a rejected selection score: how far the nearest tie is
    dropped: int  # choices beyond an expert's capacity
    aux_loss: Tensor  # scalar, coefficient included
    z_loss: Tensor  # scalar, coefficient included


def top_k(score: Tensor, k: int) -> Tensor:
    """The k largest of each row (N, E), best first; of equal ones the lower index first (torch.topk has no rule)."""
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :k]


class MoE(nn.Module):
    """Each token is sent to K of E experts; the output is the sum of theirs, weighted by the gate."""

    def __init__(self, m: Model):
        super().__init__()
        self.m = m
        self.gate = nn.Linear(m.d_model, m.n_expert, bias=False)
        self.experts = nn.ModuleList(SwiGLU(m.d_model, m.d_expert) for _ in range(m.n_expert))
        if m.d_shared:
            self.shared_expert = SwiGLU(m.d_model, m.d_shared)
        self.register_buffer("bias", torch.zeros(m.n_expert), persistent=False)  # b: moved by rule, not by gradient

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:  # x (B, T, C)
        routing = self.route(x)
        out = self.apply_experts(x.flatten(0, 1), routing).view_as(x)
        if self.m.d_shared:
            out = out + self.shared_expert(x)
        return out, routing

    def route(self, x: Tensor) -> Routing:
        m, (B, T, C) = self.m, x.shape
        N, E, K = B * T, m.n_expert, m.top_k
        logit = self.gate(x.view(N, C))  # s (N, E)

        # Scores p, and the choice. The bias steers the choice alone: the gate below is made of p without it.
        # No gradient flows through the choice.
        if m.gate == "softmax":
            p = logit.softmax(dim=-1)
            selection = p.detach()
        else:
            p = logit.sigmoid()
            selection = p.detach() + self.bias
        top_k_index = top_k(selection, K)

        # Gates.
        chosen = p.gather(1, top_k_index)  # (N, K)
        if m.gate == "softmax":
            gate = chosen / chosen.sum(dim=-1, keepdim=True) if m.norm_topk_prob else chosen
        else:
            share = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20) if m.norm_topk_prob else chosen
            gate = m.route_scale * share

        # Balance loss: E * sum_e f_e P_e, which is 1 when all experts get the same. f_e, the share of the choices that
        # fell on e, is a count and has no gradient; P_e, the mean probability of e, carries it.
        is_chosen = nn.functional.one_hot(top_k_index, E).sum(dim=1)  # (N, E), 0 or 1
        aux_loss = torch.zeros(())
        if m.balance == "aux":
            probability = p if m.gate == "softmax" else p / p.sum(dim=-1, keepdim=True)
            groups = B if m.balance_scope == "sequence" else 1  # the statistics of a group stay within it
            f = is_chosen.view(groups, N // groups, E).sum(dim=1) / (N // groups * K)  # (groups, E)
            P = probability.view(groups, N // groups, E).mean(dim=1)  # (groups, E)
            aux_loss = m.aux_coef * E * (f * P).sum(dim=-1).mean()

        # z loss: keeps the logits small.
        z_loss = m.z_coef * logit.logsumexp(dim=-1).pow(2).mean()

        sorted_score = selection.sort(dim=-1, descending=True).values
        margin = (sorted_score[:, K - 1] - sorted_score[:, K]).min().item() if K < E else math.inf
        load = is_chosen.sum(dim=0)
        dropped = (load - self.capacity(N)).clamp(min=0).sum().item()
        return Routing(top_k_index, gate, load, margin, dropped, aux_loss, z_loss)

    def capacity(self, N: int) -> int:
        """The most rows that an expert takes from a micro-batch of N tokens."""
        m = self.m
        return math.ceil(m.capacity_factor * N * m.top_k / m.n_expert) if m.capacity_factor else N

    def apply_experts(self, x: Tensor, routing: Routing) -> Tensor:  # x (N, C)
        N, K = routing.top_k_index.shape
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            # Slot t*K + k is the k-th choice of token t. An expert takes its slots in that order, up to its capacity;
            # the rest add nothing, and the gates of the others are not made larger for it.
            slot = (routing.top_k_index.flatten() == e).nonzero().flatten()[: self.capacity(N)]
            token = slot // K
            out = out.index_add(0, token, routing.gate.flatten()[slot, None] * expert(x[token]))
        return out


# ---- the model ------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, m: Model, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(m.d_model, m.rms_norm_eps)
        self.self_attn = Attention(m)
        self.post_attention_layernorm = RMSNorm(m.d_model, m.rms_norm_eps)
        self.mlp = SwiGLU(m.d_model, m.d_dense) if index in m.dense_layers else MoE(m)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x))
        h = self.post_attention_layernorm(x)
        y, routing = self.mlp(h) if isinstance(self.mlp, MoE) else (self.mlp(h), None)
        return x + y, routing


class Decoder(nn.Module):
    def __init__(self, m: Model):
        super().__init__()
        self.embed_tokens = nn.Embedding(m.vocab_size, m.d_model)
        self.layers = nn.ModuleList(Layer(m, index) for index in range(m.n_layer))
        self.norm = RMSNorm(m.d_model, m.rms_norm_eps)

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[int, Routing]]:
        x = self.embed_tokens(tokens)
        routings = {}
        for index, layer in enumerate(self.layers):
            x, routing = layer(x)
            if routing is not None:
                routings[index] = routing
        return self.norm(x), routings


class GptMoe(nn.Module):
    def __init__(self, m: Model):
        super().__init__()
        self.m = m
        self.model = Decoder(m)
        if not m.tied:
            self.lm_head = nn.Linear(m.d_model, m.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[int, Routing]]:
        """tokens (B, T) -> logits (B, T, V), and the routing of each MoE layer by its index."""
        x, routings = self.model(tokens)
        head = self.model.embed_tokens.weight if self.m.tied else self.lm_head.weight
        return x @ head.T, routings

    def moe_layers(self) -> dict[int, MoE]:
        return {i: layer.mlp for i, layer in enumerate(self.model.layers) if isinstance(layer.mlp, MoE)}


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamWOptions:
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


class Losses(NamedTuple):
    cross_entropy: Tensor  # mean over tokens
    aux_loss: Tensor  # summed over MoE layers
    z_loss: Tensor  # summed over MoE layers
    logits: Tensor  # (B, T, V)
    routings: dict[int, Routing]


def losses(model: GptMoe, tokens: Tensor, targets: Tensor) -> Losses:
    """The losses of one micro-batch; what is minimised is the sum of the three."""
    logits, routings = model(tokens)
    cross_entropy = (logits.logsumexp(dim=-1) - logits.gather(-1, targets[..., None]).squeeze(-1)).mean()
    zero = torch.zeros(())
    aux_loss = sum((r.aux_loss for r in routings.values()), zero)
    z_loss = sum((r.z_loss for r in routings.values()), zero)
    return Losses(cross_entropy, aux_loss, z_loss, logits, routings)


def forward_backward(model: GptMoe, tokens: Tensor, targets: Tensor, micro_batches: int) -> list[Losses]:
    """Leaves in .grad the gradient of the objective, the mean over the micro-batches; tokens (micro_batches*B, T)."""
    model.zero_grad(set_to_none=False)
    result = []
    for x, y in zip(tokens.chunk(micro_batches), targets.chunk(micro_batches)):
        micro = losses(model, x, y)
        ((micro.cross_entropy + micro.aux_loss + micro.z_loss) / micro_batches).backward()
        result.append(micro)
    return result


def gradients(model: GptMoe) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def global_norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(g.pow(2).sum().item() for g in gradient.values()))


class AdamW:
    """Adam with decoupled weight decay, after clipping the gradient of the whole model to a norm."""

    def __init__(self, model: GptMoe, o: AdamWOptions):
        self.model, self.o, self.t = model, o, 0
        self.m = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        self.v = {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    @torch.no_grad()
    def step(self) -> None:
        o = self.o
        self.t += 1
        gradient = gradients(self.model)
        norm = global_norm(gradient)
        scale = o.clip / norm if norm > o.clip else 1.0
        for name, p in self.model.named_parameters():
            g = gradient[name] * scale
            self.m[name] = o.beta1 * self.m[name] + (1 - o.beta1) * g
            self.v[name] = o.beta2 * self.v[name] + (1 - o.beta2) * g * g
            m_hat = self.m[name] / (1 - o.beta1**self.t)
            v_hat = self.v[name] / (1 - o.beta2**self.t)
            weight_decay = o.weight_decay if p.dim() == 2 else 0.0  # matrices (embeddings too), not norm weights
            p -= o.lr * (m_hat / (v_hat.sqrt() + o.eps) + weight_decay * p)


def update_bias(model: GptMoe, step: list[Losses]) -> None:
    """Bias balance, once a step: an expert with less than the mean load is chosen more readily from now on."""
    for index, moe in model.moe_layers().items():
        load = sum(micro.routings[index].load for micro in step)  # (E) over the whole batch of the step
        E = len(load)
        moe.bias += model.m.bias_rate * torch.sign(load.sum() - E * load)  # sign(mean - load), in integers


# ---- configurations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    name: str
    weights: str  # name of the weight set: configurations whose tensors have the same shapes share one
    model: Model
    batch_size: int = 2
    seq_len: int = 13
    micro_batches: int = 1
    adamw: AdamWOptions = AdamWOptions()
    steps: int = 10


CONFIGS = [
    # Qwen3-MoE: softmax gate renormalised over the chosen experts, QK-norm, balance and z loss over the micro-batch.
    Config("softmax_renorm", "e8", Model(n_expert=8, qk_norm=True, aux_coef=0.02, z_coef=0.01)),
    # OLMoE-like: gates not renormalised; balance within each sequence; a head of its own.
    Config("softmax_raw", "e4", seq_len=17,
           model=Model(norm_topk_prob=False, tied=False, balance_scope="sequence", aux_coef=0.05, z_coef=0.01)),
    # DeepSeek-V3: sigmoid gate, selection bias moved against the load, scaled gates, a shared expert.
    Config("sigmoid_bias", "e4", seq_len=19,
           model=Model(gate="sigmoid", route_scale=2.5, balance="bias", bias_rate=0.02, d_shared=128, qk_norm=True)),
    # The remaining sigmoid options: not renormalised, a bias that stays put, balance and z loss.
    Config("sigmoid_aux", "e4", seq_len=15,
           model=Model(gate="sigmoid", norm_topk_prob=False, route_scale=1.5, balance_scope="sequence", aux_coef=0.05,
                       z_coef=0.01)),
    # Mixtral with a capacity: an expert takes 0.9 of its even share of the rows, the rest are dropped.
    Config("capacity", "e4", seq_len=15, model=Model(capacity_factor=0.9, tied=False, aux_coef=0.02, z_coef=0.01)),
    # K = E: every token visits every expert. Another eps and theta; no balancing; a gradient that is not clipped.
    Config("all_experts", "e4", seq_len=12, adamw=AdamWOptions(clip=100.0),
           model=Model(top_k=4, balance="none", z_coef=0.01, rms_norm_eps=1e-5, rope_theta=1e6)),
    # Two MoE layers, K = 1 (Switch), NKV = NH, and two micro-batches a step.
    Config("accumulate", "two_layers", micro_batches=2,
           model=Model(n_layer=2, n_kv_head=2, n_expert=2, top_k=1, norm_topk_prob=False, qk_norm=True, aux_coef=0.02,
                       z_coef=0.01)),
    # A dense layer below a MoE layer. K = 1 renormalised: the gate is 1, so balance and z loss alone move the router.
    Config("dense_first", "two_layers", seq_len=14,
           model=Model(n_layer=2, n_kv_head=2, n_expert=2, top_k=1, dense_layers=(0,), d_dense=128, qk_norm=True,
                       aux_coef=0.02, z_coef=0.01)),
]


def normal(name: str, shape: tuple[int, ...], mean: float, std: float) -> Tensor:
    """Normal values that depend on the name alone, rounded to bf16: every number type starts from the same weights."""
    generator = random.Random(name)
    values = [generator.gauss(mean, std) for _ in range(math.prod(shape))]
    return torch.tensor(values).view(shape).to(torch.bfloat16).to(torch.float64)


def make_weights() -> dict[str, dict[str, Tensor]]:
    """The weight sets: all tensors that any configuration of the set asks for; a configuration takes what it needs.

    They are larger than at the start of a training, so that routing, attention and gradients are far from trivial.
    """
    sets: dict[str, dict[str, Tensor]] = {}
    for config in CONFIGS:
        weights = sets.setdefault(config.weights, {})
        for name, p in GptMoe(config.model).named_parameters():
            if name in weights:
                assert weights[name].shape == p.shape, (config.name, name)
                continue
            if p.dim() == 1:
                mean, std = 1.0, 0.1
            elif name in ("model.embed_tokens.weight", "lm_head.weight"):
                mean, std = 0.0, 0.2
            elif name.endswith("mlp.gate.weight"):
                mean, std = 0.0, 0.25
            else:
                mean, std = 0.0, 0.15
            weights[name] = normal(f"{config.weights}.{name}", tuple(p.shape), mean, std)
    return sets


def build(config: Config, weights: dict[str, Tensor]) -> GptMoe:
    model = GptMoe(config.model)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    if config.model.gate == "sigmoid":
        for index, moe in model.moe_layers().items():
            moe.bias.copy_(normal(f"{config.name}.bias.{index}", (config.model.n_expert,), 0.0, 0.1))
    return model


def make_batch(config: Config, attempt: int) -> tuple[Tensor, Tensor]:
    """Random tokens and, as targets, the token that follows each; (micro_batches*B, T) both."""
    generator = random.Random(f"{config.name}.tokens.{attempt}")
    rows = config.micro_batches * config.batch_size
    text = torch.tensor([[generator.randrange(config.model.vocab_size) for _ in range(config.seq_len + 1)]
                         for _ in range(rows)])
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


# ---- the reference state --------------------------------------------------------------------------------------------


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean().detach().reshape(1)


def run(config: Config, weights: dict[str, Tensor], attempt: int) -> tuple[dict[str, Tensor], float]:
    """Everything that the state holds of a configuration, and how near its routing came to a tie."""
    model = build(config, weights)
    tokens, targets = make_batch(config, attempt)
    moe_layers = model.moe_layers()
    out = {"tokens": tokens.int(), "targets": targets.int()}
    if config.model.gate == "sigmoid":
        out |= {f"bias.{index}": moe.bias.clone() for index, moe in moe_layers.items()}

    optimizer = AdamW(model, config.adamw)
    adamw_losses, margin = [], math.inf
    for step in range(config.steps):  # the same batch every step
        micros = forward_backward(model, tokens, targets, config.micro_batches)
        if step == 0:
            gradient = gradients(model)
            out["logits"] = torch.cat([micro.logits.detach().flatten(0, 1) for micro in micros])
            out["loss"] = mean([micro.cross_entropy for micro in micros])
            out["aux_loss"] = mean([micro.aux_loss for micro in micros])
            out["z_loss"] = mean([micro.z_loss for micro in micros])
            out["grad_norm"] = torch.tensor([global_norm(gradient)])
            for index in moe_layers:
                out[f"top_k_index.{index}"] = torch.cat([micro.routings[index].top_k_index for micro in micros]).int()
            out |= {f"grad.{name}": g.clone() for name, g in gradient.items()}
        routings = [r for micro in micros for r in micro.routings.values()]
        assert not config.model.capacity_factor or all(r.dropped > 0 for r in routings), "capacity drops nothing"
        margin = min(margin, *(r.margin for r in routings))
        adamw_losses.append(mean([micro.cross_entropy for micro in micros]))
        optimizer.step()
        if config.model.balance == "bias":
            update_bias(model, micros)
    out["adamw_losses"] = torch.cat(adamw_losses)
    if config.model.balance == "bias":
        out |= {f"adamw_bias.{index}": moe.bias.clone() for index, moe in moe_layers.items()}
    return out, margin


def run_far_from_ties(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws batches until one is found on which rounding in fp32 cannot change any choice in any of the steps."""
    for attempt in range(100):
        out, margin = run(config, weights, attempt)
        if margin > 1e-4:
            print(f"{config.name:15} loss {out['loss'].item():.6f} aux {out['aux_loss'].item():.6f} "
                  f"z {out['z_loss'].item():.6f} norm {out['grad_norm'].item():.4f} last loss "
                  f"{out['adamw_losses'][-1].item():.6f} margin {margin:.1e} attempt {attempt}")
            return out
    sys.exit(f"{config.name}: no batch without near-ties")


def save_safetensors(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """u64 header length, JSON header padded with spaces to 8, data; the wide types first, so that all is aligned."""
    type_name = {torch.float64: "F64", torch.int32: "I32"}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": type_name[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().contiguous().numpy().tobytes())


def write_state(path: str) -> None:
    weight_sets = make_weights()
    tensors = {f"weights.{s}.{name}": t for s, weights in weight_sets.items() for name, t in weights.items()}
    for config in CONFIGS:
        for key, t in run_far_from_ties(config, weight_sets[config.weights]).items():
            assert torch.isfinite(t).all(), (config.name, key)
            tensors[f"{config.name}.{key}"] = t
    save_safetensors(path, tensors, {"configs": json.dumps([dataclasses.asdict(c) for c in CONFIGS])})
    print(f"{path}: {len(tensors)} tensors, {os.path.getsize(path)} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="The reference model: checks itself, writes the reference state.")
    parser.add_argument("--check", action="store_true", help="check the model (needs transformers >= 5)")
    parser.add_argument("--out", metavar="FILE", help="write the reference state")
    options = parser.parse_args()
    if not options.check and not options.out:
        parser.error("nothing to do: give --check, --out FILE, or both")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # the models are tiny
    if options.check:
        import check_gpt_moe

        check_gpt_moe.check()
    if options.out:
        write_state(options.out)


if __name__ == "__main__":
    main()
