"""The next layer's gate on this layer's hidden states: what is asked for, and when nothing is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from emoe.model.prefetch import IN_FLIGHT, NextGate
from emoe.residency.worth import Worth

LAYERS, WIDTH, EXPERTS, TOP_K = (1, 3, 4), 8, 6, 2
"""MoE layers need not follow each other."""


class Router(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(seed)))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden_states.reshape(-1, WIDTH) @ self.weight.T
        weights, ids = logits.softmax(-1).topk(TOP_K)
        return logits, weights, ids


class World:
    def __init__(self) -> None:
        self.asked: list[tuple[list[tuple[int, int]], int]] = []
        ask = SimpleNamespace(ask=lambda keys, limit: self.asked.append((list(keys), limit)))
        layers = {layer: SimpleNamespace(layer=layer, pool=SimpleNamespace(prefetches=ask)) for layer in LAYERS}
        self.routers = {layer: Router(layer) for layer in LAYERS}
        self.worth = Worth()
        self.gate = NextGate(cast(Any, SimpleNamespace(layers=layers)), self.routers, self.worth)
        self.layers = layers

    def step(self, hidden: torch.Tensor, named: bool = False) -> list[list[tuple[int, int]]]:
        """One pass in which every layer sees `hidden`; what was asked for after each layer."""
        found = []
        for number, layer in enumerate(LAYERS):
            self.asked.clear()
            states = hidden + number
            self.routers[layer](hidden_states=states) if named else self.routers[layer](states)
            self.gate.after_take(cast(Any, self.layers[layer]))
            assert all(limit == IN_FLIGHT for _, limit in self.asked)
            found.append([key for keys, _ in self.asked for key in keys])
        return found


@pytest.mark.parametrize("named", [False, True])
def test_it_asks_for_what_the_next_gate_makes_of_this_layers_states(named: bool) -> None:
    world = World()
    token = torch.linspace(-1, 1, WIDTH)[None]
    assert world.step(token, named) == [[], [], []]  # how the next router is called is not known yet
    for scale in (1.0, -2.0, 0.5):
        expected: list[list[tuple[int, int]]] = []
        for number, following in enumerate(LAYERS[1:]):
            ids = world.routers[following](token * scale + number)[2]
            expected.append([(following, expert) for expert in ids.reshape(-1).tolist()])
        world.step(token, named)  # the routers were just called by this test
        assert world.step(token * scale, named) == [*expected, []]
    assert world.worth.overhead_s > 0


def test_after_a_prompt_nothing_is_guessed_until_the_next_layer_was_called_with_a_token() -> None:
    world = World()
    prompt, token = torch.ones(5, WIDTH), torch.ones(1, WIDTH)
    world.step(prompt)
    assert world.step(token) == [[], [], []]
    assert all(world.step(token)[:2])


def test_when_it_does_not_pay_it_asks_for_nothing_and_spends_nothing() -> None:
    world = World()
    token = torch.ones(1, WIDTH)
    world.step(token)
    world.worth.active = False
    spent = world.worth.overhead_s
    assert world.step(token) == [[], [], []]
    assert world.worth.overhead_s == spent
