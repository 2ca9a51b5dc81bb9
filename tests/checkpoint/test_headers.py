"""Headers: what is read back is what was written; damage is named."""

from __future__ import annotations

import gc
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from emoe.checkpoint import headers
from emoe.checkpoint.headers import read_file_header, read_headers, stamp_files
from emoe.errors import CheckpointError


def write(file: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file of `header`, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return file


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_entries_say_where_the_numbers_are(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).to(torch.bfloat16),
        "c": torch.arange(6).reshape(2, 3),
        "d": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = read_headers(tmp_path)
    assert entries.keys() == tensors.keys()
    raw = (tmp_path / "model.safetensors").read_bytes()
    for name, tensor in tensors.items():
        found = entries[name]
        stored = torch.frombuffer(bytearray(raw[found.offset :][: found.nbytes]), dtype=tensor.dtype)
        assert torch.equal(stored.reshape(found.shape), tensor)
    assert entries["b"].dtype == "BF16"


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), [("F4", [2, 3], 3), ("F6_E2M3", [4], 3), ("F8_E8M0", [5], 5)])
def test_numbers_smaller_than_a_byte_are_counted_in_bits(
    tmp_path: Path, dtype: str, shape: list[int], nbytes: int
) -> None:
    file = write(tmp_path / "f.safetensors", {"t": entry(0, nbytes, shape, dtype)}, bytes(nbytes))
    assert read_file_header(file)["t"].nbytes == nbytes
    write(file, {"t": entry(0, nbytes, [*shape, 2], dtype)}, bytes(nbytes))
    with pytest.raises(CheckpointError, match=f"gives tensor 't' {nbytes} bytes, but .* needs {2 * nbytes}"):
        read_file_header(file)


@pytest.mark.parametrize("dtype", sorted(headers.DTYPE_BITS))
def test_a_dtypes_name_says_its_bits(dtype: str) -> None:
    found = re.search(r"\d+", dtype)
    assert headers.DTYPE_BITS[dtype] == (8 if found is None else int(found[0]))  # BOOL takes a byte


def test_tensors_without_numbers_take_no_place(tmp_path: Path) -> None:
    header = {"a": entry(0, 2), "none": entry(2, 2, [0, 7]), "b": entry(2, 5)}
    file = write(tmp_path / "f.safetensors", header, b"12345")
    assert [read_file_header(file)[name].nbytes for name in ("a", "none", "b")] == [2, 0, 3]


@pytest.mark.parametrize("enabled", [True, False])
def test_collecting_garbage_goes_on_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError), headers.collector_paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_file_that_goes_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"t": entry(0, 1)}, b"1")
    entries = read_headers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors has gone since its header was read"):
        stamp_files(entries)


def test_only_the_first_of_many_names_are_listed(tmp_path: Path) -> None:
    for count, said in ((3, "t0, t1, t2 in a.safetensors"), (5, "t0, t1, t2 and 2 more in a.safetensors")):
        write(tmp_path / "a.safetensors", {"u": entry(0, 1)}, b"1")
        weight_map = {f"t{number}": "a.safetensors" for number in range(count)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=said):
            read_headers(tmp_path)


