"""`load`: a transformers model and tokenizer whose experts live inside a byte budget."""

from __future__ import annotations

import importlib.metadata
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from emoe.checkpoint.codecs.formats import NATIVE, ExpertCodec, codec_of, coded_parts
from emoe.checkpoint.index import ExpertIndex, LayerIndex, build_index
from emoe.checkpoint.memory_room import choose_reader
from emoe.checkpoint.readers import Reader
from emoe.checkpoint.skeleton import skeleton
from emoe.checkpoint.source import resolve
from emoe.config import Embeddings, ExpertMemory, LayerSplit, Mode, OnMiss, Prefetch, format_bytes, parse_host_memory
from emoe.errors import BudgetError, CheckpointError, UsageError
from emoe.kernels.choice import kernel_of
from emoe.kernels.dense import DenseKernels
from emoe.kernels.experts import ExpertMath
from emoe.model.attention import choose_attention
from emoe.model.binding import Binding, binding_of, close, label_task
from emoe.model.cache import let_grow
from emoe.model.embedding import RowsOnDisk, choose_embeddings
from emoe.model.final import Final
from emoe.model.foresight import Ahead
from emoe.model.layer import LayerRuntime
from emoe.model.loading import load_dense
from emoe.model.placement import (
    Placement,
    check_device_map,
    check_settings,
    equip,
    host_plan,
    make_pool,
    place,
    preload,
    spread_over,
)
from emoe.model.quantising import HUB_SETTINGS, embedded, stored_experts
from emoe.model.runtime import IMPLEMENTATION, Runtime
from emoe.model.spreading import Shard, Spread, check_spreading
from emoe.model.tasking import nano_profile, profile_for
from emoe.model.tracing import record_trace
from emoe.policies.foresight import Foresight
from emoe.residency.bank import Bank, slot_nbytes, torch_dtype
from emoe.residency.budget import LayerNeed, SlotPlan, plan_slots
from emoe.residency.loader import Loader
from emoe.residency.pool import Progress
from emoe.residency.table import ResidencyTable
from emoe.routing.rules import rule_for
from emoe.routing.topk import top_k_of
from emoe.tasks.profile import Profile

LOADER_THREADS = {"cached": 2, "direct": 4, "advised": 4}
"""A copy from the page cache is bound by memory, so two threads do; a disk wants several requests under way."""


