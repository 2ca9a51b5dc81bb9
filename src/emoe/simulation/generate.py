"""Traces that no model made: routed uniformly at random, where no policy can predict anything."""

from __future__ import annotations

import re

import numpy as np

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import DECODE, Trace, id_dtype

PROMPT_TOKENS = 200
"""Tokens of each prompt of a random trace, the last perhaps fewer."""

_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+):(\d+)", re.ASCII)


def parse_random(text: str) -> tuple[RoutingShape, int]:
    """The shape and the number of tokens that "LAYERSxEXPERTSxK:TOKENS" names, e.g. 24x32x4:20000.

    Raises:
        UsageError: it is not of that form.
    """
    match = _SHAPE.fullmatch(text)
    if match is None or int(match[4]) < 1:
        raise UsageError(f"cannot read {text!r} as a random trace: write LAYERSxEXPERTSxK:TOKENS, e.g. 24x32x4:20000.")
    layers, experts, top_k, tokens = map(int, match.groups())
    return RoutingShape(layers, experts, top_k), tokens


def random_trace(shape: RoutingShape, tokens: int, seed: int = 0) -> Trace:
    """Tokens whose k experts in each layer are drawn from all with equal chances, without labels."""
    rng = np.random.default_rng(seed)
    experts = np.empty((tokens, shape.layers, shape.top_k), dtype=id_dtype(shape.experts))
    for start in range(0, tokens, 4096):  # a bounded workspace, and the same numbers for any size of it
        part = experts[start : start + 4096]
        drawn = rng.random((len(part), shape.layers, shape.experts), dtype=np.float32)
        part[:] = np.argsort(drawn, axis=2)[:, :, : shape.top_k]
    offsets = np.append(np.arange(0, tokens, PROMPT_TOKENS), tokens).astype(np.int64)
    prompts = len(offsets) - 1
    return Trace(
        experts=experts,
        phase=np.full(tokens, DECODE, dtype=np.uint8),
        step=np.arange(tokens, dtype=np.int64),
        offsets=offsets,
        task=np.full(prompts, -1, dtype=np.int32),
        tasks=(),
        layers=np.arange(shape.layers, dtype=np.int32),
        num_experts=shape.experts,
        prompts=tuple({} for _ in range(prompts)),
        source={"layout": "random", "seed": seed},
    )
