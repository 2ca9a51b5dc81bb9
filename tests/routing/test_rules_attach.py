"""Attaching rules: what is observed, what is refused, and whole models with rules in place."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from emoe.errors import UnsupportedModelError, UsageError
from emoe.routing.rules import ENTRIES, RouterRule, rule_for
from emoe.routing.rules.families import deepseek_v2
from tests.families import FAMILIES, make_model
from tests.routing.routers import HIDDEN, Block, build

MIXTRAL = "mixtral.MixtralTopKRouter"


def rule_of(router: nn.Module, experts: int = 8) -> RouterRule:
    block = Block(router, experts)
    return rule_for(block, block.experts)


def hidden_states(tokens: int = 4) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0))


def test_observes_the_models_own_choice_then_asks_for_the_mask() -> None:
    router = build(MIXTRAL)
    hidden = hidden_states()
    _, own_weights, own_ids = router.call(hidden)
    events: list[Any] = []

    def allowed() -> Tensor:
        events.append("asked")
        return torch.arange(8) < 3

    attachment = rule_of(router.module).attach(allowed, lambda ids, weights: events.append((ids, weights)))
    _, weights, ids = router.call(hidden)
    (seen_ids, seen_weights), asked = events
    assert asked == "asked"
    assert torch.equal(seen_ids, own_ids)
    assert torch.equal(seen_weights, own_weights)
    assert int(ids.max()) < 3
    assert torch.allclose(weights.sum(-1), torch.ones(4))
    attachment.remove()
    attachment.remove()
    assert torch.equal(router.call(hidden)[2], own_ids)
    assert len(events) == 2


def test_none_leaves_the_output_object_alone() -> None:
    router = build(MIXTRAL)
    made: list[Any] = []
    router.module.register_forward_hook(lambda module, args, output: made.append(output))
    rule_of(router.module).attach(lambda: None)
    assert router.call(hidden_states()) is made[0]


@pytest.mark.parametrize("key", ["gemma4.Gemma4TextRouter", "mixtral.MixtralTopKRouter"])
def test_logits_of_one_call_never_serve_the_next(key: str) -> None:
    router = build(key)
    masks: list[Tensor | None] = [torch.arange(8) > 3, None, torch.arange(8) < 2]
    rule_of(router.module).attach(lambda: masks.pop(0))
    first, second = hidden_states(4), hidden_states(6)
    router.call(first)
    router.call(second)
    fresh = build(key)
    rule_of(fresh.module).attach(lambda: torch.arange(8) < 2)
    assert torch.equal(router.call(first)[2], fresh.call(first)[2])


@pytest.mark.parametrize("mask", [torch.ones(7, dtype=torch.bool), torch.ones(8), torch.ones(3, 8, dtype=torch.bool)])
def test_a_mask_of_wrong_shape_or_type_is_named(mask: Tensor) -> None:
    router = build(MIXTRAL)
    rule_of(router.module).attach(lambda: mask)
    with pytest.raises(UsageError, match=r"must be bool with shape \(8,\) or \(4, 8\), not torch\."):
        router.call(hidden_states())


@pytest.mark.parametrize("mask", [torch.zeros(8, dtype=torch.bool), torch.eye(4, 8) > 1])
def test_a_mask_that_allows_nothing_is_refused(mask: Tensor) -> None:
    router = build(MIXTRAL)
    rule_of(router.module).attach(lambda: mask)
    with pytest.raises(UsageError, match="at least one allowed expert of 8"):
        router.call(hidden_states())


def test_two_rules_on_one_router_are_refused() -> None:
    router = build(MIXTRAL)
    rule = rule_of(router.module)
    first = rule.attach(lambda: None)
    with pytest.raises(UsageError, match="already has a routing rule attached"):
        rule_of(router.module).attach(lambda: None)
    first.remove()
    rule.attach(lambda: None).remove()


def test_an_unknown_router_is_refused_with_its_name_and_the_remedy() -> None:
    with pytest.raises(UnsupportedModelError, match=r'Linear.*use mode="exact"'):
        rule_of(nn.Linear(4, 8))


def test_a_look_alike_from_elsewhere_is_refused() -> None:
    class MixtralTopKRouter(nn.Linear):  # as code shipped with a checkpoint may name its class
        top_k = 2

    with pytest.raises(UnsupportedModelError, match="no router with a routing rule"):
        rule_of(MixtralTopKRouter(4, 8))


def test_a_router_without_a_setting_the_rule_reads_is_refused() -> None:
    router = build("olmoe.OlmoeTopKRouter").module
    del router.norm_topk_prob
    with pytest.raises(UnsupportedModelError, match="lacks norm_topk_prob"):
        rule_of(router)


def test_groups_too_small_for_k_are_refused() -> None:
    router = build("deepseek_v3.DeepseekV3TopkRouter", top_k=5)  # 2 of 4 groups of 2
    with pytest.raises(UnsupportedModelError, match="chooses 5 experts from 2 of 4 groups, which hold only 4"):
        rule_of(router.module)


def test_a_router_that_routes_otherwise_is_found_out_on_its_first_call() -> None:
    """As when a hub kernel or another version of transformers takes the place of the known code."""
    router = build(MIXTRAL)
    own = router.module.forward

    def other(hidden: Tensor) -> tuple[Tensor, ...]:
        logits, weights, ids = own(hidden)
        return logits, weights * 0.99, ids

    router.module.forward = other
    rule_of(router.module).attach(lambda: torch.ones(8, dtype=torch.bool))
    with pytest.raises(UnsupportedModelError, match="does not route as its rule does"):
        router.call(hidden_states())


def test_older_versions_that_return_ids_first_keep_that_order() -> None:
    """In transformers 5.17 granitemoe returns (ids, weights, logits)."""
    router = build("granitemoe.GraniteMoeTopKRouter")
    hidden = hidden_states()
    rule = rule_of(router.module)
    with_mask = rule.attach(lambda: torch.arange(8) < 4)
    logits, weights, ids = router.call(hidden)
    with_mask.remove()
    own = router.module.forward
    router.module.forward = lambda hidden: own(hidden)[::-1]
    rule.attach(lambda: torch.arange(8) < 4)
    assert all(torch.equal(a, b) for a, b in zip(router.call(hidden), (ids, weights, logits), strict=True))


def test_phimoe_in_training_mode_is_refused() -> None:
    router = build("phimoe.PhimoeTopKRouter")
    router.module.train()
    rule_of(router.module).attach(lambda: torch.arange(8) < 4)
    with pytest.raises(UsageError, match=r"call model\.eval\(\) first"):
        router.call(hidden_states())


def experts_modules(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(block, experts) pairs."""
    found = [name for name, module in model.named_modules() if hasattr(module, "_apply_gate")]
    return [(model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)) for name in found]


