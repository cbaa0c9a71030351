#!/usr/bin/env python3
"""The MoE layers of other projects on the same GPU, at the shapes of dev/moe_shapes.h, to be put beside build/moe_layer.

One layer: bf16, router with fp32 softmax and top-k renormalised over the chosen, SwiGLU experts. Forward without
gradients, and forward with the gradients of x, of the router's weight and of the experts' weights. Operations counted:
6*T*K*d*n forward, 18*T*K*d*n both. Before a peer is timed, its output and all its gradients are compared with a loop over
the experts in fp32 on a small layer. Runs are queued without waiting between them, so that launches hide behind kernels.

saved_MiB is what is allocated between forward and backward, the output included (x, of the same size, is not);
transient_MiB the peak above that, weight gradients left out.

torch-bmm is no peer but a ceiling: the products alone, balanced, rows already gathered, cuBLAS batched, no activation.
"""
import argparse
import contextlib
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    torch, no_torch = None, error

SHAPES_HEADER = Path(__file__).resolve().parent.parent / "moe_shapes.h"
CHECK_SHAPE = (1024, 256, 256, 8, 2)  # T, d, n, E, K
CHECK_LIMIT = 0.05  # |got - expected| / |expected|, Euclidean; a wrong layout is near 1, bf16 rounding near 0.01


class NotInstalled(Exception):
    pass


def moe_shapes():
    """name -> (T, d, n, E, K), from the header that build/moe_layer is compiled with."""
    number = r",\s*(\d+)"
    rows = re.findall(r'\{"([\w.-]+)"' + 5 * number + r"\}", SHAPES_HEADER.read_text())
    return {name: tuple(map(int, numbers)) for name, *numbers in rows}


# ---- a layer's weights and inputs, and what it has to compute ----


class Weights:
    """router (E,d), gate and up (E,n,d), down (E,d,n), in bf16. Every peer makes its own layout of them."""

    def __init__(self, d, n, E, K, scale):
        def normal(*shape):
            return (scale * torch.randn(*shape, device="cuda")).bfloat16()

        self.d, self.n, self.E, self.K = d, n, E, K
        self.router = normal(E, d)
        self.gate, self.up, self.down = normal(E, n, d), normal(E, n, d), normal(E, d, n)


def route(x, router, K):
    """Gates (T,K) in x's type and experts (T,K): softmax in fp32, the K largest, renormalised."""
    p, chosen = torch.topk(torch.softmax((x @ router.t()).float(), -1), K, -1)
    return (p / p.sum(-1, keepdim=True)).to(x.dtype), chosen


def loop_over_experts(x, router, gate, up, down, K):
    p, chosen = route(x, router, K)
    out = torch.zeros_like(x)
    for e in range(gate.size(0)):
        token, k = torch.where(chosen == e)
        rows = x[token]
        y = (F.silu(rows @ gate[e].t()) * (rows @ up[e].t())) @ down[e].t()
        out = out.index_add(0, token, y * p[token, k, None])
    return out


def clear_choices(router, T, K):
    """x (T,d) of tokens whose choice of experts does not hang on a rounding of the logits."""
    x = torch.randn(4 * T, router.size(1), device="cuda").bfloat16()
    logits = (x.float() @ router.float().t()).sort(-1, descending=True).values
    x = x[logits[:, K - 1] - logits[:, K] > 0.05]
    assert x.size(0) >= T
    return x[:T].contiguous()


# ---- the peers. parameters: router first. gradients(): of the experts, in the layout of Weights ----


def parameter(t):
    return t.detach().clone().contiguous().requires_grad_()


def experts_order(chosen, E):
    """Routed rows sorted by expert: order (R), and where each expert's rows end (E)."""
    flat = chosen.flatten()
    ends = torch.histc(flat.float(), bins=E, min=0, max=E - 1).cumsum(0).to(torch.int32)
    return torch.argsort(flat, stable=True), ends


