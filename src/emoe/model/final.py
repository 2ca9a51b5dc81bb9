"""A prompt's final layer: only the tokens whose logits are asked for need its experts.

Nothing reads what the last decoder layer makes of the other tokens: no layer comes after it, and its keys and values
are made from what goes into it. So of a prompt that is read for its next token the final layer loads and computes the
experts of one token, as llama.cpp does, and not those of all. In families of which that is known
(`emoe.routing.final`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as every
from transformers import PreTrainedModel

from emoe.checkpoint.index import ExpertIndex
from emoe.routing.final import ends_row_by_row


class Final:
    """The layer whose experts' output goes to the logits and nowhere else."""

    def __init__(self, layer: int, model: PreTrainedModel, through: list[nn.Module]) -> None:
        """`through`: the modules that its output passes through."""
        self.layer = layer
        self._config = model.config
        self._through = through

    @classmethod
    def of(cls, model: PreTrainedModel, index: ExpertIndex) -> Final | None:
        """That of `model`; None where its last decoder layer has no experts, or where it always makes all logits."""
        if not ends_row_by_row(model.config.get_text_config(decoder=True).model_type):
            return None
        if model.config.is_encoder_decoder or "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
            return None
        last = max(index.layers, key=lambda entry: entry.layer)
        names = last.module.split(".")
        place = next((place for place, name in enumerate(names) if name.isdecimal()), None)
        if place is None:
            return None
        decoder = model.get_submodule(".".join(names[: place - 1]))
        layers = model.get_submodule(".".join(names[:place]))
        if not isinstance(layers, nn.ModuleList) or int(names[place]) != len(layers) - 1:
            return None
        after = [module for module in decoder.children() if module is not layers]
        return cls(last.layer, model, [decoder, *layers[-1].modules(), *after])

    def kept(self, kwargs: dict[str, Any]) -> int | None:
        """Of how many tokens at the end of each sequence this call of `forward` asks for logits; None: of all.

        All of them, too, where it asks for hidden states.
        """
        kept = kwargs.get("logits_to_keep")
        if not isinstance(kept, int) or kept < 1:
            return None
        states = kwargs.get("output_hidden_states")
        if getattr(self._config, "output_hidden_states", False) if states is None else states:
            return None
        return kept

    def watched(self) -> bool:
        """Whether somebody has hung a hook where the final layer's output passes.

        transformers' own, with which it collects hidden states, stay there after the call that asked for them.
        """
        kinds = [kind for module in self._through for kind in (module._forward_hooks, module._forward_pre_hooks)]
        kinds += [every._global_forward_hooks, every._global_forward_pre_hooks]
        hooks = (hook for kind in kinds for hook in kind.values())
        return any(not _origin(hook).startswith(("emoe.", "transformers.")) for hook in hooks)


def _origin(hook: Callable[..., Any]) -> str:
    """The module that a hook was written in."""
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))