def test_shards_are_read_through_the_index(mixtral: Path) -> None:
    index = json.loads((mixtral / "model.safetensors.index.json").read_text())
    entries = read_headers(mixtral)
    assert {name: entry.file.name for name, entry in entries.items()} == index["weight_map"]
    assert len(set(index["weight_map"].values())) > 3
    stamps = stamp_files(entries)
    assert {file.name for file in stamps} == set(index["weight_map"].values())


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[1]", b"", "not a JSON object"),
        ({"t": 3}, b"", "describes tensor 't' as 3"),
        ({"t": entry(0, 2, dtype="Q9")}, b"12", "'dtype': 'Q9'"),
        ({"t": entry(0, 2, [-2])}, b"12", "not a whole number"),
        ({"t": entry(0, 2, [2.0])}, b"12", "not a whole number"),
        ({"t": entry(0, 2, [True, 2])}, b"12", "not a whole number"),
        ({"t": entry(2, 0, [2])}, b"12", "gives tensor 't' -2 bytes, but U8 [2] needs 2"),
        ({"t": entry(0, 6, [2, 4])}, b"123456", "gives tensor 't' 6 bytes, but U8 [2, 4] needs 8"),
        ({"t": entry(0, 4), "u": entry(2, 6)}, b"123456", "and overlaps tensor 't', which ends at"),
        ({"t": entry(0, 4), "u": entry(5, 6)}, b"123456", "leaves 1 bytes unused after tensor 't'"),
        ({"t": entry(1, 6)}, b"123456", "leaves 1 bytes unused after the header"),
        ({"t": entry(0, 6)}, b"1234", "truncated: tensor 't' ends at byte"),
        ({"t": entry(0, 4)}, b"123456", "2 more than its header accounts for"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: Any, data: bytes, said: str) -> None:
    file = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_headers(tmp_path)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)
    assert "Download the checkpoint again" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 900) + b"{}"])
def test_a_file_shorter_than_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"truncated: it has {len(content)} bytes"):
        read_headers(tmp_path)


def test_what_is_no_safetensors_file_is_not_called_truncated(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"<!DOCTYPE html>")  # a failed download, often
    with pytest.raises(CheckpointError, match="it is not a safetensors file, or damaged"):
        read_headers(tmp_path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_HEADER_BYTES", 10)
    write(tmp_path / "model.safetensors", {"t": entry(0, 1)}, b"1")
    with pytest.raises(CheckpointError, match="more than the 10 the format allows"):
        read_headers(tmp_path)
    write(tmp_path / "model.safetensors", b"{}        ")  # the most that is allowed
    assert read_headers(tmp_path) == {}


@given(st.binary(max_size=60), st.booleans())
def test_random_bytes_never_escape_as_other_errors(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, framed: bool
) -> None:
    file = tmp_path_factory.mktemp("junk") / "f.safetensors"
    file.write_bytes((struct.pack("<Q", len(junk)) if framed else b"") + junk)
    try:
        assert read_file_header(file) == {}
    except CheckpointError as error:
        assert str(file) in str(error)


def test_a_missing_shard_is_named(mixtral: Path) -> None:
    shards = sorted(mixtral.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError) as caught:
        read_headers(mixtral)
    assert f"{mixtral} lacks 1 of the {len(shards)} files" in str(caught.value)
    assert shards[1].name in str(caught.value)


def test_a_truncated_shard_is_named_with_its_numbers(mixtral: Path) -> None:
    shard = sorted(mixtral.glob("model-*.safetensors"))[2]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size - 100])
    with pytest.raises(CheckpointError) as caught:
        read_headers(mixtral)
    message = str(caught.value)
    assert f"{shard} is truncated" in message
    assert f"ends at byte {size:,}, and the file has {size - 100:,}" in message


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"t": "../other.safetensors"}, "not a safetensors file inside the checkpoint's directory"),
        ({"t": "/etc/passwd"}, "not a safetensors file inside the checkpoint's directory"),
        ({"t": "model.bin"}, "not a safetensors file inside the checkpoint's directory"),
        ({"t": 3}, "no 'weight_map'"),
        ([], "no 'weight_map'"),
        (
            {"t": "a.safetensors", "v": "a.safetensors"},
            "places v in a.safetensors, whose header does not list it",
        ),
        ({"t": "a.safetensors", "u": "b.safetensors"}, "tensor 't' is in two files"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, weight_map: Any, said: str) -> None:
    write(tmp_path / "a.safetensors", {"t": entry(0, 1)}, b"1")
    write(tmp_path / "b.safetensors", {"t": entry(0, 1), "u": entry(1, 2)}, b"12")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        read_headers(tmp_path)
    assert said in str(caught.value)


def test_an_index_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_headers(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_headers(tmp_path)


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"t": entry(0, 1)}, b"1")
    (tmp_path / "model.safetensors.index.json").write_text("not even JSON")
    assert list(read_headers(tmp_path)) == ["t"]
