"""The index of experts: for every expert key, the pieces of files that make it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from emoe.checkpoint.codecs.formats import NATIVE
from emoe.checkpoint.conversion import (
    Assignment,
    Assignments,
    ConversionFailed,
    absent_patterns,
    assign,
    convert,
    missing_numbers,
    run_dtype,
)
from emoe.checkpoint.headers import FileStamp, TensorEntry, collector_paused, read_headers, stamp_files
from emoe.checkpoint.layout import Layout
from emoe.checkpoint.lookup import Lookup, find_lookup
from emoe.checkpoint.parts import PartSpec
from emoe.checkpoint.pieces import Piece, Recipe, recipe, whole_tensors
from emoe.checkpoint.settings import origins
from emoe.checkpoint.skeleton import (
    QUANTISED_REMEDY,
    SLOT_DTYPES,
    ExpertsModule,
    find_experts,
    refuse_entry,
    refuse_quantised,
    skeleton,
)
from emoe.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ExpertIndex", "LayerIndex", "PartSpec", "Piece", "build_index", "skeleton"]

_SAFETENSORS_DTYPES = {dtype: name for name, dtype in SLOT_DTYPES.items()}
# Names of the tensors that quantisation methods keep beside, or instead of, a weight.
_QUANTISED_NAME = re.compile(r"(_scales?|_scale_inv|_blocks|_absmax|qweight|qzeros|weight_packed|weight_scale)$")


@dataclass(frozen=True, slots=True)
class _PartSource:
    """Where one part of a layer's experts comes from: steps by expert, shared by layers, and the tensors."""

    spec: PartSpec
    steps: Recipe
    entries: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """The experts of one decoder layer.

    `transposed` says that the model has their matrices as [in, out], not [out, in]; `run_dtype` is the dtype they are
    computed in, whatever their parts are stored as.
    """

    layer: int
    module: str
    num_experts: int
    parts: tuple[PartSpec, ...]
    transposed: bool
    run_dtype: str
    _sources: tuple[_PartSource, ...] = field(repr=False)

    def stored_in(self, parts: Sequence[PartSpec], entries: Mapping[str, Sequence[TensorEntry]]) -> LayerIndex:
        """The same experts kept elsewhere as `parts`: of each part, one tensor per expert, by its name."""
        sources = tuple(
            _PartSource(part, whole_tensors(self.num_experts, part.shape), tuple(entries[part.name])) for part in parts
        )
        return replace(self, parts=tuple(parts), _sources=sources)

    def stored_dtypes(self) -> dict[str, str]:
        """What each part is stored as, by safetensors' names of dtypes."""
        return {source.spec.name: source.entries[0].dtype for source in self._sources}

    def pieces(self, expert: int) -> tuple[Piece, ...]:
        """The pieces of one expert, part by part."""
        return tuple(
            step.bind(source.spec.name, source.entries[step.source], _safetensors_name(source.spec.dtype))
            for source in self._sources
            for step in source.steps[expert]
        )

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert in memory, in the run dtype."""
        return sum(part.nbytes for part in self.parts)


class ExpertIndex:
    """Every expert of a checkpoint, by (layer, expert).

    `expert_tensor_names` are the checkpoint's tensors that experts are made of, `expert_param_names` the
    model's parameters that hold them. `dense_nbytes` is the rest of the model in its run dtype, tied weights
    once. `lookup` is the input embedding, where its rows can be read one by one. `expert_dtype` names the
    codec that the experts are stored with, "native" for the checkpoint's own.
    """

    def __init__(
        self,
        path: Path,
        layers: Sequence[LayerIndex],
        expert_tensor_names: frozenset[str],
        expert_param_names: frozenset[str],
        dense_nbytes: int,
        files: Mapping[Path, FileStamp],
        expert_dtype: str = NATIVE,
        lookup: Lookup | None = None,
    ) -> None:
        self.expert_dtype = expert_dtype
        self.lookup = lookup
        self.path = path
        self.layers = tuple(layers)
        self.expert_tensor_names = expert_tensor_names
        self.expert_param_names = expert_param_names
        self.dense_nbytes = dense_nbytes
        self.files = files
        self._by_layer = {layer.layer: layer for layer in self.layers}

    def stored_in(
        self, expert_dtype: str, layers: Sequence[LayerIndex], files: Mapping[Path, FileStamp]
    ) -> ExpertIndex:
        """The same experts kept elsewhere, in `files`."""
        names = self.expert_tensor_names, self.expert_param_names
        return ExpertIndex(self.path, layers, *names, self.dense_nbytes, files, expert_dtype, self.lookup)

    def layer(self, layer: int) -> LayerIndex:
        """One layer's index. Raises KeyError for a layer without experts."""
        return self._by_layer[layer]

    def keys(self) -> list[tuple[int, int]]:
        """All expert keys, ascending."""
        return [(layer.layer, expert) for layer in self.layers for expert in range(layer.num_experts)]

    def pieces(self, layer: int, expert: int) -> tuple[Piece, ...]:
        """The pieces of one expert."""
        return self._by_layer[layer].pieces(expert)

    def expert_nbytes(self, layer: int) -> int:
        """Bytes of one of the layer's experts in memory, in the run dtype."""
        return self._by_layer[layer].expert_nbytes

    def stored_nbytes(self, layer: int, expert: int) -> int:
        """Bytes to read for one expert."""
        ranges = {(piece.file, piece.offset, piece.nbytes) for piece in self.pieces(layer, expert)}
        return sum(nbytes for _, _, nbytes in ranges)

    @property
    def total_expert_nbytes(self) -> int:
        """Bytes of all experts in memory, in the run dtype."""
        return sum(layer.num_experts * layer.expert_nbytes for layer in self.layers)

    @property
    def total_stored_nbytes(self) -> int:
        """Bytes of all experts at rest."""
        sources = (source for layer in self.layers for source in layer._sources)
        # By identity: a tensor that makes two parts counts once.
        return sum({id(entry): entry.nbytes for source in sources for entry in source.entries}.values())


