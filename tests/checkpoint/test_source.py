"""Where checkpoints come from: local directories, the hub's cache, and everything that is neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from emoe.checkpoint.source import resolve
from emoe.errors import CheckpointError, UnsupportedModelError, UsageError


def test_a_local_directory_is_itself(mixtral: Path) -> None:
    assert resolve(mixtral) == mixtral
    assert resolve(str(mixtral)) == mixtral


def test_pickle_files_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnsupportedModelError) as caught:
        resolve(tmp_path)
    assert "pickle files only (pytorch_model.bin)" in str(caught.value)
    assert "save_pretrained(new_directory)" in str(caught.value)


def test_pickle_files_beside_safetensors_do_not_matter(mixtral: Path) -> None:
    (mixtral / "pytorch_model.bin").write_bytes(b"\x80")
    assert resolve(mixtral) == mixtral


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "has no config.json"),
        (["config.json"], "holds neither model.safetensors nor"),
        (["config.json", "adapter_model.safetensors"], "It has adapter_model.safetensors"),
    ],
)
def test_an_incomplete_directory_is_refused(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        resolve(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["./nothing/here", "/nothing/here", "a/b/c", "", "trailing/"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(text: str) -> None:
    with pytest.raises(UsageError, match="there is no directory"):
        resolve(text)
    with pytest.raises(UsageError, match="there is no directory"):
        resolve(Path("nothing-of-that-name"))


def test_a_file_is_refused(mixtral: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        resolve(mixtral / "config.json")


def test_a_hub_id_that_is_not_in_the_cache_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        resolve("some-org/some-model", local_files_only=True)
    assert "'some-org/some-model'" in str(caught.value)
    assert "not in the hub's local cache" in str(caught.value)


def test_an_impossible_hub_id_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="neither a local directory nor a hub id"):
        resolve("no spaces allowed")
