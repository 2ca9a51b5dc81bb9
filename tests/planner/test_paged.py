"""Which models' keys and values pages can hold, as far as the configuration tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from emoe.planner.facts import CacheLayer
from emoe.planner.paged import why_not_paged

CONFIG: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
FULL = CacheLayer(0, "full", 2 * 2 * 16 * 2)
SLIDING = replace(FULL, layer=1, kind="sliding", window=8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": None},
        {"head_dim": None, "num_key_value_heads": 3},  # one of them is the defaults' to say
        {"num_key_value_heads": None, "head_dim": 3},
    ],
)
def test_full_and_sliding_layers_of_one_size_can(changes: dict[str, Any]) -> None:
    assert why_not_paged(CONFIG | changes, [FULL, SLIDING], 2) == ""
    assert why_not_paged(CONFIG | changes, [], 2) == ""


def test_without_grouped_heads_all_have_keys() -> None:
    config = {"num_attention_heads": 8, "head_dim": 16}
    assert why_not_paged(config, [replace(FULL, token_nbytes=2 * 8 * 16 * 2)], 2) == ""
    assert "128 bytes a token" in why_not_paged(config, [FULL], 2)


@pytest.mark.parametrize(
    ("changes", "layers", "said"),
    [
        ({"layer_types": ["full_attention", "linear", "linear"]}, [FULL], "of the kind linear"),
        ({}, [FULL, replace(SLIDING, state_nbytes=96)], "layer 1 keeps a state of 96 bytes"),
        ({}, [FULL, CacheLayer(3, "latent", 128)], "layer 3 keeps its keys and values compressed"),
        ({}, [FULL, replace(SLIDING, token_nbytes=64)], "of different sizes, 64 and 128 bytes"),
        ({"head_dim": 8}, [FULL], "128 bytes a token, and 2 heads of 8 keys and as many values are 64"),
    ],
)
def test_the_others_cannot_and_it_is_said_why(changes: dict[str, Any], layers: list[CacheLayer], said: str) -> None:
    assert said in why_not_paged(CONFIG | changes, layers, 2)
