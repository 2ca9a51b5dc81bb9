"""Conversion operations run symbolically against the same operations on numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from emoe.checkpoint.conversion import Assignment, Source, convert
from emoe.checkpoint.headers import TensorEntry
from tests.checkpoint.test_layout import materialise


class FakeModel:
    """As much of a model as operations ask for: the parameter's shape."""

    config = SimpleNamespace(num_attention_heads=2)

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self.shape, device="meta")


GATE, UP = "experts.*.gate.weight", "experts.*.up.weight"
CASES: dict[str, tuple[Any, dict[str, tuple[int, tuple[int, ...]]], FakeModel]] = {
    "gate and up of each expert": (
        WeightConverter([GATE, UP], "experts.gate_up", [MergeModulelist(dim=0), Concatenate(dim=1)]),
        {GATE: (4, (3, 5)), UP: (4, (3, 5))},
        FakeModel(4, 6, 5),
    ),
    "transposed": (
        WeightConverter("experts.fused", "experts.gate_up", [Transpose(1, 2)]),
        {"experts.fused": (1, (4, 5, 6))},
        FakeModel(4, 6, 5),
    ),
    "transposed where the shape asks for it": (
        WeightConverter("experts.fused", "experts.gate_up", [Transpose(1, 2, check_dims=True)]),
        {"experts.fused": (1, (4, 5, 6))},
        FakeModel(4, 6, 5),
    ),
    "not transposed where it does not": (
        WeightConverter("experts.fused", "experts.gate_up", [Transpose(1, 2, check_dims=True)]),
        {"experts.fused": (1, (4, 6, 5))},
        FakeModel(4, 6, 5),
    ),
    "interleaved": (
        WeightConverter("experts.fused", "experts.gate_up", [Interleave(dim=1)]),
        {"experts.fused": (1, (4, 6, 5))},
        FakeModel(4, 6, 5),
    ),
    "interleaved the other way": (
        WeightConverter("experts.fused", "experts.gate_up", [Interleave(dim=1, inverse=True)]),
        {"experts.fused": (1, (4, 6, 5))},
        FakeModel(4, 6, 5),
    ),
    "one tensor for two parameters": (
        WeightConverter("experts.fused", ["experts.gate", "experts.up"], [Interleave(dim=1), Chunk(dim=1)]),
        {"experts.fused": (1, (4, 6, 5))},
        FakeModel(4, 3, 5),
    ),
    "experts shared out between two modules": (
        WeightConverter(
            [GATE, UP], ["text.experts.gate_up", "vision.experts.gate_up"], [ErnieFuseAndSplitTextVisionExperts()]
        ),
        {GATE: (6, (3, 5)), UP: (6, (3, 5))},
        FakeModel(3, 6, 5),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_symbols_end_where_the_numbers_do(case: str) -> None:
    converter, collected, model = CASES[case]
    target = "model.layers.0." + converter.target_patterns[0]
    assignment = Assignment(target, converter)
    numbers: dict[str, list[torch.Tensor]] = {}
    for pattern, (count, shape) in collected.items():
        start = 1000 * len(numbers)
        numbers[pattern] = [
            torch.arange(torch.Size(shape).numel()).reshape(shape) + 10_000 * (start + i) for i in range(count)
        ]
        entries = [TensorEntry(None, f"{pattern} {i}", "I64", shape, 0, 0) for i in range(count)]  # type: ignore[arg-type]
        assignment.sources[pattern] = Source(entries, list(range(count)))

    layouts = convert(assignment, model, torch.int64)

    for pattern, tensors in numbers.items():
        converter.collected_tensors[pattern] = list(tensors)
    expected = converter.convert(target, model=model, config=model.config)
    assert layouts.keys() == expected.keys()
    assert set(layouts) <= set(assignment.targets())
    flat = [tensor for tensors in numbers.values() for tensor in tensors]
    for name, value in expected.items():
        tensor = value[0] if isinstance(value, list) else value
        assert torch.equal(materialise(layouts[name], flat), tensor), name
