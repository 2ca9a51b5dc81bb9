"""What emoe keeps beside a model, from `load` to `close`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from emoe.checkpoint.codecs.formats import NATIVE
from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.readers import Reader
from emoe.config import OnMiss
from emoe.errors import UsageError
from emoe.kernels.choice import Kernel
from emoe.kernels.dense import DenseKernels
from emoe.model.embedding import RowsOnDisk
from emoe.model.foresight import Ahead
from emoe.model.runtime import Runtime
from emoe.residency.budget import HostPlan, SlotPlan
from emoe.residency.loader import Loader
from emoe.residency.pool import ExpertPool

_CLOSE_S = 1.0
"""Closing waits so long for a layer that is running; beyond, its own loads end it."""


class Binding:
    """What emoe keeps beside a model: found by `emoe.stats` and `emoe.close`."""

    def __init__(
        self,
        runtime: Runtime,
        index: ExpertIndex,
        plan: SlotPlan,
        reader: Reader,
        reason: str,
        loader: Loader,
        ahead: Ahead,
    ) -> None:
        self.runtime = runtime
        self.index = index
        self.plan = plan
        self.reader = reader
        self.reader_reason = reason
        self.loader = loader
        self.ahead = ahead
        self.host: HostPlan | None = None
        self.on_miss: OnMiss = "load"
        self.embedding: RowsOnDisk | None = None
        self.embeddings_reason = ""
        self.firsts: dict[int, dict[int, int]] = {}
        self.spread = ""
        self.pools: list[ExpertPool] = []
        self.handles: list[Any] = []
        self.kernel: Kernel | None = None
        self.dense: DenseKernels | None = None
        self.attention = ""
        self.finishers: list[Callable[[], object]] = []

    @property
    def lossy(self) -> bool:
        """Whether the text can differ from the full model's: by the mode, or by how experts are stored."""
        return self.ahead.lossy or self.index.expert_dtype != NATIVE

    def close(self) -> None:
        """Stop the threads and finish the trace; the model cannot run afterwards. Safe to call twice."""
        self.runtime.closed = True
        if self.runtime.lock.acquire(timeout=_CLOSE_S):
            for pool in self.pools:
                pool.prefetches.stop()
            self.runtime.lock.release()
        self.loader.close()
        self.ahead.close()
        self.reader.close()
        for pool in self.pools:
            pool.close()
        for handle in self.handles:
            handle.remove()
        while self.finishers:
            self.finishers.pop()()


def close(model: PreTrainedModel) -> None:
    """Stop a model's loader threads and finish its trace. It cannot run afterwards. Safe to call twice.

    Raises:
        UsageError: the model was not made by `load`.
    """
    binding_of(model).close()


def label_task(model: PreTrainedModel, task: str | None) -> None:
    """Label the prompts that follow with their task (traces carry it).

    Raises:
        UsageError: the model was not made by `load`.
    """
    binding_of(model).runtime.task = task


def binding_of(model: PreTrainedModel) -> Binding:
    """Return what `load` keeps beside the model.

    Raises:
        UsageError: the model was not made by `load`.
    """
    binding = getattr(model, "_emoe_binding", None)
    if not isinstance(binding, Binding):
        raise UsageError(f"this {type(model).__name__} was not made by emoe.load, so emoe knows nothing about it.")
    return binding
