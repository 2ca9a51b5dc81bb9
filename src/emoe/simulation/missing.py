"""What a budget misses on a trace: by Belady's rule, which no policy beats, and by the engine's own.

The numbers that the limit of a machine (`emoe.profiling.roofline`) is computed from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emoe.errors import UsageError
from emoe.residency.eviction import make_eviction
from emoe.residency.table import LayerCounters
from emoe.routing.trace import DECODE, FINAL_LAYER, PREFILL, Trace
from emoe.simulation.lookups import Phases
from emoe.simulation.replay import plan_of, replay
from emoe.simulation.runs import POOL, Report, Task, simulate


@dataclass(frozen=True, slots=True)
class Missing:
    """Of one budget: shares of the routed experts that are missing, with Belady's rule and with the policy."""

    share: float
    belady: float
    policy: float


def like_model(trace: Trace, layers: int, experts: int, top_k: int) -> Trace:
    """The trace for a model of this shape: its first layers, where the model has fewer.

    Raises:
        UsageError: it is of a model of another shape.
    """
    found = (len(trace.layers), trace.num_experts, trace.top_k)
    if found[1:] != (experts, top_k) or found[0] < layers:
        raise UsageError(
            f"the trace is of {found[0]} layers x {found[1]} experts, top-{found[2]}, and the model has {layers} x "
            f"{experts}, top-{top_k}: record one of this model (`emoe generate --trace`)."
        )
    weights = None if trace.weights is None else trace.weights[:, :layers]
    return dataclasses.replace(trace, experts=trace.experts[:, :layers], weights=weights, layers=trace.layers[:layers])


def first_tokens(trace: Trace, tokens: int) -> Trace:
    """The trace's first prompts that together have as many tokens, at least one of them."""
    enough = int(np.searchsorted(trace.offsets, tokens))
    return trace.select(range(min(max(enough, 1), trace.num_prompts)))


def missing(
    trace: Trace,
    shares: Sequence[float],
    policy: str = "least-stale",
    report: Report | None = None,
    *,
    bound: bool = True,
) -> list[Missing]:
    """The misses of decoding the trace's prompts one after another, at each share of all experts.

    Slots are shared between layers as the engine would share them; Belady's rule has one pool over all layers, where it
    misses least. Everything resident is loaded before and misses nothing. Where the trace has no decoded tokens, its
    prompts' tokens are taken one by one. Without `bound` Belady's share is that of the policy's own slots, which is
    quicker to find.

    Raises:
        UsageError: no such policy, or a share outside 0 to 1.
    """
    if not all(0 < share <= 1 for share in shares):
        raise UsageError(f"shares of experts must be above 0 and at most 1, not {list(shares)}")
    rule = make_eviction(policy)
    phases: Phases = "decode" if (trace.phase == DECODE).any() else "all"
    found = []
    for share in shares:
        if share == 1:
            found.append(Missing(share, 0.0, 0.0))
            continue
        quotas = plan_of(trace, share, rule).pools[0].quotas
        name = policy if any(quotas.values()) else policy + POOL
        best = "belady" + POOL if bound or name.endswith(POOL) else "belady"
        rows = simulate([(trace, None)], Task([name, best], [share], phases=phases), report)
        found.append(Missing(share, 1 - rows[1].hit_rate, 1 - rows[0].hit_rate))
    return found


@dataclass(frozen=True, slots=True)
class AfterPrompt:
    """Of one budget, as the engine serves a prompt and the tokens after it.

    prompt_loads: experts of each layer that the prompt loads; miss_rate: of the routed experts of the tokens after it;
    waiting: share of (token, layer) that miss at least one.
    """

    prompt_loads: tuple[float, ...]
    miss_rate: float
    waiting: float


WINDOWS = 3
"""Prompts that are counted, after one that is not: it finds empty slots."""


def after_prompt(
    trace: Trace,
    share: float,
    prompt: int,
    new: int,
    policy: str = "least-stale",
    *,
    windows: int = WINDOWS,
    before: int = 1,
    expert_bytes: int = 1,
    ends_in_experts: bool = False,
) -> AfterPrompt:
    """What the engine's own slots miss when `prompt` tokens are read in one pass and `new` ones follow one by one.

    The trace's tokens are taken in order, beginning anew after the last, as `emoe bench replay` feeds them. What a
    prompt leaves in the slots is not what a long answer leaves: the first tokens after it miss more. So many `windows`
    (a prompt and what follows) are counted, after those `before` them. `expert_bytes`: of one expert, which limits how
    many pass through at once (`PoolPlan.passing`). `ends_in_experts`: of a prompt the last layer runs one token
    (`ModelWork.ends_in_experts`).

    Raises:
        UsageError: no such policy, or numbers of tokens that are not positive.
        BudgetError: the share is below one token's experts of one layer.
    """
    if prompt < 1 or new < 1 or windows < 1 or before < 0:
        raise UsageError(
            f"a prompt and what follows have at least one token each, and one such is counted; not {prompt}, {new} and "
            f"{windows} after {before}"
        )
    rule = make_eviction(policy)
    each = prompt + new
    every = before + windows
    rows = np.arange(each * every) % len(trace)
    phase = np.where(np.arange(len(rows)) % each < prompt, PREFILL, DECODE).astype(np.uint8)
    # A prompt is one pass; every token after it is one.
    starts = (phase == DECODE) | (np.arange(len(rows)) % each == 0)
    fed = dataclasses.replace(
        trace,
        experts=trace.experts[rows],
        weights=None,
        phase=phase,
        step=np.cumsum(starts).astype(np.int64),
        token_ids=None,
        offsets=np.arange(0, len(rows) + 1, each, dtype=np.int64),
        task=np.full(every, -1, dtype=np.int32),
        prompt_token_ids=None,
        prompt_token_offsets=None,
        prompts=({},) * every,
        source={FINAL_LAYER: int(trace.layers[-1])} if ends_in_experts else {},
    )
    counted = [(0, 0, 0)] * len(trace.layers)
    loads = np.zeros(len(trace.layers))
    lookups = misses = waits = passes = 0

    def passed(prefill: bool, layers: list[LayerCounters]) -> None:
        nonlocal counted, loads, lookups, misses, waits, passes
        now = [(layer.hits, layer.misses, layer.loads) for layer in layers]
        passes += 1
        if passes > before * (1 + new):
            new_of = np.array(now) - np.array(counted)
            if prefill:
                loads += new_of[:, 2]
            else:
                lookups += int(new_of[:, :2].sum())
                misses += int(new_of[:, 1].sum())
                waits += int((new_of[:, 1] > 0).sum())
        counted = now

    slots = plan_of(trace, share, rule, expert_bytes)
    replay(fed, slots, lambda: make_eviction(policy), passed=passed)
    return AfterPrompt(tuple((loads / windows).tolist()), misses / lookups, waits / (windows * new * len(trace.layers)))


def distinct(trace: Trace, tokens: int) -> list[float]:
    """How many different experts of each layer `tokens` consecutive tokens route to: the mean over the trace."""
    starts = range(0, max(len(trace) - tokens, 0) + 1, max(tokens // 2, 1))
    layers = trace.experts.shape[1]
    counts = np.zeros(layers)
    for start in starts:
        window = trace.experts[start : start + tokens]
        for layer in range(layers):
            ids = np.unique(window[:, layer])
            counts[layer] += int((ids < trace.num_experts).sum())
    means: list[float] = (counts / len(starts)).tolist()
    return means
