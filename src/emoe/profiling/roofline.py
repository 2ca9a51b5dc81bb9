"""The least time that a token or a prompt can take on a machine: bytes over bandwidth, operations over rate. Pure.

    floor = floor_of(work, machine, threads)        # emoe.profiling.roofline.floor
    floor.seconds, floor.bound_by                   # what a measured time is held against

Everything overlaps in the limit: reading weights, loading what is missing and computing. So the floor is the longest of
the three, not their sum, and no engine that reads those bytes can be below it. Hits and misses are given as numbers: a
measurement's, or a simulation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from emoe.errors import UsageError
from emoe.planner.facts import Facts, dtype_bytes
from emoe.profiling.machine import Link, Machine
from emoe.routing.final import ends_row_by_row

Bound = Literal["memory", "link", "compute"]


@dataclass(frozen=True, slots=True)
class Work:
    """What one token, or one prompt, takes.

    Attributes:
        dense_bytes: read whatever the route: dense weights, keys and values.
        expert_bytes: of the routed experts, read from where they run.
        missed_bytes: of those, what has to come over the link.
        flops: operations, two for each weight and token.
        dtype: what they run in ("bfloat16").
    """

    dense_bytes: float
    expert_bytes: float
    missed_bytes: float
    flops: float
    dtype: str

    def __post_init__(self) -> None:
        for name in ("dense_bytes", "expert_bytes", "missed_bytes", "flops"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be at least 0, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of some work, its three parts, and which of them it is."""

    seconds: float
    memory_s: float
    link_s: float
    compute_s: float
    bound_by: Bound

    def share(self, measured_s: float) -> float:
        """How much of the limit a measured time reaches, 0 to 1.

        Raises:
            UsageError: a time that is not positive.
        """
        if not measured_s > 0:
            raise UsageError(f"a measured time must be positive, not {measured_s}")
        return self.seconds / measured_s

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def floor(work: Work, machine: Machine, threads: int, link: Link = "direct") -> Floor:
    """The least time of `work` on `machine` with `threads`, misses coming over `link`.

    Raises:
        UsageError: a rate that the work needs was not measured.
    """
    memory_s = (work.dense_bytes + work.expert_bytes) / machine.memory_rate(threads)
    link_s = work.missed_bytes / machine.link_rate(link) if work.missed_bytes else 0.0
    compute_s = work.flops / machine.compute_rate(work.dtype, threads) if work.flops else 0.0
    parts: dict[Bound, float] = {"memory": memory_s, "link": link_s, "compute": compute_s}
    bound_by = max(parts, key=lambda name: parts[name])
    return Floor(parts[bound_by], memory_s, link_s, compute_s, bound_by)


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a model's tokens take, from its facts alone."""

    facts: Facts

    @property
    def routed_bytes(self) -> int:
        """Bytes of the experts of one token, all layers."""
        return sum(min(self.facts.top_k, layer.experts) * layer.expert_nbytes for layer in self.facts.expert_layers)

    @property
    def routed_experts(self) -> int:
        """Experts of one token, all layers."""
        return sum(min(self.facts.top_k, layer.experts) for layer in self.facts.expert_layers)

    @property
    def routed_elements(self) -> float:
        """Weights of the experts of one token, however many bytes each takes."""
        facts = self.facts
        native = facts.native_expert_bytes or facts.expert_bytes
        return self.routed_bytes * native / (facts.expert_bytes * dtype_bytes(facts.dtype))

    @property
    def ends_in_experts(self) -> bool:
        """Whether of a prompt the last decoder layer runs the experts of one token (`emoe.model.final`)."""
        facts = self.facts
        return ends_row_by_row(facts.model_type) and facts.expert_layers[-1].layer == facts.layers - 1

    def prompt_expert_elements(self, tokens: int) -> float:
        """Weights of the routed experts of a prompt's tokens, counted once for each token that is run."""
        last = self.facts.expert_layers[-1]
        share = min(self.facts.top_k, last.experts) * last.expert_nbytes / self.routed_bytes
        unused = (tokens - 1) * share if self.ends_in_experts else 0.0
        return (tokens - unused) * self.routed_elements

    def dense_read_bytes(self, tokens: int = 1) -> int:
        """Bytes of dense weights that a pass over `tokens` reads: of a lookup table only their rows."""
        facts = self.facts
        row = facts.activations.hidden * dtype_bytes(facts.dtype)
        return facts.dense_bytes - facts.lookup_bytes + min(tokens * row, facts.lookup_bytes)

    def token(self, miss_rate: float, context: int = 0) -> Work:
        """One decoded token after `context` others, of whose routed experts a share `miss_rate` is missing.

        Raises:
            UsageError: a share outside 0 to 1.
        """
        _check_share(miss_rate)
        dense, routed = self.dense_read_bytes(), self.routed_bytes
        return Work(
            dense_bytes=dense + self.facts.cache_bytes(context, 1),
            expert_bytes=routed,
            missed_bytes=routed * miss_rate,
            flops=2 * (dense / dtype_bytes(self.facts.dtype) + self.routed_elements),
            dtype=self.facts.dtype,
        )

    def prompt(self, tokens: int, distinct: Sequence[float], miss_rate: float) -> Work:
        """A prompt read in one pass.

        Args:
            tokens: its length.
            distinct: how many different experts it routes to, layer by layer (`uniform_distinct`, or counted). Of the
                last layer's a token's are enough.
            miss_rate: the share of those that is missing.

        Raises:
            UsageError: a share outside 0 to 1, or not one number for each layer.
        """
        _check_share(miss_rate)
        facts = self.facts
        if len(distinct) != len(facts.expert_layers):
            raise UsageError(
                f"{len(distinct)} layers of distinct experts for a model with {len(facts.expert_layers)} MoE layers"
            )
        touched = sum(
            min(count, layer.experts) * layer.expert_nbytes
            for count, layer in zip(self.run_by_prompt(distinct), facts.expert_layers, strict=True)
        )
        a, itemsize = facts.activations, dtype_bytes(facts.dtype)
        head = a.vocabulary * a.hidden  # the output projection: of the last token only
        body = (facts.dense_bytes - facts.lookup_bytes) / itemsize - head
        return Work(
            dense_bytes=self.dense_read_bytes(tokens) + facts.cache_bytes(tokens, 1),
            expert_bytes=touched,
            missed_bytes=touched * miss_rate,
            flops=2 * (tokens * body + self.prompt_expert_elements(tokens) + head),
            dtype=facts.dtype,
        )

    def run_by_prompt(self, distinct: Sequence[float]) -> list[float]:
        """How many experts of each layer a prompt runs that routes to so many: of the last layer a token's."""
        run = list(distinct)
        if self.ends_in_experts:
            run[-1] = min(run[-1], self.facts.top_k)
        return run

    def uniform_distinct(self, tokens: int) -> list[float]:
        """Different experts of each layer that `tokens` route to, were each token's drawn at random."""
        return [
            layer.experts * (1 - (1 - min(self.facts.top_k, layer.experts) / layer.experts) ** tokens)
            for layer in self.facts.expert_layers
        ]


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise UsageError(f"a share of misses must be between 0 and 1, not {share}")
