"""What a model needs and what a machine can hold, before anything is loaded.

>>> from emoe.planner import plan
>>> plan("path-or-hub-id", memory="16GiB").resident_share
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emoe.checkpoint.codecs.formats import NATIVE, ExpertCodec, codec_of
from emoe.checkpoint.headers import TensorEntry, read_headers
from emoe.checkpoint.settings import read_config
from emoe.checkpoint.source import resolve
from emoe.config import Embeddings, ExpertMemory, parse_host_memory
from emoe.errors import UnsupportedModelError
from emoe.planner.facts import Facts
from emoe.planner.from_headers import facts_from_headers
from emoe.planner.limits import find_limits
from emoe.planner.plan import Plan, make_plan
from emoe.planner.remote import is_hub_id, remote_checkpoint
from emoe.planner.tensors import Unsure
from emoe.planner.verdict import verdict

__all__ = ["Facts", "Plan", "facts_of", "plan", "plan_facts", "verdict"]


def plan(
    model_id: str | Path | None = None,
    *,
    memory: str | int | None = None,
    device: str | None = None,
    process_memory: str | int | None = None,
    expert_memory: str | int | ExpertMemory | None = None,
    embeddings: Embeddings = "memory",
    host_memory: str | int | ExpertMemory | None = None,
    context: int | None = None,
    batch: int = 1,
    prompt: int | None = None,
    chunk: int | None = None,
    dtype: str | None = None,
    expert_dtype: str = NATIVE,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Plan:
    """Plan a checkpoint from its headers and configuration; of a hub model only those are fetched.

    Args:
        model_id: a checkpoint's folder or a hub id; None is the embedded emoe-nano.
        memory: what may be used where the model runs ("16GiB"): of the process's memory, or of the device's; None asks
            what is free there.
        device: where it runs: None or "cpu", "cuda", "cuda:1", or "auto" (all GPUs, their memory together).
        process_memory: on a GPU, what the process may use of the machine's memory, host memory included; None asks the
            machine what is free.
        host_memory: on a GPU, what pinned RAM other experts get: "16GiB", "50%", 0, or "auto" (also None).
        expert_memory: give the experts this much instead of what is left.
        embeddings: where the input embedding lies: "memory", "disk" (its rows are read when they are needed), or
            "auto": on disk where otherwise not every expert would be in memory.
        context: tokens that each sequence may grow to; None: 8192, or what the model was made for if less.
        batch: sequences at once.
        prompt: the longest prompt; None: the context.
        chunk: prompts are read in passes of so many tokens; None: in one.
        dtype: run in this dtype; None: the checkpoint's own.
        expert_dtype: keep experts in this form: "native" (in that dtype), "int8" or "int4" (lossy).
        revision: branch, tag or commit of a hub model.
        token: for private hub models.

    Raises:
        UsageError: an argument that cannot be meant.
        CheckpointError: files missing, truncated or inconsistent.
        UnsupportedModelError: a model that emoe cannot run.
        BudgetError: `expert_memory` below the floor.
    """
    name, facts = facts_of(model_id, dtype=dtype, expert_dtype=expert_dtype, revision=revision, token=token)
    return plan_facts(
        name,
        facts,
        memory=memory,
        device=device,
        process_memory=process_memory,
        expert_memory=expert_memory,
        embeddings=embeddings,
        host_memory=host_memory,
        context=context,
        batch=batch,
        prompt=prompt,
        chunk=chunk,
    )


def plan_facts(
    name: str,
    facts: Facts,
    *,
    memory: str | int | None = None,
    device: str | None = None,
    process_memory: str | int | None = None,
    expert_memory: str | int | ExpertMemory | None = None,
    embeddings: Embeddings = "memory",
    host_memory: str | int | ExpertMemory | None = None,
    context: int | None = None,
    batch: int = 1,
    prompt: int | None = None,
    chunk: int | None = None,
) -> Plan:
    """Plan what `facts_of` found; arguments and errors as of `plan`."""
    limits = find_limits(device, memory, process_memory)
    return make_plan(
        facts,
        model=name,
        memory_bytes=limits.memory_bytes,
        memory_source=limits.memory_source,
        device=limits.device,
        process_limit_bytes=limits.process_bytes,
        process_source=limits.process_source,
        expert_memory=None if expert_memory is None else ExpertMemory.parse(expert_memory),
        embeddings=embeddings,
        host_memory=parse_host_memory(host_memory),
        context=context,
        batch=batch,
        prompt=prompt,
        chunk=chunk,
    )


def facts_of(
    model_id: str | Path | None = None,
    *,
    dtype: str | None = None,
    expert_dtype: str = NATIVE,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[str, Facts]:
    """A model's name for people and its facts, from headers where they suffice, else from a dry run."""
    codec = codec_of(expert_dtype)
    if model_id is None:
        from emoe import nano

        return "emoe-nano", _local_facts(nano.path(), dtype, codec)
    if isinstance(model_id, str) and is_hub_id(model_id):
        path, config, entries = remote_checkpoint(model_id, revision=revision, token=token)
        if path is not None:
            return model_id, _local_facts(path, dtype, codec)
        return model_id, _remote_facts(model_id, config, entries, dtype, codec)
    path = resolve(model_id)
    return str(model_id), _local_facts(path, dtype, codec)


def _local_facts(path: Path, dtype: str | None, codec: ExpertCodec | None) -> Facts:
    try:
        return facts_from_headers(path, read_config(path), read_headers(path), dtype, codec)
    except Unsure as doubt:
        from emoe.planner.dry_run import facts_by_dry_run

        return facts_by_dry_run(path, dtype, reason=str(doubt), codec=codec)


def _remote_facts(
    model_id: str,
    config: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    dtype: str | None,
    codec: ExpertCodec | None,
) -> Facts:
    quantised = config.get("quantization_config")
    if quantised:
        from emoe.checkpoint.skeleton import QUANTISED_REMEDY

        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UnsupportedModelError(f"{model_id} is quantised ({method}). {QUANTISED_REMEDY}")
    try:
        return facts_from_headers(Path(model_id), config, entries, dtype, codec)
    except Unsure as doubt:
        raise UnsupportedModelError(
            f"{model_id} cannot be planned without its files, because {doubt}. Download it (`hf download "
            f"{model_id}`) "
            "and plan again."
        ) from doubt
