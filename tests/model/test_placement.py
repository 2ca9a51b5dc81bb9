"""Which device gets what, without a model: the parts of a spread layer, and what is refused before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from emoe.config import ExpertMemory
from emoe.errors import UsageError
from emoe.model import placement
from emoe.model.loading import device_of
from emoe.model.placement import Placement, check_settings, host_plan, preload, spread_over
from emoe.model.spreading import SpreadCosts
from emoe.residency.budget import LayerNeed, plan_slots
from emoe.residency.devices import Device
from emoe.residency.virtual import VirtualDevice

ROW = torch.zeros(1, 8)


def on(*names: str) -> list[Device]:
    return [VirtualDevice(place=torch.device(name)) for name in names]


def spread(
    names: Sequence[str] | None, needs: list[LayerNeed], share: float, how: str, saves: bool = True, homes: str = "cpu"
) -> tuple[Placement, list[Any]]:
    """What `spread_over` makes of layers that lie on `homes`, and what it measured."""
    measured: list[Any] = []

    def measure(devices: Sequence[Device], slot_nbytes: int, row: torch.Tensor) -> SpreadCosts:
        measured.extend([[str(device.place) for device in devices], slot_nbytes, row])
        return SpreadCosts(1.0, 0.0 if saves else 1e3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "measure_spread", measure)
        patch.setattr(placement, "device_at", lambda place: on(str(place))[0])
        devices = dict(zip(sorted({need.group for need in needs}), on(*homes.split()) * 9, strict=False))
        return spread_over(names, how, Placement(needs, devices), share, ROW), measured


NEEDS = st.lists(
    st.builds(
        lambda experts, k, nbytes, group: LayerNeed(0, experts, min(k, experts), nbytes, group),
        *(st.integers(1, 9), st.integers(1, 4), st.sampled_from([64, 128]), st.integers(0, 1)),
    ),
    min_size=1,
    max_size=4,
).map(lambda needs: [LayerNeed(3 * i, n.experts, n.top_k, n.slot_nbytes, n.group) for i, n in enumerate(needs)])


@given(NEEDS, st.permutations(["cpu:1", "cpu", "cpu:2"]), st.integers(2, 3))
def test_the_parts_of_a_layer_are_its_experts_in_turn(needs: list[LayerNeed], names: list[str], count: int) -> None:
    """Each expert lies on one device, of which the layers' own comes first; none holds two more than another."""
    names = names[:count] if "cpu" in names[:count] else [*names[: count - 1], "cpu"]
    made, measured = spread(names, needs, 0.5, "always")
    places = ["cpu", *(name for name in names if name != "cpu")]
    assert measured[:2] == [places, max(need.slot_nbytes for need in needs)] and measured[2] is ROW
    assert made.told.startswith("spread: spread over")
    for need in needs:
        parts = {str(made.devices[part.group].place): part for part in made.needs if part.layer == need.layer}
        found: list[int] = []
        for where in places:
            if where not in parts:
                continue
            part = parts[where]
            assert part.group // count == need.group and part.slot_nbytes == need.slot_nbytes
            assert part.top_k == min(need.top_k, part.experts) and part.experts > 0
            first = made.firsts[part.group][need.layer]
            found += range(first, first + part.experts)
        assert found == list(range(need.experts))
        sizes = [part.experts for part in parts.values()] + [0] * (count - len(parts))
        assert max(sizes) - min(sizes) <= 1


def test_left_open_they_are_spread_where_that_saves_and_a_part_holds_a_token() -> None:
    needs = [LayerNeed(0, 8, 2, 64), LayerNeed(1, 8, 2, 64)]
    names = ["cpu", "cpu:1"]
    for share, saves, told in (
        (0.5, True, "spread: spread over 2 devices a layer's token takes"),
        (0.5, False, "not spread: spread over 2 devices"),
        (0.49, True, "not spread: a device's slots of a layer hold less than one token's experts"),
        (1.0, True, "not spread: spread over 2 devices"),  # nothing is missed, so nothing is saved
    ):
        made, _ = spread(names, needs, share, "auto", saves)
        assert made.told.startswith(told), (share, saves)
        assert made.spread == told.startswith("spread") and (made.needs == needs) == told.startswith("not")
        assert ("less" if saves and share < 1 else "more") in made.told.rpartition("takes")[2]
        assert spread(names, needs, share, "always", saves)[0].spread


