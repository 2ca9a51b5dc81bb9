"""Measure how answers change when the first MoE layers route at random (paper, section 2.4; its Figure 5).

In a layer that routes at random, every token goes to k different experts drawn uniformly from all, and they get the
gate weights that the router gave its own choice, in the router's order: the amount of expert work stays, only who does
it is wrong. Works for every family, as it stands between the router and the experts. Draws are seeded by prompt and
layer, so longer prefixes repeat the shorter one's draws and measures are paired.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from emoe.model.bind import binding_of
from emoe.prediction.protocol import Array
from emoe.profiling.prompts import Prompt
from emoe.profiling.running import Answer, answer, judge
from emoe.tasks.sensitivity import Sensitivity

MORE_TOKENS = 8
"""A randomly routed answer may be twice as long as the full model's, and this many tokens more."""

Step = Callable[[int, int], None]


@contextmanager
def random_routing(model: PreTrainedModel, layers: int, seed: int) -> Iterator[None]:
    """Route at random in the first `layers` MoE layers, from the input side, inside the `with` block."""
    handles = []
    for rank, entry in enumerate(binding_of(model).index.layers[:layers]):
        module = model.get_submodule(entry.module)
        # A generator of its own for each layer: how long the prefix is does not shift its draws.
        hook = _Scrambled(entry.num_experts, torch.Generator().manual_seed(seed * 1_000_003 + rank))
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Scrambled:
    """Replaces the ids that an experts module is called with."""

    def __init__(self, experts: int, generator: torch.Generator) -> None:
        self._experts = experts
        self._generator = generator

    def __call__(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        tokens, k = given.shape
        order = torch.rand(tokens, self._experts, generator=self._generator).argsort(dim=-1)
        ids = order[:, :k].to(device=given.device, dtype=given.dtype)
        if "top_k_index" in kwargs:
            return args, kwargs | {"top_k_index": ids}
        return (args[0], ids, *args[2:]), kwargs


class Comparer(Protocol):
    """What tells how alike texts are: `similarity.SentenceEncoder`, or a stand-in of a test."""

    def similarities(self, text: str, others: Sequence[str]) -> list[float]:
        """How alike `text` is to each of the others; 1: the same."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """prefixes: the numbers of randomly routed layers to measure, ascending, the last is all; new_tokens: of an answer
    at most; seed: of the draws."""

    prefixes: tuple[int, ...]
    new_tokens: int
    seed: int = 0


def choose_prefixes(layers: int, most: int) -> tuple[int, ...]:
    """At most `most` numbers of layers, evenly spread, 1 and all of them included."""
    if layers <= most or most < 2:
        return tuple(range(1, layers + 1)) if layers <= most else (layers,)
    return tuple(sorted({round(1 + i * (layers - 1) / (most - 1)) for i in range(most)}))


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    work: Sequence[tuple[Prompt, Sequence[int], Answer]],
    settings: Settings,
    encoder: Comparer | None,
    log: Path,
    step: Step,
) -> list[dict[str, Any]]:
    """One row for each (prompt, its ids, the full model's answer) of `work`, those in `log` not measured again.

    Rows: line, task, tokens (of the judged text), nll_full, and for each prefix nll, agreement and, with an encoder,
    similarity. The judged text is the reference where there is one, else the full model's answer.
    """
    rows = read_rows(log)
    done = {row["line"] for row in rows}
    step(len(rows), len(work))
    with log.open("a", encoding="utf-8") as file:
        for prompt, ids, full in work:
            if prompt.line in done:
                continue
            row = {"line": prompt.line, "task": prompt.task}
            row |= _measure_one(model, tokenizer, prompt, list(ids), full.ids, settings, encoder)
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
            step(len(rows), len(work))
    return rows


def read_rows(log: Path) -> list[dict[str, Any]]:
    """The rows of `log`; what a killed run left of a last line is cut off."""
    if not log.is_file():
        return []
    text = log.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        log.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _measure_one(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    ids: list[int],
    answered: list[int],
    settings: Settings,
    encoder: Comparer | None,
) -> dict[str, Any]:
    judged = answered
    if prompt.reference:
        judged = list(tokenizer(prompt.reference, add_special_tokens=False).input_ids)[: settings.new_tokens] or judged
    likeliest, own = judge(model, ids, answered)
    nll_full = own if judged is answered else judge(model, ids, judged)[1]
    row: dict[str, Any] = {"tokens": len(judged), "nll_full": nll_full, "nll": [], "agreement": []}
    texts = []
    for layers in settings.prefixes:
        seed = settings.seed * 100_003 + prompt.line
        with random_routing(model, layers, seed):
            now, nll = judge(model, ids, answered)
        if judged is not answered:
            with random_routing(model, layers, seed):
                nll = judge(model, ids, judged)[1]
        row["nll"].append(nll)
        row["agreement"].append(float(np.mean([a == b for a, b in zip(now, likeliest, strict=True)])))
        if encoder is not None:
            limit = min(settings.new_tokens, 2 * len(answered) + MORE_TOKENS)
            with random_routing(model, layers, seed):
                texts.append(tokenizer.decode(answer(model, ids, limit).ids, skip_special_tokens=True))
    if encoder is not None:
        row["similarity"] = encoder.similarities(tokenizer.decode(answered, skip_special_tokens=True), texts)
    return row


def summarise(
    rows: Sequence[dict[str, Any]], layers: int, prefixes: Sequence[int], measure_by: str, threshold: float
) -> Sensitivity:
    """Curves of every measure by task.

    A layer between two measured prefixes gets the value of the longer one, so that it is not called insensitive
    unmeasured.
    """
    upper = [next(i for i, p in enumerate(prefixes) if p > rank) for rank in range(layers)]
    curves: dict[str, dict[str, Array]] = {}
    prompts: dict[str, int] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        prompts[task] = len(mine)
        found: dict[str, Array] = {
            name: np.mean([row[name] for row in mine], axis=0)
            for name in ("similarity", "agreement")
            if name in mine[0]
        }
        tokens = sum(row["tokens"] for row in mine)
        full = sum(row["nll_full"] for row in mine)
        found["perplexity"] = np.array(
            [math.exp((full - sum(row["nll"][i] for row in mine)) / tokens) for i in range(len(prefixes))]
        )
        for name, values in found.items():
            curves.setdefault(name, {})[task] = values[upper]
    return Sensitivity(measure_by, curves, layers, threshold, prompts)
