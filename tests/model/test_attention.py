"""Which models attend with few rows by `emoe.kernels.attention`, and that exactness and texts hold with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3MoeForCausalLM

import emoe
from emoe.errors import UsageError
from emoe.kernels import attention as kernels
from emoe.kernels.choice import VARIABLE, kernel_of
from emoe.kernels.native.calls import Calls
from emoe.model import attention
from emoe.model.attention import FEW_ROWS_SDPA, SINKS
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
    monkeypatch.setenv(VARIABLE, "torch")
    model, _ = emoe.load(path)
    assert implementation(model) == "sdpa"
    logits(model, (3, 1))
    emoe.close(model)
    assert rows == []


SUNK = ("gpt_oss", "mimo_v2_flash")


@pytest.mark.parametrize("name", SUNK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_sinks_are_attended_as_transformers_does(
    checkpoints: Checkpoints, name: str, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, later passes over them, single tokens, in and beyond the window, and a padded sequence."""
    if not native:
        monkeypatch.setenv(VARIABLE, "torch")
    path, steps = checkpoints(name), (12, 1, 4, 9, 1, 1)
    whole, _ = emoe.load(path, dtype=dtype)
    assert implementation(whole) == SINKS
    expected = logits(whole, steps)
    emoe.close(whole)
    part, _ = emoe.load(path, dtype=dtype, expert_memory="50%")
    assert all(torch.equal(a, b) for a, b in zip(logits(part, steps), expected, strict=True))
    emoe.close(part)
    eager, _ = emoe.load(path, dtype=dtype, attn_implementation="eager")
    assert implementation(eager) == "eager"
    assert emoe.stats(eager)["kernels"]["attention_reason"] == "as attn_implementation says"
    for a, b in zip(expected, logits(eager, steps), strict=True):
        error = (a - b).abs()
        error[1, :2] = 0  # of padding
        if dtype is torch.float32:
            assert error.max() < 1e-3 * b.abs().max()
        else:
            assert error.median() < 0.05 * b.abs().max()
    emoe.close(eager)


def test_few_rows_with_sinks_are_the_kernels(checkpoints: Checkpoints, rows: list[int]) -> None:
    model, _ = emoe.load(checkpoints("gpt_oss"))
    logits(model, (12, 1, 4))
    assert set(rows) == {1, 4}
    emoe.close(model)


def test_sinks_that_are_not_known_stay(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss

    def other(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return query.transpose(1, 2), None

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", other)
    model, _ = emoe.load(checkpoints("gpt_oss"))
    assert implementation(model) == "eager"
    assert "trial of GptOssAttention gave other numbers" in emoe.stats(model)["kernels"]["attention_reason"]
    emoe.close(model)


def test_arguments_that_sinks_do_not_know_are_refused() -> None:
    query = torch.randn(1, 2, 3, 8)
    for unknown in ({"softcap": 30.0}, {"dropout": 0.1}):
        with pytest.raises(UsageError, match=next(iter(unknown))):
            attention.sinks_attention(torch.nn.Module(), query, query, query, None, **unknown)  # type: ignore[arg-type]


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
