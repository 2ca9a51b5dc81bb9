"""Signs in the norms: the next layer's router is right as often as asked, and no route changes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from emoe import model as emoe_model
from emoe.bench.forced import forced
from emoe.bench.plant.card import CARD, ROUTES, read_card
from emoe.bench.plant.check import MEMORY, check, compare
from emoe.bench.plant.next_gate import TOLERANCE, Guesses, plant_signs
from emoe.bench.plant.routers import embeddings, logits_of, router_weight
from emoe.bench.plant.shapes import PUBLISHED
from emoe.bench.plant.tensors import DTYPE, tensors_of
from emoe.bench.plant.write import plant
from emoe.errors import UsageError
from emoe.model.prefetch import NextGate
from emoe.routing.trace import Trace
from tests.bench.plant.made_up import made_up_trace

TINY = [name for name in PUBLISHED if name.startswith("tiny-")]
TOKENS = 60
SHARE = 0.79


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint for each layout, the next gate right about 79 %."""
    folder = tmp_path_factory.mktemp("planted")
    trace = made_up_trace(TOKENS).write(folder / "made-up.npz")
    for name in TINY:
        plant(PUBLISHED[name], trace, TOKENS, folder / name, next_gate=SHARE)
    return {name: folder / name for name in TINY}


def right(guess: torch.Tensor, chosen: torch.Tensor) -> float:
    """The share of ids that are in the row of the other."""
    return float((guess[:, :, None] == chosen[:, None, :]).sum() / chosen.numel())


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(4, 16),
    k=st.integers(1, 3),
    layers=st.integers(2, 4),
    share=st.floats(0.3, 1.0),
    seed=st.integers(0, 1000),
)
def test_every_layer_routes_as_planted_and_the_one_before_guesses_the_share(
    experts: int, k: int, layers: int, share: float, seed: int
) -> None:
    trace = made_up_trace(90, layers, experts, k, seed=seed)
    assert trace.weights is not None
    logits = [logits_of(trace.experts[:, n], trace.weights[:, n], experts) for n in range(layers)]
    rows = embeddings(90, 128, 128, seed)[:90]
    assume(share > 1.5 * k / experts)
    signs = plant_signs(logits.__getitem__, layers, rows, k, share, seed)
    assert (signs.of_layers.abs() == 1).all()
    states = (rows * signs.of_layers[:, None]).to(DTYPE).float()
    weights = [router_weight(logits[n], rows * signs.of_layers[n]).to(DTYPE).float() for n in range(layers)]
    for n in range(layers):
        assert np.array_equal((states[n] @ weights[n].T).topk(k).indices, trace.experts[:, n])
    chosen = torch.from_numpy(trace.experts.astype(np.int64))
    found = [
        right((states[before] @ weights[n].T).topk(k).indices, chosen[:, n]) for before, n in pairwise(range(layers))
    ]
    assert max(abs(each - share) for each in found) < TOLERANCE + 1e-6
    assert sum(found) / len(found) == pytest.approx(signs.share)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("prompt", "chunk"), [(TOKENS, None), (TOKENS, 7), (1, None)])
