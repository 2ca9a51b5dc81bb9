"""The engine over a model whose experts are copied to a device: the same text as alone on a CPU, copies in order."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import emoe
from emoe.engine.interface import Sampling
from emoe.model import placement
from emoe.model.bind import binding_of
from emoe.residency.virtual import VirtualDevice
from tests.conftest import Checkpoints
from tests.engine.running import SMALL, alone, engine_of, prompt, send


@pytest.mark.parametrize("host", [0, "40%", "100%"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_requests_together_get_the_text_of_each_alone(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str, host: Any
) -> None:
    path = checkpoints(name, torch.float32)
    whole, _ = emoe.load(path, dtype="float32")
    device = VirtualDevice(1e9, latency_s=1e-5)
    monkeypatch.setattr(placement, "device_at", lambda place: device)
    model, _ = emoe.load(path, dtype="float32", device_map="cpu", expert_memory="40%", host_memory=host)
    asked = [prompt(seed, length) for seed, length in enumerate((5, 30, 12, 21))]
    with engine_of(model, dataclasses.replace(SMALL, max_batch_tokens=24, kv_tokens=128)) as engine:
        answers = [send(engine, each, 16)[1] for each in asked]
        for answer in answers:
            assert answer.end.reason in ("stop", "length"), answer.end.error
    for each, answer in zip(asked, answers, strict=True):
        assert answer.tokens == alone(whole, each, 16)
    stats = emoe.stats(model)
    assert stats["bytes_copied"] == stats["loads"] * binding_of(model).pools[0].bank.slot_nbytes > 0
    assert engine.stats().loads > 0
    emoe.close(model)
    emoe.close(whole)


def test_a_step_asks_the_device_once_for_each_layer(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    device = VirtualDevice(1e9, latency_s=1e-5)
    monkeypatch.setattr(placement, "device_at", lambda place: device)
    path = checkpoints("mixtral", torch.float32)
    model, _ = emoe.load(path, dtype="float32", device_map="cpu", expert_memory="40%", host_memory="100%")
    layers = len(binding_of(model).runtime.layers)
    with engine_of(model, SMALL) as engine:
        sampled = Sampling(temperature=1.0, seed=3)
        for answer in [send(engine, prompt(seed, 9), 8, sampling=sampled)[1] for seed in range(3)]:
            assert answer.end.reason in ("stop", "length")
        steps, fetches, stops = engine.stats().steps, device.fetches, device.synchronisations
        for answer in [send(engine, prompt(seed, 9), 8, sampling=sampled)[1] for seed in range(3)]:
            assert answer.end.reason in ("stop", "length")
        steps, fetches = engine.stats().steps - steps, device.fetches - fetches
        assert fetches == steps * layers and device.synchronisations == stops
    emoe.close(model)
