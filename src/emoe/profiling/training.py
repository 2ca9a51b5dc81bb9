"""Train predictors and scorers by name on a recorded trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.numpy import load_file, save

from emoe.checkpoint.whole import write_whole
from emoe.errors import UsageError
from emoe.prediction import registry
from emoe.prediction.protocol import Array, Predictor, Report, RoutingShape, Trainable, UseScorer
from emoe.routing.trace import Trace


def make(name: str, shape: RoutingShape) -> Predictor | UseScorer:
    """A new predictor, or else scorer, of that name.

    Raises:
        UsageError: there is none.
    """
    if name in registry.PREDICTORS:
        return registry.make_predictor(name, shape)
    if name in registry.SCORERS:
        return registry.make_scorer(name, shape)
    names = ", ".join(sorted({*registry.PREDICTORS, *registry.SCORERS}))
    raise UsageError(f"no predictor is called {name!r}: choose from {names}.")


def check_names(names: Sequence[str]) -> None:
    """Refuse names that nothing has, and predictors that learn nothing beforehand.

    Raises:
        UsageError: naming the first such one.
    """
    for name in names:
        if not isinstance(make(name, RoutingShape(2, 4, 2)), Trainable):
            raise UsageError(f"the predictor {name!r} learns nothing beforehand: leave it out of --predictors.")


def default_names() -> tuple[str, ...]:
    """What a profile trains unless told otherwise: the default predictor and the scorer that learns."""
    return (registry.DEFAULT_PREDICTOR, "next-use")


def train(
    names: Sequence[str], trace: Trace, folder: Path, seed: int, report: Report
) -> Mapping[str, Mapping[str, Array]]:
    """Fit what `folder` does not yet hold; return every state by name."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = RoutingShape.of(trace)
    for name in names:
        file = folder / f"{name}.safetensors"
        if file.is_file():
            continue
        report(f"{name} on {len(trace)} tokens of {trace.num_prompts} prompts")
        learner = make(name, shape)
        if not isinstance(learner, Trainable):
            raise UsageError(f"the predictor {name!r} learns nothing beforehand: leave it out of --predictors.")
        learner.fit(trace, seed=seed, progress=report)
        write_whole(file, save(learner.state()))
    return {name: load_file(folder / f"{name}.safetensors") for name in names}
