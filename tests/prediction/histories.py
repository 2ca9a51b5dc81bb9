"""Made-up histories: traces whose routing is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import DECODE, Trace, id_dtype, missing_id

Array = NDArray[Any]


def trace_of(shape: RoutingShape, prompts: Sequence[Array], tasks: Sequence[str | None]) -> Trace:
    """The trace of these prompts' routes, int [tokens, layers, k] each."""
    names = tuple(sorted({task for task in tasks if task is not None}))
    lengths = [len(routes) for routes in prompts]
    rows = np.concatenate([*prompts, np.zeros((0, shape.layers, shape.top_k))])
    return Trace(
        experts=rows.astype(id_dtype(shape.experts)),
        phase=np.full(len(rows), DECODE, dtype=np.uint8),
        step=np.arange(len(rows)),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        task=np.array([-1 if task is None else names.index(task) for task in tasks], dtype=np.int32),
        tasks=names,
        layers=np.arange(shape.layers, dtype=np.int32),
        num_experts=shape.experts,
        prompts=({},) * len(prompts),
    )


def random_routes(rng: np.random.Generator, shape: RoutingShape, tokens: int, missing: float = 0.0) -> Array:
    """Distinct experts for each token and layer; a share `missing` of the choices is "not computed"."""
    order = rng.random((tokens, shape.layers, shape.experts)).argsort(axis=2)
    routes = order[:, :, : shape.top_k].astype(id_dtype(shape.experts))
    routes[rng.random(routes.shape) < missing] = missing_id(routes.dtype)
    return routes


def routes_by_task(rng: np.random.Generator, shape: RoutingShape, tokens: int, task: int) -> Array:
    """Layer l of task t prefers the experts from 3 t + l on; nine tokens of ten go to them."""
    layer = np.arange(shape.layers)[None, :, None]
    favoured = (3 * task + layer + np.arange(shape.top_k)[None, None, :]) % shape.experts
    loyal = rng.random((tokens, 1, 1)) < 0.9
    return np.where(loyal, favoured, random_routes(rng, shape, tokens)).astype(id_dtype(shape.experts))