class Loaded(NamedTuple):
    """What `load` returns: unpack it as `model, tokenizer`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def layer_needs(index: ExpertIndex, model: PreTrainedModel, codec: ExpertCodec | None = None) -> list[LayerNeed]:
    """Return what each MoE layer asks of the budget; layers with equal part shapes share a bank.

    `codec` is what the experts of a checkpoint's own `index` are to be stored with; None: as they are.

    Raises:
        UnsupportedModelError: a size that the codec cannot take.
    """
    groups: dict[tuple[Any, ...], int] = {}
    config = model.config.get_text_config(decoder=True)
    needs = []
    for entry in index.layers:
        parts = coded_parts(codec, entry.parts, entry.transposed)
        group = groups.setdefault(parts, len(groups))
        block = model.get_submodule(entry.module.rpartition(".")[0])
        top_k = min(top_k_of(block, config, entry.layer), entry.num_experts)
        needs.append(LayerNeed(entry.layer, entry.num_experts, top_k, slot_nbytes(parts), group))
    return needs


def load(
    model_id: str | Path | None = None,
    *,
    expert_memory: str | int | ExpertMemory | None = None,
    expert_dtype: str = NATIVE,
    expert_cache: str | Path | None = None,
    host_memory: str | int | None = None,
    mode: Mode = "exact",
    on_miss: OnMiss = "load",
    expert_devices: Sequence[str] | None = None,
    spread: str = "auto",
    reader: str = "auto",
    eviction: str = "least-stale",
    replan_prompts: int | str = 1,
    profile: str | Path | Profile | None = None,
    predictor: str | None = None,
    prefetch: Prefetch | None = None,
    embeddings: Embeddings = "memory",
    layer_split: LayerSplit = "uniform",
    sensitivity_threshold: float | None = None,
    trace: str | Path | None = None,
    task: str | None = None,
    progress: bool | Progress = False,
    quantise_progress: bool | Progress | None = None,
    max_read_bytes_per_s: float | None = None,
    **kwargs: Any,
) -> Loaded:
    """Load a Mixture-of-Experts checkpoint with its experts inside a byte budget.

    The result is an ordinary transformers model: `generate()` and everything built on it works. In mode `exact` its
    logits are bit for bit those of the same model with every expert resident.

    Args:
        model_id: a checkpoint's folder or a hub id; None is the embedded emoe-nano.
        expert_memory: "8GiB", "40%", "12/layer" or bytes; None keeps every expert resident.
        expert_dtype: "native", or "int8" or "int4" (lossy): experts are quantised once, kept in a cache, and read, held
            and computed in that form; a share of `expert_memory` is a share of the quantised experts.
        expert_cache: the folder that keeps quantised experts; None: `.emoe` in the checkpoint's folder, or the user's
            cache directory where that cannot be written.
        host_memory: where experts run on a GPU, pinned RAM for others: "16GiB", "50%" (of all experts), 0 (only
            what reading needs), bytes, or "auto" (also None): what the machine has free.
        mode: "exact" loads and waits for a missing expert; "resident" (the paper, section 2.5; lossy) sends the token
            to the best-scored expert that is resident, and nothing waits; "balanced" (lossy) does the first in layers
            where the running task is sensitive to wrong routing and the second elsewhere, as the profile says.
        on_miss: "load", or on a GPU "hybrid": misses that the host holds are computed on the CPU where that is faster
            by measurement (exact routes, CPU arithmetic for misses: other last bits than the GPU's).
        expert_devices: devices ("cuda:0", "cuda:1") over which the experts of every layer are spread, the one that
            `device_map` puts the model on among them; the budget is of all together. None: they lie with their layer.
        spread: "auto" spreads them only where a token is expected to take less time so, by measurement; "always".
        reader: "auto", "cached", "direct" or "advised"; see the user guide.
        eviction: "least-stale", "lru" or "lfu", or a scorer of expected use: "decayed", or "next-use", which follows
            LRU while that loads less, and switches itself off while it takes longer than the loads it spares.
        replan_prompts: p of the paper (section 2.3): at every p-th prompt the resident experts are chosen anew. Without
            a predictor, such a prompt is read with its own routes (its experts stream through) and what it routed most
            becomes resident; that is for the modes that reroute. With one, the predictor is asked and Equation 2 gives
            the plan, in any mode; only the first prompt is read with its own routes. "adaptive" asks when what is
            routed has drifted from what was predicted.
        profile: the folder that `emoe profile` made for this model: tasks, sensitivity, popularity, what predictors
            and scorers have learned. The embedded model uses the one it ships with.
        predictor: the name of a predictor (emoe.prediction.registry.PREDICTORS) whose plans are loaded ahead.
        prefetch: "plan" (with a predictor; the default then) or "next-gate", which asks the next layer's router ahead
            (mode "exact"). Both switch themselves off while they make things slower; `stats` says so.
        embeddings: "memory", "disk" (the rows that a pass needs are read when it begins; the same bits, less memory) or
            "auto": on disk where not every expert is resident. One that is tied to another weight stays in memory.
        layer_split: "uniform" slots for every layer, or "expected-misses": the split of the same bytes that leaves the
            fewest misses by the profile's popularity.
        sensitivity_threshold: accuracy from which a layer counts as insensitive for a task (default: the profile's,
            0.85). In mode "balanced" 0 reroutes every miss of the profile's tasks, and more than 1 none.
        trace: a file to record the routing to, written when the model is closed or collected.
        task: the label that the recorded prompts carry; `label_task` changes it between prompts.
        progress: True for a progress bar, or a function called with (bytes done, bytes in all).
        quantise_progress: the same while experts are quantised; None: as `progress`.
        max_read_bytes_per_s: slows the store down, to measure what a slower disk would do.
        **kwargs: go to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, token, ...).

    Returns:
        (model, tokenizer); the tokenizer is None where the checkpoint has none.

    Raises:
        UsageError: an argument that cannot be meant.
        CheckpointError: files missing, truncated or inconsistent; no room for quantised experts.
        UnsupportedModelError: a dense model, an unknown layout, sizes that `expert_dtype` cannot take, or no routing
            rule for mode "resident".
        BudgetError: the budget is below the floor, which the message names.
        ProfileError: the profile is missing or damaged.
    """
    _check_arguments(kwargs)
    codec = codec_of(expert_dtype)
    profiled = profile is not None or (model_id is None and nano_profile() is not None)
    settings = Foresight(
        mode, eviction, predictor, prefetch, replan_prompts, layer_split, sensitivity_threshold, profiled
    )
    if profile is None and settings.wants_profile and model_id is None:
        profile = nano_profile()
    memory = None if expert_memory is None else ExpertMemory.parse(expert_memory)
    host = parse_host_memory(host_memory)
    check_settings(host, on_miss, mode, copies=bool(kwargs.get("device_map")))
    check_device_map(kwargs.get("device_map"))
    plain = predictor is None and prefetch is None and layer_split == "uniform" and on_miss == "load"
    check_spreading(expert_devices, spread, mode, plain and eviction in ("least-stale", "lru", "lfu"))
    hub = {name: kwargs[name] for name in HUB_SETTINGS if name in kwargs}
    path = resolve(embedded() if model_id is None else model_id, **hub)
    config_kwargs = {name: kwargs[name] for name in ("dtype", "trust_remote_code") if name in kwargs}
    _, empty = skeleton(path, **config_kwargs)
    index = build_index(path, empty)
    needs = layer_needs(index, empty, codec)
    runtime = Runtime(mode, replan_prompts if isinstance(replan_prompts, int) else 1, task)
    ahead = Ahead(settings, runtime, index, needs, profile_for(profile, path))
    lane = mode != "exact"
    plan = plan_slots(memory, needs, lane=lane, shared_from=settings.shared_from, popularity=ahead.popularity())
    _check_rerouting(mode, plan, needs, empty, index)
    stored = stored_experts(
        index, empty, codec, expert_cache, progress if quantise_progress is None else quantise_progress
    )
    del empty
    finish_trace = None if trace is None else record_trace(runtime, stored, needs, Path(trace))
    lookup, why = choose_embeddings(embeddings, index, plan.all_resident)
    dense = index.dense_nbytes - (0 if lookup is None else lookup.nbytes)
    kind, reason = choose_reader(stored, plan.resident_bytes, reader, reserved_bytes=plan.resident_bytes + dense)
    local = {name: value for name, value in kwargs.items() if name not in hub}
    model = load_dense(path, index, IMPLEMENTATION, lookup, **local)
    placement = place(model, stored, needs)
    row = torch.zeros(1, model.config.get_text_config(decoder=True).hidden_size, dtype=model.dtype, device=model.device)
    placement = spread_over(expert_devices, spread, placement, plan.resident_bytes / plan.total_bytes, row)
    if placement.spread:
        plan = plan_slots(
            memory, placement.needs, lane=lane, shared_from=settings.shared_from, popularity=ahead.popularity()
        )
    check_settings(host, on_miss, mode, placement.copies)
    beside = host_plan(host, placement, plan)
    if beside is not None:  # what streams is what the host has no room for, and only its slots are in the machine's RAM
        kind, reason = choose_reader(stored, beside.nbytes, reader, reserved_bytes=beside.nbytes)
    opened = Reader(kind, stored.files, max_bytes_per_s=max_read_bytes_per_s)
    loader = Loader(LOADER_THREADS[opened.kind])
    binding = Binding(runtime, stored, plan, opened, opened.notice or reason, loader, ahead)
    tokenizer = _tokenizer(path, kwargs)
    try:
        binding.host, binding.on_miss = beside, on_miss
        binding.embeddings_reason = why
        if lookup is not None:
            binding.embedding = RowsOnDisk(model, lookup, index)
            binding.handles.append(binding.embedding)
        binding.firsts, binding.spread = placement.firsts, placement.told
        _bind(model, binding, placement, opened)
        binding.attention = choose_attention(model, binding.kernel, asked="attn_implementation" in kwargs)
        binding.handles += [let_grow(model), *ahead.attach(model, binding.pools, tokenizer)]
        if plan.all_resident:
            preload(binding.pools, progress)
        if finish_trace is not None:
            binding.finishers.append(finish_trace)
    except BaseException:
        binding.close()
        raise
    runtime.final = Final.of(model, stored)
    model._emoe_binding = binding
    # Which experts run is decided in Python, layer by layer: there is no whole graph to compile.
    model._can_compile_fullgraph = False
    model.save_pretrained = _refuse_to_save
    weakref.finalize(model, binding.close)
    return Loaded(model, tokenizer)


def _check_arguments(kwargs: dict[str, Any]) -> None:
    for name in ("quantization_config", "experts_implementation", "use_safetensors"):
        if name in kwargs:
            raise UsageError(f"emoe.load sets {name} itself: leave it out.")


def _check_rerouting(
    mode: Mode, plan: SlotPlan, needs: list[LayerNeed], model: PreTrainedModel, index: ExpertIndex
) -> None:
    """Modes that reroute need a routing rule, and in each layer at least one token's experts of its own."""
    if mode == "exact":
        return
    for entry in index.layers:
        experts = model.get_submodule(entry.module)
        rule_for(model.get_submodule(entry.module.rpartition(".")[0]), experts)
    if not plan.all_resident and any(quota == 0 for pool in plan.pools for quota in pool.quotas.values()):
        lanes = {need.group: need.slot_nbytes for need in needs}
        least = sum(need.top_k * need.slot_nbytes for need in needs) + sum(lanes.values())
        raise BudgetError(
            f"mode {mode!r} needs room for one token's experts in every layer and one to read through, {least} "
            f"bytes ({format_bytes(least)}), and the budget is {format_bytes(plan.budget_bytes)}. Give that much, or "
            f"use mode 'exact', which works from {format_bytes(plan.floor_bytes)} up."
        )


