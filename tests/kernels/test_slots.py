"""The kernels over slots, in Triton's interpreter on the CPU (and on the GPU where there is one)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from emoe.checkpoint.index import PartSpec
from emoe.kernels.chunks import many_tokens
from emoe.kernels.combining import Workspace
from emoe.kernels.experts import ExpertMath, one_token
from emoe.kernels.grouping import Grouping
from emoe.kernels.slots import SlotKernels, available
from emoe.residency.bank import Bank
from emoe.residency.devices import CpuDevice, device_at
from tests.interpreter import no_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if no_triton():
    pytest.skip(no_triton(), allow_module_level=True)

# torch's activations on a CPU round differently at the ends of a tensor that is no multiple of their vectors.
HIDDEN, INNER, SLOTS = 48, 128, 6
# The interpreter computes with numpy, which has no bfloat16: its dot product takes the bits for whole numbers.
MANY_DTYPES = [torch.float32, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Experts(torch.nn.Module):
    """What `ExpertMath` reads off an experts module."""

    def __init__(self, *, gated: bool, biased: bool, transposed: bool) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = gated, biased, transposed
        self.act_fn = torch.nn.SiLU()

    def _apply_gate(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def make(dtype: torch.dtype, seed: int = 0, **layout: bool) -> tuple[ExpertMath, Bank]:
    """A bank of random experts, one slot of which holds NaN."""
    math = ExpertMath(Experts(**layout))
    first = 2 * INNER if layout["gated"] else INNER
    shapes: list[tuple[str, tuple[int, ...]]] = [(math.first, (first, HIDDEN)), ("down_proj", (HIDDEN, INNER))]
    if layout["transposed"]:
        shapes = [(name, (shape[1], shape[0])) for name, shape in shapes]
    if layout["biased"]:
        shapes += [(f"{math.first}_bias", (first,)), ("down_proj_bias", (HIDDEN,))]
    parts = [PartSpec(name, shape, str(dtype).removeprefix("torch.")) for name, shape in shapes]
    bank = Bank(parts, SLOTS, device_at(DEVICE))
    generator = torch.Generator().manual_seed(seed)
    for slot, views in enumerate(bank.views):
        for view in views.values():
            scale = 0.0 if slot == SLOTS - 1 else HIDDEN**-0.5
            view.copy_(torch.randn(view.shape, generator=generator) * scale / (scale != 0))
    return math, bank


LAYOUTS = [
    {"gated": True, "biased": False, "transposed": False},
    {"gated": True, "biased": True, "transposed": True},
    {"gated": False, "biased": True, "transposed": False},
]


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert not error.isnan() and error < TOLERANCE[theirs.dtype], error


@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_token_is_what_torch_computes(layout: dict[str, bool], dtype: torch.dtype) -> None:
    math, bank = make(dtype, **layout)
    kernels = SlotKernels(math, bank.stacked())
    hidden, slots = torch.randn(1, HIDDEN).to(DEVICE, dtype), [3, 0, 4]
    gates = torch.rand(1, 3).to(DEVICE, dtype)
    ours = kernels.one_token(hidden, slots, gates)
    near(ours, one_token(math, hidden, [math.bind(bank.views[slot]) for slot in slots], gates))


@pytest.mark.parametrize("dtype", MANY_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tokens", [2, 70])
def test_many_tokens_are_what_torch_computes_and_waves_change_no_bit(
    layout: dict[str, bool], dtype: torch.dtype, tokens: int
) -> None:
    """Which experts come together, in which order and in which slots is up to the budget: it may not show."""
    math, bank = make(dtype, **layout)
    kernels = SlotKernels(math, bank.stacked())
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(DEVICE, dtype)
    ids = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(tokens)]).to(DEVICE)
    gates = torch.rand(tokens, 2, generator=generator).to(DEVICE, dtype)
    grouping = Grouping(ids, 5)
    experts = list(grouping.counts)

    def ours(waves: Sequence[Sequence[tuple[int, int]]], kernels: SlotKernels = kernels) -> torch.Tensor:
        return kernels.many_tokens(hidden, grouping, waves, gates, Workspace())

    together = ours([[(e, e) for e in experts]])
    near(together, many_tokens(math, hidden, grouping, ((e, math.bind(bank.views[e])) for e in experts), gates))
    assert torch.equal(together, ours([[(e, e)] for e in reversed(experts)]))
    assert torch.equal(together, ours([[(e, e) for e in experts[1:]], [(experts[0], experts[0])]]))
    moved = Bank(bank.parts, SLOTS, device_at(DEVICE))
    for slot in range(SLOTS):
        moved.memories[(slot + 2) % SLOTS].copy_(bank.memories[slot])
    elsewhere = SlotKernels(math, moved.stacked())
    assert torch.equal(together, ours([[(e, (e + 2) % SLOTS) for e in experts]], elsewhere))
    assert torch.equal(kernels.many_tokens(hidden[:0], Grouping(ids[:0], 5), [], gates[:0], Workspace()), hidden[:0])


def test_long_waves_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from emoe.kernels import slots

    monkeypatch.setattr(slots, "WAVE_ROWS", 10)
    sizes = {0: 4, 1: 6, 2: 1, 3: 30}
    assert list(slots._within([(e, e) for e in sizes], sizes)) == [[(0, 0), (1, 1)], [(2, 2)], [(3, 3)]]


def test_they_are_chosen_by_device_and_dtype() -> None:
    bank = Bank([PartSpec("down_proj", (4, 4), "bfloat16")], 2, CpuDevice())
    assert available(bank.stacked())[0] is False
    quantised: dict[str, Any] = {"down_proj": torch.zeros(1, device=DEVICE, dtype=torch.int8)}
    assert available(quantised)[0] is False


def test_where_the_first_products_fail_it_is_said_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with too little shared memory for many rows would else fail in the middle of a prompt."""
    from emoe.kernels import slots, triton_products

    first = slots._refusal.__wrapped__
    assert [first(str(DEVICE), dtype) for dtype in MANY_DTYPES] == ["", ""]
    with monkeypatch.context() as patch:
        patch.setattr(triton_products, "many_rows", lambda *given: given[-2].fill_(63))
        assert first(str(DEVICE), torch.float32) == "its products are wrong"

    def refused(*given: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(triton_products, "many_rows", refused)
    assert "shared memory" in first(str(DEVICE), torch.float32)
