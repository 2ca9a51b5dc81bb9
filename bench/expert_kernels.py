"""The ways to compute one MoE layer's experts, side by side: emoe's kernels, transformers' and others that were tried.

    python bench/expert_kernels.py [--shapes qwen3,gpt-oss] [--threads 1,2] [--tokens 1,4,16] [--rounds 15]

The ways take turns on fresh routes; with one token "numba" (where installed) and "compiled" (torch.compile's C++) take
part, and with --quantised torch's own weight-only kernels beside emoe's int8 and int4. "sum" adds up as many bytes as
the routed experts have: what memory gives. Medians and min-max in milliseconds, and GB/s of weights at the median.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from emoe.kernels.choice import Kernel, kernel_of
from emoe.kernels.chunks import grouped, many_tokens
from emoe.kernels.experts import ExpertMath, Weights, one_token
from emoe.kernels.pages import prefer_huge_pages
from emoe.kernels.quantised import GROUP, QuantisedMatrix

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [tokens, hidden], ids [tokens, k], gates [tokens, k]) -> [tokens, hidden]"""

MEMORY_BYTES = 1 << 30
"""Of experts, fewer than the model has where they are large: more than any cache holds."""


class Layer(NamedTuple):
    """A layer of a published model: hidden size, expert width, experts, chosen, and whether it is built as gpt-oss'."""

    hidden: int
    width: int
    experts: int
    top_k: int
    gpt_oss: bool = False


SHAPES = {
    "gpt-oss": Layer(2880, 2880, 32, 4, True),
    "olmoe": Layer(2048, 1024, 64, 8),
    "qwen3": Layer(2048, 768, 128, 8),
    "mixtral": Layer(4096, 14336, 8, 2),
    "2.5gb": Layer(1024, 512, 64, 8),
    "nano": Layer(256, 128, 16, 2),
}


def module_of(layer: Layer, count: int, dtype: torch.dtype) -> nn.Module:
    """Transformers' experts module with random weights on huge pages."""
    with torch.device("meta"):
        if layer.gpt_oss:
            config: Any = GptOssConfig(hidden_size=layer.hidden, intermediate_size=layer.width, num_local_experts=count)
            module: nn.Module = GptOssExperts(config)
        else:
            config = Qwen3MoeConfig(hidden_size=layer.hidden, moe_intermediate_size=layer.width, num_experts=count)
            module = Qwen3MoeExperts(config)
    noise = (torch.randn(1 << 20) * 0.02).to(dtype)
    for name, parameter in list(module.named_parameters()):
        memory = torch.empty(parameter.numel(), dtype=dtype)
        prefer_huge_pages(memory)
        for start in range(0, memory.numel(), noise.numel()):
            part = memory[start : start + noise.numel()]
            part.copy_(noise[: part.numel()])
        module.register_parameter(name, nn.Parameter(memory.view(parameter.shape), requires_grad=False))
    return module


