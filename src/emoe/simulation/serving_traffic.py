"""Requests to serve in a simulation: when they come, how long they are, what task, and which experts they use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import DECODE, PREFILL, Trace
from emoe.scheduling.arrivals import Arrival
from emoe.tasks.lengths import Lengths

Array = NDArray[Any]

DRAWN_TOKENS = 2048
"""Tokens drawn for each task where no trace says what tokens do; requests start anywhere among them."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Rows of `Routes.rows`: those of the input and those of the answer. Longer requests go round in them."""

    input_start: int
    input_rows: int
    answer_start: int
    answer_rows: int


@dataclass(frozen=True, eq=False)
class Routes:
    """What requests do: rows int32 [tokens, layers * k] of key numbers (layers * experts: none), prompts by task."""

    shape: RoutingShape
    rows: Array
    prompts: Mapping[str, Sequence[Prompt]]
    source: str

    @classmethod
    def of_trace(cls, trace: Trace) -> Routes:
        """Recorded prompts; those without a label are of the task "other".

        Raises:
            UsageError: the trace holds no tokens.
        """
        shape = RoutingShape.of(trace)
        if not len(trace):
            raise UsageError("the trace holds no tokens, so there is nothing to serve: record one with --trace.")
        nowhere = shape.layers * shape.experts
        keys = trace.experts.astype(np.int32) + (np.arange(shape.layers, dtype=np.int32) * shape.experts)[:, None]
        rows = np.where(trace.computed, keys, nowhere).reshape(len(trace), -1)
        prompts: dict[str, list[Prompt]] = {}
        for number in range(trace.num_prompts):
            start, end = int(trace.offsets[number]), int(trace.offsets[number + 1])
            phase = trace.phase[start:end]
            reads, answers = int((phase == PREFILL).sum()), int((phase == DECODE).sum())
            if not len(phase):
                continue
            # Some traces hold answers alone, some prompts alone: the one then stands for the other.
            spans = (
                (start, reads) if reads else (start, answers),
                (start + reads, answers) if answers else (start, reads),
            )
            prompts.setdefault(trace.task_of(number) or "other", []).append(Prompt(*spans[0], *spans[1]))
        return cls(shape, rows, prompts, f"{trace.num_prompts} recorded prompts")

    @classmethod
    def drawn(cls, shape: RoutingShape, shares: Mapping[str, Array], seed: int = 0) -> Routes:
        """Every token's experts drawn by itself with its task's shares, float [layers, experts] whose rows sum to k."""
        rng = np.random.default_rng(seed)
        rows = []
        prompts: dict[str, list[Prompt]] = {}
        for number, (task, share) in enumerate(shares.items()):
            logits = np.log(np.maximum(share, 1e-9)).astype(np.float32)
            noise = rng.gumbel(size=(DRAWN_TOKENS, *logits.shape)).astype(np.float32)
            chosen = np.argsort(-(logits + noise), axis=2)[:, :, : shape.top_k]
            keys = chosen + (np.arange(shape.layers) * shape.experts)[:, None]
            rows.append(keys.reshape(DRAWN_TOKENS, -1).astype(np.int32))
            first = number * DRAWN_TOKENS
            prompts[task] = [Prompt(first, DRAWN_TOKENS, first, DRAWN_TOKENS)]
        return cls(shape, np.concatenate(rows), prompts, "routes drawn token by token from each task's popularity")

    def shares(self) -> dict[str, Array]:
        """float [layers, experts] of each task: the share of its tokens that each key gets; rows sum to k."""
        found = {}
        for task, prompts in self.prompts.items():
            spans = {(p.input_start, p.input_rows) for p in prompts} | {
                (p.answer_start, p.answer_rows) for p in prompts
            }
            size = self.shape.layers * self.shape.experts
            counts = np.zeros(size + 1)
            for start, rows in spans:
                counts += np.bincount(self.rows[start : start + rows].reshape(-1), minlength=size + 1)
            found[task] = self.shape.normalised(counts[:size].reshape(self.shape.layers, self.shape.experts))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to come.

    Attributes:
        at_s: when, seconds from the start.
        input_tokens, output_tokens: its lengths; the second is known to nobody before.
        task: what it is; `label`: what it says it is, None: nothing.
        expected_tokens: of its answer, by its label.
        ttft_slo_s, tpot_slo_s: its targets.
        prompt: which of its task's recorded prompts it replays, modulo their number; `offset` rows are left out of it.
        priority: lower goes first.
        max_tokens: the longest answer it may get, None: as long as it is.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    task: str
    label: str | None
    expected_tokens: float
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    prompt: int = 0
    offset: int = 0
    priority: int = 0
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Targets:
    """Latency targets of a task, seconds; None: none."""

    ttft_s: float | None
    tpot_s: float | None


TargetsOf = Callable[[str], Targets]


