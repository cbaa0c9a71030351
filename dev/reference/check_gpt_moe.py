"""Checks of gpt_moe.py, run by `python3 dev/reference/gpt_moe.py --check`; needs torch and transformers >= 5.

For every configuration: the MoE layers against a loop over tokens written from the definition, gradients against
finite differences, AdamW against PyTorch's, and, where transformers has the architecture, logits against its.
"""
import dataclasses
import json
import math
import sys
import tempfile
from unittest import mock

import torch
from gpt_moe import (CONFIGS, AdamW, Config, Model, build, forward_backward, global_norm, gradients, losses, make_batch,
                     make_weights, normal, save_safetensors, top_k)
from torch import Tensor


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def ties() -> float:
    score = [0.25, 0.5, 0.25, 0.5, 0.25] * 8
    want = sorted(range(40), key=lambda e: (-score[e], e))[:20]
    return 0.0 if top_k(torch.tensor([score]), 20)[0].tolist() == want else math.inf


@torch.no_grad()
def tokens_one_by_one(config: Config, weights: dict[str, Tensor]) -> float:
    """The MoE layers against a loop over tokens and experts, with Python's numbers for everything in the router."""
    m, worst = config.model, 0.0
    B, T, E, K = config.batch_size, config.seq_len, m.n_expert, m.top_k
    for index, moe in build(config, weights).moe_layers().items():
        x = normal(f"{config.name}.check.{index}", (B, T, m.d_model), 0.0, 1.0)
        out, routing = moe(x)

        want, choices, aux_loss, z_loss = torch.zeros_like(x), [], 0.0, 0.0
        taken = [0] * E  # rows of each expert
        count = [[0] * E for _ in range(B)]  # choices of each expert, by sequence
        probability = [[0.0] * E for _ in range(B)]  # sum over tokens, by sequence
        gate_weight, bias, tokens = moe.gate.weight.tolist(), moe.bias.tolist(), x.tolist()
        for b in range(B):
            for t in range(T):
                s = [sum(w * v for w, v in zip(row, tokens[b][t])) for row in gate_weight]
                total = sum(math.exp(v) for v in s)
                p = [math.exp(v) / total if m.gate == "softmax" else 1 / (1 + math.exp(-v)) for v in s]
                choice = sorted(range(E), key=lambda e: (-(p[e] + bias[e]), e))[:K]
                choices.append(choice)
                z_loss += m.z_coef * math.log(total) ** 2 / (B * T)
                for e in range(E):
                    probability[b][e] += p[e] / sum(p)
                for e in choice:
                    count[b][e] += 1
                    taken[e] += 1
                    if m.capacity_factor and taken[e] > math.ceil(m.capacity_factor * B * T * K / E):
                        continue
                    gate = p[e] / sum(p[i] for i in choice) if m.norm_topk_prob else p[e]
                    gate *= m.route_scale if m.gate == "sigmoid" else 1.0
                    want[b, t] += gate * moe.experts[e](x[b, t])
                if m.d_shared:
                    want[b, t] += moe.shared_expert(x[b, t])
        if m.balance_scope == "microbatch":  # one group of B*T tokens rather than B groups of T
            count = [[sum(column) for column in zip(*count)]]
            probability = [[sum(column) for column in zip(*probability)]]
        tokens_in_group = B * T // len(count)
        for c, q in zip(count, probability):
            f_dot_P = sum(c[e] / (tokens_in_group * K) * q[e] / tokens_in_group for e in range(E))
            aux_loss += m.aux_coef * E * f_dot_P / len(count) if m.balance == "aux" else 0.0

        if routing.top_k_index.tolist() != choices:
            return math.inf
        worst = max(worst, relative_error(out, want), abs(routing.aux_loss.item() - aux_loss),
                    abs(routing.z_loss.item() - z_loss))
    return worst


def finite_differences(config: Config, weights: dict[str, Tensor]) -> float:
    """The largest entry of every gradient against a central difference of the objective."""
    model = build(config, weights)
    tokens, targets = make_batch(config, 0)
    forward_backward(model, tokens, targets, config.micro_batches)
    gradient = {name: g.clone() for name, g in gradients(model).items()}

    @torch.no_grad()
    def objective() -> float:
        micros = [losses(model, x, y)
                  for x, y in zip(tokens.chunk(config.micro_batches), targets.chunk(config.micro_batches))]
        return sum((i.cross_entropy + i.aux_loss + i.z_loss).item() for i in micros) / config.micro_batches

    worst, h = 0.0, 1e-5
    for name, p in model.named_parameters():
        i = gradient[name].abs().argmax()
        entry, want = p.data.view(-1), gradient[name].view(-1)[i].item()
        value = entry[i].item()
        entry[i] = value + h
        above = objective()
        entry[i] = value - h
        below = objective()
        entry[i] = value
        worst = max(worst, abs((above - below) / (2 * h) - want) / max(abs(want), 1e-3))
    return worst


