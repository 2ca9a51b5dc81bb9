"""The least time that a replay's own work takes on this machine, and the share of it that was reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.bench.settings import DecodeSettings
from emoe.planner.facts import Facts
from emoe.profiling.machine import Link, Machine, keep, known, measure
from emoe.profiling.roofline import Floor, ModelWork, Work, floor

if TYPE_CHECKING:
    from emoe.bench.results import Outcome

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time of the median round, and the share of it reached (median over the rounds)."""

    floor: Floor
    share: float
    link: Link

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.floor.as_dict(), "share": self.share, "link": self.link}


Limits = dict[str, Limit]
""" "decode" (of one step) and "prefill"."""


def machine_of(folder: Path, say: Say) -> Machine:
    """This machine's rates: those that were kept, else measured now (20 s) and kept.

    Raises:
        UsageError: what is kept is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    found = known(files)
    if found is None:
        say("measuring this machine, about 20 s; kept for the next time")
        found = measure(files, say=say)
        keep(found)
    return found


def limits_of(outcome: Outcome, settings: DecodeSettings, facts: Facts, machine: Machine) -> Limits:
    """What bounds the contender, from the misses and bytes that it counted itself; nothing where it does not count."""
    samples = [sample for _, sample in sorted(outcome.samples.items()) if sample["decode"]]
    if not samples:
        return {}
    threads = int(outcome.loads[0]["threads"])
    found: Limits = {}
    for phase, work_of, seconds_of in (("decode", _step, _step_s), ("prefill", _prompt, _prompt_s)):
        pairs = []
        for sample in samples:
            link = link_of(sample)
            least = floor(work_of(sample, settings, facts), machine, threads, link)
            pairs.append((least.share(seconds_of(sample)), least, link))
        middle = sorted(pairs, key=lambda pair: pair[1].seconds)[len(pairs) // 2]
        found[phase] = Limit(middle[1], statistics.median(share for share, _, _ in pairs), middle[2])
    return found


def link_of(sample: dict[str, Any]) -> Link:
    """Where most of the missing experts came from: the disk, or the page cache."""
    read = sample["prefill"]["bytes_read"] + sample["decode"]["bytes_read"]
    return "direct" if 2 * sample["storage_bytes"] >= read else "cached"


def _step_s(sample: dict[str, Any]) -> float:
    return float(sample["decode_s"]) / (len(sample["tokens"]) - 1)


def _prompt_s(sample: dict[str, Any]) -> float:
    return float(sample["first_token_s"])


def _step(sample: dict[str, Any], settings: DecodeSettings, facts: Facts) -> Work:
    """One decoding step of the whole batch: each expert it routed to is read once."""
    steps, batch = len(sample["tokens"]) - 1, settings.batch
    one = ModelWork(facts).token(0.0)
    touched = (sample["decode"]["hits"] + sample["decode"]["misses"]) / steps
    return replace(
        one,
        dense_bytes=ModelWork(facts).dense_read_bytes(batch)
        + facts.cache_bytes(settings.prompt_tokens + steps // 2, batch),
        expert_bytes=touched * facts.expert_layers[0].expert_nbytes,
        missed_bytes=sample["decode"]["bytes_read"] / steps,
        flops=one.flops * batch,
    )


def _prompt(sample: dict[str, Any], settings: DecodeSettings, facts: Facts) -> Work:
    """All prompts of the batch, in one pass."""
    layers = len(facts.expert_layers)
    touched = (sample["prefill"]["hits"] + sample["prefill"]["misses"]) / layers
    whole = ModelWork(facts).prompt(settings.prompt_tokens, [touched] * layers, 0.0)
    return replace(whole, missed_bytes=sample["prefill"]["bytes_read"], flops=whole.flops * settings.batch)
