"""What one experiment is, and where it is found: a module of its name in `experiments/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from emoe.errors import UsageError

if TYPE_CHECKING:
    from emoe.bench.reproduce.findings import Finding
    from emoe.bench.reproduce.workbench import Workbench

Kind = Literal["routing", "quality", "speed"]
"""What it needs: recorded routes alone, runs of the model, or times (a quiet machine)."""

KEPT = "the share of the experts that --share gives (the paper's 60 %)"
"""What speed experiments keep, for `Experiment.method`."""

NAMES = (
    "table1",
    "fig1",
    "fig2",
    "fig3",
    "fig4",
    "fig5",
    "fig7",
    "fig8",
    "fig9",
    "fig10",
    "table2",
    "fig12",
    "fig13",
    "fig14",
    "fig15",
    "fig16",
    "fig17",
    "fig18",
    "table3",
    "fig19",
    "sec57",
)
"""Every experiment, in the paper's order."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One measurement of the paper.

    question, method and expected (what the paper says) are printed in the report; run does it. minutes: about how long
    it takes on emoe-nano and two cores, quick and in full. needs: each raises EmoeError where the run cannot do it.
    """

    name: str
    title: str
    question: str
    method: str
    expected: str
    kind: Kind
    minutes: tuple[float, float]
    run: Callable[[Workbench], Finding]
    needs: tuple[Callable[[Workbench], None], ...] = ()

    def check(self, bench: Workbench) -> None:
        """Refuse what cannot be done on this model with these prompts, before any work.

        Raises:
            EmoeError: why not, and what to do.
        """
        for need in self.needs:
            need(bench)


def experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in NAMES:
        raise UsageError(f"no experiment is called {name!r}: choose of {' '.join(NAMES)}, or all.")
    found: Experiment = import_module(f"emoe.bench.reproduce.experiments.{name}").EXPERIMENT
    return found


def chosen(names: Sequence[str]) -> list[Experiment]:
    """The named experiments in the paper's order, each once; `all` names every one.

    Raises:
        UsageError: an unknown name.
    """
    wanted = {each for name in names for each in (NAMES if name == "all" else (name,))}
    for name in sorted(wanted):
        experiment(name)
    return [experiment(name) for name in NAMES if name in wanted]
