"""Routers solved on orthogonal embeddings: what they choose, and with which weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.bench.plant.routers import GAP, MARGIN, POPULAR, embeddings, logits_of, next_token_head, router_weight
from emoe.errors import UsageError
from tests.bench.plant.made_up import made_up_trace


@settings(max_examples=60)
@given(experts=st.integers(2, 20), k=st.integers(1, 6), weighted=st.booleans(), seed=st.integers(0, 1000))
def test_the_chosen_are_best_in_order_and_clearly_apart(experts: int, k: int, weighted: bool, seed: int) -> None:
    k = min(k, experts)
    trace = made_up_trace(20, 1, experts, k, seed=seed)
    assert trace.weights is not None
    logits = logits_of(trace.experts[:, 0], trace.weights[:, 0] if weighted else None, experts)
    ordered, chosen = logits.sort(dim=1, descending=True)
    assert np.array_equal(chosen[:, :k].numpy(), trace.experts[:, 0])
    assert ((ordered[:, : k - 1] - ordered[:, 1:k]) > GAP * 0.999).all()
    if k < experts:
        assert ((ordered[:, k - 1] - ordered[:, k]) > (MARGIN - POPULAR) * 0.999).all()
    assert float(ordered.max()) < 16  # where bfloat16 still tells 0.06 apart


def test_the_softmax_over_the_chosen_gives_the_weights_of_the_trace() -> None:
    weights = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]])
    logits = logits_of(np.array([[1, 0, 4], [2, 3, 1]]), weights, 6)
    found = logits.sort(dim=1, descending=True).values[:, :3].softmax(dim=1).numpy()
    assert found[0] == pytest.approx(weights[0], abs=1e-6)
    # Equal weights are spread by GAP, so that bfloat16 keeps their order.
    assert found[1] == pytest.approx(weights[1], abs=0.025)
    assert found[1, 0] > found[1, 1]


def test_weights_that_leave_a_rest_leave_it() -> None:
    """A softmax over all experts, as OLMoE has it: the others share what the chosen leave."""
    weights = np.array([[0.2, 0.1]])
    logits = logits_of(np.array([[1, 0]]), weights, 40)
    found = logits.softmax(dim=1)[0, [1, 0]].numpy()
    assert found == pytest.approx(weights[0], rel=0.1)


def test_routers_give_the_embeddings_their_logits() -> None:
    logits = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    rows = embeddings(30, 64, 48, seed=2)
    assert rows.shape == (64, 48)
    assert torch.allclose(rows.square().mean(dim=1)[:30], torch.ones(30), atol=1e-5)
    assert torch.allclose(rows[:30] @ router_weight(logits, rows[:30]).T, logits, atol=1e-4)


def test_what_is_written_does_not_depend_on_the_number_of_threads() -> None:
    logits = torch.randn(600, 8, generator=torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rows = embeddings(600, 640, 1200, seed=2)
            found.append((rows.bfloat16(), router_weight(logits, rows[:600]).bfloat16()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_there_are_no_more_orthogonal_rows_than_the_hidden_size() -> None:
    with pytest.raises(UsageError, match="49 tokens cannot have as many orthogonal embeddings of size 48"):
        embeddings(49, 64, 48, seed=0)


def test_after_each_token_the_head_prefers_the_next_and_after_the_last_the_first() -> None:
    rows = embeddings(40, 64, 48, seed=2)
    best = (rows[:40] @ next_token_head(rows, 40, seed=3).T).argmax(dim=1)
    assert best.tolist() == [*range(1, 40), 0]
