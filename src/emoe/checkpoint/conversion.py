"""From checkpoint tensors to expert parameters, by transformers' own conversion mappings.

`assign` repeats what `convert_and_load_state_dict_in_model` does with names: each checkpoint tensor goes to
one model parameter, directly or through a converter. `convert` runs such a converter's operations on symbolic
tensors. All contact with `transformers.core_model_loading` is in this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from emoe.checkpoint.headers import TensorEntry
from emoe.checkpoint.layout import Layout
from emoe.checkpoint.symbolic import SymbolicTensor
from emoe.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAST_NUMBER = re.compile(r"(.*\.)(\d+)(\..*)")


@dataclass(slots=True)
class Source:
    """The checkpoint tensors that one pattern of a converter collects for one parameter, in its order."""

    entries: list[TensorEntry] = field(default_factory=list)
    # The number in each name that the pattern swallows (the expert), None where it has none.
    numbers: list[int | None] = field(default_factory=list)
    # How many groups of names it was filled from; more than one and the order has to be made afterwards.
    groups: int = 0


@dataclass(slots=True)
class Assignment:
    """What makes one model parameter. `converter` is None where a tensor is the parameter as it stands."""

    target: str
    converter: Any = None
    sources: dict[str, Source] = field(default_factory=dict)

    def entries(self) -> list[TensorEntry]:
        """All its checkpoint tensors, pattern by pattern."""
        return [entry for source in self.sources.values() for entry in source.entries]

    def targets(self) -> list[str]:
        """The parameters it makes: several where a converter has several target patterns."""
        if self.converter is None:
            return [self.target]
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


@dataclass(frozen=True, slots=True)
class Assignments:
    """Where every checkpoint tensor goes: by target parameter, and the tensors the model has no place for."""

    by_target: Mapping[str, Assignment]
    unused: tuple[str, ...]


def assign(entries: Mapping[str, TensorEntry], model: PreTrainedModel) -> Assignments:
    """Send every checkpoint tensor to the parameter transformers would load it into.

    Raises:
        UnsupportedModelError: two ways of making the same parameter are mixed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix

    def rename(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        return renamed, pattern

    by_target: dict[str, Assignment] = {}
    unused: list[str] = []

    def add(name: str, target: str, pattern: str | None, number: int | None = None, again: bool = False) -> None:
        if target not in state:
            unused.append(name)
            return
        assignment = by_target.get(target)
        if assignment is None:
            converter = None if pattern is None else by_pattern[pattern]
            assignment = by_target[target] = Assignment(target, converter)
        elif pattern is None or assignment.converter is not by_pattern[pattern]:
            raise UnsupportedModelError(
                f"unsupported layout: {target!r} would be made in two ways, from "
                f"{assignment.entries()[0].name!r} and from {name!r}. Remove one of them from the checkpoint."
            )
        source = assignment.sources.setdefault(name if pattern is None else pattern, Source())
        source.entries.append(entries[name])
        source.numbers.append(number)
        source.groups += not again

    # Names that differ only in their last number mostly end in one parameter, one name per expert. Renaming
    # the first and the last of such a group tells for all of it: 36,000 expert tensors cost 600 renamings.
    groups: dict[tuple[str, str], list[int]] = {}
    singles: list[str] = []
    for name in entries:
        match = _LAST_NUMBER.fullmatch(name)
        if match is not None and str(int(match[2])) == match[2]:
            groups.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            singles.append(name)
    jobs: list[tuple[str, tuple[str, str] | None]] = [(name, None) for name in singles]
    jobs += ((f"{head}{min(numbers)}{tail}", (head, tail)) for (head, tail), numbers in groups.items())
    for first_name, key in sorted(jobs, key=lambda job: dot_natural_key(job[0])):
        if key is None:
            add(first_name, *rename(first_name))
            continue
        head, tail = key
        numbers = sorted(groups[key])
        first = rename(first_name)
        other = numbers[-1] if len(numbers) > 1 else numbers[0] + 1
        swallowed = first[1] is not None and rename(f"{head}{other}{tail}") == first
        for number in numbers:
            name = f"{head}{number}{tail}"
            if swallowed:
                add(name, *first, number, again=number != numbers[0])
            else:
                add(name, *(first if name == first_name else rename(name)))
    for assignment in by_target.values():
        for source in assignment.sources.values():
            if source.groups > 1:
                pairs = zip(source.entries, source.numbers, strict=True)
                ordered = sorted(pairs, key=lambda pair: dot_natural_key(pair[0].name))
                source.entries, source.numbers = [pair[0] for pair in ordered], [pair[1] for pair in ordered]
    return Assignments(by_target, tuple(unused))


def convert(assignment: Assignment, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Layout]:
    """The layout of each parameter that the assignment makes, over its `entries()` numbered from 0.

    Raises:
        UnsupportedModelError: an operation is no rearrangement.
        ConversionFailed: an operation refused its inputs; the text is its own.
    """
    number = iter(range(len(assignment.entries())))
    tensors = {
        pattern: [
            SymbolicTensor.make(Layout.of_source(next(number), entry.shape), dtype, entry.name)
            for entry in source.entries
        ]
        for pattern, source in assignment.sources.items()
    }
    if assignment.converter is None:
        (only,) = (tensor for group in tensors.values() for tensor in group)
        return {assignment.target: only.layout_}
    converter = deepcopy(assignment.converter)
    for pattern, group in tensors.items():
        converter.collected_tensors[pattern] = group
    try:
        made = converter.convert(assignment.target, model=model, config=model.config)
    except _OPERATION_ERRORS as error:
        raise ConversionFailed(f"{type(error).__name__}: {error}") from error
    layouts: dict[str, Layout] = {}
    for target, value in made.items():
        tensor = value[0] if isinstance(value, list) else value
        if not isinstance(tensor, SymbolicTensor):
            raise UnsupportedModelError(
                f"unsupported layout: the conversion of {target!r} makes a {type(tensor).__name__}, not a "
                "rearrangement of stored numbers"
            )
        layouts[target] = tensor.layout_
    return layouts


# What operations raise for inputs they cannot work on: torch's errors, and those of missing dictionary keys.
_OPERATION_ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError)


class ConversionFailed(CheckpointError):
    """A conversion operation refused the checkpoint's tensors, mostly because one is missing or misshapen."""


def missing_numbers(assignment: Assignment, experts: int) -> list[str]:
    """Names of the per-expert tensors that `assignment` lacks, where its names are numbered by expert."""
    missing: list[str] = []
    for source in assignment.sources.values():
        match = _LAST_NUMBER.fullmatch(source.entries[0].name)
        if match is not None and None not in source.numbers:
            absent = sorted(set(range(experts)) - set(source.numbers))
            missing += (f"{match[1]}{number}{match[3]}" for number in absent)
    return missing


def absent_patterns(assignment: Assignment) -> list[str]:
    """The converter's source patterns for which the checkpoint has no tensor."""
    if assignment.converter is None:
        return []
    return [pattern for pattern in assignment.converter.source_patterns if pattern not in assignment.sources]


def run_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype the model keeps parameter `name` in: `dtype`, or float32 where its class says so."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    for pattern, kept in plan.items():
        if re.search(pattern.replace("*", ".*"), name):
            return kept
    return dtype
