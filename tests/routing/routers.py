"""A tiny instance of every router class that has a routing rule, and the same with experts taken out."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from emoe.routing.rules import ENTRIES

HIDDEN = 16
SHARED = 2  # shared experts that Inkling's router weighs beside the routed ones
VOCABULARY = 40

# These take the correction bias as an argument of forward: the block owns it.
_BIAS_ARGUMENT = {
    "afmoe.AfmoeTokenChoiceRouter",
    "hy_v3.HYV3TopKRouter",
    "dots3_note.Dots3NoteVisionTopKRouter",
    "minimax_m2.MiniMaxM2TopKRouter",
    "lfm2_moe.Lfm2MoeTopKRouter",
}
# These want [batch, tokens, hidden].
_BATCHED = {"afmoe.AfmoeTokenChoiceRouter", "zaya.ZayaRouter"}
# Its model keeps this one in float32 whatever the rest is in.
FLOAT32_ONLY = {"inkling2.Inkling2TopKRouter"}
TABLED = "deepseek_v4.DeepseekV4HashRouter"
GROUPED = sorted(key for key, entry in ENTRIES.items() if "num_group" in entry.needs)
PLAIN = sorted(key for key in ENTRIES if key not in GROUPED and key != TABLED)

# Settings that make the same class another router.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cohere2_moe.Cohere2MoeTopKRouter": [
        {"expert_selection_fn": "softmax"},
        {"expert_selection_fn": "sigmoid"},
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
    ],
    "lfm2_moe.Lfm2MoeTopKRouter": [{}, {"use_expert_bias": False}, {"norm_topk_prob": False}],
    "inkling2.Inkling2TopKRouter": [{"scoring_func": "sigmoid"}, {"scoring_func": "sqrtsoftplus"}],
    "laguna.LagunaTopKRouter": [{}, {"moe_router_logit_softcapping": 0.0}],
    "axk2.AXK2TopkRouter": [{}, {"n_group": None}],
    **{
        f"{family}.{prefix}TopkRouter": [{}, {"topk_method": "greedy"}]
        for family, prefix in [
            ("deepseek_v2", "DeepseekV2"),
            ("deepseek_ocr2", "DeepseekOcr2Text"),
            ("unlimited_ocr", "UnlimitedOcrText"),
        ]
    },
}
for _key, _entry in ENTRIES.items():
    if "norm_topk_prob" in _entry.needs and _key not in VARIANTS:
        VARIANTS[_key] = [{}, {"norm_topk_prob": False}]

CASES = [(key, variant) for key in sorted(ENTRIES) for variant in VARIANTS.get(key, [{}])]


def case_id(value: Any) -> str:
    """How pytest names a case: the class, then the settings that differ."""
    return value if isinstance(value, str) else "-".join(str(item) for item in value.values()) or "plain"


def settings(key: str, num_experts: int, top_k: int, **changes: Any) -> SimpleNamespace:
    """A stand-in for the configuration that a router's constructor reads, under every family's names."""
    values: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_experts": num_experts,
        "num_local_experts": num_experts,
        "n_routed_experts": num_experts,
        "moe_num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_topk": top_k,
        "top_k_experts": top_k,
        "n_shared_experts": SHARED,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "router_scaling_factor": 2.5,
        "route_scale": 1.5,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "scoring_func": "sqrtsoftplus",
        "expert_selection_fn": "softmax",
        "moe_norm_min": 1e-12,
        "moe_router_logit_softcapping": 3.0,
        "router_jitter_noise": 0.3,
        "input_jitter_noise": 0.0,
        "output_multiplier": 0.7,
        "use_expert_bias": True,
        "rms_norm_eps": 1e-6,
        "router_hidden_size": 8,
        "vocab_size": VOCABULARY,
        **changes,
    }
    return SimpleNamespace(**values)


@dataclass
class TinyRouter:
    """A router with random parameters; `call` gives it whatever beside hidden states it wants."""

    key: str
    module: Any
    num_experts: int
    top_k: int
    bias: Tensor | None
    changes: dict[str, Any]

    def call(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The module's own output for hidden states [tokens, hidden]."""
        inputs = hidden[None] if self.key in _BATCHED else hidden
        if self.key == TABLED:
            tokens = torch.arange(hidden.shape[0], device=hidden.device) * 7 % VOCABULARY
            output: tuple[Tensor, ...] = self.module(inputs, tokens)
        elif self.bias is not None:
            output = self.module(inputs, self.bias)
        else:
            output = self.module(inputs)
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits before any softmax or sigmoid, [tokens, experts]."""
        return self.call(hidden)[0]

    def without(self, kept: list[int]) -> TinyRouter:
        """The same router where experts other than `kept` never existed: their rows deleted."""
        choices = len(kept) + (self.key == "zaya.ZayaRouter")  # "no expert" can be chosen there too
        top_k = min(self.top_k, choices)
        small = build(self.key, len(kept), top_k, **self.changes)
        mine, its = dict(_tensors(self.module)), dict(_tensors(small.module))
        with torch.no_grad():
            for name, tensor in its.items():
                tensor.copy_(self._kept(mine[name], tensor.shape, kept))
            if self.bias is not None and small.bias is not None:
                small.bias.copy_(self.bias[kept])
        return small

    def _kept(self, tensor: Tensor, shape: torch.Size, kept: list[int]) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            if size != shape[dim]:  # rows beyond the experts are shared experts or "no expert": they stay
                return tensor.index_select(dim, torch.tensor([*kept, *range(self.num_experts, size)]))
        return tensor


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def build(key: str, num_experts: int = 8, top_k: int = 3, seed: int = 0, **changes: Any) -> TinyRouter:
    """A router of the class called `key`; `changes` are settings."""
    family, name = key.split(".")
    if name.startswith("Phimoe"):
        top_k = 2
    module_name = f"transformers.models.{family}.modeling_{family}"
    cls = getattr(importlib.import_module(module_name), name)
    config = settings(key, num_experts, top_k, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = cls(config, layer_idx=0) if name == "ZayaRouter" else cls(config)
        with torch.no_grad():
            for parameter_name, tensor in _tensors(module):
                if not tensor.is_floating_point():
                    # Prescribed experts of a token differ from each other.
                    rows = [torch.randperm(num_experts)[:top_k] for _ in range(len(tensor))]
                    tensor.copy_(torch.stack(rows))
                elif tensor.ndim == 2 and min(tensor.shape) > 1:
                    tensor.normal_(std=2.0 / HIDDEN**0.5)
                elif "scale" in parameter_name or "norm" in parameter_name:
                    tensor.uniform_(0.5, 1.5)
                else:
                    tensor.normal_(std=0.3)
        bias = torch.randn(num_experts) * 0.3 if key in _BIAS_ARGUMENT else None
    return TinyRouter(key, module.eval(), num_experts, top_k, bias, changes)


class Block(nn.Module):
    """A block as the rules see it: experts and a router side by side."""

    def __init__(self, router: nn.Module, num_experts: int, name: str = "gate") -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.num_experts = num_experts  # type: ignore[assignment]
        self.add_module(name, router)
