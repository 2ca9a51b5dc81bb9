"""The list of what `emoe.engine.batching` needs of transformers' continuous batching, and what of it has moved."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import Scheduler

from emoe.errors import UnsupportedModelError

PAGE_SIZE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
"""What transformers calls the tokens of a page."""
KNOWS_FLASH = "auto_switch_to_flash" in inspect.signature(ContinuousBatchingConfig).parameters
"""Whether transformers can be told to leave the attention alone."""

_PARAMETERS: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (ContinuousBatchProcessor, "prepare_next_batch", ("self",)),
    (ContinuousBatchProcessor, "update_batch", ("self",)),
    (ContinuousBatchProcessor, "_generation_step", ("self", "model")),
    (ContinuousBatchingManager, "_create_batch_processor", ("self",)),
    (ModelRunner, "_sample", ("self", "scores", "output_ids")),
    (Scheduler, "__init__", ("self", "cache", "safety_margin", "max_requests_per_batch")),
    (Scheduler, "schedule_batch", ("self", "token_budget", "cache_budget")),
    (Scheduler, "add_waiting_request", ("self", "state")),
    (Scheduler, "set_request_cancellation", ("self", "request_id")),
    (Scheduler, "clear_cancelled_requests", ("self",)),
    (
        Scheduler,
        "_process_candidates",
        ("self", "candidates", "token_budget", "cache_budget", "request_ids_to_remove_from_waiting"),
    ),
    (Scheduler, "_cleanup_waiting_queue", ("self", "request_ids_to_remove_from_waiting")),
    (PagedAttentionCache, "free_blocks", ("self", "request_id")),
)
_STATE = ("request_id", "initial_tokens", "max_new_tokens", "eos_token_id", "tokens_to_process", "position_offset")
_SETTINGS = (PAGE_SIZE, "num_blocks", "max_batch_tokens", "max_requests_per_batch", "scheduler_type", "safety_margin")


def moved() -> list[str]:
    """What of transformers' continuous batching is not as the engine needs it; empty where everything is."""
    found = []
    for owner, name, wanted in _PARAMETERS:
        method = getattr(owner, name, None)
        names = () if method is None else tuple(inspect.signature(method).parameters)
        if names[: len(wanted)] != wanted:
            found.append(f"{owner.__name__}.{name}({', '.join(names)}) instead of ({', '.join(wanted)})")
    fields = inspect.signature(RequestState).parameters
    found += [f"RequestState.{name} is gone" for name in _STATE if name not in fields]
    settings = inspect.signature(ContinuousBatchingConfig).parameters
    found += [f"ContinuousBatchingConfig.{name} is gone" for name in _SETTINGS if name not in settings]
    found += [
        f"RequestStatus.{name} is gone"
        for name in ("PENDING", "PREFILLING", "DECODING", "FINISHED")
        if not hasattr(RequestStatus, name)
    ]
    return found


def check() -> None:
    """Refuse a transformers whose continuous batching has moved.

    Raises:
        UnsupportedModelError: it names the version and what has moved.
    """
    if changes := moved():
        raise UnsupportedModelError(
            f"emoe's engine does not fit the continuous batching of transformers {transformers.__version__}: "
            f"{'; '.join(changes)}. Install another version (5.17 and 5.23 are known to work)."
        )
