"""Cross-correlation of expert choices, as Figures 7 to 9 use it, and what it has to be compared with.

Of two rows x and y of one number for each of a layer's E experts (tokens of a prompt routed to each):

    r(x, y) = sum_e (x_e - mean x)(y_e - mean y) / sqrt(sum_e (x_e - mean x)^2  sum_e (y_e - mean y)^2)

the normalised cross-correlation at lag zero, Pearson's r over experts: 1 where both prefer the same experts in the same
proportion, 0 on average where they prefer experts independently. The paper does not define the measure it plots; signal
processing's normalised cross-correlation also goes without subtracting means. That one, c(x, y), is near 1 for prompts
that prefer nothing at all, so it is reported beside r and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emoe.bench.reproduce.findings import Verdict
from emoe.prediction.protocol import Array

Measure = Callable[[Array, Array], Array]

METHOD = (
    "Cross-correlation is r(x, y) = sum_e (x_e - mean x)(y_e - mean y) / sqrt(sum_e (x_e - mean x)^2 sum_e "
    "(y_e - mean y)^2) over the E experts e of a layer, where x_e and y_e count the tokens (of a prompt and "
    "its answer) sent to expert e: 1 means the same experts in the same proportion, 0 no relation. The paper "
    "does not define the measure it plots. Without subtracting means it would be c(x, y) = sum_e x_e y_e / "
    "sqrt(sum_e x_e^2 sum_e y_e^2), which is near 1 even for routing without any preference; it is given "
    "beside r and decides nothing."
)
"""For the text of an experiment."""


def correlation(x: Array, y: Array) -> Array:
    """float64 [...]: r over the last axis; nan where a row is constant."""
    return uncentred(x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True))


def uncentred(x: Array, y: Array) -> Array:
    """float64 [...]: c over the last axis; nan where a row is zero."""
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    found: Array = np.divide((x * y).sum(axis=-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)
    return found


def mean(values: Array) -> float:
    """Of what is a number; nan where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def standard_error(values: Array) -> float:
    """Of the mean over the first axis (prompts), after averaging over the others; nan with fewer than two."""
    rows = np.array([mean(row) for row in values])
    rows = rows[~np.isnan(rows)]
    return float(rows.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else float("nan")


def apart(counts: Array, distance: int, measure: Measure = correlation) -> Array:
    """float64 [pairs, layers]: r of each prompt with the one `distance` later, of counts [prompts, layers, experts]."""
    return measure(counts[:-distance], counts[distance:])


def independent(counts: Array, rng: np.random.Generator) -> Array:
    """Counts of prompts as long as these whose tokens go to experts by the layer's popularity alone.

    Popularity is that of the sum over prompts [prompts, layers, experts]. What r such prompts reach is due to some
    experts being popular with everybody.
    """
    popular = counts.sum(axis=0) / np.maximum(1, counts.sum(axis=(0, 2))[:, None])
    drawn: Array = rng.multinomial(counts.sum(axis=2), popular[None])
    return drawn


def without_preference(counts: Array, rng: np.random.Generator) -> Array:
    """Counts of prompts as long as these whose tokens go to all experts equally often."""
    drawn: Array = rng.multinomial(counts.sum(axis=2), np.full(counts.shape[2], 1 / counts.shape[2]))
    return drawn


def beyond_popularity(counts: Array) -> Array:
    """Shares of each prompt's look-ups [prompts, layers, experts] less their mean over prompts."""
    shares = counts / np.maximum(1, counts.sum(axis=2, keepdims=True))
    found: Array = shares - shares.mean(axis=0)
    return found


def renaming(x: Array, y: Array) -> Array:
    """int [experts]: renaming[e] is the expert of y that stands for expert e of x, one to one.

    An expert's number means nothing from one layer to the next. Of rows x and y [rows, experts] that belong together,
    the renaming found has (nearly) the highest mean r: pairs are taken greedily, then swapped while that gains.
    """

    def standard(rows: Array) -> Array:
        centred = rows - rows.mean(axis=1, keepdims=True)
        scale = np.sqrt((centred * centred).sum(axis=1, keepdims=True))
        found: Array = np.divide(centred, scale, out=np.zeros(centred.shape), where=scale > 0)
        return found

    gain = standard(x).T @ standard(y)
    experts, left = len(gain), gain.copy()
    names = np.zeros(experts, dtype=np.int64)
    for _ in range(experts):
        e, f = np.unravel_index(int(left.argmax()), left.shape)
        names[e] = f
        left[e, :] = left[:, f] = -np.inf
    while True:
        now = gain[:, names]  # [e, e']: of calling the partner of e' the partner of e
        swap = now + now.T - np.diag(now)[:, None] - np.diag(now)[None, :]
        a, b = np.unravel_index(int(swap.argmax()), swap.shape)
        if swap[a, b] <= 1e-9:
            return names
        names[[a, b]] = names[[b, a]]


def level(mixed: float, same: float, needed: float) -> Verdict:
    """Whether prompts of mixed tasks, or else at least those of one task, reach what is needed."""
    return "holds" if mixed >= needed else "partly" if same >= needed else "does not hold"
