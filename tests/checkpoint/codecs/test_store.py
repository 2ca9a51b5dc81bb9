"""Caches of quantised experts: what is in them, whose they are, and what happens when making one goes wrong."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from emoe.checkpoint.codecs import building, cache
from emoe.checkpoint.codecs.formats import CODECS, ExpertCodec
from emoe.checkpoint.codecs.store import coded_cache, open_cache
from emoe.checkpoint.fingerprint import fingerprint
from emoe.checkpoint.index import ExpertIndex, build_index
from emoe.checkpoint.readers import Reader
from emoe.checkpoint.skeleton import skeleton
from emoe.checkpoint.writing import write_file
from emoe.config import user_cache
from emoe.errors import CheckpointError, ReadError, UnsupportedModelError, UsageError
from tests.families import FAMILIES, make_checkpoint, make_config

WIDE = {"intermediate_size": 64, "moe_intermediate_size": 64}
INT4 = CODECS["int4"]


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def model_folder(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of its own, so that caches beside it are the test's own too."""
    return Path(shutil.copytree(checkpoints("qwen3_moe", moe_intermediate_size=64), tmp_path / "model"))


def indexed(folder: Path, dtype: str = "auto") -> tuple[ExpertIndex, Any]:
    _, empty = skeleton(folder, dtype=dtype)
    return build_index(folder, empty), empty


def made(folder: Path, codec: ExpertCodec = INT4, **options: Any) -> Path:
    index, empty = indexed(folder)
    return coded_cache(index, empty, codec, **options)


def expert_of(index: ExpertIndex, layer: int, expert: int) -> dict[str, torch.Tensor]:
    parts = {part.name: torch.empty(part.shape, dtype=getattr(torch, part.dtype)) for part in index.layer(layer).parts}
    with Reader("cached", index.files) as reader:
        reader.read_into(index.pieces(layer, expert), parts)
    return parts


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("codec", list(CODECS.values()), ids=list(CODECS))
def test_every_expert_of_every_family_is_what_the_codec_makes_of_it(
    name: str, codec: ExpertCodec, tmp_path: Path
) -> None:
    folder = make_checkpoint(name, tmp_path / "model", seed=2, dtype=torch.bfloat16, **wide(name))
    index, empty = indexed(folder)
    told: list[tuple[int, int]] = []
    where = coded_cache(index, empty, codec, cache=tmp_path / "kept", progress=lambda *state: told.append(state))
    coded = open_cache(where, index, codec)
    assert coded.expert_dtype == codec.name
    assert coded.keys() == index.keys()
    for layer in index.layers:
        expert = layer.num_experts - 1
        plain, kept = expert_of(index, layer.layer, expert), expert_of(coded, layer.layer, expert)
        for part, values in plain.items():
            if values.ndim == 1:
                assert torch.equal(kept.pop(part), values)
                continue
            rows = values.t() if layer.transposed else values
            expected = codec.encode(rows)
            found = (kept.pop(part), kept.pop(f"{part}_scale"))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            error = (codec.decode(*found) - rows.float()).norm() / rows.float().norm()
            assert error < (0.01 if codec.name == "int8" else 0.12)
        assert not kept
    assert told[-1] == (coded.total_expert_nbytes, coded.total_expert_nbytes)
    assert coded.total_stored_nbytes == coded.total_expert_nbytes
    assert coded.total_expert_nbytes < index.total_expert_nbytes * (0.6 if codec.name == "int8" else 0.35)


def wide(name: str) -> dict[str, Any]:
    """Settings that make the family's expert widths multiples of 32."""
    known = make_config(name).to_dict()
    return {key: value for key, value in WIDE.items() if key in known}