def test_emoe_routes_as_the_trace_however_tokens_are_fed(
    planted: dict[str, Path], tmp_path: Path, name: str, prompt: int, chunk: int | None
) -> None:
    loaded, _ = emoe_model.load(planted[name], expert_memory=MEMORY, trace=tmp_path / "routes.npz")
    guesses = Guesses(loaded)
    for _ in forced(loaded, torch.arange(TOKENS)[None], prompt, chunk):
        pass
    guesses.remove()
    emoe_model.close(loaded)
    found = compare("all", Trace.read(planted[name] / ROUTES), Trace.read(tmp_path / "routes.npz"))
    assert (found.routes, found.wrong) == (TOKENS * len(PUBLISHED[name].moe_layers), 0)
    assert guesses.share is not None
    assert abs(guesses.share - SHARE) < TOLERANCE
    assert abs(guesses.share - read_card(planted[name]).next_gate) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_plain_transformers_guesses_the_same_share(planted: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(planted[name], dtype=dtype)
    guesses = Guesses(model)
    for _ in forced(model, torch.arange(TOKENS)[None], TOKENS):
        pass
    assert guesses.share == pytest.approx(read_card(planted[name]).next_gate, abs=0.01)


def test_what_emoe_loads_ahead_is_right_as_often(planted: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`prefetch="next-gate"`, in steps of one token."""
    asked: list[tuple[int, list[int]]] = []
    guess = NextGate._guess

    def noted(self: NextGate, layer: int, following: int) -> list[int]:
        asked.append((following, guess(self, layer, following)))
        return asked[-1][1]

    monkeypatch.setattr(NextGate, "_guess", noted)
    wanted = Trace.read(planted["tiny-gpt-oss"] / ROUTES).experts
    loaded, _ = emoe_model.load(planted["tiny-gpt-oss"], expert_memory=MEMORY, prefetch="next-gate", mode="exact")
    found = []
    for token, _ in enumerate(forced(loaded, torch.arange(TOKENS)[None], 1)):
        found += [len(set(ids) & set(wanted[token, layer].tolist())) / 2 for layer, ids in asked if ids]
        asked.clear()
    emoe_model.close(loaded)
    assert len(found) >= 2 * TOKENS // 3
    assert sum(found) / len(found) == pytest.approx(SHARE, abs=0.06)  # once it is not worth it, it asks no more


def test_without_a_share_every_norm_is_one_and_the_gate_always_right(tmp_path: Path) -> None:
    shape = PUBLISHED["tiny-olmoe"]
    trace = made_up_trace(30).write(tmp_path / "made-up.npz")
    card = plant(shape, trace, 30, tmp_path / "x")
    assert card.next_gate == 1
    assert card.guesses == "right every time, as planted: more than any trained model's is"
    prefill, *_ = check(tmp_path / "x")
    assert (prefill.next_gate, prefill.planted, prefill.failed) == (1.0, 1.0, False)
    norms = [t for t in tensors_of(shape, 64, 30, lambda _: torch.zeros(30, 8), 0) if "layernorm" in t.name]
    assert norms and all(bool((block == 1).all()) for norm in norms for block in norm.blocks())
    signs = torch.ones(3, 64, dtype=torch.int8)
    signs[2, 5] = -1
    signed = {t.name: t for t in tensors_of(shape, 64, 30, lambda _: torch.zeros(30, 8), 0, signs)}
    [block] = signed["model.layers.2.post_attention_layernorm.weight"].blocks()
    assert block.tolist() == signs[2].tolist()


def test_the_card_keeps_the_share_and_older_cards_have_none(planted: dict[str, Path], tmp_path: Path) -> None:
    card = read_card(planted["tiny-olmoe"])
    assert abs(card.next_gate - SHARE) < TOLERANCE
    assert card.guesses == f"right about {card.next_gate:.1%} of a token's experts, as planted"
    older = card.as_dict()
    del older["next_gate"]
    (tmp_path / CARD).write_text(json.dumps(older))
    assert read_card(tmp_path) == replace(card, next_gate=1.0)


def test_a_gate_that_guesses_otherwise_is_found(planted: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for path in planted["tiny-mixtral"].iterdir():
        (folder / path.name).symlink_to(path)
    card = read_card(folder)
    (folder / CARD).unlink()
    (folder / CARD).write_text(json.dumps(replace(card, next_gate=0.9).as_dict()))
    prefill, *others = check(folder)
    assert prefill.wrong == 0
    assert prefill.failed
    assert prefill.text.endswith(f"next gate right about {card.next_gate:.1%} of a token's experts (planted: 90.0%)")
    assert not any(part.failed for part in others)  # they feed some tokens more than once, or not at all


def test_shares_that_cannot_be_planted_are_named() -> None:
    rows = embeddings(8, 64, 64, 0)[:8]
    trace = made_up_trace(8, 2)

    def logits(layer: int) -> torch.Tensor:
        return logits_of(trace.experts[:, layer], None, 8)

    with pytest.raises(UsageError, match=r"above 0 and at most 1, not 1\.5"):
        plant_signs(logits, 2, rows, 2, 1.5, 0)
    with pytest.raises(UsageError, match="with one layer of experts there is no next gate"):
        plant_signs(logits, 1, rows, 2, 0.8, 0)
    with pytest.raises(UsageError, match=r"guesses 80% cannot be planted with 1 tokens: the nearest is \d+%; ask for"):
        plant_signs(lambda layer: logits(layer)[:1], 2, rows[:1], 2, 0.8, 0)
