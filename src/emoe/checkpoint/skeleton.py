"""The model without its weights, and the experts modules in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch

from emoe.checkpoint.headers import TensorEntry, read_headers
from emoe.checkpoint.settings import EXPERT_COUNTS, check_sizes, read_config
from emoe.errors import CheckpointError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes an expert may have in a checkpoint, by their names in safetensors."""

SLOT_DTYPES: dict[str, torch.dtype] = {**TORCH_DTYPES, "I8": torch.int8, "U8": torch.uint8}
"""The dtypes a part of a slot may have: those of a checkpoint, and those that codecs pack numbers into."""


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One layer's experts in the model: `parts` maps parameter name to (shape with experts first, dtype).

    `transposed` says that matrices are [in, out], not [out, in].
    """

    path: str
    layer: int
    num_experts: int
    parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    transposed: bool


def skeleton(
    directory: Path,
    dtype: str | torch.dtype | None = "auto",
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[PretrainedConfig, PreTrainedModel]:
    """The configuration, and the causal language model on the meta device (shapes and dtypes, no memory).

    `dtype` is read as `from_pretrained` reads it. `settings` go to the configuration where it knows them.

    Raises:
        CheckpointError: config.json is missing, damaged, or states sizes that no model can have.
        UnsupportedModelError: transformers has no causal language model for it, or the checkpoint is quantised.
        UsageError: no such dtype.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    check_sizes(read_config(directory), directory / "config.json")
    # What comes out of transformers for a configuration it does not know or believe, or code it may not run; of torch
    # and Python for sizes that make no layer.
    refusals = (
        *(ValueError, KeyError, ImportError, OSError, TypeError, AttributeError, StrictDataclassError),
        *(RuntimeError, ArithmeticError, IndexError, AssertionError),
    )
    try:
        config, _ = AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **settings
        )
    except refusals as error:
        raise _unknown_model(directory, error) from error
    refuse_quantised(directory, config)
    run_dtype = _run_dtype(directory, config, dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=run_dtype, trust_remote_code=trust_remote_code)
    except refusals as error:
        raise _unknown_model(directory, error) from error
    return config, model.eval()


def _unknown_model(directory: Path, error: Exception) -> UnsupportedModelError:
    # transformers lists every family it knows in some of these.
    said = shorten(str(error), 300, placeholder=" ...")
    return UnsupportedModelError(
        f"transformers cannot build a causal language model from {directory / 'config.json'}: {said}. Check "
        "model_type there; newer families need a newer transformers, families with code of their own need "
        "trust_remote_code=True."
    )


def refuse_quantised(directory: Path, config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError where the configuration says that weights are quantised."""
    for part in (config, config.get_text_config()):
        quantisation = getattr(part, "quantization_config", None)
        if quantisation is not None:
            settings = quantisation if isinstance(quantisation, dict) else vars(quantisation)
            method = settings.get("quant_method", "unknown method")
            raise UnsupportedModelError(f"{directory} is quantised ({method}). {QUANTISED_REMEDY}")


QUANTISED_REMEDY = (
    "emoe reads float weights (float32, bfloat16, float16). Use the family's float checkpoint, or write "
    "one: load it with transformers and quantization_config=...(dequantize=True) where the method has that, "
    "then save_pretrained()."
)


def _run_dtype(directory: Path, config: PretrainedConfig, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype `from_pretrained(dtype=...)` would give the model's parameters."""
    if dtype is None:
        return torch.get_default_dtype()
    if dtype == "auto":
        dtype = getattr(config, "dtype", None)
        if dtype is None:
            entries = read_headers(directory).values()
            dtype = next((TORCH_DTYPES[e.dtype] for e in entries if e.dtype in TORCH_DTYPES), torch.float32)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype {dtype!r} is not 'auto' or a floating dtype of torch, such as 'bfloat16'.")
    return found


def find_experts(model: PreTrainedModel) -> tuple[ExpertsModule, ...]:
    """The model's experts modules, by ascending layer.

    They are known by the interface of transformers' `use_experts_implementation`. Of their own parameters
    those whose first dimension is the number of experts are the experts; all else in them is dense.

    Raises:
        UnsupportedModelError: there are none, or their layers cannot be told apart.
    """
    found: dict[int, ExpertsModule] = {}
    for path, module in model.named_modules():
        if not all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate")):
            continue
        parameters = dict(module.named_parameters(recurse=False))
        count = getattr(module, "num_experts", None)
        if not isinstance(count, int) and "down_proj" in parameters:
            count = parameters["down_proj"].shape[0]
        parts = {
            name: (tuple(parameter.shape), parameter.dtype)
            for name, parameter in parameters.items()
            if parameter.ndim and parameter.shape[0] == count
        }
        match = re.search(r"(?:^|\.)(\d+)\.", path)
        if not parts or not isinstance(count, int) or match is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the experts module {path!r} has no layer number in its name or no "
                "parameters with one row per expert. emoe needs decoder layers in a numbered list."
            )
        layer = int(match.group(1))
        if layer in found:
            raise UnsupportedModelError(
                f"{type(model).__name__} has two experts modules in layer {layer}: {found[layer].path!r} and "
                f"{path!r}. emoe keeps one set of experts per layer."
            )
        found[layer] = ExpertsModule(path, layer, count, parts, bool(module.is_transposed))
    if not found:
        _refuse_without_experts(model)
    return tuple(found[layer] for layer in sorted(found))


def _refuse_without_experts(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model without experts modules, saying why it has none."""
    config = model.config.get_text_config()
    counts = {name: getattr(config, name, None) for name in EXPERT_COUNTS}
    claimed = {name: value for name, value in counts.items() if isinstance(value, int) and value > 1}
    if claimed:
        raise UnsupportedModelError(
            f"{type(model).__name__} has experts ({claimed}), but its code does not use transformers' "
            "experts interface (use_experts_implementation), which emoe works through. Run it with "
            "transformers alone."
        )
    raise UnsupportedModelError(
        f"{type(model).__name__} is a dense model: it has no experts to keep at rest. Run it with transformers alone."
    )


def refuse_entry(entry: TensorEntry, target: str) -> None:
    """Raise where an expert's tensor has a dtype that is not a float emoe reads.

    Raises:
        UnsupportedModelError: it looks quantised.
        CheckpointError: its dtype makes no sense for a weight.
    """
    if entry.dtype in TORCH_DTYPES:
        return
    if entry.dtype.startswith(("F8", "F6", "F4")) or entry.dtype in ("I8", "U8"):
        raise UnsupportedModelError(
            f"{entry.file}: expert tensor {entry.name!r} is quantised ({entry.dtype}). {QUANTISED_REMEDY}"
        )
    raise CheckpointError(
        f"{entry.file}: expert tensor {entry.name!r} has dtype {entry.dtype}, but {target!r} needs one of "
        f"{', '.join(TORCH_DTYPES)}. Download the checkpoint again, or save it in a float dtype."
    )