def _bind(model: PreTrainedModel, binding: Binding, placement: Placement, reader: Reader) -> None:
    """Make the banks and attach each experts module to its layer."""
    runtime, index = binding.runtime, binding.index
    entries = {entry.layer: entry for entry in index.layers}
    shards: dict[int, list[Shard]] = {}
    for pool_plan in binding.plan.pools:
        members = [need for need in placement.needs if need.group == pool_plan.group]
        first = entries[members[0].layer]
        device = placement.devices[pool_plan.group]
        experts = {need.layer: need.experts for need in members}
        table = ResidencyTable(pool_plan, experts, binding.ahead.rule(experts, pool_plan.quotas))
        bank = Bank(first.parts, pool_plan.slots, device)
        firsts = placement.firsts.get(pool_plan.group)
        pool = make_pool(table, bank, device, binding.host, index, reader, binding.loader, firsts)
        binding.pools.append(pool)
        kernel = kernel_of(device.place, torch_dtype(first.run_dtype))
        math = ExpertMath(model.get_submodule(first.module), kernel)
        weights = [math.bind(views) for views in bank.views]
        for need in members:
            begins = 0 if firsts is None else firsts[need.layer]
            shards.setdefault(need.layer, []).append(Shard(pool, begins, need.experts, weights))
    for number, own in shards.items():
        module = model.get_submodule(entries[number].module)
        dtype = torch_dtype(entries[number].run_dtype)
        pool, count = own[0].pool, sum(shard.count for shard in own)
        math = ExpertMath(module, kernel_of(pool.bank.device, dtype))
        layer = LayerRuntime(number, count, pool, math, runtime, own[0].weights, dtype)
        layer.spread = Spread(number, math, own) if len(own) > 1 else None
        runtime.layers[number] = layer
        module._emoe_layer = layer
        if runtime.mode != "exact":
            binding.handles.append(_attach_rule(model, entries[number], layer))
    equip(runtime.layers.values(), binding.on_miss)
    binding.kernel = kernel_of(binding.pools[0].bank.device, model.dtype)
    binding.dense = DenseKernels(model, binding.kernel)
    binding.handles.append(binding.dense)
    ends = getattr(model.generation_config, "eos_token_id", None)
    runtime.end_tokens = frozenset(ends if isinstance(ends, list | tuple) else () if ends is None else (ends,))
    runtime.watch(model)


