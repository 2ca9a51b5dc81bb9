"""What is loaded beside the experts: a model like any other, in memory of its own, that bears no mark of how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import emoe
from emoe.errors import UsageError
from emoe.model.loading import ExpertsAtRestConfig
from tests.conftest import Checkpoints


def mapped() -> set[str]:
    """The files that this process has mapped; empty where that cannot be told."""
    maps = Path("/proc/self/maps")
    return {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()


def test_the_model_says_what_a_model_loaded_without_emoe_says(checkpoints: Checkpoints) -> None:
    path = checkpoints("qwen3_moe")
    plain = AutoModelForCausalLM.from_pretrained(path)
    model, _ = emoe.load(path)
    assert not model.is_quantized
    for name in ("hf_quantizer", "quantization_method"):
        assert hasattr(model, name) == hasattr(plain, name), name
    for module in model.modules():
        config = getattr(module, "config", None)
        assert not {"quantization_config", "_is_quantized"} & vars(config or object).keys()
    assert model.dtype == plain.dtype and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    emoe.close(model)


def test_dense_weights_lie_in_memory_of_their_own(checkpoints: Checkpoints) -> None:
    """Else a file that is cut while the model runs would end the process."""
    path = checkpoints("mixtral", torch.float32)
    model, _ = emoe.load(path, dtype="float32", expert_memory="60%")
    stored = load_file(path / "model.safetensors")
    assert torch.equal(model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
    del stored
    assert str(path / "model.safetensors") not in mapped()
    emoe.close(model)


def test_the_configuration_alone_is_refused(checkpoints: Checkpoints) -> None:
    assert ExpertsAtRestConfig().to_dict() == {"quant_method": "emoe_experts_at_rest"}
    with pytest.raises(UsageError, match=r"is made by emoe.load and cannot be given to from_pretrained alone"):
        AutoModelForCausalLM.from_pretrained(checkpoints("mixtral"), quantization_config=ExpertsAtRestConfig())
