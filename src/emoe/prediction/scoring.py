"""How well predictors name the experts of the next prompt: the measure behind the paper's Table 2.

Before each scored prompt a predictor is asked for its shares, given the prompt's task; afterwards it observes the
prompt. k experts serve each token, E are in a layer. For each prompt and layer
- the truth is the prompt's k most used experts, the prediction the k experts with the highest predicted shares, ties
  to the lower number. Accuracy: share of the true experts that were predicted, averaged over layers and prompts.
- precision, recall, F1: the same as a multilabel problem with a label for each expert of each layer. A label's
  precision is over the prompts that were predicted to use it, its recall over those that did; a label that never was
  predicted (used) has precision (recall) 0. Labels neither used nor predicted are left out; the rest average equally.
- hit@40: the share of the prompts' look-ups (token, layer, one of k) that find their expert among the 40 % of each
  layer's experts (rounded) with the highest predicted shares, over all scored tokens. This is what loading by the
  prediction would hit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from emoe.prediction.protocol import Array, Predictor, RoutingShape, Trainable
from emoe.prediction.registry import make_predictor
from emoe.routing.trace import Trace

SIMPLE = ("static", "task-popularity", "previous-prompt", "transitions", "decayed-prompt", "moe-infinity")
RESIDENT = 0.4
BOUND = "best possible"
"""The name of what the best set for each prompt would score."""

Figures = dict[str, float]


@dataclass
class Score:
    """Adds up what one predictor named, prompt by prompt."""

    shape: RoutingShape
    overlaps: list[float] = field(default_factory=list)
    hits: int = 0
    routed: int = 0
    seconds: float = 0.0
    both: Any = 0
    predicted: Any = 0
    used: Any = 0

    def add(self, shares: Array, counts: Array) -> None:
        """Score predicted shares against a prompt's counts, both [layers, experts]."""
        k, resident = self.shape.top_k, round(RESIDENT * self.shape.experts)
        guess, truth = top(shares, k), top(counts, k)
        self.overlaps.append(float((guess & truth).sum(axis=1).mean() / k))
        self.both = self.both + (guess & truth)
        self.predicted, self.used = self.predicted + guess, self.used + truth
        self.hits += int(counts[top(shares, resident)].sum())
        self.routed += int(counts.sum())

    def figures(self) -> Figures:
        """Accuracy, macro precision, recall and F1, hit share, milliseconds for each prediction."""
        precision = self.both / np.maximum(self.predicted, 1)
        recall = self.both / np.maximum(self.used, 1)
        f1 = 2 * self.both / np.maximum(self.predicted + self.used, 1)
        labels = (self.predicted + self.used) > 0
        return {
            "accuracy": float(np.mean(self.overlaps)),
            "precision": float(precision[labels].mean()),
            "recall": float(recall[labels].mean()),
            "f1": float(f1[labels].mean()),
            "hit_at_40": self.hits / self.routed,
            "ms": 1000 * self.seconds / len(self.overlaps),
        }


def top(amounts: Array, count: int) -> Array:
    """bool [layers, experts]: each layer's `count` largest, ties to the lower number."""
    chosen = np.zeros(amounts.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-amounts, axis=1, kind="stable")[:, :count], True, axis=1)
    return chosen


def unlabelled(trace: Trace) -> Trace:
    """The trace without its tasks."""
    return replace(trace, task=np.full_like(trace.task, -1), tasks=())


def halves(prompts: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the prompts to learn from and of those to score: a half each, drawn and in random order."""
    order = np.random.default_rng(seed).permutation(prompts).tolist()
    return order[: prompts // 2], order[prompts // 2 :]


def sides(trace: Trace, history: Trace | None, seed: int, in_order: bool) -> tuple[Trace, Trace]:
    """What is learned from and what is scored: `history` and `trace`, or halves of `trace`, in random order.

    in_order: in the order of the traces.
    """
    if history is None:
        learned, scored = halves(trace.num_prompts, seed)
    else:
        rng = np.random.default_rng(seed)
        learned = rng.permutation(history.num_prompts).tolist()
        scored = rng.permutation(trace.num_prompts).tolist()
    if in_order:
        learned, scored = sorted(learned), sorted(scored)
    return (trace if history is None else history).select(learned), trace.select(scored)


def measure(name: str, history: Trace, scored: Trace, seed: int, after: int = 0) -> dict[str, Figures]:
    """Figures of one predictor, or of the bound, at the prompts' boundaries; and with `after`, under "within", once
    more knowing each prompt's first tokens, scored on the rest.

    "ms" is the processor time of one prediction, "fit_s" that of learning, "mb" the size of a network.

    Raises:
        UsageError: too few prompts for a network to learn from.
    """
    shape = RoutingShape.of(history)
    boundary, within = Score(shape), Score(shape)
    started = time.process_time()
    predictor = None if name == BOUND else _fitted(name, history, seed)
    fit_s = time.process_time() - started

    def ask(score: Score, task: str | None, counts: Array) -> None:
        begun = time.process_time()
        shares = counts if predictor is None else predictor.predict(task)
        score.seconds += time.process_time() - begun
        score.add(shares, counts)

    for prompt in range(scored.num_prompts):
        routes = scored.experts[scored.offsets[prompt] : scored.offsets[prompt + 1]]
        if not len(routes):
            continue
        task = scored.task_of(prompt)
        ask(boundary, task, shape.counts(routes))
        if predictor is not None:
            predictor.begin_prompt(task)
            predictor.observe(routes[:after])
        if after and len(routes) > after:
            ask(within, task, shape.counts(routes[after:]))
        if predictor is not None:
            predictor.observe(routes[after:])
    more = {"fit_s": fit_s, "mb": getattr(predictor, "nbytes", 0) / 1e6}
    found = {"boundary": boundary.figures() | more}
    return found | ({"within": within.figures() | more} if within.overlaps else {})


def _fitted(name: str, history: Trace, seed: int) -> Predictor:
    predictor = make_predictor(name, RoutingShape.of(history))
    if isinstance(predictor, Trainable):
        predictor.fit(history, seed=seed)
    return predictor


@dataclass(frozen=True)
class Row:
    """One predictor's figures: means over the seeds, and the largest deviation from them."""

    predictor: str
    when: str
    figures: Figures
    deviation: Figures


def summed_up(name: str, runs: Sequence[Mapping[str, Figures]]) -> list[Row]:
    """Means over seeds."""
    rows = []
    for when in runs[0]:
        values = {key: np.array([run[when][key] for run in runs]) for key in runs[0][when]}
        means = {key: float(value.mean()) for key, value in values.items()}
        spread = {key: float(np.abs(value - value.mean()).max()) for key, value in values.items()}
        rows.append(Row(name, when, means, spread))
    return rows


def network_name(model: str, kind: str) -> str:
    """The predictor whose network is like `model` (xlnet, gpt2, bert), of `kind` a (all layers at once) or l."""
    return f"emoe-{kind}" if model == "xlnet" else f"emoe-{kind}-{model}"