def _attach_rule(model: PreTrainedModel, entry: LayerIndex, layer: LayerRuntime) -> Any:
    block: nn.Module = model.get_submodule(entry.module.rpartition(".")[0])
    rule = rule_for(block, model.get_submodule(entry.module))

    def observe(ids: torch.Tensor, weights: torch.Tensor) -> None:
        layer.owner.note_route(layer, ids, weights)

    return rule.attach(layer.allowed, observe)


def _refuse_to_save(*args: object, **kwargs: object) -> None:
    raise UsageError(
        "a model made by emoe.load holds its dense weights only, so saving it would lose the experts. Copy the "
        "checkpoint's folder, or load it with transformers to save it."
    )


def _tokenizer(path: Path, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None where it has none (a folder of weights alone).

    Raises:
        CheckpointError: transformers cannot read it, with whatever error that shows.
    """
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    trust = bool(kwargs.get("trust_remote_code", False))
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path, trust_remote_code=trust))
    except (ImportError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{path}: transformers cannot read the tokenizer ({type(error).__name__}: {error}). {_remedy(path)}"
        ) from error


def _remedy(path: Path) -> str:
    """What to do about a tokenizer that cannot be read: transformers' own advice names one package of several."""
    lacking = [name for name in ("sentencepiece", "tiktoken", "protobuf") if not _installed(name)]
    if (path / "tokenizer.json").exists() or not lacking:
        return "Download its tokenizer files again."
    return (
        f"It has no tokenizer.json, and older files are read by packages that are not all here: "
        f"pip install {' '.join(lacking)}; or add tokenizer.json to the folder."
    )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


__all__ = ["Binding", "Loaded", "binding_of", "close", "label_task", "layer_needs", "load"]
