"""The settings that look ahead, checked against each other. Pure: commands check them before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from emoe.config import LAYER_SPLITS, MODES, PREFETCHES, LayerSplit, Mode, Prefetch
from emoe.errors import UsageError, unknown
from emoe.prediction.registry import PREDICTORS, SCORERS
from emoe.prediction.schedule import Adaptive, Every, make_schedule
from emoe.residency.eviction import EVICTION_RULES, Scored, make_eviction


@dataclass(frozen=True, slots=True)
class Foresight:
    """Which rule evicts, who predicts, what is loaded ahead and when; `emoe.load` explains each.

    Raises:
        UsageError: settings that contradict each other, with what to change.
    """

    mode: Mode = "exact"
    eviction: str = "least-stale"
    predictor: str | None = None
    prefetch: Prefetch | None = None
    replan_prompts: int | str = 1
    layer_split: LayerSplit = "uniform"
    sensitivity_threshold: float | None = None
    profiled: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        if self.eviction not in EVICTION_RULES and self.eviction not in SCORERS:
            raise unknown("eviction rule", self.eviction, sorted({*EVICTION_RULES, *SCORERS}))
        if self.predictor is not None and self.predictor not in PREDICTORS:
            raise unknown("predictor", self.predictor, sorted(PREDICTORS))
        schedule = make_schedule(self.replan_prompts)
        if isinstance(schedule, Adaptive) and self.predictor is None:
            raise UsageError(
                f"replan_prompts={self.replan_prompts!r} compares what is routed with what was predicted: name a "
                "predictor, or give a number of prompts."
            )
        if isinstance(schedule, Every) and schedule.prompts < 1:
            raise UsageError(f"replan_prompts is {self.replan_prompts}, but must be at least 1.")
        if self.layer_split not in LAYER_SPLITS:
            raise unknown("layer_split", self.layer_split, LAYER_SPLITS)
        if self.prefetch is not None and self.prefetch not in PREFETCHES:
            raise unknown("prefetch", self.prefetch, PREFETCHES)
        if self.prefetch == "plan" and self.predictor is None:
            raise UsageError("prefetch='plan' loads what a predictor expects: name one with predictor=.")
        if self.prefetch == "next-gate" and self.predictor is not None:
            raise UsageError("prefetch='next-gate' and a predictor both load ahead: choose one.")
        if self.prefetch == "next-gate" and self.mode != "exact":
            raise UsageError(
                f"prefetch='next-gate' works in mode 'exact': in mode {self.mode!r} what is resident decides the "
                "route. Choose mode 'exact' (--mode, --modes)."
            )
        threshold = self.sensitivity_threshold
        if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
            raise UsageError(f"sensitivity_threshold is {threshold}, but must be a number of at least 0.")
        if not self.profiled:
            for wanted, setting in (
                (self.mode == "balanced", "mode='balanced'"),
                (self.layer_split == "expected-misses", "layer_split='expected-misses'"),
                (threshold is not None, "sensitivity_threshold"),
            ):
                if wanted:
                    raise UsageError(f"{setting} needs a profile of the model: make one with `emoe profile`.")

    @property
    def wants_profile(self) -> bool:
        """Whether anything here can use one: without, reading it would only take time."""
        learns = self.predictor is not None or self.eviction in SCORERS
        return learns or self.mode == "balanced" or self.layer_split != "uniform"

    @property
    def shared_from(self) -> float:
        """From how many slots per layer one shared pool is better under the eviction rule."""
        return Scored.shared_from if self.eviction in SCORERS else make_eviction(self.eviction).shared_from
