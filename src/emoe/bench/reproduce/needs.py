"""What an experiment needs of the run's prompts and traces: checked before anything long begins, for all of them."""

from __future__ import annotations

from emoe.bench.reproduce.sources import enough
from emoe.bench.reproduce.workbench import Workbench
from emoe.errors import UsageError
from emoe.prediction.fitting import LEAST_PROMPTS
from emoe.profiling.prompts import first_of_each


def references(bench: Workbench, per_task: int | None = None) -> None:
    """For one that reads reference answers; per_task: those of the first so many prompts of each task.

    Raises:
        UsageError: no prompt to score has one.
    """
    prompts = bench.prompts["score"]
    read = range(len(prompts)) if per_task is None else first_of_each(prompts, per_task)
    if not any(prompts[index].reference for index in read):
        raise UsageError('no prompt to score has a reference: give --prompts with "reference" in its lines.')


def networks(bench: Workbench) -> None:
    """For one that trains networks on the model's own routes.

    Raises:
        UsageError: too few prompts to learn from.
    """
    _enough(bench.name, len(bench.prompts["learn"]), "give more --prompts, or a --learn file")


def networks_of_traces(bench: Workbench) -> None:
    """For one that trains networks on the routes of `--trace`, too: half of its prompts are learned from.

    Raises:
        UsageError: too few prompts to learn from in a trace.
    """
    for name, routes in bench.traces.items():
        _enough(name, routes.num_prompts // 2, f"leave out --trace {name}=..., or record more prompts")


def _enough(name: str, count: int, remedy: str) -> None:
    if count < LEAST_PROMPTS:
        raise UsageError(
            f"{name} has {count} prompts to learn from, and networks need at least {LEAST_PROMPTS}: {remedy}."
        )


def pairs(bench: Workbench) -> None:
    """For one that compares routes of prompts.

    Raises:
        UsageError: too few prompts to compare, here or in a trace.
    """
    for name in bench.traces:
        enough(bench, name)
    for side, prompts in bench.prompts.items():
        if len(prompts) < 2:
            raise UsageError(f"comparing prompts needs at least two to {side}: give more --prompts.")
