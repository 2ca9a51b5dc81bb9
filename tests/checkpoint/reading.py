"""What the reader tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.memory_room import READER_KINDS
from emoe.checkpoint.readers import Reader
from emoe.checkpoint.segments import Bytes
from tests.checkpoint.test_index import empty_parts

KINDS = pytest.mark.parametrize("kind", READER_KINDS)
Parts = dict[str, torch.Tensor]


def keys_of(index: ExpertIndex) -> list[tuple[int, int]]:
    return index.keys()


def expected(index: ExpertIndex, layer: int, expert: int) -> Parts:
    model = AutoModelForCausalLM.from_pretrained(index.path, dtype="auto")
    module = model.get_submodule(index.layer(layer).module)
    return {part.name: getattr(module, part.name)[expert].detach() for part in index.layer(layer).parts}


def read(reader: Reader, index: ExpertIndex, layer: int, expert: int) -> Parts:
    parts = empty_parts(index.layer(layer))
    assert reader.read_into(index.pieces(layer, expert), parts) == index.stored_nbytes(layer, expert)
    return parts


def assert_parts_equal(found: Parts, wanted: Parts) -> None:
    assert found.keys() == wanted.keys()
    for name, part in found.items():
        assert torch.equal(part, wanted[name]), name


def preadv(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
    """The real one."""
    return os.preadv(descriptor, cast("list[bytearray]", buffers), offset)


def counting(calls: list[int]) -> Callable[[int, Sequence[Bytes], int], int]:
    def counted(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        calls.append(len(buffers))
        return preadv(descriptor, buffers, offset)

    return counted