def test_a_cache_is_ordinary_safetensors_beside_the_model(model_folder: Path) -> None:
    where = made(model_folder)
    assert where == model_folder / ".emoe" / f"experts-int4-{fingerprint(model_folder)[:16]}"
    listed = json.loads((where / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.experts.5.down_proj"
    with safe_open(where / listed[name], "pt") as opened:
        assert opened.get_slice(name).get_shape() == [32, 32]
        assert opened.get_slice(f"{name}_scale").get_dtype() == "F16"
    assert sorted(file.name for file in where.iterdir()) == [
        "emoe_experts.json",
        *(f"experts-0000{layer}.safetensors" for layer in range(3)),
        "model.safetensors.index.json",
    ]


def test_torch_works_on_one_thread_meanwhile(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dozens of short passes for each block: beside a busy neighbour each would wait for another thread."""
    seen: set[int] = set()
    encode = type(INT4).encode

    def watched(self: Any, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.add(torch.get_num_threads())
        return encode(self, matrix)

    monkeypatch.setattr(type(INT4), "encode", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        made(model_folder)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


def test_a_second_call_finds_it_and_the_run_dtype_does_not_matter(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(model_folder)
    monkeypatch.setattr(building, "write_file", None)
    index, empty = indexed(model_folder, "float32")
    assert coded_cache(index, empty, INT4) == first
    assert open_cache(first, index, INT4).layers[0].run_dtype == "float32"


def test_weights_are_quantised_from_what_is_stored(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """A model run in bfloat16 is not rounded to it before it is quantised."""
    folder = checkpoints("gpt_oss", torch.float32, **wide("gpt_oss"))
    kept = []
    for dtype in ("float32", "bfloat16"):
        index, empty = indexed(folder, dtype)
        where = coded_cache(index, empty, CODECS["int8"], cache=tmp_path / dtype)
        kept.append((where / "experts-00000.safetensors").read_bytes())
    assert kept[0] == kept[1]


def test_an_unwritable_model_folder_sends_it_to_the_users_cache(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (model_folder / ".emoe").write_text("in the way")
    where = made(model_folder)
    assert where.parent == tmp_path / "home" / "emoe"
    assert "cannot be written" in caplog.text
    assert str(where.parent) in caplog.text
    caplog.clear()
    assert made(model_folder) == where
    assert not caplog.text


def test_a_given_folder_is_the_only_one_looked_at(model_folder: Path, tmp_path: Path) -> None:
    beside = made(model_folder)
    assert made(model_folder, cache=tmp_path / "mine").parent == tmp_path / "mine"
    assert made(model_folder) == beside
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be kept"):
        made(model_folder, cache=tmp_path / "file" / "below")


def test_the_embedded_model_keeps_its_folder_clean(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert made(model_folder, beside=False).parent == tmp_path / "emoe"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache() == Path.home() / ".cache" / "emoe"


def test_a_cache_of_another_checkpoint_codec_or_version_is_refused(model_folder: Path) -> None:
    where = made(model_folder)
    index, _ = indexed(model_folder)
    card = json.loads((where / cache.CARD).read_text())
    for change, message in (
        ({"fingerprint": "0" * 64}, "another checkpoint"),
        ({"codec": "int8"}, "holds int8 experts, not int4"),
        ({"format": 99}, "format 99"),
    ):
        (where / cache.CARD).write_text(json.dumps(card | change))
        with pytest.raises(CheckpointError, match=message) as refusal:
            open_cache(where, index, INT4)
        assert f"Remove {where}" in str(refusal.value)
    for text in ("{", json.dumps({"format": 1}), json.dumps([1])):
        (where / cache.CARD).write_text(text)
        with pytest.raises(CheckpointError, match="missing or damaged"):
            open_cache(where, index, INT4)


def test_a_truncated_or_foreign_cache_is_refused_by_name(model_folder: Path) -> None:
    where = made(model_folder)
    index, _ = indexed(model_folder)
    file = where / "experts-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match=r"experts-00001.safetensors is truncated.*Remove") as refusal:
        open_cache(where, index, INT4)
    assert "Download" not in str(refusal.value)
    file.write_bytes(whole.replace(b'"dtype":"U8"', b'"dtype":"I8"', 1))
    with pytest.raises(CheckpointError, match=r"holds I8 .* the model wants uint8"):
        open_cache(where, index, INT4)
    file.write_bytes(whole)
    coded = open_cache(where, index, INT4)
    with Reader("cached", coded.files) as reader:  # truncated while it is in use
        file.write_bytes(whole[:-7])
        last = coded.layers[1]
        parts = {part.name: torch.empty(part.shape, dtype=getattr(torch, part.dtype)) for part in last.parts}
        with pytest.raises(ReadError, match="ends early"):
            reader.read_into(coded.pieces(last.layer, last.num_experts - 1), parts)


def test_sizes_that_groups_do_not_divide_are_refused_before_anything_is_written(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="'down_proj' has 24 inputs"):
        made(checkpoints("qwen3_moe"), cache=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_too_little_room_is_said_before_anything_is_written(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(model_folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"int4 experts of .* take .* has 1000 B free"):
        made(model_folder)
    assert not list((model_folder / ".emoe").glob("*/*.safetensors"))


class Stopped(BaseException):
    """Stands for Ctrl-C, and for a process that is killed."""


@pytest.mark.parametrize(
    ("fault", "seen"),
    [(OSError(errno.ENOSPC, "No space left on device"), CheckpointError), (Stopped(), Stopped)],
)
def test_half_a_cache_never_counts_and_the_next_run_goes_on(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, seen: type[BaseException]
) -> None:
    written: list[str] = []
    write = write_file

    def failing(tensors: Any, file: Path, *rest: Any) -> int:
        if len(written) == 2:
            file.write_bytes(b"half")
            raise fault
        written.append(file.name)
        return write(tensors, file, *rest)

    monkeypatch.setattr(building, "write_file", failing)
    with pytest.raises(seen) as refusal:
        made(model_folder)
    if seen is CheckpointError:
        assert "No space left on device. Make room" in str(refusal.value)
    (partial,) = (model_folder / ".emoe").iterdir()
    assert partial.name.endswith(".partial")
    assert not list(partial.glob("*growing"))

    monkeypatch.setattr(building, "write_file", write)
    told: list[tuple[int, int]] = []
    where = made(model_folder, progress=lambda *state: told.append(state))
    assert told[0][0] == told[-1][1] // 3  # the first layer was there
    shutil.copytree(where, model_folder / "resumed")
    shutil.rmtree(model_folder / ".emoe")
    fresh = made(model_folder)
    for file in fresh.iterdir():
        assert file.read_bytes() == (model_folder / "resumed" / file.name).read_bytes()


def test_what_another_job_left_is_dropped(model_folder: Path) -> None:
    left = model_folder / ".emoe" / f"{cache.cache_name('int4', fingerprint(model_folder))}.partial"
    (left / "folder").mkdir(parents=True)
    (left / "job.json").write_text(json.dumps({"codec": "int4", "fingerprint": "other", "format": 1}))
    (left / "experts-00000.safetensors").write_bytes(b"of another model")
    where = made(model_folder)
    assert not left.exists()
    index, _ = indexed(model_folder)
    assert open_cache(where, index, INT4).total_expert_nbytes


def test_builders_at_once_make_one_cache(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = write_file

    def counting(tensors: Any, file: Path, *rest: Any) -> int:
        written.append(file.name)
        return write(tensors, file, *rest)

    monkeypatch.setattr(building, "write_file", counting)
    index, empty = indexed(model_folder)
    start = threading.Barrier(4)
    found: list[Path] = []

    def work() -> None:
        start.wait()
        found.append(coded_cache(index, empty, INT4))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(set(found)) == 1
    assert len(found) == 4
    assert sorted(written) == [f"experts-0000{layer}.safetensors.growing" for layer in range(3)]
    assert [path.name for path in found[0].parent.iterdir()] == [found[0].name]
    open_cache(found[0], index, INT4)


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("qwen3_moe", tmp_path / "model", moe_intermediate_size=64)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.experts.6.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'gate_up_proj' of expert 6 in layer 2 .* int4"):
        made(folder)
