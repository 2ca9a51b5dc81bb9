"""The plan: what a model needs, and what a memory holds of it. Arithmetic."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from emoe.checkpoint.codecs.formats import NATIVE
from emoe.checkpoint.memory_room import memory_room
from emoe.config import AUTO, Embeddings, ExpertMemory, format_bytes
from emoe.errors import UnsupportedModelError, UsageError
from emoe.planner.activations import activation_bytes, why_not_native
from emoe.planner.facts import Facts, layer_needs
from emoe.planner.limits import CPU
from emoe.planner.verdict import verdict
from emoe.residency.budget import LayerNeed, SlotPlan, floor_bytes, plan_host, plan_slots, total_bytes

IMPORT_BYTES = 334 << 20
"""Resident memory of a process that has imported emoe.model and one model class (torch 2.13 CPU build, transformers
5.23). docs/log.md has the measurements."""

RUNTIME_BYTES = 40 << 20
"""What loading and the first passes add for good, whatever the model: thread pools, compiled kernels, late imports."""

READ_BUFFER_BYTES = (4 + 7) * ((1 << 20) + 8192)
"""A buffer of checkpoint.readers.STAGING_BYTES for each of the loader threads of O_DIRECT (model.bind) and of those
that help them (readers.DIRECT_DEPTH)."""

CACHE_STEP = 64
"""Tokens by which the cache of keys and values grows (emoe.model.cache.STEP)."""

DEVICE_RUNTIME_BYTES = 640 << 20
"""Taken for what CUDA keeps on a device beside tensors: its context, kernels, cuBLAS's workspace. Not measured here."""

CUDA_ASSUMED = "what CUDA takes for itself, on the device and of the process, is assumed, not measured"

DEFAULT_CONTEXT = 8192

Fit = Literal["all", "some", "none"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes by purpose. `memory_bytes` is what may be used where the model runs, None when nothing was asked about it:
    the process's memory on a CPU. On a GPU it is the device's, and the process is counted apart: `process_bytes`,
    pinned host memory included, of `process_limit_bytes`.

    Experts are counted as `expert_dtype` stores them; natively all of them are `native_expert_bytes`. With `embeddings`
    on "disk", `dense_bytes` are without the `lookup_bytes` of the input embedding. `prompts_by` says whose kernels the
    activations are counted for, "native" (the C ones) or "torch", and why.
    """

    model: str
    model_type: str
    dtype: str
    context: int
    batch: int
    prompt: int
    checkpoint_bytes: int
    dense_bytes: int
    expert_bytes: int
    cache_bytes: int
    cache_layers: dict[str, int]
    activation_bytes: int
    buffer_bytes: int
    import_bytes: int
    runtime_bytes: int
    experts: int
    layers: int
    experts_per_layer: int
    expert_nbytes: int
    top_k: int
    floor_bytes: int
    memory_bytes: int | None
    memory_source: str
    expert_memory: str | None
    host_memory: str | None
    host_bytes: int
    host_experts: int
    budget_bytes: int
    resident_bytes: int
    resident_experts: int
    fit: Fit
    source: str
    assumed: tuple[str, ...]
    expert_dtype: str = NATIVE
    native_expert_bytes: int = 0
    embeddings: Embeddings = "memory"
    lookup_bytes: int = 0
    device: str = CPU
    device_runtime_bytes: int = 0
    process_limit_bytes: int | None = None
    process_source: str = ""
    prompts_by: str = "torch"

    @property
    def on_device(self) -> bool:
        """Whether the model runs in other memory than the process's."""
        return self.device != CPU

    @property
    def process_bytes(self) -> int:
        """The process: all of it on a CPU, else what stays in the machine's memory beside a GPU."""
        return self._process_rest_bytes + self.host_bytes if self.on_device else self.total_bytes

    @property
    def _process_rest_bytes(self) -> int:
        return self.import_bytes + self.runtime_bytes + self.buffer_bytes

    @property
    def process_fits(self) -> bool:
        """Whether the process keeps to its limit, where that is another than the device's."""
        return self.process_limit_bytes is None or self.process_bytes <= self.process_limit_bytes

    @property
    def lossy(self) -> bool:
        """Whether the experts are stored in a form that can change the text."""
        return self.expert_dtype != NATIVE

    @property
    def rest_bytes(self) -> int:
        """Everything but the experts, where the model runs."""
        beside = self.device_runtime_bytes if self.on_device else self._process_rest_bytes
        return self.dense_bytes + self.cache_bytes + self.activation_bytes + beside

    @property
    def total_bytes(self) -> int:
        """Where the model runs, with the experts this plan keeps resident: the process, or the GPU's memory."""
        return self.rest_bytes + self.resident_bytes

    @property
    def full_bytes(self) -> int:
        """The same with every expert resident."""
        return self.rest_bytes + self.expert_bytes

    @property
    def smallest_bytes(self) -> int:
        """The same with as few experts resident as work at all."""
        return self.rest_bytes + self.floor_bytes

    @property
    def resident_share(self) -> float:
        """Resident experts, 0 to 1."""
        return self.resident_experts / self.experts

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self) | {
            "rest_bytes": self.rest_bytes,
            "total_bytes": self.total_bytes,
            "process_bytes": self.process_bytes,
            "full_bytes": self.full_bytes,
            "smallest_bytes": self.smallest_bytes,
            "resident_share": self.resident_share,
            "lossy": self.lossy,
            "verdict": verdict(self),
        }