def test_what_is_not_to_be_spread_is_left_as_it_is() -> None:
    needs = [LayerNeed(0, 8, 2, 64, 0), LayerNeed(1, 8, 2, 64, 1)]
    for names in (None, ["cpu"]):
        made, measured = spread(names, needs, 0.5, "always")
        assert made.needs == needs and not made.spread and not measured and not made.firsts
    for homes, names in (("cpu cpu:1", ["cpu", "cpu:1"]), ("cpu", ["cpu:1", "cpu:2"])):
        with pytest.raises(UsageError, match=r"the layers lie on cpu.*with device_map"):
            spread(names, needs, 0.5, "always", homes=homes)


def test_host_slots_are_for_layers_that_are_copied_to() -> None:
    needs = [LayerNeed(0, 8, 2, 64, 0), LayerNeed(1, 8, 2, 64, 1)]
    plan = plan_slots(ExpertMemory("share", 0.5), needs)
    near, far = VirtualDevice(copies=False), VirtualDevice()
    assert host_plan("auto", Placement(needs, {0: near, 1: near}), plan) is None
    made = host_plan("0", Placement(needs, {0: near, 1: far}), plan)
    assert made is not None and set(made.pools) == {1}


def test_what_only_a_gpu_can_do_is_refused_without_one() -> None:
    some = ExpertMemory("bytes", 1 << 20)
    check_settings(None, "load", "resident", False)
    check_settings("0", "load", "exact", False)
    check_settings(some, "hybrid", "exact", True)
    for host in (some, "auto"):
        with pytest.raises(UsageError, match="is for experts that run on a GPU"):
            check_settings(host, "load", "exact", False)
    with pytest.raises(UsageError, match="on_miss is one of load, hybrid, not 'skip'"):
        check_settings(None, "skip", "exact", True)
    for mode, copies in (("exact", False), ("resident", True), ("balanced", True)):
        with pytest.raises(UsageError, match="it needs mode 'exact' and the model on a GPU"):
            check_settings(None, "hybrid", cast(Any, mode), copies)


@pytest.mark.parametrize("bar", [False, True])
def test_what_is_loaded_before_the_first_request_is_told_as_one_sum(
    bar: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over all pools; or shown as one bar for each."""
    loaded: list[tuple[int, int]] = []

    def pool(experts: dict[int, int], nbytes: int) -> Any:
        def load(keys: list[tuple[int, int]], report: Any = None) -> None:
            loaded.extend(keys)
            for done in range(1, len(keys) + 1):
                if report is not None:
                    report(done * nbytes // len(keys), nbytes)

        bank = SimpleNamespace(nbytes=nbytes)
        return SimpleNamespace(bank=bank, table=SimpleNamespace(experts=experts), preload=load)

    told: list[tuple[int, int]] = []
    preload([pool({3: 1, 1: 2}, 30), pool({0: 2}, 8)], bar or (lambda done, total: told.append((done, total))))
    assert loaded == [(1, 0), (1, 1), (3, 0), (0, 0), (0, 1)]
    if bar:
        shown = capsys.readouterr().err
        assert "Loading experts: 100%" in shown and "30.0/30.0" in shown and "8.00/8.00" in shown
    else:
        assert told == [(10, 38), (20, 38), (30, 38), (34, 38), (38, 38)]


def test_a_block_lies_where_its_first_real_weight_lies() -> None:
    block = nn.Module()
    assert device_of(block) == torch.device("cpu")
    block.experts = nn.Parameter(torch.empty(1, device="meta"))
    assert device_of(block) == torch.device("cpu"), "experts at rest lie nowhere"