def adamw(config: Config, weights: dict[str, Tensor]) -> float:
    """Three updates against torch.optim.AdamW."""
    ours, theirs = build(config, weights), build(config, weights)
    tokens, targets = make_batch(config, 0)
    o = config.adamw
    our_adamw = AdamW(ours, o)
    their_adamw = torch.optim.AdamW(
        [{"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": o.weight_decay},
         {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0}],
        lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, foreach=False)
    for _ in range(3):
        forward_backward(ours, tokens, targets, config.micro_batches)
        our_adamw.step()
        forward_backward(theirs, tokens, targets, config.micro_batches)
        norm = global_norm(gradients(theirs))
        for p in theirs.parameters():
            p.grad *= min(1.0, o.clip / norm)
        their_adamw.step()
    return max(relative_error(a.detach(), b.detach()) for a, b in zip(ours.parameters(), theirs.parameters()))


def huggingface_type(m: Model) -> str | None:
    """The model_type of transformers that computes the same logits, capacity aside."""
    if m.gate != "softmax" or m.d_shared:
        return None
    if m.qk_norm:
        return "qwen3_moe"
    return "mixtral" if m.norm_topk_prob and not m.dense_layers else None


def transformers_logits(config: Config, weights: dict[str, Tensor]) -> float:
    """Logits against transformers, which reads the weights from a checkpoint directory with one tensor an expert."""
    import transformers

    m = dataclasses.replace(config.model, capacity_factor=0.0)
    model = build(dataclasses.replace(config, model=m), weights)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    options = {
        "model_type": huggingface_type(m), "vocab_size": m.vocab_size, "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layer, "num_attention_heads": m.n_head, "num_key_value_heads": m.n_kv_head,
        "head_dim": m.head_dim, "num_experts_per_tok": m.top_k, "rms_norm_eps": m.rms_norm_eps,
        "rope_theta": m.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "max_position_embeddings": 4096, "tie_word_embeddings": m.tied, "hidden_act": "silu", "torch_dtype": "float64",
        "bos_token_id": None, "eos_token_id": None,
    }
    if huggingface_type(m) == "qwen3_moe":
        kind = transformers.Qwen3MoeForCausalLM
        options |= {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": m.n_expert,
                    "intermediate_size": m.d_dense or m.d_expert, "moe_intermediate_size": m.d_expert,
                    "norm_topk_prob": m.norm_topk_prob, "decoder_sparse_step": 1,
                    "mlp_only_layers": list(m.dense_layers), "attention_bias": False, "use_sliding_window": False}
    else:
        kind = transformers.MixtralForCausalLM
        options |= {"architectures": ["MixtralForCausalLM"], "num_local_experts": m.n_expert,
                    "intermediate_size": m.d_expert, "sliding_window": None}
        for ours, theirs in ((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"),
                             ("down_proj", "w2")):
            tensors = {name.replace(ours, theirs): t for name, t in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_safetensors(f"{folder}/model.safetensors", tensors, {})
        with open(f"{folder}/config.json", "w") as file:
            json.dump(options, file)
        other = kind.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager",
                                     experts_implementation="eager").eval()

    # transformers computes norms, softmax and RoPE in float32 whatever the model's type: let float32 mean float64.
    other.model.rotary_emb.inv_freq = m.rope_theta ** (-2 * torch.arange(m.head_dim // 2) / m.head_dim)
    tokens, _ = make_batch(config, 0)
    with torch.no_grad(), mock.patch.object(torch, "float32", torch.float64), \
            mock.patch.object(torch, "float", torch.float64), \
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        logits = other(input_ids=tokens).logits
    with torch.no_grad():
        return relative_error(model(tokens)[0], logits)


def check() -> None:
    weight_sets = make_weights()
    failures = 0

    def report(name: str, what: str, error: float, limit: float) -> None:
        nonlocal failures
        good = error <= limit  # NaN is not
        failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {name:15} {what:45} {error:.1e} (limit {limit:.0e})", flush=True)

    report("top_k", "ties go to the lower index", ties(), 0)
    for config in CONFIGS:
        weights = weight_sets[config.weights]
        report(config.name, "MoE layers against a loop over tokens", tokens_one_by_one(config, weights), 1e-12)
        report(config.name, "gradients against finite differences", finite_differences(config, weights), 1e-6)
        report(config.name, "AdamW against torch.optim.AdamW", adamw(config, weights), 1e-9)
        kind = huggingface_type(config.model)
        if kind is not None:
            report(config.name, f"logits against transformers' {kind}", transformers_logits(config, weights), 1e-10)
    if failures:
        sys.exit(f"{failures} checks failed")
    print("all checks passed")