class TorchGrouped:
    """Grouped products as model files write them: gather by indexing, index_add into the output."""

    compiled = False
    packages = ("torch",)

    def __init__(self, w):
        self.E, self.K = w.E, w.K
        w13 = parameter(torch.cat((w.gate, w.up), 1).mT)  # (E,d,2n)
        self.parameters = [parameter(w.router), w13, parameter(w.down.mT)]
        self.product = getattr(torch, "_grouped_mm", None) or F.grouped_mm  # the public name since 2.10
        self.run = torch.compile(self.layer, dynamic=False) if self.compiled else self.layer

    def layer(self, x, router, w13, w2):
        p, chosen = route(x, router, self.K)
        order, ends = experts_order(chosen, self.E)
        token = order // self.K
        gate, up = self.product(x[token], w13, offs=ends).chunk(2, -1)
        y = self.product(F.silu(gate) * up, w2, offs=ends) * p.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, y)

    def forward(self, x):
        return self.run(x, *self.parameters)

    def gradients(self, w13, w2):
        return (*w13.mT.chunk(2, 1), w2.mT)


class TorchGroupedCompiled(TorchGrouped):
    compiled = True


if torch:

    class GatherTokens(torch.autograd.Function):
        """x (T,d) -> its rows in the experts' order (R,d)."""

        @staticmethod
        def forward(ctx, x, order, inverse, K):
            ctx.save_for_backward(inverse)
            ctx.K = K
            return x[order // K]

        @staticmethod
        def backward(ctx, grad):
            (inverse,) = ctx.saved_tensors
            return grad[inverse].view(-1, ctx.K, grad.size(-1)).sum(1), None, None, None

    class TokensOrder(torch.autograd.Function):
        """Rows in the experts' order -> in the tokens' order (R,d)."""

        @staticmethod
        def forward(ctx, y, order, inverse):
            ctx.save_for_backward(order)
            return y[inverse]

        @staticmethod
        def backward(ctx, grad):
            (order,) = ctx.saved_tensors
            return grad[order], None, None


class TorchGatherCompiled(TorchGroupedCompiled):
    """The same with a permutation and its inverse instead of index_add: no atomics, forward or backward."""

    def layer(self, x, router, w13, w2):
        p, chosen = route(x, router, self.K)
        order, ends = experts_order(chosen, self.E)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        gate, up = self.product(GatherTokens.apply(x, order, inverse, self.K), w13, offs=ends).chunk(2, -1)
        y = TokensOrder.apply(self.product(F.silu(gate) * up, w2, offs=ends), order, inverse)
        return (y.view(-1, self.K, x.size(1)) * p.unsqueeze(-1)).sum(1)


class SonicMoE:
    """Routes by itself: softmax over the chosen logits, which is the renormalised softmax."""

    packages = ("sonic-moe", "quack-kernels")
    every_config = False

    def __init__(self, w):
        os.environ.setdefault("QUACK_COMPILE_WORKERS", str(os.cpu_count()))  # its autotuner compiles side by side
        try:
            from quack import gemm_interface
            from sonicmoe import moe_TC_softmax_topk_layer
        except Exception as error:
            raise NotInstalled(f"{error}; pip install sonic-moe") from None
        for kernel in vars(gemm_interface).values():
            prune = getattr(kernel, "early_config_prune", None)
            if prune and not isinstance(prune, functools.partial):
                kernel.early_config_prune = functools.partial(SonicMoE.configs, prune)
        self.layer, self.K = moe_TC_softmax_topk_layer, w.K
        interleaved = torch.stack((w.gate, w.up), 2).flatten(1, 2)  # (E,2n,d): gate row, up row, gate row, ...
        self.parameters = [parameter(w.router), parameter(interleaved), parameter(w.down)]

    @staticmethod
    def configs(prune, configs, args, **others):
        """The configurations that its autotuner tries. All of them are up to 44 kernels a product, and one takes ten
        seconds to compile; these three are the library's default and the two largest tiles."""

        def large(config):
            c = config.kwargs["config"]
            return (c.tile_m, c.tile_n, c.pingpong) in ((128, 192, True), (128, 256, False), (256, 128, False))

        valid = prune(configs, args, **others)
        tiles = [c for c in valid if large(c) and c.kwargs["config"].cluster_m == 2 and not c.kwargs["config"].swap_ab]
        return valid if SonicMoE.every_config else tiles or valid

    def forward(self, x):
        router, w13, w2 = self.parameters
        inference = not torch.is_grad_enabled()
        stream = torch.cuda.current_stream().cuda_stream
        w13, w2 = w13.permute(1, 2, 0), w2.permute(1, 2, 0)
        return self.layer(x, router, w13, None, w2, None, self.K, stream, "swiglu", inference)[0]

    def gradients(self, w13, w2):
        return (*w13.unflatten(1, (-1, 2)).unbind(2), w2)


class ScatterMoE:
    packages = ("scattermoe",)

    def __init__(self, w):
        try:
            from scattermoe.mlp import GLUMLP
        except Exception as error:
            raise NotInstalled(f"{error}; it is not on PyPI: install github.com/shawntan/scattermoe") from None
        self.K = w.K
        self.experts = GLUMLP(w.d, w.n, w.E, w.K).to("cuda", torch.bfloat16)
        up_gate, down = self.experts.experts.weight, self.experts.output_experts.weight  # (E,2n,d), (E,d,n)
        with torch.no_grad():
            up_gate.copy_(torch.cat((w.up, w.gate), 1))  # it activates the second half
            down.copy_(w.down)
        self.parameters = [parameter(w.router), up_gate, down]

    def forward(self, x):
        return self.experts(x, *route(x, self.parameters[0], self.K))

    def gradients(self, up_gate, down):
        up, gate = up_gate.chunk(2, 1)
        return gate, up, down


class MegaBlocks:
    """Its dropless experts with grouped products; our router, since its own takes the softmax in bf16."""

    packages = ("megablocks", "grouped_gemm")

    def __init__(self, w):
        try:
            import grouped_gemm  # noqa: F401
            from megablocks.layers.arguments import Arguments
            from megablocks.layers.dmoe import ParallelDroplessMLP
        except Exception as error:
            raise NotInstalled(f"{error}; on PyPI as source only: pip install megablocks[gg] with nvcc") from None
        self.E, self.K = w.E, w.K
        self.experts = ParallelDroplessMLP(Arguments(
            hidden_size=w.d, ffn_hidden_size=w.n, moe_num_experts=w.E, moe_top_k=w.K, moe_loss_weight=0, bias=False,
            return_bias=False, activation_fn=F.silu, mlp_type="glu", mlp_impl="grouped", fp16=False, bf16=True))
        mlp = self.experts.mlp  # w1, v1, w2 are all (E*n,d): gate, up, and down transposed
        with torch.no_grad():
            for to, weight in ((mlp.w1, w.gate), (mlp.v1, w.up), (mlp.w2, w.down.mT)):
                to.copy_(weight.reshape(to.shape))
        self.parameters = [parameter(w.router), mlp.w1, mlp.v1, mlp.w2]

    def forward(self, x):
        p, chosen = route(x, self.parameters[0], self.K)
        return self.experts(x.unsqueeze(0), None, p, chosen).squeeze(0)

    def gradients(self, *grads):
        gate, up, down = (g.view(self.E, -1, g.size(1)) for g in grads)
        return gate, up, down.mT


class Liger:
    packages = ("liger-kernel",)
    every_config = False

    def __init__(self, w):
        try:
            from liger_kernel.ops import fused_moe_kernels
            from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
        except Exception as error:
            raise NotInstalled(f"{error}; pip install liger-kernel") from None
        self.layer, self.K = LigerFusedMoEFunction.apply, w.K
        self.parameters = [parameter(w.router), parameter(torch.cat((w.gate, w.up), 1)), parameter(w.down)]
        for kernel in vars(fused_moe_kernels).values():
            if hasattr(kernel, "early_config_prune"):
                kernel.early_config_prune = functools.partial(Liger.configs, kernel)

    @staticmethod
    def configs(kernel, configs, args, **others):
        """The configurations that its autotuner tries. All of them are 240 kernels a shape, minutes of compilation; the
        large tiles, which suit these shapes, are 56. They are compiled side by side, where Triton can do that."""

        def large(config):
            tile = config.kwargs
            if "BLOCK_H" in tile:  # the gather
                return tile["BLOCK_H"] >= 256 and tile["BLOCK_K"] in (2, 8)
            if "BLOCK_M" in tile:  # weight gradients
                return tile["BLOCK_M"] == tile["BLOCK_N"] == 128
            return tile["BLOCK_N"] == 128 and config.num_stages in (3, 4)

        kept = configs if Liger.every_config else [c for c in configs if large(c)] or configs
        with contextlib.suppress(Exception):  # a head start only: the autotuner compiles what is missing
            import triton

            options = {k: v for k, v in others.items() if k != "warmup"}
            with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
                for config in kept:
                    kernel.fn.warmup(*args.values(), **options, **config.all_kwargs())
        return kept

    def forward(self, x):
        router, w13, w2 = self.parameters
        p, chosen = route(x, router, self.K)
        return self.layer(x, w13, w2, chosen.to(torch.int32), p)

    def gradients(self, w13, w2):
        return (*w13.chunk(2, 1), w2)


# In order of trust: one that loses the GPU's context ends the run.
PEERS = {
    "torch-bmm": None,
    "torch-grouped": TorchGrouped,
    "torch-grouped-compiled": TorchGroupedCompiled,
    "torch-gather-compiled": TorchGatherCompiled,
    "liger": Liger,
    "scattermoe": ScatterMoE,
    "megablocks": MegaBlocks,
    "sonicmoe": SonicMoE,
}


# ---- checks and measurements ----


def check(make):
    """The largest relative error of the output and the gradients, and what it is of."""
    T, d, n, E, K = CHECK_SHAPE
    w = Weights(d, n, E, K, d**-0.5)
    x = clear_choices(w.router, T, K).requires_grad_()
    dout = torch.randn_like(x)

    exact = [t.detach().float().requires_grad_() for t in (x, w.router, w.gate, w.up, w.down)]
    out_expected = loop_over_experts(*exact, K)
    expected = [out_expected, *torch.autograd.grad(out_expected, exact, dout.float())]

    peer = make(w)
    out = peer.forward(x)
    dx, drouter, *dexperts = torch.autograd.grad(out, [x, *peer.parameters], dout)
    got = [out, dx, drouter, *peer.gradients(*dexperts)]
    with torch.no_grad():
        without = peer.forward(x)  # may be another kernel
    errors = {}
    names = ("out", "dx", "drouter", "dgate", "dup", "ddown", "forward alone")
    for name, a, b in zip(names, [*got, without], [*expected, out_expected]):
        assert a.shape == b.shape, f"{name} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        errors[name] = ((a.detach().float() - b.detach()).norm() / b.detach().norm()).item()
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN before all
    return errors[worst], worst


def times_ms(run, runs, warm_up=4):
    """Median, 10th and 90th percentile."""
    for _ in range(warm_up):
        run()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    ms = sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))
    return ms[len(ms) // 2], ms[len(ms) // 10], ms[len(ms) * 9 // 10]


def rates(shape, forward, both):
    T, d, n, E, K = shape
    flops = 6.0 * T * K * d * n
    ms, (both_ms, p10, p90) = forward[0], both
    return {"fwd_ms": round(ms, 4), "fwdbwd_ms": round(both_ms, 4), "p10_ms": round(p10, 4), "p90_ms": round(p90, 4),
            "fwd_tflops": round(flops / ms * 1e-9, 1), "fwdbwd_tflops": round(3 * flops / both_ms * 1e-9, 1)}


def measure(make, shape, runs):
    T, d, n, E, K = shape
    peer = make(Weights(d, n, E, K, 0.02))
    x = torch.randn(T, d, device="cuda").bfloat16().requires_grad_()
    dout = torch.randn_like(x)
    inputs = [x, *peer.parameters]

    def both():
        torch.autograd.grad(peer.forward(x), inputs, dout)

    @torch.no_grad()
    def forward():
        peer.forward(x)

    both()  # tunes and compiles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = peer.forward(x)
    saved = torch.cuda.memory_allocated() - before
    grads = torch.autograd.grad(out, inputs, dout)
    peak = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads[1:])
    del out, grads
    return {**rates(shape, times_ms(forward, runs), times_ms(both, runs)), "saved_MiB": round(saved / 2**20, 1),
            "transient_MiB": round(max(0, peak - saved) / 2**20, 1)}


