"""The ways to compute one MoE layer's experts, side by side: emoe's kernels and transformers' implementations.

    python bench/expert_kernels.py [--hidden 1024 --width 512 --experts 64 --top-k 8] [--threads 1,2] [--rounds 15]

The ways take turns; the table shows medians and min-max in milliseconds, and the bytes of weights one token reads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from emoe.kernels.experts import ExpertMath, Grouping, many_tokens, one_token, rounds_rows

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ways(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Way]:
    """Return every way over the same weights; emoe's slots are views of transformers' stacked parameters."""
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.width,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    experts = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    math = ExpertMath(experts)
    slots = [
        math.bind({"gate_up_proj": experts.gate_up_proj[e], "down_proj": experts.down_proj[e]})
        for e in range(options.experts)
    ]

    def emoe(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] == 1:
            return one_token(math, hidden, [slots[e] for e in ids[0].tolist()], gates)
        grouping = Grouping(ids, options.experts, rounded=rounds_rows(hidden.device, dtype))
        return many_tokens(math, hidden, grouping, ((e, slots[e]) for e in grouping.by_count()), gates)

    def theirs(name: str) -> Way:
        def run(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            config._experts_implementation = name
            out: torch.Tensor = experts(hidden, ids, gates)
            return out

        return run

    return {"emoe": emoe, **{name: theirs(name) for name in ("eager", "grouped_mm", "batched_mm")}}


def measure(options: argparse.Namespace, dtype: torch.dtype, tokens: int) -> dict[str, list[float]]:
    """Return milliseconds per call of each way, the ways taking turns on fresh routes."""
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        every = ways(options, dtype)
        for round_ in range(options.rounds + 2):
            hidden = torch.randn(tokens, options.hidden).to(dtype)
            ids = torch.rand(tokens, options.experts).topk(options.top_k).indices
            gates = torch.rand(tokens, options.top_k).softmax(-1).to(dtype)
            for name, way in every.items():
                if name == "batched_mm" and tokens > 1:  # copies every token's experts: gigabytes
                    continue
                start = time.perf_counter()
                way(hidden, ids, gates)
                if round_ >= 2:
                    found.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
    return found


def main() -> None:
    """Print a table per dtype, thread count and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("width", 512), ("experts", 64), ("top-k", 8), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default="1,16,256")
    options = parser.parse_args()
    for dtype in (torch.bfloat16, torch.float32):
        read = options.top_k * 3 * options.hidden * options.width * dtype.itemsize
        for threads in map(int, options.threads.split(",")):
            torch.set_num_threads(threads)
            for tokens in map(int, options.tokens.split(",")):
                print(f"{str(dtype)[6:]}, {threads} threads, {tokens} tokens (one token reads {read / 1e6:.1f} MB)")
                for name, times in measure(options, dtype, tokens).items():
                    middle = statistics.median(times)
                    print(f"  {name:<11} {middle:8.3f} ms   ({min(times):.3f} - {max(times):.3f})", flush=True)


if __name__ == "__main__":
    main()