def build_index(directory: Path, model: PreTrainedModel, dtype: torch.dtype | None = None) -> ExpertIndex:
    """Index every expert of the checkpoint in `directory` for `model` (from `skeleton`), from headers alone.

    `dtype` is what experts run in; without it, what the model's parameters have.

    Raises:
        CheckpointError: a file or an expert's tensor is missing, truncated or of the wrong shape or dtype.
        UnsupportedModelError: the model is dense, or its layout or quantisation is not supported.
    """
    refuse_quantised(directory, model.config)
    modules = find_experts(model)
    with collector_paused():
        return _Builder(directory, model, dtype, modules, read_headers(directory)).build()


class _Builder:
    """The state of one `build_index`."""

    def __init__(
        self,
        directory: Path,
        model: PreTrainedModel,
        dtype: torch.dtype | None,
        modules: tuple[ExpertsModule, ...],
        entries: Mapping[str, TensorEntry],
    ) -> None:
        self.directory = directory
        self.model = model
        self.dtype = dtype
        self.modules = modules
        self.entries = entries
        self.assignments: Assignments = assign(entries, model)
        # Recipe and tensors by parameter name, filled by `_make`; recipes by what they depend on.
        self.made: dict[str, tuple[Recipe, tuple[TensorEntry, ...]]] = {}
        self.recipes: dict[object, Recipe] = {}
        self.dense_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.shapes = {f"{m.path}.{name}": shape for m in modules for name, (shape, _) in m.parts.items()}

    def build(self) -> ExpertIndex:
        for target, assignment in self.assignments.by_target.items():
            if any(name in self.shapes for name in assignment.targets()):
                self._make(assignment)
            elif assignment.converter is None:
                self._check_dense(target, assignment.entries()[0])
        layers = [self._layer(module) for module in self.modules]
        self._check_dense_complete()
        used = {entry.name for _, entries in self.made.values() for entry in entries}
        return ExpertIndex(
            self.directory,
            layers,
            frozenset(used),
            frozenset(self.shapes),
            _dense_nbytes(self.model, frozenset(self.shapes)),
            stamp_files(self.entries),
            lookup=find_lookup(self.model, self.assignments.by_target, self._run_dtype),
        )

    def _run_dtype(self, name: str, parameter_dtype: torch.dtype) -> torch.dtype:
        return run_dtype(self.model, name, self.dtype or parameter_dtype)

    def _layer(self, module: ExpertsModule) -> LayerIndex:
        sources: list[_PartSource] = []
        for name, (shape, parameter_dtype) in module.parts.items():
            target = f"{module.path}.{name}"
            if target not in self.made:
                self._refuse_missing(module, target)
            dtype = self._run_dtype(target, parameter_dtype)
            spec = PartSpec(name, shape[1:], str(dtype).removeprefix("torch."))
            sources.append(_PartSource(spec, *self.made[target]))
        specs = tuple(source.spec for source in sources)
        matrices = [spec.dtype for spec in specs if len(spec.shape) > 1]
        run_dtype = matrices[0] if matrices else specs[0].dtype
        return LayerIndex(
            module.layer, module.path, module.num_experts, specs, module.transposed, run_dtype, tuple(sources)
        )

    def _refuse_missing(self, module: ExpertsModule, target: str) -> None:
        """Raise for a parameter that no tensor goes to."""
        inside = [name for name in self.assignments.unused if _module_tail(module.path) in name]
        quantised = [name for name in inside if _QUANTISED_NAME.search(name)]
        if quantised:
            raise UnsupportedModelError(
                f"{self.directory}: layer {module.layer}'s experts are stored quantised ({quantised[0]!r}). "
                f"{QUANTISED_REMEDY}"
            )
        hint = f" It has {inside[0]!r}, which transformers cannot place." if inside else ""
        raise CheckpointError(
            f"{self.directory}: no tensor makes {target!r} (layer {module.layer}, {module.num_experts} "
            f"experts).{hint} Download the checkpoint again, or check that config.json belongs to it."
        )

    def _make(self, assignment: Assignment) -> None:
        """Work out the recipes of the parameters one assignment makes."""
        entries = tuple(assignment.entries())
        for entry in entries:
            refuse_entry(entry, assignment.target)
        known = [name for name in assignment.targets() if name in self.shapes]
        experts = sum(self.shapes[name][0] for name in known)
        missing = missing_numbers(assignment, experts)
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks {len(missing)} of the tensors that make {known[0]!r} ({experts} "
                f"experts): {', '.join(missing[:3])}. Download the checkpoint again."
            )
        counts = tuple(
            (pattern, tuple(entry.shape for entry in source.entries))
            for pattern, source in assignment.sources.items()
            if assignment.converter is not None
        )
        shape = self.shapes[known[0]]
        # Layers alike in these share one recipe: a converter sees patterns, shapes and the parameter's own
        # shape.
        key = (id(assignment.converter), shape, counts or entries[0].shape)
        alone = len(assignment.targets()) == 1
        if alone and key in self.recipes:
            self.made[assignment.target] = self.recipes[key], entries
            return
        for name, layout in self._convert(assignment).items():
            if name not in self.shapes:
                continue
            if layout.shape != self.shapes[name]:
                raise self._wrong_shape(assignment, f"they make {list(layout.shape)}", layout.shape)
            steps = recipe(layout, name)
            self.made[name] = steps, entries
            if alone:
                self.recipes[key] = steps

    def _convert(self, assignment: Assignment) -> Mapping[str, Layout]:
        try:
            return convert(assignment, self.model, torch.float32)
        except ConversionFailed as error:
            raise self._wrong_shape(assignment, f"transformers' conversion says {error}") from error

    def _wrong_shape(self, assignment: Assignment, finding: str, made: Sequence[int] = ()) -> CheckpointError:
        """The error for tensors that do not make their parameter, as precise as can be told."""
        absent = absent_patterns(assignment)
        target = next(name for name in assignment.targets() if name in self.shapes)
        expected = list(self.shapes[target])
        if absent:
            return CheckpointError(
                f"{self.directory}: no tensor matches {absent[0]!r}, which {target!r} {expected} needs "
                f"besides {assignment.entries()[0].name!r}. Download the checkpoint again."
            )
        odd = _odd_one(assignment)
        named = odd or assignment.entries()[0]
        which = "unlike its neighbours" if odd else "like its neighbours"
        return CheckpointError(
            f"{named.file}: tensor {named.name!r} has shape {list(named.shape)}, {which}; {target!r} needs "
            f"{expected} from {len(assignment.entries())} tensors, and {finding}.{self._origins(expected, made)} Check "
            "that config.json belongs to the checkpoint, or download it again."
        )

    def _check_dense(self, target: str, entry: TensorEntry) -> None:
        """Check a tensor that is a dense parameter as it stands."""
        expected = self.dense_shapes.get(target)
        if expected is not None and expected != entry.shape:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, but the model's "
                f"{target!r} has {list(expected)}.{self._origins(expected, entry.shape)} Check that config.json "
                "belongs to the checkpoint, or download it again."
            )

    def _origins(self, expected: Sequence[int], found: Sequence[int]) -> str:
        """The fields of config.json that ask for other sizes than those found, as a sentence; they may be defaults."""
        other = {a for a, b in zip(expected, found, strict=False) if a != b} if len(expected) == len(found) else ()
        config = self.model.config.get_text_config(decoder=True).to_dict()
        told = [f"{number} is {where}" for number in sorted(other) if (where := origins(config, number))]
        return f" By the configuration {', '.join(told)}." if told else ""

    def _check_dense_complete(self) -> None:
        """Check that every dense parameter has its tensor: transformers would fill gaps at random."""
        covered = {name for a in self.assignments.by_target.values() for name in a.targets()}
        covered |= self.shapes.keys()
        for pair in getattr(self.model, "all_tied_weights_keys", {}).items():
            if covered.intersection(pair):  # transformers ties them to whichever of the two is stored
                covered.update(pair)
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        missing = [
            name
            for name in self.dense_shapes
            if name not in covered and not any(pattern.search(name) for pattern in ignored)
        ]
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks {len(missing)} of the model's dense tensors: "
                f"{', '.join(missing[:3])}. transformers would fill them with random numbers. Download the "
                "checkpoint again, or check that config.json belongs to it."
            )


