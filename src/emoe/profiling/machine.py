"""What a machine can do, as numbers: bytes per second from memory and disk, floating-point operations per second.

Measured once (`emoe.profiling.measuring`) and kept with what it was measured on (`emoe.profiling.kept`). Rates are what
a plain loop reaches, so they bound what decoding can reach: nothing reads weights faster than a sum over a large array
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from emoe.errors import UsageError

FORMAT = "emoe-machine/1"

Link = Literal["direct", "cached", "pinned", "pageable"]
"""How a missed expert comes: from disk past the page cache or through it; from host memory to a GPU."""

Rates = dict[int, float]
"""Number of threads -> rate."""


PROMPT_TOKENS = 512
"""The prompt whose rates `EngineRates` holds."""


@dataclass(frozen=True, slots=True)
class EngineRates:
    """Of one number of threads, in bfloat16 on the CPU.

    dense_bytes_per_s, expert_bytes_per_s: weights read for one token; dense_flops, expert_flops: operations per second
    for a prompt of PROMPT_TOKENS; layer_s: a decoder layer of one token whatever its size (hooks, routes, slots,
    attention's own calls); token_s: what `generate` adds to a token.
    """

    dense_bytes_per_s: float
    expert_bytes_per_s: float
    dense_flops: float
    expert_flops: float
    layer_s: float
    token_s: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineRates:
        """The opposite of `as_dict`.

        Raises:
            UsageError: it is no such thing.
        """
        try:
            return cls(**{name: float(values[name]) for name in cls.__slots__})
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"damaged rates of the engine ({error}): measure anew with `--fresh`.") from error


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Of one token of one checkpoint run in `dtype`, in seconds, as the engine runs it, experts as its files have them.

    dense_s: everything but the experts, after PROMPT_TOKENS tokens; experts_s: the experts of one layer, all of them
    resident; first_miss_s: what the first missing one of a layer adds to that, more_miss_s: each further one.
    """

    dense_s: float
    experts_s: float
    first_miss_s: float
    more_miss_s: float
    dtype: str = "bfloat16"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenTimes:
        """The opposite of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for anything else."""
        seconds = {name: float(values[name]) for name in cls.__slots__ if name != "dtype"}
        return cls(**seconds, dtype=str(values["dtype"]))


@dataclass(frozen=True, slots=True)
class ModelRates:
    """Of one checkpoint's own experts and one number of threads, on the CPU.

    one_bytes_per_s, stream_bytes_per_s: reading experts into slots, one after another or several at once (None where
    files cannot be read directly); expert_flops: operations per second of a prompt of PROMPT_TOKENS; token: None where
    it was not measured.
    """

    one_bytes_per_s: float | None
    stream_bytes_per_s: float | None
    expert_flops: float
    token: TokenTimes | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelRates:
        """The opposite of `dataclasses.asdict`.

        Raises:
            UsageError: it is no such thing.
        """
        try:
            one, stream = (
                None if values[name] is None else float(values[name])
                for name in ("one_bytes_per_s", "stream_bytes_per_s")
            )
            times = values.get("token")  # measurements of before it was there have none
            token = None if times is None else TokenTimes.from_dict(times)
            return cls(one, stream, float(values["expert_flops"]), token)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"damaged rates of a model ({error}): measure anew with `--fresh`.") from error


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates; None or an absent key where something was not measured.

    Attributes:
        fingerprint: what it was measured on (`fingerprint`).
        device: where experts run: "cpu" or "cuda".
        memory_bytes_per_s: reading a large array, by threads.
        disk_direct_bytes_per_s: reading the checkpoint's files with O_DIRECT; the best way found, `disk_direct_way`.
        disk_cached_bytes_per_s: reading what the page cache holds, one thread.
        h2d_pinned_bytes_per_s, h2d_pageable_bytes_per_s: host memory to the GPU.
        flops: dtype -> threads -> operations per second of a matrix product.
        device_bytes_per_s, device_flops: the same two of the GPU's own memory.
        notes: what could not be measured, and why.
        engine: threads -> what emoe's own kernels and layers take (`with_engine`); empty where not measured.
        models: `layout_of` a checkpoint -> threads -> what its own experts and tokens take (`with_model`).
    """

    fingerprint: dict[str, str]
    device: str = "cpu"
    memory_bytes_per_s: Rates = field(default_factory=dict)
    disk_direct_bytes_per_s: float | None = None
    disk_cached_bytes_per_s: float | None = None
    disk_direct_way: dict[str, int] | None = None
    h2d_pinned_bytes_per_s: float | None = None
    h2d_pageable_bytes_per_s: float | None = None
    flops: dict[str, Rates] = field(default_factory=dict)
    device_bytes_per_s: float | None = None
    device_flops: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    engine: dict[int, EngineRates] = field(default_factory=dict)
    models: dict[str, dict[int, ModelRates]] = field(default_factory=dict)

    def memory_rate(self, threads: int) -> float:
        """Bytes per second at which weights are read where experts run, by so many threads.

        Raises:
            UsageError: it was not measured.
        """
        if self.device != "cpu" and self.device_bytes_per_s is not None:
            return self.device_bytes_per_s
        return _at(self.memory_bytes_per_s, threads, "memory bandwidth")

    def compute_rate(self, dtype: str, threads: int) -> float:
        """Operations per second in `dtype` where experts run; that of float32 for a dtype without a rate of its own.

        Raises:
            UsageError: it was not measured.
        """
        if self.device != "cpu" and self.device_flops:
            rate = self.device_flops.get(dtype, self.device_flops.get("float32"))
            if rate is not None:
                return rate
        return _at(self.flops.get(dtype) or self.flops.get("float32", {}), threads, f"matrix rate of {dtype}")

    def link_rate(self, link: Link) -> float:
        """Bytes per second over the way of missed experts.

        Raises:
            UsageError: it was not measured.
        """
        rate = {
            "direct": self.disk_direct_bytes_per_s,
            "cached": self.disk_cached_bytes_per_s,
            "pinned": self.h2d_pinned_bytes_per_s,
            "pageable": self.h2d_pageable_bytes_per_s,
        }[link]
        if rate is None:
            raise UsageError(
                f"the rate of {link!r} loads was not measured on this machine ({'; '.join(self.notes) or 'no files'}). "
                "Run `emoe roofline MODEL --fresh` with a local checkpoint."
            )
        return rate

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Machine:
        """The opposite of `as_dict`, also after JSON made text of the numbers of threads.

        Raises:
            UsageError: it is no such thing.
        """
        if values.get("format") != FORMAT:
            raise UsageError(f"no measurements of a machine in the format {FORMAT}: measure anew with `--fresh`.")
        try:
            known = {name: values[name] for name in cls.__slots__ if name not in ("engine", "models")}
            known["memory_bytes_per_s"] = _rates(known["memory_bytes_per_s"])
            known["flops"] = {dtype: _rates(rates) for dtype, rates in known["flops"].items()}
            known["notes"] = tuple(known["notes"])
            engine = values.get("engine") or {}
            known["engine"] = {int(threads): EngineRates.from_dict(rates) for threads, rates in engine.items()}
            known["models"] = {
                model: {int(threads): ModelRates.from_dict(rates) for threads, rates in by_threads.items()}
                for model, by_threads in (values.get("models") or {}).items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"damaged measurements of a machine ({type(error).__name__}: {error}): measure anew with `--fresh`."
            ) from error
        return cls(**known)


def _at(rates: Rates, threads: int, what: str) -> float:
    """The best rate of up to that many threads (fewer may be faster: a neighbour on a core), or of the fewest."""
    if not rates:
        raise UsageError(f"the {what} was not measured: run `emoe roofline MODEL --fresh`.")
    return max((rate for count, rate in rates.items() if count <= threads), default=rates[min(rates)])


def _rates(values: Mapping[Any, Any]) -> Rates:
    return {int(threads): float(rate) for threads, rate in values.items()}