def measure_bmm(shape, runs):
    T, d, n, E, K = shape
    if T * K % E:
        raise ValueError(f"{T * K} rows do not divide among {E} experts")

    def normal(*sizes):
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    R = T * K // E
    x, h, a, dy = normal(E, R, d), normal(E, R, 2 * n), normal(E, R, n), normal(E, R, d)
    w13, w2 = normal(E, d, 2 * n), normal(E, n, d)
    y, h_out, a_out, dw13, dw2 = map(torch.empty_like, (dy, h, a, w13, w2))

    def forward():
        torch.bmm(x, w13, out=h_out)
        torch.bmm(a, w2, out=y)

    def both():
        forward()
        torch.bmm(dy, w2.mT, out=a_out)
        torch.bmm(a.mT, dy, out=dw2)
        torch.bmm(h, w13.mT, out=y)
        torch.bmm(x.mT, h, out=dw13)

    return rates(shape, times_ms(forward, runs), times_ms(both, runs))


def version_of(packages):
    found = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def one_line(error):
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


def free_memory():
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def run_peer(name, shapes, runs, write):
    """Whether all went well: being absent counts as well, being wrong does not."""
    make, start, good = PEERS[name], time.monotonic(), True
    if make:
        torch.manual_seed(1)
        try:
            error, of = check(make)
        except NotInstalled as reason:
            print(f"peer {name}: not installed ({reason})".replace("\n", " "), flush=True)
            return True
        except Exception as problem:
            print(f"peer {name}: failed its check: {one_line(problem)}; not timed", flush=True)
            free_memory()
            return False
        right = error <= CHECK_LIMIT
        verdict = "" if right else ": WRONG, not timed"
        print(f"peer {name}: largest error {error:.4f} ({of}), limit {CHECK_LIMIT}{verdict}", flush=True)
        free_memory()
        if not right:
            return False
    for shape, sizes in shapes.items():
        torch.manual_seed(2)
        try:
            row = measure(make, sizes, runs) if make else measure_bmm(sizes, runs)
        except Exception as problem:
            print(f"peer {name} {shape}: failed: {one_line(problem)}", flush=True)
            good = False
        else:
            version = version_of(make.packages if make else ("torch",))
            write({"bench": "moe_layer", "shape": shape, "impl": name, **row, "version": version})
            print(f"peer {name} {shape}: forward {row['fwd_ms']:.3f} ms {row['fwd_tflops']:.1f} TF | forward+backward "
                  f"{row['fwdbwd_ms']:.3f} ms {row['fwdbwd_tflops']:.1f} TF | saved {row.get('saved_MiB', '-')} MiB", flush=True)
        free_memory()
    print(f"peer {name}: {time.monotonic() - start:.0f} s in all", flush=True)
    return good


