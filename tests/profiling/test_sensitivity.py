"""Random routing: who computes is random, how much is not; curves come from paired measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import emoe
from emoe.model.bind import binding_of
from emoe.profiling.prompts import encode_all, read_prompts
from emoe.profiling.running import answer
from emoe.profiling.sensitivity import (
    Settings,
    _Scrambled,
    choose_prefixes,
    measure,
    random_routing,
    read_rows,
    summarise,
)
from tests.conftest import Checkpoints

IDS = torch.tensor([[4, 5, 6, 7, 8, 9]])


def routes(model: Any, layers: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each MoE layer what its experts were called with under random routing."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    handles = []
    with random_routing(model, layers, seed), torch.no_grad():
        for entry in binding_of(model).index.layers:
            handles.append(
                model.get_submodule(entry.module).register_forward_pre_hook(
                    lambda m, args, kwargs: seen.append((args[0], args[1], args[2])), with_kwargs=True
                )
            )
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_the_first_layers_route_at_random_and_the_others_do_not(loaded: Any, layers: int) -> None:
    model, _ = loaded
    own, scrambled = routes(model, 0, 1), routes(model, layers, 1)
    for rank in range(3):
        ids, weights = scrambled[rank][1:]
        assert ids.shape == own[rank][1].shape
        assert ids.dtype == own[rank][1].dtype
        assert all(len(set(row.tolist())) == ids.shape[1] for row in ids)
        assert ((ids >= 0) & (ids < 8)).all()
        if rank == 0:  # later layers see other hidden states
            assert torch.equal(weights, own[rank][2])
            assert torch.equal(ids, own[rank][1]) == (layers == 0)
        # What a layer gets depends on the layers before it: its route is the router's own or not.
        router = model.get_submodule(binding_of(model).index.layers[rank].module.replace("experts", "gate"))
        chosen = router(scrambled[rank][0])[2]
        assert torch.equal(chosen, ids) == (rank >= layers)


def test_draws_repeat_and_do_not_depend_on_the_prefix(loaded: Any) -> None:
    model, _ = loaded
    one, two, again, other = routes(model, 1, 5), routes(model, 2, 5), routes(model, 2, 5), routes(model, 2, 6)
    assert torch.equal(one[0][1], two[0][1])
    assert all(torch.equal(a[1], b[1]) for a, b in zip(two, again, strict=True))
    assert not torch.equal(two[0][1], other[0][1])
    assert not torch.equal(two[0][1], two[1][1])


def test_experts_are_drawn_uniformly(loaded: Any) -> None:
    model, _ = loaded
    drawn = torch.cat([routes(model, 1, seed)[0][1] for seed in range(150)])
    counts = torch.bincount(drawn.flatten(), minlength=8)
    expected = drawn.numel() / 8
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # chi square of 7: 0.1 %


@given(st.integers(1, 100), st.integers(1, 20))
def test_prefixes_are_few_and_reach_the_last_layer(layers: int, most: int) -> None:
    chosen = choose_prefixes(layers, most)
    assert list(chosen) == sorted({*chosen})
    assert chosen[-1] == layers
    assert len(chosen) <= most
    assert chosen[0] == 1 or most == 1
    if layers <= most:
        assert chosen == tuple(range(1, layers + 1))


class FirstLetters:
    """A stand-in for the sentence encoder: the share of equal leading letters."""

    def similarities(self, text: str, others: Sequence[str]) -> list[float]:
        def alike(other: str) -> float:
            pairs = list(zip(text, other, strict=False))
            return sum(a == b for a, b in pairs) / max(len(text), len(other), 1)

        return [1.0 if other == text else alike(other) for other in others]


@pytest.fixture
def work(loaded: Any, prompt_file: Path) -> list[Any]:
    model, tokenizer = loaded
    prompts = read_prompts(prompt_file)[:4]
    ids = encode_all(prompts, tokenizer, "tiny", None, 6)
    return [(prompt, given, answer(model, given, 6)) for prompt, given in zip(prompts, ids, strict=True)]


def run(loaded: Any, work: list[Any], log: Path, step: Any = lambda *_: None) -> list[Any]:
    model, tokenizer = loaded
    return measure(model, tokenizer, work, Settings((1, 3), 6, seed=2), FirstLetters(), log, step)


def test_a_stopped_run_goes_on_and_measures_the_same(loaded: Any, work: list[Any], tmp_path: Path) -> None:
    whole = run(loaded, work, tmp_path / "whole.jsonl")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    log = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(loaded, work, log, stop)
    assert len(read_rows(log)) == 2
    with log.open("a") as file:
        file.write('{"line": 3, "task"')  # what a kill leaves
    seen: list[int] = []
    rows = run(loaded, work, log, lambda done, _: seen.append(done))
    assert seen == [2, 3, 4]
    assert rows == whole == read_rows(log)


def test_rows_hold_each_measure_for_each_prefix(loaded: Any, work: list[Any], tmp_path: Path) -> None:
    rows = run(loaded, work, tmp_path / "log.jsonl")
    assert [(row["line"], row["task"]) for row in rows] == [(1, "maths"), (2, "chat"), (3, "maths"), (4, "chat")]
    for row in rows:
        assert len(row["agreement"]) == len(row["nll"]) == len(row["similarity"]) == 2
        assert all(0 <= x <= 1 for x in row["agreement"])
        assert row["tokens"] == (1 if row["task"] == "maths" else len(work[row["line"] - 1][2].ids))
    # The full model's own answer is what it finds likeliest; a wrong routing finds it less likely.
    chat = [row for row in rows if row["task"] == "chat"]
    assert sum(row["nll_full"] for row in chat) < sum(row["nll"][1] for row in chat)
    assert min(row["agreement"][1] for row in rows) < 1


def test_without_an_encoder_nothing_is_generated(
    loaded: Any, work: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    monkeypatch.setattr(model, "generate", None)
    rows = measure(model, tokenizer, work, Settings((3,), 6), None, tmp_path / "log.jsonl", lambda *_: None)
    assert all("similarity" not in row for row in rows)


def test_curves_are_means_and_gaps_take_the_longer_prefixs_value() -> None:
    base = {"task": "qa", "tokens": 2, "nll_full": 1.0}
    rows: list[dict[str, Any]] = [
        base | {"line": 1, "nll": [1.0, 2.0], "agreement": [1.0, 0.5], "similarity": [0.9, 0.1]},
        base | {"line": 2, "nll": [2.0, 4.0], "agreement": [0.8, 0.3], "similarity": [0.7, -0.1], "tokens": 6},
        {
            "line": 3,
            "task": "chat",
            "tokens": 1,
            "nll_full": 0.0,
            "nll": [0.0, 0.0],
            "agreement": [1, 1],
            "similarity": [1, 1],
        },
    ]
    known = summarise(json.loads(json.dumps(rows)), 4, (1, 4), "similarity", 0.5)
    assert known.curves["similarity"]["qa"] == pytest.approx([0.8, 0.0, 0.0, 0.0])
    assert known.curves["agreement"]["qa"] == pytest.approx([0.9, 0.4, 0.4, 0.4])
    assert known.curves["perplexity"]["qa"] == pytest.approx([math.exp(-1 / 8), *[math.exp(-4 / 8)] * 3])
    assert known.curves["perplexity"]["chat"] == pytest.approx(np.ones(4))
    assert known.prompts == {"qa": 2, "chat": 1}
    assert known.sensitive("qa").tolist() == [False, True, True, True]
    assert not known.sensitive("chat").any()


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "jamba", "gemma4_text"])
def test_it_works_without_a_routing_rule_whatever_the_router(family: str, checkpoints: Checkpoints) -> None:
    """Dense layers first, another order of calls, experts with biases: random routing stands at the experts' door."""
    model, _ = emoe.load(checkpoints(family))
    with torch.no_grad():
        own = model(input_ids=IDS).logits
        found = []
        for layers in (1, 99):
            with random_routing(model, layers, 0):
                found.append(model(input_ids=IDS).logits)
        assert torch.equal(model(input_ids=IDS).logits, own)
    emoe.close(model)
    assert not torch.equal(found[0], own)
    assert not torch.equal(found[1], own)


def test_ids_are_replaced_however_they_are_given() -> None:
    scramble = _Scrambled(8, torch.Generator().manual_seed(3))
    again = _Scrambled(8, torch.Generator().manual_seed(3))
    hidden, ids, weights = torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.int32), torch.ones(5, 2)
    (first, drawn, last), rest = scramble(None, (hidden, ids, weights), {"extra": 1})
    assert first is hidden and last is weights and rest == {"extra": 1}
    assert drawn.dtype == torch.int32 and all(len(set(row.tolist())) == 2 for row in drawn)
    given = {"top_k_index": ids, "top_k_weights": weights}
    args, named = again(None, (hidden,), given)
    assert len(args) == 1 and args[0] is hidden and named["top_k_weights"] is weights
    assert torch.equal(named["top_k_index"], drawn) and given["top_k_index"] is ids
