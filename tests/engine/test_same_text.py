"""Greedy decoding in the engine gives the text of generate() run alone, whatever joins and leaves.

"Within the engine's own numerics": a request in the engine goes through the same kernels with the same weights, but its
tokens share matrix products with those of others, and a prompt may be read in chunks. A product of more rows may add in
another order, so logits differ by rounding, never by more. Hence: in float32 the tokens are equal. In bfloat16 they are
equal, or, at the first difference, generate()'s own two best logits are closer to each other than `TIE`: rounding
decided. (What comes after that token is another text, and is not compared.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import emoe
from emoe import nano
from emoe.engine.interface import EngineSettings
from emoe.engine.tickets import Ticket
from tests.conftest import Checkpoints
from tests.engine.running import ENDLESS, GREEDY, SMALL, Answer, alone, engine_of, prompt, send, wait_until

TIE = 2**-5
"""Of the larger of the two logits: four units in the last place of bfloat16."""
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "gemma4_text", "afmoe"]
"""Plain, shared queries per key head, sinks and windows without sdpa, windows with it."""


@pytest.fixture(scope="module", params=["40%", "100%"])
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    made, _ = emoe.load(expert_memory=request.param, dtype="float32")
    yield made
    emoe.close(made)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    _, tokenizer = emoe.load(expert_memory="40%")
    assert tokenizer is not None
    turns = [[{"role": "user", "content": each["prompt"]}] for each in nano.prompts()[::5]]
    return [tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns]


@settings(max_examples=6)
@given(data=st.data())
def test_whatever_joins_and_leaves(model: PreTrainedModel, prompts: list[list[int]], data: st.DataObject) -> None:
    """Arrivals, lengths, cancellations, KV memory so small that requests are preempted, prompts read in chunks."""
    chosen = data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=2, max_size=7))
    lengths = [data.draw(st.integers(1, 24)) for _ in chosen]
    longest = max(len(prompts[i]) + n for i, n in zip(chosen, lengths, strict=True))
    small = EngineSettings(
        scheduler=data.draw(st.sampled_from(["fifo", "edf", "emoe", "affinity"])),
        max_running=data.draw(st.integers(1, 6)),
        max_batch_tokens=data.draw(st.sampled_from([6, 17, 64, 512])),
        page_tokens=8,
        kv_tokens=-(-longest // 8) * 8 + data.draw(st.sampled_from([0, 16, 64, 4096])),
    )
    cancelled = data.draw(st.sets(st.integers(0, len(chosen) - 1), max_size=2))
    endless = data.draw(st.sets(st.integers(0, len(chosen) - 1)))
    pauses = [data.draw(st.sampled_from([0, 0, 1, 3])) for _ in chosen]
    with engine_of(model, small) as engine:
        answers: list[Answer] = []
        for number, (which, length) in enumerate(zip(chosen, lengths, strict=True)):
            name, answer = send(engine, prompts[which], length, sampling=ENDLESS if number in endless else GREEDY)
            answers.append(answer)
            if number in cancelled:
                engine.cancel(name)
            wait_until(lambda n=pauses[number]: engine.stats().steps >= n or not engine.stats().running)  # type: ignore[misc]
        for number, answer in enumerate(answers):
            reason = answer.end.reason
            assert reason in ("stop", "length") or (reason == "cancelled" and number in cancelled)
        assert engine.failure is None
    for number, (which, length, answer) in enumerate(zip(chosen, lengths, answers, strict=True)):
        expected = alone(model, prompts[which], length, ends=number not in endless)
        assert answer.tokens == expected[: len(answer.tokens)]
        if answer.end.reason != "cancelled":
            assert len(answer.tokens) == len(expected)


def test_preemption_happens_and_changes_nothing(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    tight = dataclasses.replace(SMALL, kv_tokens=336, max_batch_tokens=512)
    with engine_of(model, tight) as engine:
        resumed: list[bool] = []
        take_back = engine._desk.take_back

        def watch(tickets: Sequence[Ticket]) -> None:
            resumed.extend(ticket.request.resumed for ticket in tickets)
            take_back(tickets)

        engine._desk.take_back = watch  # type: ignore[method-assign]
        answers = [send(engine, each, 30, sampling=ENDLESS)[1] for each in prompts[:5]]
        preempted = sum(answer.end.report.preemptions for answer in answers)
        assert preempted == engine.stats().preemptions == sum(resumed) == len(resumed) > 0
        assert engine.stats().prompt_tokens == sum(len(each) for each in prompts[:5])  # what is read again counts once
        assert engine.stats().generation_tokens == 5 * 30
    for each, answer in zip(prompts, answers, strict=False):
        assert answer.tokens == alone(model, each, 30, ends=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(checkpoints: Checkpoints, name: str) -> None:
    path = checkpoints(name, torch.float32)
    model, _ = emoe.load(path, expert_memory="60%", dtype="float32")
    asked = [prompt(seed, length) for seed, length in enumerate((5, 30, 12, 40, 21))]
    with engine_of(model, dataclasses.replace(SMALL, max_batch_tokens=24, kv_tokens=128)) as engine:
        answers = [send(engine, each, 20)[1] for each in asked]
        for answer in answers:
            assert answer.end.reason in ("stop", "length"), answer.end.error
    for each, answer in zip(asked, answers, strict=True):
        assert answer.tokens == alone(model, each, 20)
    emoe.close(model)


def test_bfloat16_differs_only_where_rounding_decides(prompts: list[list[int]]) -> None:
    model, _ = emoe.load(expert_memory="40%", dtype="bfloat16")
    with engine_of(model, EngineSettings(scheduler="fifo", max_running=13, max_batch_tokens=96)) as engine:
        answers = [send(engine, each, 32)[1] for each in prompts]
        for answer in answers:
            assert answer.end.reason in ("stop", "length")
    for each, answer in zip(prompts, answers, strict=True):
        expected = alone(model, each, 32)
        place = _first_difference(answer.tokens, expected)
        if place is not None:
            assert _margin(model, [*each, *expected[:place]], answer.tokens[place]) < TIE
    emoe.close(model)


def test_the_tolerance_is_not_met_by_any_text(prompts: list[list[int]]) -> None:
    """What the test above accepts is narrow: the second-best token is rarely within it."""
    model, _ = emoe.load(expert_memory="100%", dtype="bfloat16")
    close = 0
    for each in prompts:
        with torch.no_grad():
            best = model(torch.tensor([each])).logits[0, -1].float().topk(2)
        close += _margin(model, each, int(best.indices[1])) < TIE
    assert close < len(prompts) / 3
    emoe.close(model)


def _first_difference(one: list[int], other: list[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def _margin(model: Any, tokens: list[int], chosen: int) -> float:
    """How much better the best token is than the chosen one after these tokens, as a share of its logit."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1].float()
    return float((logits.max() - logits[chosen]) / logits.max().abs())
