"""Trace layouts that others wrote, read as `Trace`.

Generated tokens of many prompts, one row each: `experts` uint8 [tokens, layers, k], `weights_u8` (weight x 255),
`offsets` [prompts + 1]; with `token_ids` and `token_offsets`, whole texts as ids, where row offsets[i] + j routes
token n_prompt_tokens + j of text i. Beside it `prompts.jsonl` or `prompts.jsonl.gz`, one object for each prompt;
its `task`, else its `domain`, is the label.

One prompt, step by step: `sel` uint8 [steps, layers, k] (255: not computed), `weights`, `phase`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from emoe.routing.trace import DECODE, Array, Trace, TraceError, id_dtype, missing_id


def read_foreign(file: Path, arrays: dict[str, Array], num_experts: int | None) -> Trace:
    """The arrays of an .npz file in one of the layouts above. Raises TraceError for any other."""
    try:
        if {"experts", "weights_u8", "offsets"} <= arrays.keys():
            return _generated(file, arrays, num_experts)
        if {"sel", "weights", "phase"} <= arrays.keys():
            return _one_prompt(arrays, num_experts)
    except TraceError as error:
        raise TraceError(f"{file}: {error}") from error
    except (IndexError, ValueError) as error:
        raise TraceError(f"{file}: the arrays contradict each other ({error})") from error
    if "counts" in arrays:
        raise TraceError(f"{file} holds counts for each prompt, without the order of tokens that a trace needs")
    raise TraceError(f"{file} is no trace that emoe knows; it holds {', '.join(sorted(arrays)) or 'nothing'}")


def _generated(file: Path, arrays: dict[str, Array], num_experts: int | None) -> Trace:
    experts, offsets = arrays["experts"], arrays["offsets"].astype(np.int64)
    rows, prompts = len(experts), len(offsets) - 1
    described = _described(file.parent, prompts)
    labels = [line.get("task", line.get("domain")) for line in described]
    tasks = tuple(dict.fromkeys(str(label) for label in labels if label is not None))
    token_ids = text = text_offsets = None
    lengths = [line.get("n_prompt_tokens") for line in described]
    if "token_ids" in arrays and "token_offsets" in arrays and None not in lengths:
        token_ids, text, text_offsets = _texts(arrays, offsets, np.array(lengths, dtype=np.int64))
    experts, count = _ids(experts, num_experts)
    return Trace(
        experts=experts,
        weights=(arrays["weights_u8"] / np.float32(255)).astype(np.float16),
        phase=np.full(rows, DECODE, dtype=np.uint8),
        step=np.arange(rows, dtype=np.int64),
        token_ids=token_ids,
        offsets=offsets,
        task=np.array([-1 if x is None else tasks.index(str(x)) for x in labels], dtype=np.int32),
        tasks=tasks,
        prompt_token_ids=text,
        prompt_token_offsets=text_offsets,
        layers=np.arange(experts.shape[1], dtype=np.int32),
        num_experts=count,
        prompts=tuple(described),
        source={"file": file.name, "layout": "generated tokens"},
    )


def _texts(arrays: dict[str, Array], offsets: Array, lengths: Array) -> tuple[Array, Array, Array]:
    """Routed tokens' ids, prompts' ids, prompts' offsets, out of whole texts."""
    ids, starts = arrays["token_ids"].astype(np.int32), arrays["token_offsets"].astype(np.int64)
    if len(starts) != len(offsets) or bool((starts[:-1] + lengths + np.diff(offsets) > starts[1:]).any()):
        raise TraceError("token_offsets leaves a prompt fewer tokens than were routed for it")
    routed = np.repeat(starts[:-1] + lengths - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    prompt = np.repeat(starts[:-1] - ends[:-1], lengths) + np.arange(ends[-1])
    return ids[routed], ids[prompt], ends


def _one_prompt(arrays: dict[str, Array], num_experts: int | None) -> Trace:
    experts, count = _ids(arrays["sel"], num_experts)
    steps, layers = experts.shape[:2]
    return Trace(
        experts=experts,
        weights=np.where(experts == missing_id(experts.dtype), 0, arrays["weights"]).astype(np.float16),
        phase=arrays["phase"].astype(np.uint8),
        step=np.arange(steps, dtype=np.int64),
        offsets=np.array([0, steps], dtype=np.int64),
        task=np.array([-1], dtype=np.int32),
        tasks=(),
        layers=np.arange(layers, dtype=np.int32),
        num_experts=count,
        prompts=({},),
        source={"layout": "one prompt"},
    )


def _ids(experts: Array, num_experts: int | None) -> tuple[Array, int]:
    """Ids with "not computed" as this package writes it, and the number of experts."""
    if experts.ndim != 3 or experts.dtype.kind != "u":
        raise TraceError(f"expert ids are {experts.dtype} {list(experts.shape)}, not unsigned [tokens, layers, k]")
    absent = experts == missing_id(experts.dtype)
    known = experts[~absent]
    count = num_experts or (int(known.max()) + 1 if known.size else 1)
    dtype = id_dtype(count)
    ids = experts.astype(dtype)
    ids[absent] = missing_id(dtype)
    return ids, count


def _described(folder: Path, prompts: int) -> list[dict[str, Any]]:
    """What is known of each prompt; nothing where no such file lies beside the trace."""
    for name in ("prompts.jsonl", "prompts.jsonl.gz"):
        path = folder / name
        if not path.exists():
            continue
        try:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise TraceError(f"{path} cannot be read as JSON lines: {error}") from error
        if len(lines) != prompts or not all(isinstance(line, dict) for line in lines):
            raise TraceError(f"{path} describes {len(lines)} prompts, the trace beside it holds {prompts}")
        return lines
    return [{} for _ in range(prompts)]
