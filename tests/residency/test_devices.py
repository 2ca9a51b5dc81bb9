"""The device interface and the virtual clock: orders a real device might forgive are found, and times add up."""

from __future__ import annotations

import pytest
import torch

from emoe.errors import UnsupportedModelError
from emoe.residency.devices import CpuDevice, Device, device_at
from emoe.residency.virtual import OrderError, VirtualDevice

SLOT = 1 << 20
LINK = 1e9
COPY_S = SLOT / LINK


def of(device: Device, *values: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Host memory with a slot of each value, and a bank of as many slots."""
    held = device.host(len(values) * SLOT)
    host = held.memory.view(-1, SLOT)
    for row, value in zip(host, values, strict=True):
        row.fill_(value)
    return host, device.bank(len(values) * SLOT).view(-1, SLOT)


@pytest.mark.parametrize("device", [CpuDevice(), VirtualDevice()], ids=lambda d: type(d).__name__)
def test_what_is_copied_arrives(device: Device) -> None:
    host, bank = of(device, 3, 5)
    assert bank.data_ptr() % 64 == 0
    arrivals = [device.copy(host[i], bank[i], (), ahead=bool(i)) for i in range(2)]
    for i, arrival in enumerate(arrivals):
        device.wait(arrival)
        assert torch.equal(bank[i], host[i])
    last = device.used(list(bank))
    again = device.copy(host[1], bank[0], (last,), ahead=False)
    device.finish(again)
    assert again.query() and torch.equal(bank[0], host[1])


def test_other_devices_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="meta"):
        device_at(torch.device("meta"))
    assert not device_at(torch.device("cpu")).copies


def test_until_something_waits_a_slot_is_nan() -> None:
    device = VirtualDevice()
    host, bank = of(device, 0)
    arrival = device.copy(host[0], bank[0], (), ahead=False)
    assert bank[0].view(torch.bfloat16).isnan().all()
    assert not arrival.query()
    device.wait(arrival)
    assert (bank[0] == 0).all()


def test_wrong_orders_are_found() -> None:
    device = VirtualDevice()
    host, bank = of(device, 1, 2)
    first = device.copy(host[0], bank[0], (), ahead=False)
    with pytest.raises(OrderError, match="nothing had waited"):
        device.used([bank[0]])
    with pytest.raises(OrderError, match="a copy fills"):
        device.copy(host[1], bank[0], (), ahead=False)
    device.wait(first)
    device.compute(1.0)
    last = device.used([bank[0]])
    with pytest.raises(OrderError, match="used until"):
        device.copy(host[1], bank[0], (), ahead=False)
    second = device.copy(host[1], bank[0], (last,), ahead=False)
    host[1].fill_(9)
    with pytest.raises(OrderError, match="source"):
        device.wait(second)


def test_copies_take_their_bytes_and_run_beside_computing() -> None:
    device = VirtualDevice(LINK)
    host, bank = of(device, *range(4))
    arrivals = [device.copy(host[i], bank[i], (), ahead=False) for i in range(4)]
    for arrival in arrivals:
        device.wait(arrival)
        device.compute(2 * COPY_S)
    assert device.compute_s == pytest.approx(9 * COPY_S)  # the first copy, then what takes longer
    assert device.link_s == pytest.approx(4 * COPY_S) and device.program_s == 0
    device.finish(arrivals[0])
    device.finish(arrivals[0])
    assert device.synchronisations == 1 and device.program_s == pytest.approx(COPY_S)
    device.synchronise()
    assert device.program_s == pytest.approx(9 * COPY_S)
