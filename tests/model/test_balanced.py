"""Mode `balanced`: between `exact` and `resident`, equal to them at the ends of its dial."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emoe
from emoe.checkpoint.fingerprint import fingerprint
from emoe.errors import UsageError
from emoe.model import label_task
from emoe.model.bind import binding_of
from emoe.prediction.protocol import RoutingShape
from emoe.tasks.keywords import Keywords
from emoe.tasks.lengths import Lengths
from emoe.tasks.profile import Profile
from emoe.tasks.sensitivity import Sensitivity
from tests.families import make_checkpoint
from tests.model.test_exact import batch_of, logits_of

LAYERS, EXPERTS, TOP_K = 3, 16, 3
CURVES = {"easy": [0.99, 0.95, 0.9], "middling": [0.9, 0.6, 0.7], "hard": [0.3, 0.2, 0.1]}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    return make_checkpoint("qwen3_moe", folder, seed=5, num_experts=EXPERTS, num_experts_per_tok=TOP_K)


def profile_of(path: Path, curves: dict[str, list[float]] = CURVES) -> Profile:
    tasks = tuple(CURVES)
    popularity = np.tile(np.arange(EXPERTS, 0, -1.0), (LAYERS, 1))
    return Profile(
        fingerprint=fingerprint(path),
        shape=RoutingShape(LAYERS, EXPERTS, TOP_K),
        tasks=tasks,
        keywords=Keywords({task: {task: 1.0} for task in tasks}),
        lengths={"hard": Lengths.of([20, 40])},
        sensitivity=Sensitivity("agreement", {"agreement": {t: np.array(c) for t, c in curves.items()}}, LAYERS),
        popularity={"other": TOP_K * popularity / popularity.sum(axis=1, keepdims=True)},
    )


def run(model: Any, prompts: list[tuple[str | None, int, int, int]], decode: int = 3) -> list[torch.Tensor]:
    found = []
    for task, seed, batch, length in prompts:
        label_task(model, task)
        found += logits_of(model, batch_of(seed, batch, length), decode)
    return found


prompts_ = st.lists(
    st.tuples(st.sampled_from(sorted(CURVES)), st.integers(0, 999), st.integers(1, 2), st.integers(1, 9)),
    min_size=2,
    max_size=4,
)


@settings(max_examples=5)
@given(prompts_, st.integers(4, 15), st.integers(1, 3), st.sampled_from([None, "previous-prompt"]))
def test_the_ends_of_the_dial_are_resident_and_exact(
    path: Path, prompts: list[tuple[str | None, int, int, int]], slots: int, p: int, predictor: str | None
) -> None:
    common: dict[str, Any] = {"expert_memory": f"{slots}/layer", "replan_prompts": p}
    profile = profile_of(path)
    whole, _ = emoe.load(path)
    highest, _ = emoe.load(
        path, mode="balanced", profile=profile, sensitivity_threshold=1.1, predictor=predictor, **common
    )
    for ours, theirs in zip(run(highest, prompts), run(whole, prompts), strict=True):
        assert torch.equal(ours, theirs)
    assert (emoe.stats(highest)["lossy"], emoe.stats(highest)["rerouted_tokens"]) == (False, 0)

    lowest, _ = emoe.load(path, mode="balanced", profile=profile, sensitivity_threshold=0, **common)
    resident, _ = emoe.load(path, mode="resident", **common)
    for ours, theirs in zip(run(lowest, prompts), run(resident, prompts), strict=True):
        assert torch.equal(ours, theirs)
    assert emoe.stats(lowest)["lossy"] is True
    for name in ("hits", "misses", "loads", "rerouted_tokens"):
        assert emoe.stats(lowest)[name] == emoe.stats(resident)[name]
    for model in (whole, highest, lowest, resident):
        emoe.close(model)


def test_sensitive_layers_load_and_the_others_reroute(path: Path) -> None:
    model, _ = emoe.load(
        path, mode="balanced", expert_memory="5/layer", profile=profile_of(path), replan_prompts=10**6, task="hard"
    )
    run(model, [("hard", 0, 1, 9)])
    before = emoe.stats(model)["layers"]
    run(model, [("middling", 1, 1, 9), ("middling", 2, 2, 5)], decode=8)
    after = emoe.stats(model)["layers"]
    grew = {
        name: [after[layer][name] - before[layer][name] for layer in after] for name in ("loads", "rerouted_tokens")
    }
    # layer 0 keeps 90 % with a random route, deeper ones fall below 85 %
    assert grew["loads"][0] == 0 and min(grew["loads"][1:]) > 0
    assert grew["rerouted_tokens"][0] > 0 and grew["rerouted_tokens"][1:] == [0, 0]
    assert emoe.stats(model)["lossy"] is True


def test_an_unknown_task_is_sensitive_everywhere(path: Path) -> None:
    model, _ = emoe.load(path, mode="balanced", expert_memory="5/layer", profile=profile_of(path), replan_prompts=99)
    whole, _ = emoe.load(path)
    prompts = [("unheard of", 0, 1, 9), (None, 1, 1, 9)]
    for ours, theirs in zip(run(model, prompts), run(whole, prompts), strict=True):
        assert torch.equal(ours, theirs)


def test_a_label_wins_over_keywords_and_keywords_over_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {3: "an easy one", 4: "a hard one", 5: "neither"}

    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return texts[ids[0]]

    monkeypatch.setattr("emoe.model.bind._tokenizer", lambda path, kwargs: Tokenizer())
    model, _ = emoe.load(path, mode="balanced", expert_memory="50%", profile=profile_of(path))
    found = []
    with torch.no_grad():
        for label in (None, "middling"):
            label_task(model, label)
            model(torch.tensor([[3, 9], [4, 9], [5, 9]]))
            found.append(emoe.stats(model)["tasks"])
    assert found == [["easy", "hard", None], ["middling"] * 3]
    waits = [layer.waits for layer in binding_of(model).runtime.layers.values()]
    assert waits == [False, True, True]


def test_a_profile_of_another_model_is_refused(path: Path, tmp_path: Path) -> None:
    other = make_checkpoint("qwen3_moe", tmp_path / "m", seed=6, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
    with pytest.raises(UsageError, match="other weights route otherwise"):
        emoe.load(other, expert_memory="50%", profile=profile_of(path))
    profile_of(path).write(tmp_path / "p")
    with pytest.raises(UsageError, match="other weights route otherwise"):
        emoe.load(other, expert_memory="50%", profile=tmp_path / "p")


def test_a_split_by_popularity_gives_more_slots_to_even_layers(path: Path) -> None:
    profile = profile_of(path)
    shares = np.full((LAYERS, EXPERTS), TOP_K / EXPERTS)
    shares[1] = [1.0] * TOP_K + [0.0] * (EXPERTS - TOP_K)  # three experts serve every token of layer 1
    skewed = dataclasses.replace(profile, popularity={"other": shares})
    model, _ = emoe.load(path, expert_memory="50%", profile=skewed, layer_split="expected-misses")
    assert [entry["slots"] for entry in emoe.stats(model)["layers"].values()] == [11, TOP_K, 10]
    with torch.no_grad():
        model(batch_of(0, 1, 9)["input_ids"])
    assert emoe.stats(model)["peak_resident_bytes"] <= emoe.stats(model)["budget_bytes"]
