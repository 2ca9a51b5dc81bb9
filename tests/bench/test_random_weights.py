"""Checkpoints of named shapes: what transformers loads from them, that they are repeatable, and how they route."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from emoe.bench import random_weights
from emoe.bench.random_weights import SHAPES, TOPICS, card_of, make_checkpoint, shape_of, tensors_of, total_bytes
from emoe.errors import CheckpointError, UsageError
from emoe.planner import plan


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    return model, info


@pytest.mark.parametrize("name", ["tiny", "tiny-mixtral"])
def test_transformers_loads_every_tensor_and_misses_none(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    model, info = load(folder)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    stored = load_file(folder / "model.safetensors")
    shape = SHAPES[name]
    assert sum(value.nbytes for value in stored.values()) == total_bytes(shape)
    assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])
    block, gate, up = ("mlp", "gate_proj", "up_proj") if name == "tiny" else ("block_sparse_moe", "w1", "w3")
    fused = model.model.layers[1].mlp.experts.gate_up_proj[5]
    parts = [stored[f"model.layers.1.{block}.experts.5.{part}.weight"] for part in (gate, up)]
    assert torch.equal(fused, torch.cat(parts))
    assert model.generation_config.do_sample is False


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_checkpoint("tiny", tmp_path / folder, seed)
    data = {f: (tmp_path / f / "model.safetensors").read_bytes() for f in "abc"}
    assert data["a"] == data["b"] != data["c"]


def test_a_checkpoint_that_is_there_is_kept(tmp_path: Path) -> None:
    folder = make_checkpoint("tiny", tmp_path / "x", seed=3)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_checkpoint("tiny", folder, seed=3) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert card_of(folder) == {"shape": "tiny", "seed": 3, "topics": TOPICS}


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    folder = make_checkpoint("tiny", tmp_path / "x")
    with pytest.raises(UsageError, match="not a tiny checkpoint of seed 1"):
        make_checkpoint("tiny", folder, seed=1)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="choose another folder"):
        make_checkpoint("tiny", tmp_path / "y")
    assert (tmp_path / "y" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert card_of(make_checkpoint("tiny", tmp_path / "empty"))


def test_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"a tiny checkpoint of seed 0 takes .* KiB, and .* has 1000 B free"):
        make_checkpoint("tiny", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint("tiny", tmp_path / "x", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_an_unknown_shape_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'huge'; use one of qwen3-moe-2\.5gb"):
        shape_of("huge")


def test_the_shape_measured_on_has_the_bytes_it_is_named_for() -> None:
    shape = SHAPES["qwen3-moe-2.5gb"]
    assert shape.expert_bytes == 12 * 64 * 3 * 1024 * 512 * 2
    assert total_bytes(shape) - shape.expert_bytes == 98_096_128


def test_large_tensors_are_made_in_small_blocks() -> None:
    wide = replace(SHAPES["tiny"], hidden=8192, vocabulary=4096)
    table = next(tensors_of(wide, seed=0))
    sizes = [block.numel() for block in table.blocks()]
    assert sum(sizes) == 4096 * 8192
    assert max(sizes) <= random_weights.BLOCK_ELEMENTS


def test_the_planner_knows_the_shape(tmp_path: Path) -> None:
    made = plan(make_checkpoint("tiny", tmp_path / "x"), context=64)
    shape = SHAPES["tiny"]
    assert made.expert_bytes == shape.expert_bytes
    assert made.dense_bytes == total_bytes(shape) - shape.expert_bytes
    assert made.top_k == shape.top_k


@torch.no_grad()
def test_routing_is_skewed_by_topic_and_no_expert_is_dead(tmp_path: Path) -> None:
    """As in trained models: each topic has experts of its own liking, and taken together every expert is used."""
    folder = make_checkpoint(replace(SHAPES["tiny"], vocabulary=2048, hidden=128), tmp_path / "x")
    model, _ = load(folder)
    chosen: list[torch.Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, output: chosen.append(output[-1]))
    shares = []
    for topic in range(TOPICS):
        chosen.clear()
        model(torch.arange(topic, 2048, TOPICS)[None])
        shares.append(torch.bincount(chosen[0].flatten(), minlength=16).float())
    by_topic = torch.stack([share / share.sum() for share in shares])
    top = by_topic.sort(dim=1, descending=True).values[:, :4].sum(dim=1)
    assert (top > 1.5 * 4 / 16).all()  # uniform routing would give 4/16
    assert (by_topic.mean(dim=0) > 0.1 / 16).all()
    assert json.loads((folder / "config.json").read_text())["num_experts"] == 16
