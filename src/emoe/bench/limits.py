"""The least time that an engine's own work takes on this machine, and the share of it that was reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.bench.settings import DecodeSettings
from emoe.planner.facts import Facts
from emoe.profiling.kept import keep, known
from emoe.profiling.machine import Link, Machine
from emoe.profiling.measuring import measure
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


@dataclass(frozen=True, slots=True)
class Done:
    """What one sample did in a step of decoding, or in its prompt: experts `touched` (keys, of all layers), those of
    their bytes that were missing and came over `link`, and the time it all took."""

    seconds: float
    touched: float
    missed_bytes: float
    link: Link

    def step(self, facts: Facts, context: int, batch: int = 1) -> Work:
        """As work: one step of `batch` sequences after `context` tokens. Each expert is read once."""
        one = ModelWork(facts).token(0.0)
        return replace(
            one,
            dense_bytes=ModelWork(facts).dense_read_bytes(batch) + facts.cache_bytes(context, batch),
            expert_bytes=self.touched * facts.expert_layers[0].expert_nbytes,
            missed_bytes=self.missed_bytes,
            flops=one.flops * batch,
        )

    def prompt(self, facts: Facts, tokens: int, batch: int = 1) -> Work:
        """As work: all prompts of the batch, in one pass."""
        whole = ModelWork(facts).prompt(tokens, [0.0] * len(facts.expert_layers), 0.0)
        return replace(
            whole,
            expert_bytes=self.touched * facts.expert_layers[0].expert_nbytes,
            missed_bytes=self.missed_bytes,
            flops=whole.flops * batch,
        )


def limit_of(rounds: Sequence[tuple[Done, Work]], machine: Machine, threads: int) -> Limit:
    """What bounds at least one round, the middle one by its least time; the share is the median of the rounds'.

    Raises:
        UsageError: a rate that the work needs was not measured.
    """
    found = []
    for done, work in rounds:
        least = floor(work, machine, threads, done.link)
        found.append((least.share(done.seconds), least, done.link))
    middle = sorted(found, key=lambda one: one[1].seconds)[len(found) // 2]
    return Limit(middle[1], statistics.median(share for share, _, _ in found), middle[2])


def link_of(storage_bytes: float, read_bytes: float) -> Link:
    """Where most of the missing experts came from: the disk, or the page cache."""
    return "direct" if 2 * storage_bytes >= read_bytes else "cached"


def limits_of(outcome: Outcome, settings: DecodeSettings, facts: Facts, machine: Machine) -> Limits:
    """What bounds the contender, from the misses and bytes that it counted itself; nothing where it does not count."""
    samples = [sample for _, sample in sorted(outcome.samples.items()) if sample["decode"]]
    if not samples:
        return {}
    threads, batch, prompt = int(outcome.loads[0]["threads"]), settings.batch, settings.prompt_tokens
    steps, prompts = [], []
    for sample in samples:
        link = link_of(sample["storage_bytes"], sample["prefill"]["bytes_read"] + sample["decode"]["bytes_read"])
        count = len(sample["tokens"]) - 1
        step = counted(float(sample["decode_s"]), sample["decode"], link, count)
        steps.append((step, step.step(facts, prompt + count // 2, batch)))
        whole = counted(float(sample["first_token_s"]), sample["prefill"], link)
        prompts.append((whole, whole.prompt(facts, prompt, batch)))
    return {"decode": limit_of(steps, machine, threads), "prefill": limit_of(prompts, machine, threads)}


def counted(seconds: float, counters: Mapping[str, float], link: Link, steps: int = 1) -> Done:
    """What emoe counted in `steps` equal steps that took `seconds` together."""
    touched = counters["hits"] + counters["misses"]
    return Done(seconds / steps, touched / steps, counters["bytes_read"] / steps, link)