def ways(layer: Layer, count: int, dtype: torch.dtype, tokens: int, quantised: bool) -> dict[str, Way]:
    """Every way over the same weights; emoe's slots are views of transformers' stacked parameters."""
    module = module_of(layer, count, dtype)
    slots = [{name: part[e] for name, part in module.named_parameters()} for e in range(count)]
    kernel = kernel_of("cpu", dtype)
    flat = [part.view(-1) for part in module.parameters() if part.dim() == 3]
    each = [part.numel() // count for part in flat]

    def plain_sum(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        for e in ids.unique().tolist():
            for part, size in zip(flat, each, strict=True):
                part[e * size : (e + 1) * size].view(torch.float32).sum()
        return hidden

    found: dict[str, Way] = {"sum": plain_sum, "torch": emoe_way(module, slots, Kernel("torch", ""))}
    if kernel.calls is not None:
        found["native"] = emoe_way(module, slots, kernel)

    def theirs(name: str) -> Way:
        def run(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            module.config._experts_implementation = name  # type: ignore[union-attr]
            out: torch.Tensor = module(hidden, ids, gates)
            return out

        return run

    found |= {name: theirs(name) for name in ("eager", "grouped_mm")}
    if tokens == 1 and not layer.gpt_oss and dtype is torch.bfloat16:
        found["compiled"] = compiled_way(slots)
        if importlib.util.find_spec("numba") is not None:
            found["numba"] = numba_way(slots)
    if quantised and dtype is torch.bfloat16:
        found |= quantised_ways(layer, module, slots, kernel)
    return found


def emoe_way(module: nn.Module, slots: list[dict[str, torch.Tensor]], kernel: Kernel) -> Way:
    """emoe's kernels, one token or many."""
    math = ExpertMath(module, kernel)
    weights = [math.bind(slot) for slot in slots]

    def run(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return run_emoe(math, weights, hidden, ids, gates)

    return run


def run_emoe(
    math: ExpertMath, weights: list[Weights], hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """As a bound model does."""
    if hidden.shape[0] == 1:
        return one_token(math, hidden, [weights[e] for e in ids[0].tolist()], gates)
    grouping = grouped(math, weights[0], hidden.dtype, ids, len(weights))
    return many_tokens(math, hidden, grouping, ((e, weights[e]) for e in grouping.by_count()), gates)


def compiled_way(slots: list[dict[str, torch.Tensor]]) -> Way:
    """One expert by torch.compile's C++ back end: products written as sums, which it fuses and vectorises."""

    @torch.compile(dynamic=False)
    def expert(hidden: torch.Tensor, first: torch.Tensor, down: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        inner = (first.float() * hidden.float()).sum(-1).bfloat16()
        left, right = inner.chunk(2)
        return (down.float() * (nn.functional.silu(left) * right).float()).sum(-1) * gate

    def run(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        chosen = ids[0].tolist()
        outs = [
            expert(hidden, slots[e]["gate_up_proj"], slots[e]["down_proj"], g)
            for e, g in zip(chosen, gates[0], strict=True)
        ]
        return torch.stack(outs).sum(0, keepdim=True).bfloat16()

    return run


def numba_way(slots: list[dict[str, torch.Tensor]]) -> Way:
    """Products by numba over bfloat16 bits, as many threads as torch has; the rest by torch."""
    import numba
    from numba.core import types
    from numba.extending import intrinsic

    @intrinsic
    def as_float(context: Any, bits: Any) -> Any:
        def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(types.float32))

        return types.float32(types.uint32), make

    @numba.njit(fastmath=True, parallel=True)
    def product(w: Any, x: Any, y: Any) -> None:
        for r in numba.prange(w.shape[0]):
            total = numba.float32(0)
            for c in range(w.shape[1]):
                total += as_float(numba.uint32(w[r, c]) << numba.uint32(16)) * x[c]
            y[r] = total

    bits = [{name: part.view(torch.uint16).numpy() for name, part in slot.items()} for slot in slots]

    def run(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        x = hidden[0].float().numpy()
        outer = torch.empty(ids.shape[1], hidden.shape[1])
        inner = torch.empty(ids.shape[1], bits[0]["gate_up_proj"].shape[0])
        chosen = ids[0].tolist()
        for j, e in enumerate(chosen):
            product(bits[e]["gate_up_proj"], x, inner[j].numpy())
        left, right = inner.bfloat16().chunk(2, dim=-1)
        gated = (nn.functional.silu(left) * right).float()
        for j, e in enumerate(chosen):
            product(bits[e]["down_proj"], gated[j].numpy(), outer[j].numpy())
        return (outer * gates[0].float()[:, None]).sum(0, keepdim=True).bfloat16()

    return run


def quantised_ways(
    layer: Layer, module: nn.Module, slots: list[dict[str, torch.Tensor]], kernel: Kernel
) -> dict[str, Way]:
    """int8 and int4 experts (random integers) by emoe's kernels, and one after another by torch's weight-only ones."""
    sizes = {"gate_up_proj": (2 * layer.width, layer.hidden), "down_proj": (layer.hidden, layer.width)}
    biases = [{name: part for name, part in slot.items() if name.endswith("_bias")} for slot in slots]
    found: dict[str, Way] = {}
    for bits in (8, 4):
        packed = []
        for own in biases:
            slot = dict(own)
            for name, (rows, columns) in sizes.items():
                if bits == 8:
                    slot[name] = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
                    slot[f"{name}_scale"] = torch.rand(rows) * 1e-3
                else:
                    slot[name] = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
                    slot[f"{name}_scale"] = (torch.rand(rows, columns // GROUP) * 1e-2).half()
            packed.append(slot)
        found[f"torch int{bits}"] = torch_quantised_way(bits, packed, module)
        if kernel.calls is not None:
            found[f"native int{bits}"] = emoe_way(module, packed, kernel)
    return found


def torch_quantised_way(bits: int, packed: list[dict[str, torch.Tensor]], module: nn.Module) -> Way:
    """torch's own weight-only products of the same values (int4: scales and zeros in its layout), expert by expert."""
    activate: Any = module._apply_gate
    held: list[dict[str, Any]] = []
    for slot in packed:
        ready: dict[str, Any] = {}
        for name in ("gate_up_proj", "down_proj"):
            matrix = QuantisedMatrix(slot[name], slot[f"{name}_scale"])
            if bits == 8:
                ready[name] = (slot[name], matrix.scale.bfloat16())
            else:
                columns, rows = matrix.shape
                nibbles = torch.stack((slot[name] & 15, slot[name] >> 4), dim=-1).view(rows, columns).int()
                scales = matrix.scale.t().bfloat16()
                both = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()
                ready[name] = (torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1), both)
        held.append(ready)

    def product(x: torch.Tensor, weight: Any) -> torch.Tensor:
        if bits == 8:
            return torch.ops.aten._weight_int8pack_mm(x, *weight)  # type: ignore[no-any-return]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight[0], GROUP, weight[1])  # type: ignore[no-any-return]

    def run(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for e in ids.unique().tolist():
            rows, choice = (ids == e).nonzero(as_tuple=True)
            inner = activate(product(hidden[rows], held[e]["gate_up_proj"]))
            out.index_add_(0, rows, product(inner, held[e]["down_proj"]) * gates[rows, choice, None])
        return out

    return run


def measure(
    layer: Layer, count: int, dtype: torch.dtype, threads: int, tokens: int, options: argparse.Namespace
) -> dict[str, list[tuple[float, int]]]:
    """(milliseconds, distinct experts read) per call of each way, the ways taking turns on fresh routes."""
    found: dict[str, list[tuple[float, int]]] = {}
    with torch.no_grad():
        every = ways(layer, count, dtype, tokens, options.quantised)
        for round_ in range(options.rounds + 2):
            for name, way in every.items():
                hidden = torch.randn(tokens, layer.hidden).to(dtype)
                ids = torch.rand(tokens, count).topk(min(layer.top_k, count)).indices
                gates = torch.rand(ids.shape).softmax(-1).to(dtype)
                torch.set_num_threads(threads)  # numba changes it
                start = time.perf_counter()
                way(hidden, ids, gates)
                if round_ >= 2:
                    found.setdefault(name, []).append(((time.perf_counter() - start) * 1e3, len(ids.unique())))
    return found


def main() -> None:
    """Print a table per shape, dtype, thread count and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="bfloat16", help="bfloat16,float32")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quantised", action="store_true")
    options = parser.parse_args()
    for shape in options.shapes.split(","):
        layer = SHAPES[shape]
        for dtype in (getattr(torch, name) for name in options.dtypes.split(",")):
            expert = 3 * layer.hidden * layer.width
            count = max(layer.top_k, min(layer.experts, MEMORY_BYTES // (expert * dtype.itemsize)))
            for threads in map(int, options.threads.split(",")):
                torch.set_num_threads(threads)
                for tokens in map(int, options.tokens.split(",")):
                    print(f"{shape}: {str(dtype)[6:]}, {threads} threads, {tokens} tokens, {count} experts")
                    for name, calls in measure(layer, count, dtype, threads, tokens, options).items():
                        times = [ms for ms, _ in calls]
                        nbytes = {"int8": 1.0, "int4": 0.5625}.get(name.rpartition(" ")[2], dtype.itemsize) * expert
                        rate = statistics.median(n * nbytes / ms / 1e6 for ms, n in calls)
                        middle, spread = statistics.median(times), f"({min(times):.3f} - {max(times):.3f})"
                        print(f"  {name:<11} {middle:8.3f} ms  {rate:5.1f} GB/s   {spread}", flush=True)


if __name__ == "__main__":
    main()