def _safetensors_name(dtype: str) -> str:
    """What safetensors calls a torch dtype; its own name where experts at rest cannot have it."""
    return _SAFETENSORS_DTYPES.get(getattr(torch, dtype), dtype)


def _module_tail(path: str) -> str:
    """An experts module's path without the model's prefix: "layers.3.mlp.experts"."""
    match = re.search(r"[^.]+\.\d+\..*", path)
    return match[0] if match else path


def _odd_one(assignment: Assignment) -> TensorEntry | None:
    """The first tensor whose shape is not its pattern's most common one."""
    for source in assignment.sources.values():
        shapes = Counter(entry.shape for entry in source.entries)
        common = shapes.most_common(1)[0][0]
        odd = next((entry for entry in source.entries if entry.shape != common), None)
        if odd is not None:
            return odd
    return None


def _dense_nbytes(model: PreTrainedModel, experts: frozenset[str]) -> int:
    """Bytes of the model's parameters and saved buffers that are not experts, each tied tensor once."""
    saved = model.state_dict(keep_vars=True)
    dense = {id(tensor): (name, tensor) for name, tensor in saved.items() if name not in experts}
    return sum(
        tensor.numel() * (run_dtype(model, name, tensor.dtype) if tensor.is_floating_point() else tensor.dtype).itemsize
        for name, tensor in dense.values()
    )
