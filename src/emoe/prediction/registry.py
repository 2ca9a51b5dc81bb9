"""Predictors and scorers by name. Adding one is one file and one line here.

Factories import what they need when they are called, so that naming a predictor costs no torch.
"""

from __future__ import annotations

from collections.abc import Callable

from emoe.errors import UsageError
from emoe.prediction.protocol import Predictor, RoutingShape, UseScorer

PREDICTORS: dict[str, Callable[[RoutingShape], Predictor]] = {}
"""Prompt-level predictors by name."""

SCORERS: dict[str, Callable[[RoutingShape], UseScorer]] = {}
"""Token-level scorers by name."""


def make_predictor(name: str, shape: RoutingShape) -> Predictor:
    """Return a new predictor by name.

    Raises:
        UsageError: no predictor has that name.
    """
    if name not in PREDICTORS:
        raise UsageError(f"no predictor is called {name!r}: choose one of {', '.join(sorted(PREDICTORS))}.")
    return PREDICTORS[name](shape)


def make_scorer(name: str, shape: RoutingShape) -> UseScorer:
    """Return a new scorer by name.

    Raises:
        UsageError: no scorer has that name.
    """
    if name not in SCORERS:
        raise UsageError(f"no scorer is called {name!r}: choose one of {', '.join(sorted(SCORERS))}.")
    return SCORERS[name](shape)
