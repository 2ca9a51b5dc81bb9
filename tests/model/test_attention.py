"""Which models attend with few rows by `emoe.kernels.attention`, and that exactness and texts hold with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3MoeForCausalLM

import emoe
from emoe.kernels import attention as kernels
from emoe.kernels.choice import VARIABLE, kernel_of
from emoe.kernels.native.calls import Calls
from emoe.model import attention
from emoe.model.attention import FEW_ROWS_SDPA
from tests.conftest import Checkpoints
from tests.engine.running import SMALL, alone, engine_of, prompt, send


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Query rows of each call of the C kernels' attention."""
    if kernel_of("cpu", torch.bfloat16).name != "native":
        pytest.skip("without the C kernels transformers' sdpa attends")
    seen: list[int] = []

    def few_rows(calls: Calls, query: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(query.shape[2])
        return kernels.few_rows(calls, query, *args)

    monkeypatch.setattr(attention, "few_rows", few_rows)
    yield seen


def implementation(model: PreTrainedModel) -> object:
    report = emoe.stats(model)["kernels"]
    assert report["attention"] == model.config._attn_implementation
    return report["attention"]


def logits(model: PreTrainedModel, steps: tuple[int, ...]) -> list[torch.Tensor]:
    """Of two sequences, the second left-padded, read in `steps` of tokens."""
    ids = torch.randint(3, 128, (2, sum(steps)), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    past, found, at = DynamicCache(config=model.config), [], 0
    for count in steps:
        with torch.no_grad():
            out = model(ids[:, at : at + count], attention_mask=mask[:, : at + count], past_key_values=past)
        at += count
        found.append(out.logits)
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_exact_stays_exact_and_near_transformers(checkpoints: Checkpoints, rows: list[int], name: str) -> None:
    path = checkpoints(name)
    steps = (12, 1, 1, 4, 1)
    whole, _ = emoe.load(path)
    part, _ = emoe.load(path, expert_memory="50%")
    assert implementation(whole) == implementation(part) == FEW_ROWS_SDPA
    expected = logits(whole, steps)
    assert set(rows) == {1, 4}
    assert len(rows) == 4 * whole.config.num_hidden_layers
    assert all(torch.equal(a, b) for a, b in zip(logits(part, steps), expected, strict=True))
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, experts_implementation="eager").eval()
    assert theirs.config._attn_implementation == "sdpa"
    for a, b in zip(expected, logits(theirs, steps), strict=True):  # medians: rounding flips a route here and there
        assert (a - b).abs().median() < 0.05 * b.abs().max()
    emoe.close(whole)
    emoe.close(part)


def test_the_engine_attends_alike(checkpoints: Checkpoints, rows: list[int]) -> None:
    model, _ = emoe.load(checkpoints("qwen3_moe"))
    asked = [prompt(seed, length) for seed, length in enumerate((5, 30))]
    with engine_of(model, SMALL) as engine:
        tokens = [send(engine, each, 4)[1] for each in asked]
        assert all(answer.end.reason in ("stop", "length") for answer in tokens)
    assert 1 in rows
    assert implementation(model) == FEW_ROWS_SDPA
    assert tokens[1].tokens[:1] == alone(model, asked[1], 4)[:1]
    emoe.close(model)


def test_where_it_does_not(checkpoints: Checkpoints, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints("qwen3_moe")
    for expected, asked in (
        ("sdpa", {"attn_implementation": "sdpa"}),
        ("eager", {"attn_implementation": "eager"}),
        ("sdpa", {"dtype": torch.float32}),
        ("sdpa", {"dtype": torch.float16}),
    ):
        model, _ = emoe.load(path, **asked)
        assert implementation(model) == expected
        logits(model, (3, 1))
        emoe.close(model)
    model, _ = emoe.load(checkpoints("gpt_oss"))
    assert implementation(model) == "eager"  # its sinks
    emoe.close(model)
    monkeypatch.setenv(VARIABLE, "torch")
    model, _ = emoe.load(path)
    assert implementation(model) == "sdpa"
    logits(model, (3, 1))
    emoe.close(model)
    assert rows == []


def test_code_that_asks_for_the_name_keeps_it() -> None:
    """As this file does."""

    class Asks(PreTrainedModel):  # type: ignore[misc]
        """Somebody's."""

    assert attention._asks_for_sdpa(Asks)
    assert not attention._asks_for_sdpa(Qwen3MoeForCausalLM)


def test_rows_without_a_mask_are_causal_as_sdpas(rows: list[int]) -> None:
    module = torch.nn.Module()
    query, key = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 3, 8).bfloat16()
    ours, _ = attention.attention(module, query, key, key, None, is_causal=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True).transpose(1, 2)
    assert torch.equal(ours, theirs)
    attention.attention(module, query, key, key, torch.zeros(1, 1, 3, 3).bfloat16(), dropout=0.5)
    attention.attention(module, query[:, :, :1], key, key, None, position_bias=torch.zeros(1, 2, 1, 3).bfloat16())
    assert rows == []
    attention.attention(module, query[:, :, :1], key, key, None, position_bias=None)
    assert rows == [1]
