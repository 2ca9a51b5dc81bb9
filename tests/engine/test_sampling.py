"""Tokens are chosen as asked, from the right shares, and by the request alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import emoe
from emoe.engine.interface import EngineSettings, Sampling
from emoe.engine.sampling import Draw, choose, uniform
from tests.conftest import Checkpoints
from tests.engine.running import SMALL, engine_of, prompt, send


def logits_of(seed: int, size: int = 50) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shares_of(logits: torch.Tensor, sampling: Sampling) -> dict[int, float]:
    """The definition, slowly: temperature, then top_k, then top_p, then normalised."""
    scaled = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])[: sampling.top_k]
    whole = sum(float(scaled[i]) for i in order)
    kept: dict[int, float] = {}
    for i in order:
        if kept and sum(kept.values()) >= sampling.top_p * whole:
            break
        kept[i] = float(scaled[i])
    return {i: share / sum(kept.values()) for i, share in kept.items()}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([None, 1, 5, 400]),
)
def test_what_is_drawn_has_the_shares_asked_for(seed: int, temperature: float, top_p: float, top_k: int | None) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    logits, draws = logits_of(seed), 400
    expected = shares_of(logits, sampling)
    rows = logits.expand(draws, -1)
    found = Counter(choice.token for choice in choose(rows, [Draw(sampling, seed, i) for i in range(draws)]))
    assert set(found) <= set(expected)
    for token, share in expected.items():
        spread = math.sqrt(share * (1 - share) / draws)
        assert abs(found[token] / draws - share) <= 5 * spread + 4 / draws


def test_a_large_vocabulary_is_cut_the_same_way() -> None:
    """The shortcut over the likeliest few agrees with the definition where it suffices and where it does not."""
    flat, steep = torch.zeros(5000), logits_of(1, 5000)
    sampling = Sampling(top_p=0.5)
    picked = {choose(flat[None], [Draw(sampling, 3, i)])[0].token for i in range(200)}
    assert len(picked) > 150
    expected = shares_of(steep, sampling)
    assert {choose(steep[None], [Draw(sampling, 3, i)])[0].token for i in range(200)} <= set(expected)


def test_uniform_numbers() -> None:
    drawn = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert 0 <= min(drawn) <= max(drawn) < 1
    assert len(set(drawn)) == len(drawn)
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.01)
    assert uniform(2**70 + 1, 5) == uniform((2**70 + 1) % 2**64, 5)


def test_temperature_0_takes_the_best_whatever_else_is_asked() -> None:
    logits = torch.stack([logits_of(seed) for seed in range(5)])
    chosen = choose(logits, [Draw(Sampling(temperature=0, top_p=0.1, top_k=3, seed=4), 4, 0)] * 5)
    assert [choice.token for choice in chosen] == logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def model(checkpoints: Checkpoints) -> Iterator[PreTrainedModel]:
    made, _ = emoe.load(checkpoints("mixtral", torch.float32), expert_memory="60%", dtype="float32")
    yield made
    emoe.close(made)


def test_a_seed_gives_the_same_answer_whatever_else_runs(model: PreTrainedModel) -> None:
    """Alone, among others, and preempted."""
    seeded = Sampling(temperature=1.3, top_p=0.95, seed=7, ignore_end=True)
    with engine_of(model) as engine:
        first = send(engine, prompt(1, 10), 40, sampling=seeded)[1]
        assert first.end.reason == "length"
    tight = EngineSettings(scheduler="fifo", max_running=6, max_batch_tokens=16, kv_tokens=72, page_tokens=4)
    with engine_of(model, tight) as engine:
        others = [send(engine, prompt(n, 10), 30, sampling=Sampling(ignore_end=True))[1] for n in range(2, 5)]
        again = send(engine, prompt(1, 10), 40, sampling=seeded)[1]
        others += [send(engine, prompt(n, 10), 30, sampling=Sampling(ignore_end=True))[1] for n in range(5, 8)]
        assert again.end.reason == "length"
        assert sum(other.end.report.preemptions for other in [*others, again]) > 0
    assert again.tokens == first.tokens


def test_without_a_seed_answers_differ(model: PreTrainedModel) -> None:
    with engine_of(model) as engine:
        free = Sampling(temperature=1.5, ignore_end=True)
        answers = [send(engine, prompt(1, 10), 20, sampling=free)[1] for _ in range(3)]
        assert all(answer.end.reason == "length" for answer in answers)
    assert len({tuple(answer.tokens) for answer in answers}) == 3


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward(model: PreTrainedModel, temperature: float) -> None:
    asked = prompt(3, 11)
    sampling = Sampling(temperature=temperature, top_p=0.8, seed=1, logprobs=4, ignore_end=True)
    with engine_of(model, SMALL) as engine:
        none = send(engine, asked, 3, sampling=Sampling(temperature=0, ignore_end=True))[1]
        answer = send(engine, asked, 12, sampling=sampling)[1]
        assert (none.end.reason, answer.end.reason) == ("length", "length")
    assert all(event.logprob is None and event.top == () for event in none.given)
    with torch.no_grad():
        logits = model(torch.tensor([[*asked, *answer.tokens]])).logits[0].float()
    expected = torch.log_softmax(logits[len(asked) - 1 : -1], dim=-1)
    for row, event in zip(expected, answer.given, strict=True):
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
        best = row.topk(4)
        assert [value for _, value in event.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert event.top[0][0] == int(best.indices[0])
    drawn = choose(logits[len(asked) - 1 : -1], [Draw(sampling, 1, place) for place in range(12)])
    assert answer.tokens == [choice.token for choice in drawn]
