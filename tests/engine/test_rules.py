"""What the model's generation configuration says holds in the engine, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import emoe
from emoe.engine.engine import Engine
from emoe.engine.interface import Sampling
from emoe.engine.rules import Rules
from emoe.engine.sampling import Draw, choose
from emoe.errors import UsageError
from tests.engine.running import ENDLESS, SMALL, alone, engine_of, prompt, send

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    made, _ = emoe.load(expert_memory="40%", dtype="float32")
    yield made
    emoe.close(made)


@pytest.mark.parametrize(
    "setting",
    [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": list(range(0, 8192, 3))}],
    ids=lambda setting: next(iter(setting)),
)
def test_the_text_is_that_of_generate(
    model: PreTrainedModel, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = alone(model, prompt(9, 9), 24, ends=False)
    for name, value in setting.items():
        monkeypatch.setattr(model.generation_config, name, value)
    expected = [alone(model, prompt(length, length), 24, ends=False) for length in (9, 14)]
    assert expected[0] != plain
    with engine_of(model, SMALL) as engine:
        answers = [send(engine, prompt(length, length), 24, sampling=ENDLESS)[1] for length in (9, 14)]
        assert all(answer.end.reason == "length" for answer in answers)
        assert [answer.tokens for answer in answers] == expected


@pytest.mark.parametrize(("name", "value"), [("num_beams", 4), ("min_new_tokens", 3), ("stop_strings", ["x"])])
def test_what_the_engine_does_not_do_is_refused_by_name(
    model: PreTrainedModel, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, name, value)
    with pytest.raises(UsageError, match=name):
        Engine(model, None, SMALL)


def test_log_probabilities_are_the_models() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    rules = Rules(GenerationConfig(suppress_tokens=[0]), CPU)
    scores = rules.apply(logits, [[0]])
    assert rules and logits[0, 0] == 3
    (choice,) = choose(logits, [Draw(Sampling(temperature=0, logprobs=1), 0, 0)], scores)
    assert choice.token == 1
    assert choice.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 1]))
    assert choice.top[0][0] == 0


def test_without_settings_there_are_none() -> None:
    assert not Rules(GenerationConfig(), CPU)