def chosen_of(text, known, what):
    names = [s for s in text.split(",") if s]
    for name in names:
        if name not in known:
            sys.exit(f"peers: --{what} '{name}' is not one of {', '.join(known)}")
    return [name for name in known if name in names] if names else list(known)


def main():
    parser = argparse.ArgumentParser(description="Times other projects' MoE layers at the shapes of dev/moe_shapes.h.")
    parser.add_argument("--shapes", default="", metavar="A,B", help="only these shapes; default all")
    parser.add_argument("--peers", default="", metavar="A,B", help=f"only these of {', '.join(PEERS)}")
    parser.add_argument("--json", metavar="FILE", help="append one line of results a measurement")
    parser.add_argument("--run-id", default=os.environ.get("RUN_ID") or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
                        help="marks the lines of one run; default $RUN_ID, else the time")
    parser.add_argument("--quick", action="store_true", help="few timed runs")
    parser.add_argument("--full-tune", action="store_true", help="let the autotuners of Liger and SonicMoE try all their configurations")
    o = parser.parse_args()

    known = moe_shapes()
    if not known:
        sys.exit(f"peers: found no shape in {SHAPES_HEADER}")
    shapes = {name: known[name] for name in chosen_of(o.shapes, known, "shapes")}
    peers = chosen_of(o.peers, PEERS, "peers")
    if torch is None:
        sys.exit(f"peers: PyTorch is not installed ({no_torch})")
    if not torch.cuda.is_available():
        sys.exit("peers: PyTorch finds no GPU")
    Liger.every_config = SonicMoE.every_config = o.full_tune
    about = {"gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "run_id": o.run_id}
    print(f"{about['gpu']}, PyTorch {torch.__version__}, run {o.run_id}", flush=True)

    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(o.json, "a")) if o.json else None
        except OSError as error:
            sys.exit(f"peers: cannot write {o.json}: {error.strerror}")

        def write(row):
            if file:
                file.write(json.dumps({**row, **about}) + "\n")
                file.flush()

        good = True
        for i, name in enumerate(peers):
            try:
                good &= run_peer(name, shapes, 5 if o.quick else 25, write)
            except Exception as error:  # what run_peer() cannot get over
                left = f"; not run: {', '.join(peers[i + 1:])}" if peers[i + 1:] else ""
                sys.exit(f"peers: {name} left the GPU unusable ({one_line(error)}){left}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
