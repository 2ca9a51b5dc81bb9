"""Latency targets from what requests take that have the engine to themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from emoe.errors import UsageError
from emoe.scheduling.arrivals import Arrival
from emoe.simulation.serving import SimulationSettings, simulate_serving
from emoe.simulation.serving_traffic import Routes, Targets, make_calls
from emoe.tasks.lengths import Lengths

TTFT_FACTOR = 5.0
"""The first token is due within so many times what it takes alone."""
TPOT_FACTOR = 3.0
"""Later tokens may take so many times what they take alone."""
ROUNDS = 6
"""Requests of each task that are served alone."""


def alone(
    routes: Routes,
    lengths: Mapping[str, Lengths],
    settings: SimulationSettings,
    *,
    input_tokens: int | None = None,
    length_scale: float = 1.0,
    longest: int = 1 << 30,
) -> dict[str, tuple[float, float]]:
    """Mean seconds to the first token and for each later one, by task, one request at a time, tasks taking turns.

    `input_tokens`: of every request; None: as recorded.
    """
    tasks = list(routes.prompts)
    found: dict[str, tuple[list[float], list[float]]] = {task: ([], []) for task in tasks}
    none = Targets(None, None)
    calls = []
    for number in range(ROUNDS * len(tasks)):
        task = tasks[number % len(tasks)]
        made = make_calls(
            [Arrival(number * 1e6, input_tokens)],
            routes,
            lengths,
            lambda task: none,
            mix={task: 1.0},
            length_scale=length_scale,
            longest=longest,
            seed=number,
        )[0]
        calls.append(dataclasses.replace(made, output_tokens=min(max(8, made.output_tokens), 32)))
    results = simulate_serving(calls, routes, dataclasses.replace(settings, scheduler="fifo"))
    for number, call in enumerate(calls):
        found[call.task][0].append(results.ttft_s(number))
        found[call.task][1].append(results.tpot_s(number) or 0.0)
    return {task: (float(np.mean(ttft)), float(np.mean(tpot))) for task, (ttft, tpot) in found.items()}


def targets_from(
    times: Mapping[str, tuple[float, float]], ttft_factor: float = TTFT_FACTOR, tpot_factor: float = TPOT_FACTOR
) -> dict[str, Targets]:
    """Targets as multiples of what `alone` found: the first token's by task, later tokens' alike for all tasks."""
    pace = float(np.mean([tpot for _, tpot in times.values()])) * tpot_factor
    return {task: Targets(ttft * ttft_factor, pace) for task, (ttft, _) in times.items()}


def read_targets(path: Path, tasks: Collection[str]) -> dict[str, Targets]:
    """Targets of a JSON file: {"TASK": {"ttft_s": seconds, "tpot_s": seconds}}; "*" is for tasks not named, null: none.

    Raises:
        UsageError: it cannot be read, holds something else, or names a task that there is not.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = {task: Targets(_seconds(each, "ttft_s"), _seconds(each, "tpot_s")) for task, each in values.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f'cannot read targets from {path}: {error}; write {{"TASK": {{"ttft_s": 1.5, "tpot_s": 0.05}}}}.'
        ) from error
    unknown = sorted(set(found) - set(tasks) - {"*"})
    if unknown:
        raise UsageError(f"{path} names the tasks {', '.join(unknown)}: there are {', '.join(tasks)}.")
    others = found.get("*", Targets(None, None))
    return {task: found.get(task, others) for task in tasks}


def _seconds(values: Mapping[str, float | None], name: str) -> float | None:
    value = values.get(name)
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be above 0, not {value}")
    return None if value is None else float(value)
