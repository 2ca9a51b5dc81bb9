"""Files written tensor by tensor are safetensors files like any other."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from emoe.checkpoint.writing import TensorToWrite, write_sharded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def whole(name: str, value: torch.Tensor, rows: int) -> TensorToWrite:
    """`value`, written `rows` rows at a time."""

    def blocks() -> Iterable[torch.Tensor]:
        return [value.float()[start : start + rows] for start in range(0, len(value), rows)]

    return TensorToWrite(name, tuple(value.shape), value.dtype, blocks)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from(DTYPES)), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 400),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, int, torch.dtype]],
    rows: int,
    shard_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("written")
    values = {f"t{i}": torch.randn(a, b).to(dtype) for i, (a, b, dtype) in enumerate(sizes)}
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    files = write_sharded([whole(n, v, rows) for n, v in values.items()], folder, shard_bytes, note)

    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(file)
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 4096 == 0  # where O_DIRECT may begin
    total = sum(v.nbytes for v in values.values())
    assert seen[-1] == (total, total)
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == total
        assert index["weight_map"].keys() == values.keys()
        for file in files:
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
            assert all(index["weight_map"][name] == file.name for name in names)
            assert len(names) == 1 or sum(values[name].nbytes for name in names) <= shard_bytes


def test_a_tensor_of_another_size_than_promised_is_refused(tmp_path: Path) -> None:
    short = TensorToWrite("x", (3, 4), torch.float32, lambda: [torch.ones(2, 4)])
    with pytest.raises(ValueError, match="x: 32 bytes were made"):
        write_sharded([short], tmp_path, 100)
