"""A whole model with the kernels over slots, in Triton's interpreter on a virtual device: no budget changes a bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import emoe
from emoe.model import placement
from emoe.model.bind import binding_of
from emoe.residency.virtual import VirtualDevice
from tests.families import make_checkpoint
from tests.interpreter import no_triton
from tests.model.test_exact import batch_of, logits_of

if no_triton():
    pytest.skip(no_triton(), allow_module_level=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/cuda runs the kernels themselves")
def test_exact_with_the_kernels_over_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Widths are multiples of the processor's vectors: at their ends torch's activations round differently.
    path = make_checkpoint("mixtral", tmp_path, seed=5, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    plain, _ = emoe.load(path)
    monkeypatch.setattr(placement, "device_at", lambda place: VirtualDevice())
    monkeypatch.setattr(placement, "available", lambda parts: (True, "tested"))
    whole, _ = emoe.load(path, device_map="cpu")
    assert all(layer.kernels is not None for layer in binding_of(whole).runtime.layers.values())
    for budget, host in (("26%", 0), ("60%", "50%")):
        model, _ = emoe.load(path, device_map="cpu", expert_memory=budget, host_memory=host)
        inputs = batch_of(1, 2, 9)
        inputs = {name: value[1:] for name, value in inputs.items()}
        expected = zip(logits_of(whole, inputs, 2), logits_of(plain, inputs, 2), strict=True)
        for ours, (theirs, torchs) in zip(logits_of(model, inputs, 2), expected, strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-3)
        emoe.close(model)
    emoe.close(whole)
    emoe.close(plain)
