"""Names sent to parameters: groups of names told by two of them, against each name renamed on its own."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from emoe.checkpoint.conversion import Assignment, Source, absent_patterns, assign, missing_numbers
from emoe.checkpoint.headers import TensorEntry
from emoe.errors import UnsupportedModelError

W1, W3, W2 = (f"experts.*.{name}.weight" for name in ("w1", "w3", "w2"))
LAYERS = 2


def model() -> Any:
    """As much of a model as names are sent by."""
    names = [
        f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in ("experts.up", "experts.down", "mix")
    ]
    state = {name: torch.empty(0) for name in [*names, "model.keep.weight"]}
    return SimpleNamespace(state_dict=lambda: state, base_model_prefix="model")


def mapping() -> list[Any]:
    """Experts under an older name, too; a renaming that would lead away from what is there already."""
    return [
        WeightRenaming(r"\.old\.", ".w1."),
        WeightRenaming("keep", "kept"),
        WeightConverter([W1, W3], "experts.up", [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter(W2, "experts.down", [MergeModulelist(dim=0)]),
    ]


@pytest.fixture(autouse=True)
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: mapping())


def entries(names: list[str]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(None, name, "F32", (2, 2), 0, 0) for name in names}  # type: ignore[arg-type]


Sent = dict[str, dict[str, list[str]]]


def one_by_one(names: list[str]) -> tuple[Sent, list[str]]:
    """By target and pattern, the names in natural order; and those that have no target."""
    renamings, converters = mapping()[:2], mapping()[2:]
    state = model().state_dict()
    sent: Sent = {}
    unused = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, "model", state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            unused.append(name)
            continue
        sent.setdefault(target, {}).setdefault(pattern or name, []).append(name)
    return sent, unused


@given(st.integers(0, 10**6))
def test_groups_are_sent_as_each_name_on_its_own(seed: int) -> None:
    """Also where names of several groups make one parameter, experts are in the order of their numbers."""
    draw = random.Random(seed)
    names = ["model.keep.weight", "model.other.3.weight", "model.other.x"]
    for layer in range(LAYERS):
        names.append(f"model.layers.{layer}.mix")
        experts = draw.sample(range(13), draw.randint(1, 13))
        older = draw.choice([0.0, 0.5])
        for expert in experts:
            first = "old" if draw.random() < older else "w1"
            names += [f"model.layers.{layer}.experts.{expert}.{name}.weight" for name in (first, "w3", "w2")]
    draw.shuffle(names)
    found = assign(entries(names), model())
    sent, unused = one_by_one(names)
    assert sorted(found.unused) == sorted(unused) == ["model.other.3.weight", "model.other.x"]
    assert {
        target: {pattern: [entry.name for entry in source.entries] for pattern, source in one.sources.items()}
        for target, one in found.by_target.items()
    } == sent
    for one in found.by_target.values():
        assert (one.converter is None) == ("experts" not in one.target)
        for pattern, source in one.sources.items():
            numbers = [int(entry.name.split(".")[4]) if "*" in pattern else None for entry in source.entries]
            assert source.numbers == numbers
            assert numbers == sorted(numbers, key=lambda each: each or 0)


@pytest.mark.parametrize("first", ["model.layers.0.experts.up", "model.layers.0.experts.7.w2.weight"])
def test_one_parameter_made_in_two_ways_is_refused(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands and from experts, or by two converters."""
    twice = WeightConverter(W2, "experts.up", [MergeModulelist(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [*mapping()[:3], twice])
    names = [first, "model.layers.0.experts.0.w1.weight", "model.layers.0.experts.1.w1.weight"]
    with pytest.raises(UnsupportedModelError, match=r"'model.layers.0.experts.up' would be made in two ways"):
        assign(entries(names), model())


def test_what_is_missing_is_named() -> None:
    converter = mapping()[2]
    names = [f"layers.0.experts.{number}.w1.weight" for number in (0, 2)]
    source = Source(list(entries(names).values()), [0, 2], 1)
    lacking = Assignment("layers.0.experts.up", converter, {W1: source})
    assert missing_numbers(lacking, 4) == ["layers.0.experts.1.w1.weight", "layers.0.experts.3.w1.weight"]
    assert missing_numbers(lacking, 1) == []
    assert absent_patterns(lacking) == [W3]
    fused = Assignment("fused", None, {"fused.3.weight": Source(list(entries(["fused.3.weight"]).values()), [None], 1)})
    assert missing_numbers(fused, 9) == [] and absent_patterns(fused) == []
    assert missing_numbers(Assignment("x", None, {"x": Source(list(entries(["x"]).values()), [None], 1)}), 9) == []