def make_calls(
    arrivals: Sequence[Arrival],
    routes: Routes,
    lengths: Mapping[str, Lengths],
    targets: TargetsOf,
    *,
    mix: Mapping[str, float] | None = None,
    wrong_labels: float = 0.0,
    length_scale: float = 1.0,
    longest: int = 1 << 30,
    seed: int = 0,
) -> list[Call]:
    """Give every arrival a task, lengths where it has none, a prompt to replay and targets.

    Args:
        arrivals: in order of time.
        routes: what there is to replay.
        lengths: answers by task; a task without has those of its recorded prompts.
        targets: of a task, which are those of the true one.
        mix: weight of each task (default: all alike). Where an arrival brings its own answer's length, tasks whose
            answers are about as long, by `lengths` scaled to the arrivals' mean, are the likelier for it.
        wrong_labels: share of requests that bear another task's label, drawn at random; those of a smaller share are
            among those of a larger one.
        length_scale: factor for lengths that come from tasks, not from arrivals.
        longest: input and output together are cut to it.
        seed: of every draw.

    Raises:
        UsageError: a mix of tasks that there are not, or a share outside 0 to 1.
    """
    tasks = list(routes.prompts)
    weights = _weights(tasks, mix)
    if not 0 <= wrong_labels <= 1:
        raise UsageError(f"the share of wrong labels is between 0 and 1, not {wrong_labels:g}.")
    rng, spoil = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    means = {task: _mean(task, routes, lengths) * length_scale for task in tasks}
    scale = _scale(arrivals, means, weights, tasks)
    expected = {task: mean * scale for task, mean in means.items()}
    calls = []
    for arrival in arrivals:
        task = tasks[int(rng.choice(len(tasks), p=_chances(arrival, weights, expected, tasks)))]
        number = int(rng.integers(len(routes.prompts[task])))
        prompt = routes.prompts[task][number]
        drawn = _draw(task, prompt, lengths, rng) * length_scale
        output = arrival.output_tokens or max(1, round(drawn))
        entry = arrival.input_tokens or max(1, round(min(prompt.input_rows, DRAWN_TOKENS // 8) * length_scale))
        output = max(1, min(output, longest - 1))
        others = [other for other in tasks if other != task]
        # From draws of their own for every request: the same traffic, whatever share is wrong.
        wrong, other = rng.random() < wrong_labels, int(spoil.integers(max(1, len(others))))
        label = others[other] if wrong and others else task
        found = targets(task)
        calls.append(
            Call(
                at_s=arrival.at_s,
                input_tokens=min(entry, longest - output),
                output_tokens=output,
                task=task,
                label=label,
                expected_tokens=expected[label],
                ttft_slo_s=found.ttft_s,
                tpot_slo_s=found.tpot_s,
                prompt=number,
                offset=int(rng.integers(DRAWN_TOKENS)) if prompt.input_rows == DRAWN_TOKENS else 0,
            )
        )
    return calls


def _weights(tasks: Sequence[str], mix: Mapping[str, float] | None) -> Array:
    if mix is None:
        return np.full(len(tasks), 1 / len(tasks))
    unknown = sorted(set(mix) - set(tasks))
    values = np.array([mix.get(task, 0.0) for task in tasks])
    if unknown:
        raise UsageError(f"the task mix names {', '.join(unknown)}: there are {', '.join(tasks)}.")
    if (values < 0).any() or not values.sum() > 0:
        raise UsageError("the weights of a task mix must not be negative, and one of them must be above 0.")
    shares: Array = values / values.sum()
    return shares


def _mean(task: str, routes: Routes, lengths: Mapping[str, Lengths]) -> float:
    if task in lengths:
        return lengths[task].mean
    return float(np.mean([prompt.answer_rows for prompt in routes.prompts[task]]))


def _draw(task: str, prompt: Prompt, lengths: Mapping[str, Lengths], rng: np.random.Generator) -> float:
    """An answer's length: by the task's quantiles, else that of the recorded prompt."""
    if task not in lengths:
        return prompt.answer_rows
    quantiles = sorted(lengths[task].quantiles.items())
    return float(np.interp(rng.random(), [0.0, *(q for q, _ in quantiles)], [1.0, *(n for _, n in quantiles)]))


def _scale(arrivals: Sequence[Arrival], means: Mapping[str, float], weights: Array, tasks: Sequence[str]) -> float:
    """The arrivals' own mean answer over that of the tasks, 1 where arrivals bring none."""
    own = [arrival.output_tokens for arrival in arrivals if arrival.output_tokens is not None]
    if not own:
        return 1.0
    return float(np.mean(own)) / float(sum(w * means[task] for w, task in zip(weights, tasks, strict=True)))


def _chances(arrival: Arrival, weights: Array, expected: Mapping[str, float], tasks: Sequence[str]) -> Array:
    """The task of an arrival, by the mix and by its answer's length: a log-normal spread of 0.7 around each mean."""
    if arrival.output_tokens is None:
        return weights
    means = np.array([expected[task] for task in tasks])
    away = (np.log(arrival.output_tokens) - np.log(np.maximum(means, 1.0))) / 0.7
    chances: Array = weights * np.exp(-0.5 * np.minimum(away * away, 600.0))
    total = chances.sum()
    likely: Array = chances / total if total > 0 else weights
    return likely
