"""int8 and int4 experts: what they compute is what their numbers say, and within a codec `exact` is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

import emoe
from emoe.checkpoint.codecs.formats import CODECS
from emoe.checkpoint.skeleton import find_experts
from emoe.config import ExpertMemory
from emoe.errors import BudgetError, UnsupportedModelError, UsageError
from emoe.model import close
from emoe.residency.eviction import EVICTION_RULES
from tests.families import FAMILIES, make_config
from tests.model.test_device import Virtual

IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", autouse=True)
def _own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def wide(name: str) -> dict[str, Any]:
    """Settings that make the family's expert widths multiples of 32."""
    known = make_config(name).to_dict()
    return {key: 64 for key in ("intermediate_size", "moe_intermediate_size") if key in known}


def steps(model: PreTrainedModel, ids: torch.Tensor = IDS, decode: int = 2) -> list[torch.Tensor]:
    """Logits of a prompt, and of single tokens after it."""
    found = []
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        found.append(out.logits)
        for step in range(decode):
            token = torch.full((len(ids), 1), 5 + step)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


def with_decoded_experts(folder: Path, codec: str) -> PreTrainedModel:
    """transformers' own model, its expert weights replaced by what the codec makes of them."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    for found in find_experts(model):
        module: Any = model.get_submodule(found.path)
        for name in found.parts:
            experts = getattr(module, name).data
            for expert in experts if experts.ndim == 3 else ():
                rows = expert.t() if module.is_transposed else expert
                decoded = CODECS[codec].decode(*CODECS[codec].encode(rows))
                expert.copy_(decoded.t() if module.is_transposed else decoded)
    return model


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_computes_what_its_numbers_say(name: str, codec: str, checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints(name, torch.float32, **wide(name))
    theirs = with_decoded_experts(folder, codec)
    ours, _ = emoe.load(folder, expert_dtype=codec, expert_memory="60%")
    for a, b in zip(steps(ours), steps(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-4, atol=5e-4)
    report = emoe.stats(ours)
    assert (report["lossy"], report["expert_dtype"], report["mode"]) == (True, codec, "exact")
    close(ours)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_within_a_codec_exact_is_bit_identical_for_any_budget(
    name: str, codec: str, checkpoints: Callable[..., Path]
) -> None:
    folders = {dtype: checkpoints(name, dtype, **wide(name)) for dtype in (torch.float32, torch.bfloat16)}
    resident = {dtype: emoe.load(folder, expert_dtype=codec)[0] for dtype, folder in folders.items()}

    @settings(max_examples=8)
    @given(
        at=st.one_of(st.just(0.0), st.floats(0, 1)),
        rule=st.sampled_from(sorted(EVICTION_RULES)),
        batch=st.integers(1, 3),
        length=st.integers(1, 12),
        seed=st.integers(0, 10**6),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        reader=st.sampled_from(["cached", "direct"]),
    )
    def check(at: float, rule: str, batch: int, length: int, seed: int, dtype: torch.dtype, reader: str) -> None:
        whole = emoe.stats(resident[dtype])
        budget = int(whole["floor_bytes"] + at * (whole["total_expert_bytes"] - whole["floor_bytes"]))
        ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))
        model, _ = emoe.load(folders[dtype], expert_memory=budget, expert_dtype=codec, eviction=rule, reader=reader)
        try:
            for ours, reference in zip(steps(model, ids), steps(resident[dtype], ids), strict=True):
                assert torch.equal(ours, reference)
            assert emoe.stats(model)["peak_resident_bytes"] <= budget
        finally:
            close(model)

    check()
    for model in resident.values():
        close(model)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_share_is_a_share_of_the_quantised_experts(codec: str, checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints("qwen3_moe", **wide("qwen3_moe"))
    native, _ = emoe.load(folder)
    whole = emoe.stats(native)["total_expert_bytes"]
    coded, _ = emoe.load(folder, expert_dtype=codec, expert_memory=ExpertMemory("share", 0.5))
    steps(coded)
    report = emoe.stats(coded)
    assert report["total_expert_bytes"] < whole * (0.6 if codec == "int8" else 0.35)
    assert report["budget_bytes"] == report["total_expert_bytes"] // 2
    assert report["bytes_read"] == report["loads"] * report["total_expert_bytes"] // 24
    close(native)
    close(coded)


def test_modes_that_reroute_run_on_quantised_experts(checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints("qwen3_moe", **wide("qwen3_moe"))
    model, _ = emoe.load(folder, expert_dtype="int4", expert_memory="60%", mode="resident")
    first = steps(model)
    assert all(bool(torch.isfinite(logits).all()) for logits in first)
    assert emoe.stats(model)["lossy"] is True
    close(model)


def test_what_cannot_be_is_refused_before_anything_is_quantised(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoints("mixtral")
    with pytest.raises(UsageError, match="'int5'; use one of native, int8, int4"):
        emoe.load(folder, expert_dtype="int5", expert_cache=tmp_path)
    with pytest.raises(UnsupportedModelError, match="24 inputs"):
        emoe.load(folder, expert_dtype="int4", expert_cache=tmp_path)
    with pytest.raises(BudgetError, match="below the floor"):
        emoe.load(folder, expert_dtype="int8", expert_cache=tmp_path, expert_memory=100)
    with pytest.raises(UsageError, match="quantise to int8 or int4"):
        emoe.quantise(folder, expert_dtype="native", expert_cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_quantise_makes_what_load_finds(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints("gpt_oss", **wide("gpt_oss"))
    told: list[tuple[int, int]] = []
    made = emoe.quantise(folder, expert_dtype="int4", expert_cache=tmp_path, progress=lambda *state: told.append(state))
    assert made.parent == tmp_path
    assert told[-1][0] == told[-1][1] > 0
    monkeypatch.setattr("emoe.checkpoint.codecs.building.write_file", None)
    model, _ = emoe.load(folder, expert_dtype="int4", expert_cache=tmp_path)
    assert emoe.stats(model)["total_expert_bytes"] == told[-1][1]
    close(model)
    assert emoe.quantise(folder, expert_dtype="int4", expert_cache=tmp_path) == made


def test_emoe_nano_is_quantised_into_the_users_cache() -> None:
    made = emoe.quantise(expert_dtype="int8")
    assert made.parent.name == "emoe"
    model, tokenizer = emoe.load(expert_dtype="int8", expert_memory="40%")
    assert tokenizer is not None
    out = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 1
    close(model)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_device_reached_by_copies_gives_the_same_bits(
    codec: str, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints("gpt_oss", **wide("gpt_oss"))
    whole, _ = emoe.load(folder, expert_dtype=codec)
    model = Virtual(monkeypatch).load(folder, expert_dtype=codec, expert_memory="40%", host_memory="70%")
    for ours, reference in zip(steps(model), steps(whole), strict=True):
        assert torch.equal(ours, reference)
    report = emoe.stats(model)
    assert report["host"]["budget_bytes"] < 0.7 * emoe.stats(whole)["total_expert_bytes"] + 1
    assert report["bytes_copied"] > 0
    close(model)
    close(whole)
