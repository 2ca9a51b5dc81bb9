"""Planted checkpoints of every layout: transformers loads them, and routes as the trace did."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from emoe.bench.forced import forced
from emoe.bench.plant.card import CARD, LABEL, ROUTES, read_card
from emoe.bench.plant.check import check
from emoe.bench.plant.shapes import PUBLISHED, published, vocabulary_for
from emoe.bench.plant.tensors import Noise, tensors_of
from emoe.bench.plant.write import plant, summary
from emoe.errors import CheckpointError, UsageError
from emoe.planner import plan
from emoe.routing.trace import Array, Trace
from tests.bench.plant.made_up import made_up_trace

TINY = [name for name in PUBLISHED if name.startswith("tiny-")]
TOKENS = 60


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint for each layout."""
    folder = tmp_path_factory.mktemp("planted")
    trace = made_up_trace(TOKENS).write(folder / "made-up.npz")
    for name in TINY:
        plant(PUBLISHED[name], trace, TOKENS, folder / name)
    return {name: folder / name for name in TINY}


def routes_of(model: Any, ids: torch.Tensor, prompt: int) -> Array:
    """What plain transformers' routers choose: [batch, tokens, layers, k], in falling order of their weights."""
    layers: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, output: tuple[torch.Tensor, ...]) -> None:
        _, weights, chosen = output
        best = weights.float().argsort(dim=-1, descending=True)
        layers.setdefault(name, []).append(chosen.gather(-1, best).view(ids.shape[0], -1, chosen.shape[-1]))

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("topkrouter")
    ]
    for _ in forced(model, ids, prompt):
        pass
    for handle in handles:
        handle.remove()
    found: Array = torch.stack([torch.cat(parts, dim=1) for parts in layers.values()], dim=2).numpy()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_plain_transformers_routes_as_the_trace(planted: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(planted[name], dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    wanted = Trace.read(planted[name] / ROUTES).experts
    # All in one pass, and a batch one by one.
    assert np.array_equal(routes_of(model, torch.arange(TOKENS)[None], TOKENS)[0], wanted)
    batch = torch.stack([torch.arange(30), torch.arange(25, 55)])
    assert np.array_equal(routes_of(model, batch, 4), wanted[batch.numpy()])
    # Greedy decoding walks along the trace by itself, and begins anew at its end.
    text = model.generate(torch.arange(50)[None], max_new_tokens=14, do_sample=False)
    assert text[0].tolist() == [*range(TOKENS), 0, 1, 2, 3]


@pytest.mark.parametrize("name", TINY)
def test_emoe_routes_as_the_trace_and_plans_it_from_headers(planted: dict[str, Path], name: str) -> None:
    said: list[str] = []
    found = check(planted[name], said.append)
    assert [(part.part, part.wrong) for part in found] == [("prefill", 0), ("decode", 0), ("batch of 3", 0)]
    layers = len(PUBLISHED[name].moe_layers)
    assert found[0].routes == TOKENS * layers
    assert said[0].startswith(f"prefill: all {TOKENS * layers} routes equal the trace, weights within 0.0")
    made = plan(planted[name])
    assert made.source == "headers"
    assert made.expert_bytes == PUBLISHED[name].expert_bytes


def test_a_router_that_does_something_else_is_found(planted: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(planted["tiny-mixtral"], folder)
    trace = Trace.read(folder / ROUTES)
    experts = trace.experts.copy()
    experts[7, 1] = experts[7, 1, ::-1]
    replace(trace, experts=experts).write(folder / ROUTES)
    prefill, *_ = check(folder)
    assert prefill.wrong == 1
    swapped = trace.experts[7, 1].tolist()
    assert prefill.text.endswith(f"first in prefill, token 7, layer 1: {swapped} instead of {swapped[::-1]}")


def test_the_card_says_what_it_is(planted: dict[str, Path]) -> None:
    folder = planted["tiny-gpt-oss"]
    values = json.loads((folder / CARD).read_text())
    assert values["format"] == 1
    assert values["label"] == LABEL
    assert values["prompts"] == [[0, 20], [20, 40], [40, 60]]
    card = read_card(folder)
    assert (card.shape, card.trace, card.tokens, card.resampled) == ("tiny-gpt-oss", "made-up", TOKENS, False)
    assert json.loads((folder / "generation_config.json").read_text()) == {"do_sample": False}
    told = "\n".join(summary(card, PUBLISHED["tiny-gpt-oss"]))
    assert "3 layers, 3 with 8 experts of" in told and "60 tokens of 3 prompts" in told and told.endswith(LABEL)
    assert (card.vocabulary, card.dtype, card.layers, card.experts, card.top_k) == (64, "bfloat16", 3, 8, 2)


def test_cards_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no planted checkpoint .*; make one with emoe bench plant"):
        read_card(tmp_path)
    wrong = ('{"format": 2}', "not of format 1"), ('{"format": 1}', "incomplete .KeyError")
    for text, said in (("{", "is not JSON"), ("[]", "not of format 1"), *wrong):
        (tmp_path / CARD).write_text(text)
        with pytest.raises(UsageError, match=f"{said}.*plant the checkpoint again"):
            read_card(tmp_path)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    trace = made_up_trace(20).write(tmp_path / "made-up.npz")
    data = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        plant(PUBLISHED["tiny-olmoe"], trace, 20, tmp_path / name, seed)
        data[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert data["a"] == data["b"] != data["c"]


def test_experts_differ_and_every_cut_begins_elsewhere() -> None:
    noise = Noise(seed=0, largest=100)
    one, two = (noise.tensor(name, (30, 10), 0.5) for name in "ab")
    first, second = (torch.cat(list(tensor.blocks())) for tensor in (one, two))
    assert not torch.equal(first, second)
    assert float(first.float().std()) == pytest.approx(0.5, rel=0.15)
    assert torch.equal(first, torch.cat(list(one.blocks())))
    experts = noise.tensor("c", (4, 300, 400), 1.0)  # longer than the tile of 65536: it begins anew
    values = torch.cat(list(experts.blocks())).view(4, -1)
    assert values.shape == (4, 120_000)
    assert len({tuple(row[:8].tolist()) for row in values}) == 4


def test_folders_and_disks_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = made_up_trace(20).write(tmp_path / "made-up.npz")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a planted tiny-olmoe; choose another folder"):
        plant(PUBLISHED["tiny-olmoe"], trace, 20, tmp_path / "full")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(CheckpointError, match=r"a planted tiny-olmoe takes .* KiB, and .* has 1000 B free"):
        plant(PUBLISHED["tiny-olmoe"], trace, 20, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "made-up.npz"]


@pytest.mark.parametrize(
    ("name", "billions", "expert_mb"),
    [
        ("olmoe-1b-7b", 6.92, 12.6),
        ("gpt-oss-20b", 20.9, 49.8),
        ("qwen3-30b-a3b", 30.5, 9.44),
        ("mixtral-8x7b", 46.7, 352.3),
        ("deepseek-v2-lite", 15.7, 17.3),
    ],
)
def test_published_sizes_are_the_published_ones(name: str, billions: float, expert_mb: float) -> None:
    shape = published(name)
    tensors = list(tensors_of(shape, shape.vocabulary, 1, lambda layer: torch.zeros(1, shape.experts), 0))
    assert sum(tensor.nbytes for tensor in tensors) / 2e9 == pytest.approx(billions, abs=0.06)
    assert shape.expert_nbytes / 1e6 == pytest.approx(expert_mb, abs=0.06)
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_unknown_shapes_and_impossible_layers_are_named() -> None:
    with pytest.raises(UsageError, match="'gpt-5'; use one of olmoe-1b-7b, gpt-oss-20b"):
        published("gpt-5")
    with pytest.raises(UsageError, match="olmoe-1b-7b has 16 layers, so layers must be 1 to 16, not 17"):
        published("olmoe-1b-7b", 17)
    with pytest.raises(UsageError, match="layers must be 2 to 27, not 1"):
        published("deepseek-v2-lite", 1)  # its first layer has no experts
    assert published("gpt-oss-20b", 6).config()["layer_types"] == ["sliding_attention", "full_attention"] * 3
    assert [vocabulary_for(tokens) for tokens in (1, 64, 65)] == [64, 64, 128]
