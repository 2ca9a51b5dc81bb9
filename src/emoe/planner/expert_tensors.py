"""A checkpoint's experts by the names and shapes of its tensors.

An expert is `...experts.<number>...`, or a row of a tensor whose first dimension is the number of experts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emoe.checkpoint.codecs.formats import ExpertCodec, coded_parts
from emoe.checkpoint.headers import TensorEntry
from emoe.checkpoint.parts import PartSpec
from emoe.checkpoint.settings import EXPERT_COUNTS
from emoe.planner.facts import ExpertLayer, by_size
from emoe.planner.tensors import LAYER, Unsure, element_count, stated

_NUMBERED = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of an expert: a matrix or a bias of the product into hidden ("down") or of the one out of it."""

    elements: int
    down: bool
    bias: bool

    def spec(self, dtype: str, hidden: int | None) -> PartSpec:
        """Its name in experts modules, its shape (rows are outputs where `hidden` is given), its dtype."""
        name = "down_proj" if self.down else "gate_up_proj"
        if self.bias or hidden is None:
            return PartSpec(f"{name}_bias" if self.bias else name, (self.elements,), dtype)
        if self.elements % hidden:
            raise Unsure(f"an expert's {name} of {self.elements} numbers has no side of hidden_size {hidden}")
        other = self.elements // hidden
        return PartSpec(name, (hidden, other) if self.down else (other, hidden), dtype)


Experts = tuple[int, int, tuple[_Part, ...]]
"""A layer, its number of experts, and the parts of each."""


def find_experts(config: Mapping[str, Any], used: Mapping[str, TensorEntry]) -> tuple[list[Experts], set[str]]:
    """The layers of experts, and the names of all tensors that are experts."""
    numbered: dict[str, dict[int, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for name, entry in used.items():
        if (match := _NUMBERED.match(name)) and not name.endswith("_scale_inv"):
            numbered[match[1]][int(match[2])][match[3]] = element_count(entry)
    if numbered:
        layers = [_numbered_layer(module, experts) for module, experts in numbered.items()]
        names = {name for name in used if _NUMBERED.match(name)}
    else:
        layers, names = _fused_layers(stated(config, *EXPERT_COUNTS), used)
    if not layers:
        raise Unsure("no tensor looks like an expert")
    layer, times = Counter(layer for layer, _, _ in layers).most_common(1)[0]
    if times > 1:
        raise Unsure(f"layer {layer} has several groups of experts")
    return sorted(layers, key=lambda layer: layer[0]), names


def expert_layers(
    experts: Sequence[Experts], dtype: str, codec: ExpertCodec | None = None, hidden: int | None = None
) -> tuple[ExpertLayer, ...]:
    """The layers in bytes; a codec asks for `hidden`, to tell outputs from inputs."""
    made = []
    for layer, count, parts in experts:
        if hidden is not None and sum(part.down and not part.bias for part in parts) != 1:
            raise Unsure(f"it is not plain which of layer {layer}'s expert tensors leads into hidden_size")
        specs = coded_parts(codec, (part.spec(dtype, hidden) for part in parts), transposed=False)
        made.append(ExpertLayer(layer, count, by_size(spec.nbytes for spec in specs)))
    return tuple(made)


def _numbered_layer(module: str, experts: Mapping[int, Mapping[str, int]]) -> Experts:
    """One tensor per expert and projection: all experts must have the same."""
    first = experts.get(0, {})
    if set(experts) != set(range(len(experts))) or any(parts != first for parts in experts.values()):
        raise Unsure(f"the experts of {module} are not numbered 0 to {len(experts) - 1} with equal tensors")
    # gate and up become one part; so do their biases: the parts then are those of the model's own parameters.
    parts: Counter[tuple[bool, bool]] = Counter()
    for name, elements in first.items():
        parts[_is_down(name), name.endswith("bias")] += elements
    return _layer_number(module), len(experts), tuple(_Part(n, down, bias) for (down, bias), n in parts.items())


def _is_down(name: str) -> bool:
    return any(word in name for word in ("down", "w2", "output_linear", "fc2"))


def _fused_layers(count: int, used: Mapping[str, TensorEntry]) -> tuple[list[Experts], set[str]]:
    """Tensors that hold all experts: three dimensions, or a bias beside such, the first their number."""
    modules: dict[str, dict[str, _Part]] = defaultdict(dict)
    matrices = [name for name, entry in used.items() if len(entry.shape) == 3 and entry.shape[0] == count]
    owners = {name.removesuffix(".weight").rpartition(".")[0] for name in matrices}
    for name, entry in used.items():
        plain = name.removesuffix(".weight")
        owner = plain.rpartition(".")[0]
        is_bias = len(entry.shape) == 2 and entry.shape[0] == count and "bias" in name
        if owner in owners and (name in matrices or is_bias):
            down = _is_down(plain.removeprefix(owner))
            modules[owner][name] = _Part(element_count(entry) // count, down, is_bias)
    layers = [(_layer_number(owner), count, tuple(parts.values())) for owner, parts in modules.items()]
    return layers, {name for parts in modules.values() for name in parts}


def _layer_number(module: str) -> int:
    match = LAYER.search(f"{module}.")
    if match is None:
        raise Unsure(f"{module} names no decoder layer")
    return int(match[1])
