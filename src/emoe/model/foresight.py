"""Looking ahead: which predictor, prefetcher, scorer and profile a model is loaded with, checked and put in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emoe.checkpoint.index import ExpertIndex
from emoe.config import Mode
from emoe.errors import UnsupportedModelError, UsageError
from emoe.model.balance import Balance
from emoe.model.collecting import RouteCollector
from emoe.model.planning import Answers, AnswersHere, Planner
from emoe.model.prefetch import NextGate
from emoe.model.runtime import Runtime
from emoe.model.scoring import LiveScored, Scores
from emoe.model.tasking import KnownHabits, TaskReader
from emoe.prediction.protocol import Predictor, RoutingShape, Trainable, UseScorer
from emoe.prediction.registry import PREDICTORS, SCORERS, make_predictor, make_scorer
from emoe.residency.budget import LayerNeed
from emoe.residency.eviction import EVICTION_RULES, Eviction, Scored, make_eviction
from emoe.residency.pool import ExpertPool
from emoe.residency.worth import Worth
from emoe.routing.rules import has_rule
from emoe.tasks.profile import Profile

LayerSplit = Literal["uniform", "expected-misses"]
LAYER_SPLITS: tuple[LayerSplit, ...] = ("uniform", "expected-misses")
Prefetch = Literal["plan", "next-gate"]
PREFETCHES: tuple[Prefetch, ...] = ("plan", "next-gate")


@dataclass(frozen=True, slots=True)
class Foresight:
    """The settings of `load` that look ahead; see there.

    Raises:
        UsageError: settings that contradict each other, with what to change.
    """

    mode: Mode = "exact"
    eviction: str = "least-stale"
    predictor: str | None = None
    prefetch: Prefetch | None = None
    replan_prompts: int = 1
    layer_split: LayerSplit = "uniform"
    sensitivity_threshold: float | None = None
    profiled: bool = False

    def __post_init__(self) -> None:
        if self.eviction not in EVICTION_RULES and self.eviction not in SCORERS:
            known = ", ".join(sorted({*EVICTION_RULES, *SCORERS}))
            raise UsageError(f"no eviction rule is called {self.eviction!r}: choose one of {known}.")
        if self.predictor is not None and self.predictor not in PREDICTORS:
            raise UsageError(
                f"no predictor is called {self.predictor!r}: choose one of {', '.join(sorted(PREDICTORS))}."
            )
        if self.replan_prompts < 1:
            raise UsageError(f"replan_prompts is {self.replan_prompts}, but must be at least 1.")
        if self.layer_split not in LAYER_SPLITS:
            raise UsageError(f"no layer_split is called {self.layer_split!r}: choose one of {', '.join(LAYER_SPLITS)}.")
        if self.prefetch is not None and self.prefetch not in PREFETCHES:
            raise UsageError(f"no prefetch is called {self.prefetch!r}: choose one of {', '.join(PREFETCHES)}.")
        if self.prefetch == "plan" and self.predictor is None:
            raise UsageError("prefetch='plan' loads what a predictor expects: name one with predictor=.")
        if self.prefetch == "next-gate" and self.predictor is not None:
            raise UsageError("prefetch='next-gate' and a predictor both load ahead: choose one.")
        if self.prefetch == "next-gate" and self.mode != "exact":
            raise UsageError(
                f"prefetch='next-gate' works in mode 'exact': in mode {self.mode!r} what is resident decides the route."
            )
        threshold = self.sensitivity_threshold
        if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
            raise UsageError(f"sensitivity_threshold is {threshold}, but must be a number of at least 0.")
        if not self.profiled:
            for wanted, setting in (
                (self.mode == "balanced", "mode='balanced'"),
                (self.layer_split == "expected-misses", "layer_split='expected-misses'"),
            ):
                if wanted:
                    raise UsageError(f"{setting} needs a profile of the model: make one with `emoe profile`.")

    @property
    def shared_from(self) -> float:
        """From how many slots per layer one shared pool is better under the eviction rule."""
        return Scored.shared_from if self.eviction in SCORERS else make_eviction(self.eviction).shared_from


class Ahead:
    """What looks ahead beside one bound model. Make it before the pools, then `attach` it."""

    def __init__(
        self, settings: Foresight, runtime: Runtime, index: ExpertIndex, needs: Sequence[LayerNeed], profile: Any
    ) -> None:
        """Make the scorer, if eviction asks for one: the pools' rules need it.

        Raises:
            UsageError: the profile's state of a scorer or predictor is damaged or of another shape.
        """
        self.settings = settings
        self.profile: Profile | None = profile
        self.worth = Worth()
        self.planner: Planner | None = None
        self.gate: NextGate | None = None
        self.idle = ""
        self._runtime = runtime
        self._index = index
        self._needs = sorted(needs, key=lambda need: need.layer)
        self._shape = RoutingShape(len(needs), max(need.experts for need in needs), max(need.top_k for need in needs))
        self._habits = KnownHabits(profile, settings.sensitivity_threshold)
        self._scores: Scores | None = None
        if settings.eviction in SCORERS:
            self._scores = Scores(runtime, self._restored(make_scorer(settings.eviction, self._shape)))
        self._answers: Answers | None = None
        if settings.predictor is not None:
            self._answers = AnswersHere(self._restored(make_predictor(settings.predictor, self._shape)))

    @property
    def lossy(self) -> bool:
        """Whether the mode can change the text."""
        mode = self.settings.mode
        return mode == "resident" or (mode == "balanced" and not self._habits.all_sensitive())

    def popularity(self) -> dict[int, list[float]] | None:
        """For `plan_slots`: the profile's popularity over all prompts, where the split asks for it."""
        if self.settings.layer_split == "uniform" or self.profile is None:
            return None
        shares = self.profile.popularity_of(None)
        return {need.layer: shares[rank, : need.experts].tolist() for rank, need in enumerate(self._needs)}

    def rule(self, experts: dict[int, int]) -> Eviction:
        """The eviction rule of a table that holds these layers (layer -> experts)."""
        if self._scores is None:
            return make_eviction(self.settings.eviction)
        rank = {need.layer: rank for rank, need in enumerate(self._needs)}
        layers = sorted(experts)
        return LiveScored(self._scores, [rank[layer] for layer in layers], [experts[layer] for layer in layers])

    def attach(
        self, model: PreTrainedModel, pools: Sequence[ExpertPool], tokenizer: PreTrainedTokenizerBase | None
    ) -> list[Any]:
        """Wire everything to a runtime whose layers are bound; return what has a `remove` method, to undo it."""
        runtime, settings = self._runtime, self.settings
        decode: Callable[[list[int]], str] | None = None if tokenizer is None else tokenizer.decode
        if self.profile is not None:
            runtime.tasks_of = TaskReader(runtime, self.profile, decode)
        fits = all(pool.table.all_fit for pool in pools)
        if fits:  # nothing will ever be evicted or missed: what looks ahead would only cost time
            self.idle = "every expert is resident"
            return []
        for pool in pools:
            pool.prefetches.worth = self.worth
        if self._scores is not None or self._answers is not None:
            collector = RouteCollector(
                runtime,
                [need.layer for need in self._needs],
                self._shape.experts,
                self._shape.top_k,
                with_weights=self._scores is not None,
            )
            if self._scores is not None:
                collector.consumers.append(self._scores.collect)
                runtime.at_pass_start.append(self._scores.start_pass)
            if self._answers is not None:
                self.planner = self._planner(pools, self._answers)
                collector.consumers.append(self.planner.collect)
                runtime.reads_own_routes = self.planner.reads_own_routes
                runtime.at_pass_start.append(self.planner.start_pass)
        if settings.mode == "balanced":
            runtime.at_pass_start.append(Balance(runtime, self._habits).start_pass)
        if settings.prefetch == "next-gate":
            self.gate = NextGate(runtime, self._routers(model), self.worth)
            runtime.after_take = self.gate.after_take
        if self.planner is not None or self.gate is not None:
            runtime.at_pass_start.append(lambda now: self.worth.end_pass())
        return [] if self.gate is None else list(self.gate.handles)

    def close(self) -> None:
        """End what was started."""
        if self._answers is not None:
            self._answers.close()

    def _planner(self, pools: Sequence[ExpertPool], answers: Answers) -> Planner:
        p = self.settings.replan_prompts
        return Planner(self._runtime, pools, answers, lambda prompt: prompt % p == 0, self._habits, self.worth)

    def _restored(self, made: Any) -> Any:
        """What the profile learned for it, where it can learn and the profile has it."""
        name = made.name
        if self.profile is not None and name in self.profile.predictors and isinstance(made, Trainable):
            made.restore(self.profile.predictors[name])
        return made

    def _routers(self, model: PreTrainedModel) -> dict[int, nn.Module]:
        found = {}
        for entry in self._index.layers:
            block = model.get_submodule(entry.module.rpartition(".")[0])
            routers = [child for child in block.children() if has_rule(child)]
            if len(routers) != 1:
                raise UnsupportedModelError(
                    f"the router of {type(block).__name__} (layer {entry.layer}) is not one that emoe knows, so "
                    "prefetch='next-gate' cannot ask it ahead: leave prefetch out."
                )
            found[entry.layer] = routers[0]
        return found


__all__ = ["LAYER_SPLITS", "PREFETCHES", "Ahead", "Foresight", "LayerSplit", "Predictor", "Prefetch", "UseScorer"]
