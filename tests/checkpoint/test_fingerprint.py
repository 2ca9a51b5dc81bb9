"""A fingerprint follows the weights, not where they lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emoe.checkpoint.fingerprint import READ_BYTES, READS, fingerprint, samples
from emoe.checkpoint.headers import SINGLE_FILE, read_headers
from emoe.errors import CheckpointError
from tests.checkpoint.sparse import write_sparse_qwen3_moe
from tests.conftest import Checkpoints


@pytest.fixture
def copy(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "copy"))


def test_a_copy_elsewhere_is_the_same(checkpoints: Checkpoints, copy: Path) -> None:
    assert fingerprint(copy) == fingerprint(checkpoints("qwen3_moe"))
    assert len(fingerprint(copy)) == 64


def test_sharding_and_order_do_not_matter(checkpoints: Checkpoints, copy: Path) -> None:
    before = fingerprint(copy)
    tensors = load_file(copy / SINGLE_FILE)
    (copy / SINGLE_FILE).unlink()
    names = sorted(tensors, reverse=True)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, copy / file)
    index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint(copy) == before


def test_every_kind_of_tensor_is_sampled_and_every_sampled_byte_counts(copy: Path) -> None:
    before = fingerprint(copy)
    entries = read_headers(copy)
    read = list(samples(entries))
    assert {entry.name.split(".")[-2] for entry, _, _ in read} == {name.split(".")[-2] for name in entries}
    file = copy / SINGLE_FILE
    whole = file.read_bytes()
    for entry, offset, nbytes in read[:: len(read) // 5]:
        for at in (entry.offset + offset, entry.offset + offset + nbytes - 1):
            changed = bytearray(whole)
            changed[at] ^= 1
            file.write_bytes(changed)
            assert fingerprint(copy) != before, entry.name
    file.write_bytes(whole)
    assert fingerprint(copy) == before


def test_a_fine_tune_of_the_routers_alone_changes_it(copy: Path) -> None:
    before = fingerprint(copy)
    tensors = load_file(copy / SINGLE_FILE)
    tuned = {name: t + 0.01 if name.endswith("mlp.gate.weight") else t for name, t in tensors.items()}
    assert any(not torch.equal(tuned[name], tensors[name]) for name in tensors)
    save_file(tuned, copy / SINGLE_FILE)
    assert fingerprint(copy) != before


def test_a_name_a_shape_and_a_dtype_count(copy: Path) -> None:
    tensors = load_file(copy / SINGLE_FILE)
    found = {fingerprint(copy)}
    name = next(iter(tensors))
    for changed in ({name: tensors[name].reshape(-1)}, {name: tensors[name].view(torch.float16)}):
        save_file(tensors | changed, copy / SINGLE_FILE)
        found.add(fingerprint(copy))
    save_file({f"{n}x" if n == name else n: t for n, t in tensors.items()}, copy / SINGLE_FILE)
    assert len(found | {fingerprint(copy)}) == 4


def test_a_large_checkpoint_takes_a_bounded_number_of_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sparse_qwen3_moe(tmp_path, layers=48, experts=128, hidden=2048, width=768, shards=4)
    entries = read_headers(tmp_path)
    nbytes = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        nbytes.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    fingerprint(tmp_path, entries)
    assert len(nbytes) <= READS
    assert max(nbytes) <= READ_BYTES


def test_a_file_cut_short_after_its_header_was_read_is_named(copy: Path) -> None:
    entries = read_headers(copy)
    with (copy / SINGLE_FILE).open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        fingerprint(copy, entries)
