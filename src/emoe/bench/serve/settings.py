"""What `emoe bench serve` is asked to do. Plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emoe.bench.serve.client import PATHS, Endpoint
from emoe.bench.serve.targets import Targets
from emoe.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """One run of `emoe bench serve`.

    Attributes:
        url: the server.
        arrivals: a CSV file; None: `requests` Poisson arrivals at `rate` per second.
        time_scale, length_scale, start, limit: as `emoe.scheduling.arrivals.read_arrivals` takes them.
        rate, requests: of Poisson arrivals.
        seed: of Poisson arrivals, tasks and wrong labels.
        task_mix: "qa=2,converse=1" or "uniform".
        prompts: JSONL file; None: emoe-nano's.
        fit_prompts: fit prompts to the arrivals' lengths where they have any.
        max_tokens: longest answer where neither arrival nor prompt says one.
        context: prompt and answer together at most where prompts are fitted; None: as the server says.
        targets: given ones by task; with any, nothing is calibrated.
        slo_scale: measured targets are so many times what an unloaded server needs; given ones are multiplied by it
            where it is set. None: 5 for measured ones, 1 for given ones.
        calibration: requests of each task for that; 0: no targets.
        labels: tell an emoe server the tasks.
        wrong_labels: share of requests that are told as another task.
        ignore_eos: ask for answers of exactly their longest length.
        endpoint, model, api_key, temperature, timeout_s: of the requests.
        concurrency: requests in flight at most; None: no limit, which is what open loop means.
    """

    url: str
    arrivals: Path | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0
    start: int = 0
    limit: int | None = None
    rate: float = 1.0
    requests: int = 100
    seed: int = 0
    task_mix: str | None = None
    prompts: Path | None = None
    fit_prompts: bool = True
    max_tokens: int = 128
    context: int | None = None
    targets: Mapping[str, Targets] = field(default_factory=dict)
    slo_scale: float | None = None
    calibration: int = 3
    labels: bool = True
    wrong_labels: float = 0.0
    ignore_eos: bool = False
    endpoint: Endpoint = "chat"
    model: str | None = None
    api_key: str | None = None
    temperature: float = 0.0
    timeout_s: float = 600.0
    concurrency: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers. Raises UsageError."""
        if self.endpoint not in PATHS:
            raise UsageError(f"no endpoint is called {self.endpoint!r}; use {' or '.join(PATHS)}")
        for name, least in (("max_tokens", 1), ("calibration", 0), ("concurrency", 1), ("context", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name.replace('_', ' ')} must be at least {least}, not {value}")
        for name in ("timeout_s", "slo_scale"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name.replace('_', ' ').removesuffix(' s')} must be above 0, not {value:g}")
        if not 0 <= self.temperature <= 2:
            raise UsageError(f"temperature must be between 0 and 2, not {self.temperature:g}")
        if self.wrong_labels and not self.labels:
            raise UsageError("--wrong-labels tells labels and --no-labels tells none; give one of them")

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without the API key."""
        values = asdict(self)
        del values["api_key"]
        values["targets"] = {task: targets.as_dict() for task, targets in self.targets.items()}
        return values | {name: None if values[name] is None else str(values[name]) for name in ("arrivals", "prompts")}
