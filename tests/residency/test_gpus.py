"""Devices by name, wherever one is asked for."""

from __future__ import annotations

import pytest
import torch

from emoe.errors import UsageError
from emoe.residency.gpus import gpu_count, gpu_number


def test_a_name_is_a_gpu_that_is_here_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [gpu_number(name, "") for name in ("cpu", "cuda", "cuda:0", "cuda:1")] == [None, 0, 0, 1]
    with pytest.raises(UsageError, match=r"no device 'cuda:2': torch .* finds 2 CUDA devices\. Do that\."):
        gpu_number("cuda:2", "Do that.")
    with pytest.raises(UsageError, match="no device is called 'gpu'"):
        gpu_number("gpu", "")
    with pytest.raises(UsageError, match="'meta' is neither"):
        gpu_number("meta", "")


def test_devices_of_a_driver_that_does_not_run_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu_count() == 0
    with pytest.raises(UsageError, match="finds 0 CUDA devices"):
        gpu_number("cuda", "")
