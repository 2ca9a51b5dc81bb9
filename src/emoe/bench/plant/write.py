"""Writing a planted checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from emoe.bench.plant.card import CARD, LABEL, ROUTES, PlantCard
from emoe.bench.plant.history import HISTORY, history_of
from emoe.bench.plant.next_gate import plant_signs
from emoe.bench.plant.resample import Routes, fit, other_prompts, read_trace
from emoe.bench.plant.routers import logits_of
from emoe.bench.plant.shapes import vocabulary_for
from emoe.bench.plant.tensors import DTYPE, rows_of, seed_of, tensors_of
from emoe.bench.shapes import Shape
from emoe.bench.writing import Progress, write_checkpoint, write_json
from emoe.config import format_bytes
from emoe.routing.trace import DECODE, Trace

SHARD_BYTES = 2 * 10**9

GENERATION = {"do_sample": False}
"""Greedy: the output projection then walks along the trace (`routers.next_token_head`)."""


def plant(
    shape: Shape,
    trace: str | Path,
    tokens: int,
    folder: str | Path,
    seed: int = 0,
    progress: Progress | None = None,
    next_gate: float | None = None,
) -> PlantCard:
    """Write a checkpoint of `shape` whose routers repeat the first `tokens` of `trace`, and return its card. Routes of
    the trace's other prompts, where it has any, lie beside it as a history to learn from (`history.HISTORY`).

    The same arguments give the same bytes. Memory stays at a few hundred MB whatever the shape. The folder appears
    under its name only when it is complete.

    Args:
        shape: one of `shapes.PUBLISHED`, maybe cut to fewer layers (`shapes.published`).
        trace: a trace file, or a folder with a trace.npz.
        tokens: how many of the trace; at most the hidden size.
        folder: where to; it must not exist, or be empty.
        seed: of the weights, and of resampling.
        progress: called with (bytes done, bytes in all).
        next_gate: the share of a token's experts that the next layer's router is to find when it is asked a layer
            early (`next_gate.plant_signs`); None: all of them.

    Raises:
        UsageError: too many tokens or layers, `folder` holds something, or such a share cannot be planted.
        TraceError: the trace is missing or damaged.
        CheckpointError: the disk has not enough room.
    """
    folder, path = Path(folder), Path(trace)
    recorded = read_trace(path, shape)
    routes = fit(recorded, shape, tokens, seed)
    vocabulary = vocabulary_for(tokens)

    def logits(layer: int) -> torch.Tensor:
        weights = None if routes.weights is None else routes.weights[:, layer]
        return logits_of(routes.experts[:, layer], weights, shape.experts)

    signs = None
    if next_gate is not None:
        rows = rows_of(shape, vocabulary, tokens, seed)[:tokens]
        layers = len(shape.moe_layers)
        signs = plant_signs(logits, layers, rows, routes.top_k, next_gate, seed_of(seed, "signs"))
    card = PlantCard(
        shape=shape.name,
        model=shape.model,
        layers=shape.layers,
        experts=shape.experts,
        top_k=routes.top_k,
        trace=path.resolve().stem if path.is_file() else path.resolve().name,
        tokens=tokens,
        seed=seed,
        dtype=str(DTYPE).removeprefix("torch."),
        resampled=routes.resampled,
        kept=routes.kept,
        prompts=routes.prompts,
        vocabulary=vocabulary,
        next_gate=1.0 if signs is None else round(signs.share, 4),
    )
    history = history_of(recorded, shape, card) if other_prompts(recorded, tokens) else None
    config = replace(shape, vocabulary=card.vocabulary).config() | {"num_experts_per_tok": routes.top_k}
    if "experts_per_token" in config:
        config["experts_per_token"] = routes.top_k

    def others(work: Path) -> None:
        write_json(config, work / "config.json")
        write_json(GENERATION, work / "generation_config.json")
        as_trace(routes, shape, card).write(work / ROUTES)
        write_json(card.as_dict(), work / CARD)
        if history is not None:
            history.write(work / HISTORY)

    tensors = list(tensors_of(shape, vocabulary, tokens, logits, seed, None if signs is None else signs.of_layers))
    write_checkpoint(folder, f"a planted {shape.name}", tensors, others, SHARD_BYTES, progress)
    return card


def as_trace(routes: Routes, shape: Shape, card: PlantCard) -> Trace:
    """What was planted, in emoe's own trace format, which simulations and replays read."""
    count = len(routes.experts)
    return Trace(
        experts=routes.experts,
        weights=None if routes.weights is None else routes.weights.astype(np.float16),
        phase=np.full(count, DECODE, dtype=np.uint8),
        step=np.arange(count, dtype=np.int64),
        token_ids=np.arange(count, dtype=np.int32),
        offsets=np.array([0, *(end for _, end in card.prompts)], dtype=np.int64),
        task=np.full(len(card.prompts), -1, dtype=np.int32),
        tasks=(),
        layers=np.array(shape.moe_layers, dtype=np.int32),
        num_experts=shape.experts,
        prompts=tuple({} for _ in card.prompts),
        source={"planted": card.shape, "trace": card.trace, "kept": card.kept, "about": LABEL},
    )


def summary(card: PlantCard, shape: Shape) -> list[str]:
    """What was planted, for people."""
    each, everything = format_bytes(shape.expert_nbytes), format_bytes(shape.expert_bytes)
    return [
        f"{card.shape} ({card.model}): {card.layers} layers, {len(shape.moe_layers)} with {card.experts} experts of "
        f"{each}, {card.top_k} per token; {everything} of experts in {card.dtype}",
        f"routes of {card.trace}: {card.tokens} tokens of {len(card.prompts)} prompts; {card.kept}",
        f"vocabulary {card.vocabulary} instead of {shape.vocabulary}: token id i is position i of the trace",
        f"the next layer's router, asked a layer early, is {card.guesses}",
        LABEL,
    ]
