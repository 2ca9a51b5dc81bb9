"""What should be resident next: Equation 2 of the paper, and the best L experts of each layer. Pure arithmetic.

Layers are ranks here: positions among the MoE layers, 0 nearest the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emoe.errors import UsageError

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class TaskDemand:
    """The running requests of one task, and what is expected of them.

    Attributes:
        input_tokens: W_j, the input tokens of each running request.
        output_tokens: W_o, the output tokens still expected of each request.
        shares: f, float [layers, experts]: the predicted share of tokens per expert.
        sensitive: s, bool [layers]; None: every layer is.
    """

    input_tokens: Sequence[int]
    output_tokens: float
    shares: Array
    sensitive: Array | None = None

    @property
    def tokens(self) -> float:
        """Sum over requests of W_j, plus T * W_o."""
        return sum(self.input_tokens) + len(self.input_tokens) * self.output_tokens


def expected_tokens(demands: Iterable[TaskDemand]) -> Array:
    """N of Equation 2, float64 [layers, experts]: the tokens each expert is expected to get from layers that matter.

    Raises:
        UsageError: no demand, or shares and sensitivities whose shapes do not fit each other.
    """
    total: Array | None = None
    for demand in demands:
        shares = np.asarray(demand.shares, dtype=np.float64)
        if shares.ndim != 2 or (total is not None and shares.shape != total.shape):
            raise UsageError(f"predicted shares of shape {list(shares.shape)} do not fit; [layers, experts] is wanted.")
        votes = demand.tokens * shares
        if demand.sensitive is not None:
            if np.shape(demand.sensitive) != shares.shape[:1]:
                raise UsageError(
                    f"sensitivity of shape {list(np.shape(demand.sensitive))} does not fit {shares.shape[0]} layers."
                )
            votes = np.where(np.asarray(demand.sensitive, dtype=bool)[:, None], votes, 0.0)
        total = votes if total is None else total + votes
    if total is None:
        raise UsageError("a plan needs at least one task with running requests.")
    return total


def best_keys(tokens: Array, quotas: Sequence[int]) -> list[list[int]]:
    """The experts of each layer that should be resident: the `quotas[rank]` with most expected tokens, most first.

    Ties go to the lower number. An expert that nobody votes for (0 tokens) is not in the plan: loading it would help
    nobody, while a resident that nobody votes for may stay as long as nothing needs its slot.

    Args:
        tokens: [layers, experts], as `expected_tokens` gives them.
        quotas: L of each layer.

    Raises:
        UsageError: not one quota per layer.
    """
    if len(quotas) != len(tokens):
        raise UsageError(f"{len(quotas)} quotas do not fit {len(tokens)} layers.")
    order = np.argsort(-tokens, axis=1, kind="stable")
    return [
        [expert for expert in order[rank, :quota].tolist() if tokens[rank, expert] > 0]
        for rank, quota in enumerate(quotas)
    ]


def best_keys_of_all(tokens: Array, slots: int) -> list[list[int]]:
    """As `best_keys`, for one pool of `slots` that all layers share: the keys with most expected tokens of all.

    Every layer sees the same tokens, so that is the choice with the fewest expected misses. Ties go to the lower layer,
    then to the lower number.
    """
    chosen: list[list[int]] = [[] for _ in tokens]
    experts = tokens.shape[1]
    for number in np.argsort(-tokens, axis=None, kind="stable")[:slots].tolist():
        if tokens.flat[number] > 0:
            chosen[number // experts].append(number % experts)
    return chosen
