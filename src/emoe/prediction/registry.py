"""Predictors and scorers by name. Adding one is one file and one line here.

Factories import what they need when they are called, so that naming a predictor costs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from emoe.errors import named
from emoe.plugins import Registry, check_conforms
from emoe.prediction.protocol import Predictor, RoutingShape, UseScorer


def _simple(module: str, name: str) -> Callable[[RoutingShape], Predictor]:
    def make(shape: RoutingShape) -> Predictor:
        predictor: Predictor = getattr(import_module(f"emoe.prediction.{module}"), name)(shape)
        return predictor

    return make


def _sequence(name: str, kind: str, network: str) -> Callable[[RoutingShape], Predictor]:
    def make(shape: RoutingShape) -> Predictor:
        predictor: Predictor = getattr(import_module("emoe.prediction.emoe_sequence"), kind)(shape, name, network)
        return predictor

    return make


def _scorer(module: str, name: str) -> Callable[[RoutingShape], UseScorer]:
    def make(shape: RoutingShape) -> UseScorer:
        scorer: UseScorer = getattr(import_module(f"emoe.prediction.{module}"), name)(shape)
        return scorer

    return make


PREDICTORS: Registry[Callable[[RoutingShape], Predictor]] = Registry(
    "predictor",
    "policy",
    {
        "static": _simple("popularity", "Static"),
        "task-popularity": _simple("popularity", "TaskPopularity"),
        "previous-prompt": _simple("popularity", "PreviousPrompt"),
        "decayed-prompt": _simple("popularity", "DecayedPrompt"),
        "transitions": _simple("transitions", "Transitions"),
        "moe-infinity": _simple("matching", "ActivationMatching"),
        "emoe-a": _sequence("emoe-a", "EmoeA", "xlnet"),
        "emoe-l": _sequence("emoe-l", "EmoeL", "xlnet"),
        "emoe-a-gpt2": _sequence("emoe-a-gpt2", "EmoeA", "gpt2"),
        "emoe-a-bert": _sequence("emoe-a-bert", "EmoeA", "bert"),
        "emoe-l-gpt2": _sequence("emoe-l-gpt2", "EmoeL", "gpt2"),
        "emoe-l-bert": _sequence("emoe-l-bert", "EmoeL", "bert"),
    },
)
"""Prompt-level predictors by name."""

NETWORKS = frozenset(name for name in PREDICTORS if name.startswith("emoe-"))
"""The paper's predictors: networks, slow, and unable to predict before they are trained."""

DEFAULT_PREDICTOR = "task-popularity"
"""No predictor of bench/table2.py does better, networks included. It names 0.541 of the next prompt's k most used
experts on gpt-oss-20b and 0.587 on emoe-nano, the best network 0.540 and 0.571; 40 % of the experts chosen by it hold
0.767 and 0.615 of the look-ups, by the best network 0.761 and 0.608. It needs no training and no history."""

SCORERS: Registry[Callable[[RoutingShape], UseScorer]] = Registry(
    "scorer", "policy", {"decayed": _scorer("decay", "Decayed"), "next-use": _scorer("next_use", "NextUse")}
)
"""Token-level scorers by name."""

CONTESTED = frozenset({"next-use"})
"""Scorers that LRU replaces for as long as it loads less (emoe.residency.contest): those that can be wrong about
traffic unlike what they learned from, and are worth the bookkeeping."""


def make_predictor(name: str, shape: RoutingShape) -> Predictor:
    """Return a new predictor by name.

    Raises:
        UsageError: no predictor has that name, or what bears it lacks something that `Predictor` asks for.
    """
    made = named("predictor", name, PREDICTORS)(shape)
    check_conforms(made, Predictor, "predictor", name)
    return made


def make_scorer(name: str, shape: RoutingShape) -> UseScorer:
    """Return a new scorer by name.

    Raises:
        UsageError: no scorer has that name, or what bears it lacks something that `UseScorer` asks for.
    """
    made = named("scorer", name, SCORERS)(shape)
    check_conforms(made, UseScorer, "scorer", name)
    return made
