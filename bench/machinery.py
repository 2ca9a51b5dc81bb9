"""What does the machinery cost when everything fits? Emoe beside its own kernels without it, in one process.

    python -m bench.machinery [MODEL] [--rounds 9] [--steps 16] [--context 256] [-t 1]

Both run the same model with every expert resident, and the same kernels. "bare" calls them straight from the experts
modules: no slots, no table, no counters, no look at the pass. Rounds take turns; a round decodes `--steps` given tokens
after the same prompt. Prints the medians of a token's milliseconds, and the ratio of each round's two (invariant 6: the
machinery costs under 2 %). Logits of both must be the same to the last bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import cast

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import emoe
from emoe.kernels.chunks import grouped, many_tokens
from emoe.kernels.experts import Weights, one_token
from emoe.model import close
from emoe.model.bind import binding_of
from emoe.model.layer import LayerRuntime
from emoe.model.runtime import IMPLEMENTATION

BARE = "emoe_bare"


def bare_forward(self: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The experts of a layer that lie where they lie."""
    layer, weights = cast(LayerRuntime, self._emoe_layer), cast(list[Weights], self._emoe_bare)
    if hidden.shape[0] == 1:
        return one_token(layer.math, hidden, [weights[e] for e in ids.tolist()[0]], gates)
    grouping = grouped(layer.math, weights[0], hidden.dtype, ids, layer.experts)
    ready = ((e, weights[e]) for e in grouping.by_count())
    return many_tokens(layer.math, hidden, grouping, ready, gates, layer.owner.workspace)


@torch.inference_mode()
def token_s(model: nn.Module, ids: torch.Tensor, steps: int) -> tuple[float, torch.Tensor]:
    """Median seconds of a step after the prompt, and the last logits."""
    out = model(input_ids=ids[:, :-steps], use_cache=True, logits_to_keep=1)
    times = []
    for at in range(ids.shape[1] - steps, ids.shape[1]):
        start = time.perf_counter()
        out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times), out.logits


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint's folder (default: emoe-nano)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("-t", "--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, _ = emoe.load(args.model)
    runtime = binding_of(model).runtime
    for module in model.modules():
        layer = getattr(module, "_emoe_layer", None)
        if layer is not None:
            table = layer.pool.table
            module._emoe_bare = [layer.weights[table.find((layer.layer, e))] for e in range(layer.experts)]
    ALL_EXPERTS_FUNCTIONS.register(BARE, bare_forward)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (1, args.context + args.steps), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {"emoe": [], "bare": []}
    for number in range(args.rounds + 1):
        logits = {}
        for name in sorted(found, reverse=bool(number % 2)):
            model.config._experts_implementation = BARE if name == "bare" else IMPLEMENTATION
            runtime.dense_only = name == "bare"  # the hook on the forward pass returns at once
            seconds, logits[name] = token_s(model, ids, args.steps)
            if number:  # the first round warms up
                found[name].append(seconds)
        if not torch.equal(logits["emoe"], logits["bare"]):
            raise SystemExit("the machinery changed the logits: that is a defect")
    runtime.dense_only = False
    close(model)
    ratios = [a / b for a, b in zip(found["emoe"], found["bare"], strict=True)]
    for name, values in found.items():
        print(f"{name}: {1e3 * statistics.median(values):.3f} ms a token ({1e3 * min(values):.3f} at best)")
    print(
        f"emoe over bare: {statistics.median(ratios):.4f} ({min(ratios):.4f}..{max(ratios):.4f}), "
        f"{args.threads} threads, {args.rounds} rounds of {args.steps} tokens after {args.context}"
    )


if __name__ == "__main__":
    main()
