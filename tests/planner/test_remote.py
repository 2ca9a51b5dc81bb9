"""Hub models are planned from headers that range requests fetch; here the hub is a function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils._safetensors import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

from emoe.checkpoint.headers import read_headers
from emoe.errors import CheckpointError, UnsupportedModelError, UsageError
from emoe.planner import facts_of
from emoe.planner.remote import is_hub_id
from tests.conftest import Checkpoints


@pytest.fixture
def hub(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A hub that has one model, org/model; change its config by changing the dict."""
    path = checkpoints("qwen3_moe", max_shard_size="40KB")
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    files: dict[str, dict[str, TensorInfo]] = {}
    for name, entry in read_headers(path).items():
        info = TensorInfo(entry.dtype, list(entry.shape), (entry.offset, entry.offset + entry.nbytes))  # type: ignore[arg-type]
        files.setdefault(entry.file.name, {})[name] = info

    def download(repo: str, name: str, **_: Any) -> str:
        (tmp_path / name).write_text(json.dumps(config))
        return str(tmp_path / name)

    def metadata(repo: str, **_: Any) -> SafetensorsRepoMetadata:
        content = {name: SafetensorsFileMetadata({}, tensors) for name, tensors in files.items()}
        return SafetensorsRepoMetadata(None, True, {}, content)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    return config


def test_the_same_facts_as_of_the_files(hub: dict[str, Any], checkpoints: Checkpoints) -> None:
    name, remote = facts_of("org/model")
    _, local = facts_of(checkpoints("qwen3_moe", max_shard_size="40KB"))
    assert name == "org/model"
    assert remote.expert_layers == local.expert_layers
    assert (remote.dense_bytes, remote.cache_bytes(10, 1)) == (local.dense_bytes, local.cache_bytes(10, 1))


def test_what_headers_do_not_settle_asks_for_a_download(hub: dict[str, Any]) -> None:
    del hub["tie_word_embeddings"]
    with pytest.raises(UnsupportedModelError, match="hf download org/model"):
        facts_of("org/model")


def test_quantised_models_are_refused_without_a_download(hub: dict[str, Any]) -> None:
    hub["quantization_config"] = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedModelError, match=r"quantised \(fp8\)"):
        facts_of("org/model")


def test_a_hub_that_is_not_reached() -> None:
    with pytest.raises(CheckpointError, match="no folder 'org/nothing'"):
        facts_of("org/nothing")


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert [is_hub_id(text) for text in ("org/model", "gpt2", "here", "./model", "/a/b", "a/b/c", "~/m", "")] == [
        True,
        True,
        False,
        False,
        False,
        False,
        False,
        False,
    ]


def test_paths_that_do_not_exist_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="there is no directory"):
        facts_of("./nothing")
