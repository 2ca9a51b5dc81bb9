"""Routing rules against the families' own routers: bit-identical with all experts, an oracle with fewer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emoe.routing.rules import rule_for
from tests.routing.routers import (
    CASES,
    FLOAT32_ONLY,
    GROUPED,
    HIDDEN,
    PLAIN,
    TABLED,
    Block,
    TinyRouter,
    build,
    case_id,
)

EXPERTS = 8


@contextmanager
def restricted(router: TinyRouter, mask: Tensor | None) -> Iterator[None]:
    block = Block(router.module, router.num_experts)
    attachment = rule_for(block, block.experts).attach(lambda: mask)
    try:
        yield
    finally:
        attachment.remove()


def hidden_states(tokens: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)) * scale


def routed(router: TinyRouter, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    with restricted(router, mask):
        _, weights, ids, *_ = router.call(hidden)
    return ids, weights


def as_rows(ids: Tensor, weights: Tensor) -> list[dict[int, float]]:
    """Each token's experts with a weight, in no order."""
    pairs = zip(ids.tolist(), weights.tolist(), strict=True)
    return [{e: w for e, w in zip(row, ws, strict=True) if w != 0} for row, ws in pairs]


def assert_same_rows(mine: list[dict[int, float]], theirs: list[dict[int, float]]) -> None:
    for token, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a == pytest.approx(b, rel=2e-5, abs=1e-7), token


masks = st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS).filter(any)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key", "changes"), CASES, ids=case_id)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), tokens=st.integers(1, 9))
def test_all_allowed_is_the_models_own_choice_bit_for_bit(
    key: str, changes: dict[str, Any], dtype: torch.dtype, seed: int, tokens: int
) -> None:
    router = build(key, EXPERTS, seed=seed, **changes)
    router.module.to(torch.float32 if key in FLOAT32_ONLY else dtype)
    hidden = hidden_states(tokens, seed).to(dtype)
    own = router.call(hidden)
    for mask in (torch.ones(EXPERTS, dtype=torch.bool), torch.ones(tokens, EXPERTS, dtype=torch.bool)):
        with restricted(router, mask):
            mine = router.call(hidden)
        assert len(mine) == len(own)
        for a, b in zip(mine, own, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_allowed_is_the_models_own_choice_on_cuda(dtype: torch.dtype) -> None:
    """The first restricted call compares the whole result with the router's own, and raises where it differs."""
    for key, changes in CASES:
        router = build(key, 64, top_k=8, **changes)
        router.module.to("cuda", torch.float32 if key in FLOAT32_ONLY else dtype)
        router.bias = None if router.bias is None else router.bias.cuda()
        ids, _ = routed(router, hidden_states(33, 0).to("cuda", dtype), torch.ones(64, dtype=torch.bool))
        assert ids.is_cuda


@pytest.mark.parametrize(("key", "changes"), [case for case in CASES if case[0] in PLAIN], ids=case_id)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), mask=masks)
def test_restricted_is_the_router_with_rows_deleted(
    key: str, changes: dict[str, Any], seed: int, mask: list[bool]
) -> None:
    router = build(key, EXPERTS, seed=seed, **changes)
    hidden = hidden_states(5, seed)
    kept = [expert for expert, ok in enumerate(mask) if ok]
    ids, weights = routed(router, hidden, torch.tensor(mask))
    small = router.without(kept)
    _, own_weights, own_ids, *rest = small.call(hidden)
    if "phimoe" in key and len(kept) == 1:  # its own second choice among one expert is nan
        assert torch.equal(ids, torch.full_like(ids, kept[0]))
        assert torch.equal(weights, torch.tensor([[1.0, 0.0]]).expand_as(weights))
        return
    if "privacy_filter" in key:  # it divides by k, which its block undoes: k is not the smaller router's
        own_weights = own_weights * small.top_k / router.top_k
    assert_same_rows(as_rows(ids, weights), as_rows(torch.tensor(kept)[own_ids], own_weights))
    if "inkling." in key:
        with restricted(router, torch.tensor(mask)):
            torch.testing.assert_close(router.call(hidden)[3], rest[0])


