"""Loading a model's dense weights and nothing else, through transformers' own `from_pretrained`.

transformers lets a quantizer change the model between its construction (on the meta device) and the reading of
weights. A quantizer registered here takes the expert parameters away at that point, so that no expert byte is read or
allocated, and leaves no trace once the model is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.lookup import Lookup
from emoe.errors import UsageError
from emoe.kernels.pages import keep_freed_memory, prefer_huge_pages
from emoe.model.embedding import keep_at_rest

METHOD = "emoe_experts_at_rest"


@register_quantization_config(METHOD)
class ExpertsAtRestConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Names the expert parameters that stay at rest while the dense weights are loaded."""

    def __init__(self, index: ExpertIndex | None = None, lookup: Lookup | None = None, **kwargs: Any) -> None:
        """Keep the index of the checkpoint whose experts stay at rest, and the embedding that does too."""
        self.quant_method = METHOD
        self.index = index
        self.lookup = lookup

    def to_dict(self) -> dict[str, Any]:
        """Return what could be written to a config.json: the method's name only."""
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class ExpertsAtRestQuantizer(HfQuantizer):  # type: ignore[misc]
    """Removes expert parameters before weights are read. Nothing is quantised."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = cast(ExpertsAtRestConfig, self.quantization_config)
        index, lookup = config.index, config.lookup
        if index is None:
            raise UsageError("this configuration is made by emoe.load and cannot be given to from_pretrained alone.")
        for layer in index.layers:
            module = model.get_submodule(layer.module)
            for part in layer.parts:
                module._parameters.pop(part.name)
            module._is_hf_initialized = True
        names = index.expert_param_names
        if lookup is not None:
            keep_at_rest(model.get_submodule(lookup.module))
            names |= {f"{lookup.module}.weight"}
        patterns = {rf"{re.escape(name)}$" for name in names}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | patterns
        return model

    @property
    def is_trainable(self) -> bool:
        """Experts in slots have no gradient."""
        return False

    def is_serializable(self, **kwargs: Any) -> bool:
        """A model without its experts is no checkpoint."""
        return False


def load_dense(
    path: Path, index: ExpertIndex, implementation: str, lookup: Lookup | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Return the model of `path` with its dense weights loaded and its experts' parameters absent.

    Args:
        path: the checkpoint's folder.
        index: its expert index.
        implementation: the registered experts implementation that will run them.
        lookup: the input embedding, where that stays at rest too.
        kwargs: for `AutoModelForCausalLM.from_pretrained`.
    """
    model = cast(
        PreTrainedModel,
        AutoModelForCausalLM.from_pretrained(
            path,
            quantization_config=ExpertsAtRestConfig(index, lookup),
            experts_implementation=implementation,
            use_safetensors=True,
            **kwargs,
        ),
    )
    _forget_quantizer(model)
    _own_memory(model)
    keep_freed_memory()  # only now: a first model's weights are pieces of their own, which go back when the model goes
    model.eval()
    model.requires_grad_(False)
    return model


def _own_memory(model: PreTrainedModel) -> None:
    """Copy dense weights out of the checkpoint's memory map, on a CPU.

    transformers leaves them mapped: under memory pressure the kernel would drop them and read them again for every
    token, and a file truncated while the model runs would end the process with SIGBUS instead of an error.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            own = torch.empty_like(tensor.data)
            prefer_huge_pages(own)
            tensor.data = own.copy_(tensor.data)


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Undo what transformers notes on a quantised model: this one is not, and `.dtype`, `.config` must say so."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            config = module.config
            for name in ("quantization_config", "_is_quantized"):
                if name in config.__dict__:
                    delattr(config, name)
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    cast(Any, model).is_quantized = False


def device_of(module: nn.Module) -> torch.device:
    """Return where a block's dense weights lie, hence where its experts run."""
    for tensor in module.parameters():
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")
