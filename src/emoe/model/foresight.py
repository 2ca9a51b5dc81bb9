"""Looking ahead: puts the predictor, prefetcher, scorer and profile that a model is loaded with in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emoe.checkpoint.index import ExpertIndex
from emoe.errors import UnsupportedModelError, UsageError
from emoe.model.asking import Answers, AnswersAside, AnswersHere, Spent
from emoe.model.balance import Balance
from emoe.model.collecting import RouteCollector
from emoe.model.passes import Pass
from emoe.model.planning import Planner
from emoe.model.prefetch import NextGate
from emoe.model.runtime import Runtime
from emoe.model.scoring import Scores
from emoe.model.tasking import KnownHabits, TaskReader
from emoe.policies.foresight import Foresight
from emoe.prediction.live import LiveScored, LiveScores
from emoe.prediction.protocol import RoutingShape, Trainable
from emoe.prediction.registry import NETWORKS, SCORERS, make_predictor, make_scorer
from emoe.prediction.schedule import make_schedule
from emoe.prediction.worker import PredictorProcess
from emoe.residency.budget import LayerNeed
from emoe.residency.eviction import Eviction, make_eviction
from emoe.residency.pool import ExpertPool
from emoe.residency.worth import Worth
from emoe.routing.rules import has_rule
from emoe.tasks.profile import Profile


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
        self._started = 0.0
        self._runtime = runtime
        self._index = index
        self._needs = sorted(needs, key=lambda need: need.layer)
        self._shape = RoutingShape(len(needs), max(need.experts for need in needs), max(need.top_k for need in needs))
        self._habits = KnownHabits(profile, settings.sensitivity_threshold)
        self.scores: Scores | None = None
        if settings.eviction in SCORERS:
            live = LiveScores(self._restored(make_scorer(settings.eviction, self._shape)), self._shape)
            self.scores = Scores(runtime, live, [need.layer for need in self._needs])
        self._answers: Answers | None = None
        name = settings.predictor
        if name in NETWORKS and (profile is None or name not in profile.predictors):
            raise UsageError(
                f"predictor {name!r} is a network that has to be trained, and no profile holds it: make one with "
                f"`emoe profile --predictors {name}`, or choose a predictor that needs no training."
            )

    @property
    def lossy(self) -> bool:
        """Whether the mode can change the text."""
        mode = self.settings.mode
        return mode == "resident" or (mode == "balanced" and not self._habits.all_sensitive())

    def spent(self) -> Spent:
        """What predicting took."""
        return Spent() if self._answers is None else self._answers.spent()

    def popularity(self) -> dict[int, list[float]] | None:
        """For `plan_slots`: the profile's popularity over all prompts, where the split asks for it."""
        if self.settings.layer_split == "uniform" or self.profile is None:
            return None
        shares = self.profile.popularity_of(None)
        return {need.layer: shares[rank, : need.experts].tolist() for rank, need in enumerate(self._needs)}

    def rule(self, experts: dict[int, int], quotas: dict[int, int]) -> Eviction:
        """The eviction rule of a table that holds these layers: experts and slots of each."""
        if self.scores is None:
            return make_eviction(self.settings.eviction)
        rank = {need.layer: rank for rank, need in enumerate(self._needs)}
        layers = sorted(experts)
        sizes, slots = [experts[layer] for layer in layers], [quotas[layer] for layer in layers]
        return LiveScored(self.scores.live, [rank[layer] for layer in layers], sizes, slots)

    def attach(
        self, model: PreTrainedModel, pools: Sequence[ExpertPool], tokenizer: PreTrainedTokenizerBase | None
    ) -> list[Any]:
        """Wire everything to a runtime whose layers are bound; return what has a `remove` method, to undo it."""
        runtime, settings = self._runtime, self.settings
        decode: Callable[[list[int]], str] | None = None
        if tokenizer is not None:  # keywords are looked for near both ends: not in the template's marks
            decode = partial(tokenizer.decode, skip_special_tokens=True)
        if self.profile is not None:
            runtime.tasks_of = TaskReader(runtime, self.profile, decode)
        fits = all(pool.table.all_fit for pool in pools)
        if fits:  # nothing will ever be evicted or missed: what looks ahead would only cost time
            self.idle = "every expert is resident"
            return []
        for pool in pools:
            pool.prefetches.worth = self.worth
        if settings.predictor is not None:
            self._answers = self._ask(settings.predictor)
        if self.scores is not None and settings.mode == "resident":  # scoring took 3 to 8 of 20 tok/s for nothing
            self.scores.rest("in mode 'resident' plans say what is resident, and no answer evicts anything")
        scores = None if self.scores is None or self.scores.idle else self.scores
        if scores is not None or self._answers is not None:
            collector = RouteCollector(
                runtime,
                [need.layer for need in self._needs],
                self._shape.experts,
                self._shape.top_k,
                with_weights=scores is not None,
            )
            if scores is not None:
                scores.pools = pools
                collector.consumers.append(scores.collect)
                runtime.at_pass_start.append(scores.start_pass)
                runtime.observers.append(scores.route)
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
            runtime.at_pass_start.append(self._end_pass)
        return [] if self.gate is None else list(self.gate.handles)

    def close(self) -> None:
        """End what was started."""
        if self._answers is not None:
            self._answers.close()

    def _end_pass(self, now: Pass) -> None:
        """Tell the account that the pass before this one has ended; the time between prompts is nobody's."""
        started = time.perf_counter()
        self.worth.end_pass(0.0 if now.new_prompt else started - self._started)
        self._started = started

    def _planner(self, pools: Sequence[ExpertPool], answers: Answers) -> Planner:
        schedule = make_schedule(self.settings.replan_prompts)
        return Planner(self._runtime, pools, answers, schedule, self._shape, self._habits, self.worth)

    def _ask(self, name: str) -> Answers:
        """Networks think in a process of their own; the others answer within microseconds."""
        if name not in NETWORKS or self.profile is None:
            return AnswersHere(self._restored(make_predictor(name, self._shape)))
        return AnswersAside(PredictorProcess(name, self._shape, self.profile.predictors[name]))

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
