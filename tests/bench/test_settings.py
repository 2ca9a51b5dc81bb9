"""Which contenders follow from what is asked."""

from __future__ import annotations

import pytest

from emoe.bench.settings import Contender, DecodeSettings, parse_budget
from emoe.config import ExpertMemory
from emoe.errors import UsageError


def names(settings: DecodeSettings) -> list[str]:
    return [contender.name for contender in settings.contenders]


def test_every_mode_at_every_budget_then_the_baselines() -> None:
    settings = DecodeSettings(
        budgets=(parse_budget("100"), parse_budget("40%"), parse_budget("8GiB")),
        baselines=("eager", "accelerate-disk", "accelerate-disk:20"),
    )
    assert names(settings) == [
        "emoe exact 100%",
        "emoe exact 40%",
        "emoe resident 40%",
        "emoe exact 8GiB",
        "emoe resident 8GiB",
        "transformers eager",
        "accelerate disk 40%",
        "accelerate disk 20%",
    ]


def test_the_default_is_what_the_command_line_documents() -> None:
    assert len(names(DecodeSettings())) == 7 + 4
    assert DecodeSettings().as_dict()["budgets"] == ["100%", "60%", "40%", "20%"]


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("40", ExpertMemory("share", 0.4)),
        (" 12.5 ", ExpertMemory("share", 0.125)),
        ("40%", ExpertMemory("share", 0.4)),
        ("12/layer", ExpertMemory("per_layer", 12)),
        ("2GiB", ExpertMemory("bytes", 2**31)),
    ],
)
def test_a_bare_number_is_percent(text: str, memory: ExpertMemory) -> None:
    assert parse_budget(text) == memory


def test_a_contender_survives_the_way_to_its_process() -> None:
    for contender in DecodeSettings(budgets=(parse_budget("100"), parse_budget("3/layer"))).contenders:
        assert Contender.from_dict(contender.as_dict()) == contender


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"new_tokens": 1}, "new tokens must be at least 2"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"budgets": (), "baselines": ()}, "nothing to measure"),
        ({"baseline": "vllm"}, "no contender is called 'vllm'; there are emoe exact 100%"),
        ({"baselines": ("eager:40",)}, "only accelerate-disk takes a budget"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        DecodeSettings(**wrong)  # type: ignore[arg-type]


def test_what_looks_ahead_is_checked_before_anything_starts() -> None:
    assert DecodeSettings(predictor="static").as_dict()["predictor"] == "static"
    with pytest.raises(UsageError, match="'nothing'"):
        DecodeSettings(predictor="nothing")
    with pytest.raises(UsageError, match="prefetch='plan' loads what a predictor expects"):
        DecodeSettings(prefetches=("plan",))
    with pytest.raises(UsageError, match="no prefetching is called 'often'; use none, plan, next-gate"):
        DecodeSettings(prefetches=("often",))
    with pytest.raises(UsageError, match="a predictor loads ahead: leave it out, or prefetching 'none'"):
        DecodeSettings(predictor="static", prefetches=("none",))
    with pytest.raises(UsageError, match="'next-gate' works in mode 'exact'"):
        DecodeSettings(prefetches=("none", "next-gate"))


def test_each_prefetching_is_a_contender_where_something_is_missing() -> None:
    settings = DecodeSettings(
        budgets=(ExpertMemory("share", 1.0), ExpertMemory("share", 0.4)),
        modes=("exact",),
        baselines=(),
        evictions=("lru", "least-stale"),
        prefetches=("none", "next-gate"),
    )
    assert names(settings) == [
        "emoe exact 100%",
        "emoe exact 40% lru",
        "emoe exact 40% lru next-gate",
        "emoe exact 40% least-stale",
        "emoe exact 40% least-stale next-gate",
    ]
    for contender in settings.contenders:
        assert Contender.from_dict(contender.as_dict()) == contender
