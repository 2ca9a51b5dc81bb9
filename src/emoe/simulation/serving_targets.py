"""Latency targets from what requests take that have the engine to themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

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
