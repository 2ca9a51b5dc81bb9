"""Settings that look ahead: what they may be together, and what follows from them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.config import LAYER_SPLITS, MODES
from emoe.errors import UsageError
from emoe.policies.foresight import Foresight
from emoe.prediction.registry import PREDICTORS, SCORERS
from emoe.residency.eviction import EVICTION_RULES, Scored

RULES = sorted({*EVICTION_RULES, *SCORERS})


@pytest.mark.parametrize(
    ("given_settings", "text"),
    [
        ({"mode": "fast"}, "no mode is called 'fast': choose one of exact, balanced, resident"),
        ({"eviction": "fifo"}, f"no eviction rule is called 'fifo': choose one of {', '.join(RULES)}"),
        ({"predictor": "oracle"}, f"no predictor is called 'oracle': choose one of {', '.join(sorted(PREDICTORS))}"),
        ({"layer_split": "fair"}, "no layer_split is called 'fair': choose one of uniform, expected-misses"),
        ({"prefetch": "hope"}, "no prefetch is called 'hope': choose one of plan, next-gate"),
        ({"prefetch": "plan"}, "name one with predictor="),
        ({"prefetch": "next-gate", "predictor": "static"}, "both load ahead: choose one"),
        ({"prefetch": "next-gate", "mode": "resident"}, "works in mode 'exact'"),
        ({"replan_prompts": "adaptive"}, "name a predictor, or give a number of prompts"),
        ({"replan_prompts": 0}, "replan_prompts is 0, but must be at least 1"),
        ({"replan_prompts": 0, "predictor": "static"}, "must be at least 1"),
        ({"sensitivity_threshold": -0.1}, "sensitivity_threshold is -0.1, but"),
        ({"sensitivity_threshold": math.nan}, "must be a number of at least 0"),
        ({"sensitivity_threshold": math.inf}, "must be a number of at least 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_or_without_a_profile(given_settings: dict[str, Any], text: str) -> None:
    for profiled in (False, True):
        with pytest.raises(UsageError, match=text):
            Foresight(**given_settings, profiled=profiled)


@pytest.mark.parametrize(
    ("given_settings", "named"),
    [
        ({"mode": "balanced"}, "mode='balanced'"),
        ({"layer_split": "expected-misses"}, "layer_split='expected-misses'"),
        ({"sensitivity_threshold": 0.0}, "sensitivity_threshold"),
    ],
)
def test_what_only_a_profile_can_answer_needs_one(given_settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"^{named} needs a profile of the model: make one with `emoe profile`"):
        Foresight(**given_settings)
    assert Foresight(**given_settings, profiled=True).profiled


@pytest.mark.parametrize(
    "sound",
    [
        {"replan_prompts": 1},
        {"replan_prompts": "40", "predictor": "static"},
        {"replan_prompts": "adaptive:0.2", "predictor": "static"},
        {"prefetch": "plan", "predictor": "static"},
        {"prefetch": "next-gate"},
        {"mode": "resident", "predictor": "static", "prefetch": "plan"},
    ],
)
def test_settings_that_go_together(sound: dict[str, Any]) -> None:
    assert not Foresight(**sound).profiled


@given(
    st.sampled_from(MODES),
    st.sampled_from(RULES),
    st.none() | st.sampled_from(sorted(PREDICTORS)),
    st.sampled_from(LAYER_SPLITS),
)
def test_a_profile_is_read_where_something_learns_from_it(
    mode: Any, eviction: str, predictor: str | None, layer_split: Any
) -> None:
    settings = Foresight(mode, eviction, predictor, layer_split=layer_split, profiled=True)
    learns = predictor is not None or eviction in SCORERS
    assert settings.wants_profile == (learns or mode == "balanced" or layer_split == "expected-misses")


def test_pools_are_shared_as_the_eviction_rule_wants() -> None:
    for eviction in RULES:
        rule = EVICTION_RULES.get(eviction)
        assert Foresight(eviction=eviction).shared_from == (Scored if rule is None else rule()).shared_from