def make_plan(
    facts: Facts,
    *,
    model: str,
    memory_bytes: int | None = None,
    memory_source: str = "given",
    device: str = CPU,
    process_limit_bytes: int | None = None,
    process_source: str = "",
    expert_memory: ExpertMemory | None = None,
    embeddings: Embeddings = "memory",
    host_memory: ExpertMemory | str | None = None,
    context: int | None = None,
    batch: int = 1,
    prompt: int | None = None,
    chunk: int | None = None,
) -> Plan:
    """Plan `facts` for `batch` sequences of `context` tokens (None: 8192 or the model's most, whichever is
    less), with prompts of `prompt` tokens at most (None: the context).

    Prompts are read in passes of `chunk` tokens (None: in one). With `expert_memory` the experts get that much; else
    what `memory_bytes` leaves beside everything else; else all. `embeddings` "auto" takes the input embedding out of
    memory where otherwise not every expert would be in it. On another `device` than the CPU `memory_bytes` is that
    device's, and the process, with the pinned `host_memory` (None: "auto"), has a limit of its own.

    Raises:
        UsageError: a number that cannot be meant, or host memory of a model that runs on the CPU.
        UnsupportedModelError: the embedding on disk where it is tied to another weight.
        BudgetError: `expert_memory` is below the floor.
    """
    on_device = device != CPU
    if host_memory is not None and not on_device:
        raise UsageError("host memory is for models that run on a GPU: give --device, e.g. cuda")
    if context is None:
        context = min(DEFAULT_CONTEXT, facts.max_context or DEFAULT_CONTEXT)
    prompt = context if prompt is None else prompt
    for name, value in (("context", context), ("batch", batch), ("prompt", prompt)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if prompt > context:
        raise UsageError(f"a prompt of {prompt} tokens does not fit a context of {context}; raise --context")
    needs = layer_needs(facts)
    floor, total = floor_bytes(needs), total_bytes(needs)
    cache = facts.cache_bytes(cache_tokens(context), batch)
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk must be at least 1, not {chunk}")
    read = min(prompt, chunk or prompt)
    by_torch = "" if on_device else why_not_native(facts)
    native = not on_device and not by_torch
    activations = activation_bytes(facts, read, batch, prompt - read, native=native, on_device=on_device)
    more = activation_bytes(facts, read, batch, prompt - read) - activations if native else 0
    process = READ_BUFFER_BYTES + IMPORT_BYTES + RUNTIME_BYTES
    if embeddings == "disk" and not facts.lookup_bytes:
        raise UnsupportedModelError(f"the input embedding of {model} is tied to another weight: it stays in memory")
    rest = facts.dense_bytes + cache + activations + (DEVICE_RUNTIME_BYTES if on_device else process)
    slots, fits = _slots(rest, memory_bytes, expert_memory, needs)
    on_disk = embeddings == "disk" or (embeddings == "auto" and facts.lookup_bytes > 0 and _fit(slots, fits) != "all")
    if on_disk:
        rest -= facts.lookup_bytes
        slots, fits = _slots(rest, memory_bytes, expert_memory, needs)
    host = None
    if on_device:
        free = memory_room().available_bytes if process_limit_bytes is None else max(0, process_limit_bytes - process)
        host = plan_host(host_memory, slots, needs, free)
    if host is not None and process_limit_bytes is not None:
        fits = fits and process + host.nbytes <= process_limit_bytes
    return Plan(
        model=model,
        model_type=facts.model_type,
        dtype=facts.dtype,
        context=context,
        batch=batch,
        prompt=prompt,
        checkpoint_bytes=facts.checkpoint_bytes,
        dense_bytes=facts.dense_bytes - (facts.lookup_bytes if on_disk else 0),
        expert_bytes=total,
        cache_bytes=cache,
        cache_layers=dict(Counter(layer.kind for layer in facts.cache_layers)),
        activation_bytes=activations,
        buffer_bytes=READ_BUFFER_BYTES,
        import_bytes=IMPORT_BYTES,
        runtime_bytes=RUNTIME_BYTES,
        experts=facts.experts,
        layers=len(needs),
        experts_per_layer=max(need.experts for need in needs),
        expert_nbytes=max(need.slot_nbytes for need in needs),
        top_k=facts.top_k,
        floor_bytes=floor,
        memory_bytes=memory_bytes,
        memory_source="" if memory_bytes is None else memory_source,
        expert_memory=None if expert_memory is None else str(expert_memory),
        host_memory=(AUTO if on_device else None) if host_memory is None else str(host_memory),
        host_bytes=0 if host is None else host.nbytes,
        host_experts=0 if host is None else sum(pool.slots for pool in host.pools.values()),
        budget_bytes=slots.budget_bytes,
        resident_bytes=slots.resident_bytes,
        resident_experts=slots.slots,
        fit=_fit(slots, fits),
        source=facts.source,
        assumed=(
            *(*facts.assumed, *_beyond(context, facts.max_context)),
            *((CUDA_ASSUMED,) if on_device else ()),
            *((_by_c(more),) if native else ()),
        ),
        expert_dtype=facts.expert_dtype,
        native_expert_bytes=facts.native_expert_bytes or total,
        embeddings="disk" if on_disk else "memory",
        lookup_bytes=facts.lookup_bytes,
        device=device,
        device_runtime_bytes=DEVICE_RUNTIME_BYTES if on_device else 0,
        process_limit_bytes=process_limit_bytes if on_device else None,
        process_source=process_source if on_device else "",
        prompts_by="native" if native else f"torch: {by_torch or 'the C kernels are for CPUs'}",
    )


def _slots(
    rest: int, memory_bytes: int | None, expert_memory: ExpertMemory | None, needs: list[LayerNeed]
) -> tuple[SlotPlan, bool]:
    """The experts' slots beside `rest` bytes, and whether both fit."""
    if expert_memory is not None:
        slots = plan_slots(expert_memory, needs)
    else:
        total = total_bytes(needs)
        left = total if memory_bytes is None else min(memory_bytes - rest, total)
        slots = plan_slots(ExpertMemory("bytes", max(left, floor_bytes(needs))), needs)
    return slots, memory_bytes is None or rest + slots.resident_bytes <= memory_bytes


def cache_tokens(context: int) -> int:
    """Tokens that a cache of `context` tokens has room for: it grows by steps (emoe.model.cache)."""
    return -(-context // CACHE_STEP) * CACHE_STEP


def _beyond(context: int, most: int | None) -> tuple[str, ...]:
    if most is None or context <= most:
        return ()
    return (f"the model was made for {most} tokens; a context of {context} is beyond that",)


def _by_c(more: int) -> str:
    """What is supposed of a machine whose kernels nobody has compiled yet, and what it would cost."""
    also = f": by torch they take {format_bytes(more)} more" if more > 0 else ""
    return f"prompts are counted as the C kernels read them, which loading compiles{also}"


def _fit(slots: SlotPlan, fits: bool) -> Fit:
    if not fits:
        return "none"
    return "all" if slots.all_resident else "some"
