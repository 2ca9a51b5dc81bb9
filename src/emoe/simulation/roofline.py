"""The least time of a token and of a prompt at each budget: a machine's rates and a trace's misses, or chance's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emoe.planner.facts import Facts
from emoe.profiling.machine import Link, Machine
from emoe.profiling.roofline import Floor, ModelWork, floor
from emoe.routing.trace import Trace
from emoe.simulation.missing import Missing, distinct, like_model, missing
from emoe.simulation.runs import Report


@dataclass(frozen=True, slots=True)
class Limit:
    """One budget. `token` and `token_policy`: with Belady's misses and with the policy's; `prompt`: with the missing
    share of what a prompt touches, whatever the policy."""

    share: float
    missing: Missing
    token: Floor
    token_policy: Floor
    prompt: Floor

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "share": self.share,
            "belady_miss_rate": self.missing.belady,
            "policy_miss_rate": self.missing.policy,
            "token": self.token.as_dict(),
            "token_policy": self.token_policy.as_dict(),
            "prompt": self.prompt.as_dict(),
        }


def limits(
    facts: Facts,
    machine: Machine,
    threads: int,
    shares: Sequence[float],
    *,
    trace: Trace | None = None,
    policy: str = "least-stale",
    context: int = 0,
    prompt_tokens: int = 512,
    link: Link = "direct",
    report: Report | None = None,
) -> list[Limit]:
    """The limits of `facts` on `machine` at these shares of all experts.

    Without a trace every expert is as likely as any other, so a budget of a share misses the rest, and no policy does
    better than another.

    Raises:
        UsageError: a trace of another model, or a rate that is needed and was not measured.
    """
    work = ModelWork(facts)
    if trace is None:
        rates = [Missing(share, 1 - share, 1 - share) for share in shares]
        touched = work.uniform_distinct(prompt_tokens)
    else:
        trace = like_model(
            trace, len(facts.expert_layers), max(each.experts for each in facts.expert_layers), facts.top_k
        )
        rates = missing(trace, shares, policy, report)
        touched = distinct(trace, prompt_tokens)
    return [
        Limit(
            each.share,
            each,
            floor(work.token(each.belady, context), machine, threads, link),
            floor(work.token(each.policy, context), machine, threads, link),
            floor(work.prompt(prompt_tokens, touched, 1 - each.share), machine, threads, link),
        )
        for each in rates
    ]