@pytest.mark.parametrize(("key", "changes"), [case for case in CASES if case[0] in GROUPED], ids=case_id)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), data=st.data())
def test_groups_thinned_evenly_are_the_router_with_rows_deleted(
    key: str, changes: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    """Four groups of four; the same number stays in each, so that the family's own code can run on them."""
    router = build(key, 16, seed=seed, **changes)
    if key.startswith("axk2."):  # positive scores: its 0 for experts outside then never wins, so never ties
        router.module.e_score_correction_bias += 3
    stay = data.draw(st.integers(2, 4))
    kept = [4 * group + member for group in range(4) for member in sorted(data.draw(st.permutations(range(4)))[:stay])]
    mask = torch.zeros(16, dtype=torch.bool)
    mask[kept] = True
    hidden = hidden_states(5, seed)
    ids, weights = routed(router, hidden, mask)
    _, own_weights, own_ids = router.without(kept).call(hidden)
    assert_same_rows(as_rows(ids, weights), as_rows(torch.tensor(kept)[own_ids], own_weights))


def scores_of(router: TinyRouter, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A grouped router's scores and choice scores for allowed experts, from its logits."""
    logits = router.logits(hidden)
    if "e_score_correction_bias" in dict(router.module.named_buffers()):
        scores = logits.sigmoid()
        return scores, scores + router.module.e_score_correction_bias
    scores = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return scores, scores


@pytest.mark.parametrize("key", GROUPED)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    level=st.sampled_from([-3.0, 0.0, 3.0]),
    mask=st.lists(st.booleans(), min_size=12, max_size=12).filter(any),
)
def test_grouped_choice_against_plain_python(key: str, seed: int, level: float, mask: list[bool]) -> None:
    """Any mask over four groups of three, with correction biases around `level`."""
    router = build(key, 12, seed=seed)
    if hasattr(router.module, "e_score_correction_bias"):
        router.module.e_score_correction_bias += level
    allowed = torch.tensor(mask)
    hidden = hidden_states(4, seed)
    ids, _ = routed(router, hidden, allowed)
    _, choice = scores_of(router, hidden, allowed)
    best_only = "topk_method" in vars(router.module)
    outside = 0.0 if best_only or key.startswith(("axk2.", "mistral")) else None
    for token, values in enumerate(choice.tolist()):
        expected = plain_python(values, mask, router.top_k, outside, best_only)
        places = ids[token].tolist()
        chosen = list(dict.fromkeys(places))
        assert all(mask[expert] for expert in chosen)
        got = sorted((value for value, experts in expected for e in chosen if e in experts), reverse=True)
        wanted = [value for value, _ in expected]
        assert len(chosen) == len(wanted), (chosen, expected)
        if len({*wanted}) == len(wanted):
            assert got == pytest.approx(wanted)


def plain_python(
    choice: list[float], mask: list[bool], top_k: int, outside: float | None, best_only: bool
) -> list[tuple[float, set[int]]]:
    """The choice scores of the experts to take, best first, each with the experts that have that score."""
    open_to_all = [value for value, ok in zip(choice, mask, strict=True) if ok]
    groups: list[tuple[float, int]] = []
    for group in range(4):
        members = sorted((choice[e] for e in range(3 * group, 3 * group + 3) if mask[e]), reverse=True)
        if not members:
            continue
        second = members[1] if len(members) > 1 else min(open_to_all)
        groups.append((members[0] if best_only else members[0] + second, group))
    chosen = {group for _, group in sorted(groups, reverse=True)[:2]}
    candidates: dict[int, float] = {}
    for expert, ok in enumerate(mask):
        if ok and expert // 3 in chosen:
            candidates[expert] = choice[expert]
        elif ok and outside is not None:
            candidates[expert] = outside
    values = sorted(candidates.values(), reverse=True)[:top_k]
    return [(value, {e for e, v in candidates.items() if v == value}) for value in values]


@settings(max_examples=50)
@given(seed=st.integers(0, 2**16), mask=masks)
def test_prescribed_experts_stay_and_forbidden_ones_go_to_the_best_scored(seed: int, mask: list[bool]) -> None:
    router = build(TABLED, EXPERTS, seed=seed)
    hidden = hidden_states(5, seed)
    scores = router.module.score_fn(router.logits(hidden)).tolist()
    prescribed = router.call(hidden)[2].tolist()
    ids, weights = routed(router, hidden, torch.tensor(mask))
    for token, row in enumerate(as_rows(ids, weights)):
        kept = [expert for expert in prescribed[token] if mask[expert]]
        others = sorted(
            (expert for expert in range(EXPERTS) if mask[expert] and expert not in kept),
            key=lambda expert: -scores[token][expert],
        )
        expected = [*kept, *others][: router.top_k]
        total = sum(scores[token][expert] for expert in expected)
        assert row == pytest.approx({e: 2.5 * scores[token][e] / total for e in expected}, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key", "changes"), CASES, ids=case_id)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3]),
    rows=st.lists(masks, min_size=4, max_size=4),
    per_token=st.booleans(),
)
def test_never_a_forbidden_expert_and_never_nan(
    key: str,
    changes: dict[str, Any],
    dtype: torch.dtype,
    seed: int,
    scale: float,
    rows: list[list[bool]],
    per_token: bool,
) -> None:
    """Ties, saturated and underflowing scores, masks for each token: ids allowed, weights finite."""
    router = build(key, EXPERTS, seed=seed, **changes)
    router.module.to(torch.float32 if key in FLOAT32_ONLY else dtype)
    hidden = hidden_states(4, seed, scale).to(dtype)
    mask = torch.tensor(rows if per_token else rows[0])
    ids, weights = routed(router, hidden, mask)
    assert ids.dtype == torch.int64
    assert ids.shape == weights.shape == (4, router.top_k)
    assert mask.expand(4, EXPERTS).gather(1, ids).all()
    assert weights.isfinite().all()
    for row, row_weights in zip(ids.tolist(), weights.tolist(), strict=True):
        used = [expert for expert, weight in zip(row, row_weights, strict=True) if weight != 0]
        assert len({*used}) == len(used), "an expert counted twice"


@pytest.mark.parametrize(("key", "changes"), CASES, ids=case_id)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), rows=st.lists(masks, min_size=3, max_size=3))
def test_a_mask_for_each_token_is_each_token_alone(
    key: str, changes: dict[str, Any], seed: int, rows: list[list[bool]]
) -> None:
    router = build(key, EXPERTS, seed=seed, **changes)
    hidden = hidden_states(3, seed)
    together = as_rows(*routed(router, hidden, torch.tensor(rows)))
    for token, mask in enumerate(rows):
        ids, weights = routed(router, hidden, torch.tensor(mask))
        assert_same_rows([as_rows(ids, weights)[token]], [together[token]])