def batch() -> dict[str, Tensor]:
    """Two prompts, the first one padded on the left."""
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_whole_models_with_rules_in_place(name: str) -> None:
    """All allowed: the logits bit for bit. Restricted: nothing forbidden reaches the experts, no nan."""
    model = make_model(name)
    mask: Tensor | None = None
    reached: list[Tensor] = []
    with torch.no_grad():
        plain = model(**batch()).logits
        for block, experts in experts_modules(model):
            rule_for(block, experts).attach(lambda: mask)
            experts.register_forward_pre_hook(lambda module, args: reached.append(args[1]))
        untouched = model(**batch()).logits
        mask = torch.ones(8, dtype=torch.bool)
        everyone = model(**batch()).logits
        reached.clear()
        mask = torch.tensor([False, True, False, False, True, True, False, False])
        fewer = model(**batch()).logits
    assert torch.equal(untouched, plain)
    assert torch.equal(everyone, plain)
    assert reached
    assert all(bool(mask[ids].all()) for ids in reached)
    assert fewer.isfinite().all()
    assert not torch.equal(fewer, plain)


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="the survey is of transformers 5.23")
def test_every_router_beside_interface_experts_has_a_rule() -> None:
    """Reads transformers' sources: a family added there without a rule here shows up by name."""
    spec = find_spec("transformers.models")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    missing, seen = [], 0
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("*/modeling_*.py")):
        source = path.read_text()
        if "@use_experts_implementation" not in source:
            continue
        family = path.parent.name
        for line in re.findall(r"self\.(?:gate|router) = (.*)", source):
            for router in re.findall(r"\b(\w*(?:Router|Gate\d?))\(", line):
                seen += 1
                if f"{family}.{router}" not in ENTRIES:
                    missing.append(f"{family}.{router}")
    assert missing == []
    assert seen >= 60


def test_a_way_of_choosing_that_has_no_rule_is_refused() -> None:
    """DeepSeek-V2's configuration may name others than its published models do."""
    call: Any = SimpleNamespace(router=SimpleNamespace(topk_method="noaux_tc"), logits=torch.zeros(2, 8))
    with pytest.raises(UnsupportedModelError, match=r"topk_method 'noaux_tc' has no routing rule .*mode=\"exact\""):
        deepseek_v2(call, None)
