"""How well do predictors name the experts of the next prompt? The paper's Table 2, beside simple baselines.

    python bench/table2.py TRACE [--history TRACE | --split SEED] [--models xlnet,gpt2,bert] [--kinds a,l]
                           [--seeds 0,1] [--after N] [--order trace] [--no-tasks] [--model-bytes N] [--json]

Without `--history`, half of TRACE's prompts, drawn with the seed of `--split`, are learned from and the other half is
scored; both in random order (`--order trace` keeps the trace's, where prompts of one task may follow each other). With
several `--seeds`, the split (or the order) and the training are drawn anew for each and figures are means, with the
largest deviation in brackets.

Before each scored prompt a predictor is asked for its shares, given the prompt's task (`--no-tasks`: nobody knows any);
afterwards it observes the prompt. With `--after N` it is asked once more knowing the prompt's first N tokens, and
scored on the rest.

The measure. k experts serve each token, E are in a layer. For each prompt and layer
- the truth is the prompt's k most used experts, the prediction the k experts with the highest predicted shares, ties
  to the lower number. Accuracy: share of the true experts that were predicted, averaged over layers and prompts.
- precision, recall, F1: the same as a multilabel problem with a label for each expert of each layer. A label's
  precision is over the prompts that were predicted to use it, its recall over those that did; a label that never was
  predicted (used) has precision (recall) 0. Labels neither used nor predicted are left out; the rest average equally.
- hit@40: the share of the prompts' look-ups (token, layer, one of k) that find their expert among the 40 % of each
  layer's experts (rounded) with the highest predicted shares, over all scored tokens. This is what loading by the
  prediction would hit; `best possible` says what the best set for each prompt would.

MS is the processor time of one prediction in milliseconds, FIT_S that of learning, MB the size of the network.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import make_predictor
from emoe.routing.trace import Trace

SIMPLE = ("static", "task-popularity", "previous-prompt", "transitions", "decayed-prompt", "moe-infinity")
RESIDENT = 0.4
BOUND = "best possible"


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

    def add(self, shares: np.ndarray, counts: np.ndarray) -> None:
        """Score predicted shares against a prompt's counts, both [layers, experts]."""
        k, resident = self.shape.top_k, round(RESIDENT * self.shape.experts)
        guess, truth = top(shares, k), top(counts, k)
        self.overlaps.append(float((guess & truth).sum(axis=1).mean() / k))
        self.both = self.both + (guess & truth)
        self.predicted, self.used = self.predicted + guess, self.used + truth
        self.hits += int(counts[top(shares, resident)].sum())
        self.routed += int(counts.sum())

    def figures(self) -> dict[str, float]:
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


def top(amounts: np.ndarray, count: int) -> np.ndarray:
    """bool [layers, experts]: each layer's `count` largest, ties to the lower number."""
    chosen = np.zeros(amounts.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-amounts, axis=1, kind="stable")[:, :count], True, axis=1)
    return chosen


def unlabelled(trace: Trace) -> Trace:
    """The trace without its tasks."""
    return replace(trace, task=np.full_like(trace.task, -1), tasks=())


def sides(trace: Trace, history: Trace | None, seed: int, in_order: bool) -> tuple[Trace, Trace]:
    """What is learned from and what is scored."""
    rng = np.random.default_rng(seed)
    if history is None:
        order = rng.permutation(trace.num_prompts)
        halves = order[: len(order) // 2], order[len(order) // 2 :]
    else:
        halves = rng.permutation(history.num_prompts), rng.permutation(trace.num_prompts)
    if in_order:
        halves = np.sort(halves[0]), np.sort(halves[1])
    return (trace if history is None else history).select(halves[0]), trace.select(halves[1])


def measure(name: str, history: Trace, scored: Trace, seed: int, after: int) -> dict[str, dict[str, float]]:
    """Figures of one predictor at the prompts' boundaries, and after their first tokens where that is asked."""
    shape = RoutingShape.of(history)
    boundary, within = Score(shape), Score(shape)
    started = time.process_time()
    predictor: Any = None if name == BOUND else make_predictor(name, shape)
    if predictor is not None:
        predictor.fit(history, seed=seed)
    fit_s = time.process_time() - started

    def ask(score: Score, task: str | None, counts: np.ndarray) -> None:
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


@dataclass(frozen=True)
class Row:
    """One predictor's figures: means over the seeds, and the largest deviation from them."""

    predictor: str
    when: str
    figures: dict[str, float]
    deviation: dict[str, float]


def summed_up(name: str, runs: list[dict[str, dict[str, float]]]) -> list[Row]:
    """Means over seeds."""
    rows = []
    for when in runs[0]:
        values = {key: np.array([run[when][key] for run in runs]) for key in runs[0][when]}
        means = {key: float(value.mean()) for key, value in values.items()}
        spread = {key: float(np.abs(value - value.mean()).max()) for key, value in values.items()}
        rows.append(Row(name, when, means, spread))
    return rows


def line(row: Row, after: int, model_bytes: int) -> str:
    """One line of the table."""
    where = "next prompt" if row.when == "boundary" else f"after {after} tokens"
    figures, parts = row.figures, []
    for key in ("accuracy", "precision", "recall", "f1", "hit_at_40"):
        parts.append(f"{figures[key]:.3f} ({row.deviation[key]:.3f})")
    share = f" {100 * figures['mb'] * 1e6 / model_bytes:.3f} % of the model" if model_bytes and figures["mb"] else ""
    cost = f"{figures['ms']:7.2f} {figures['fit_s']:7.1f} {figures['mb']:6.2f}{share}"
    return f"{row.predictor:<16} {where:<16} {'  '.join(parts)} {cost}"


def main() -> None:
    """Print a line for each predictor, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--history")
    parser.add_argument("--split", type=int, default=0)
    parser.add_argument("--models", default="xlnet,gpt2,bert")
    parser.add_argument("--kinds", default="a,l")
    parser.add_argument("--seeds", help="several splits, for means; replaces --split")
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--order", choices=("random", "trace"), default="random")
    parser.add_argument("--no-tasks", action="store_true")
    parser.add_argument(
        "--model-bytes", type=int, default=0, help="the model's size, to give the networks' share of it"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trace = Trace.read(options.trace)
    history = Trace.read(options.history) if options.history else None
    if options.no_tasks:
        trace, history = unlabelled(trace), None if history is None else unlabelled(history)
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else [options.split]
    networks = [
        f"emoe-{kind}" if model == "xlnet" else f"emoe-{kind}-{model}"
        for model in filter(None, options.models.split(","))
        for kind in filter(None, options.kinds.split(","))
    ]
    if not options.json:
        columns = "".join(f"{name:<15}" for name in ("accuracy", "precision", "recall", "F1", "hit@40"))
        print(f"{'':<33} {columns}{'MS':>6} {'FIT_S':>7} {'MB':>6}")
    rows = []
    for name in (*SIMPLE, *networks, BOUND):
        runs = [measure(name, *sides(trace, history, s, options.order == "trace"), s, options.after) for s in seeds]
        for row in summed_up(name, runs):
            rows.append(asdict(row))
            if not options.json:
                print(line(row, options.after, options.model_bytes), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
