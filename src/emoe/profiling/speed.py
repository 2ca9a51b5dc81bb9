"""How fast a model will run here: its bytes over the rates that emoe's kernels reach, its misses over the link. Pure.

Unlike the limit (`emoe.profiling.roofline`) the parts add up, but for what overlaps: a layer's experts are computed
while those that are missing are read, all but the last to come. Where the checkpoint's own layers were timed with and
without misses (`TokenTimes`), a token is made of those. A prompt streams its experts, so there reading and computing
overlap in part.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from emoe.checkpoint.codecs.formats import NATIVE
from emoe.planner.facts import Facts, dtype_bytes
from emoe.profiling.machine import PROMPT_TOKENS, EngineRates, Link, Machine, ModelRates
from emoe.profiling.roofline import ModelWork

PROMPT_OVERLAP = 0.75
"""Of a prompt's reading or computing, whichever is shorter, the share that the other one hides: 0.58 to 0.79 on
gpt-oss's and OLMoE's shapes at 20 to 80 % of the experts (docs/log.md). Hardly anything waits, but who computes loses
time to reading."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What is expected: seconds of a token and of a prompt, and what they are made of.

    overlap_s: of a token's `load_s`, the part that it is not longer for; below 0 where misses cost more than reading.
    """

    token_s: float
    first_token_s: float
    memory_s: float
    load_s: float
    overlap_s: float
    overhead_s: float
    prompt_compute_s: float
    prompt_load_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second while decoding."""
        return 1 / self.token_s

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}


def expected(
    facts: Facts,
    machine: Machine,
    engine: EngineRates,
    *,
    miss_rate: float,
    prompt_tokens: int,
    prompt_missed_bytes: float,
    context: int = 0,
    waiting: float | None = None,
    link: Link = "direct",
    model: ModelRates | None = None,
) -> Speed:
    """The speed with a share `miss_rate` of the routed experts missing, and so many bytes of a prompt's.

    `waiting`: the share of (token, layer) that miss at least one; by default that of misses as they fall at random.
    `model`: what its own experts take, where that was measured; else the disk's own rate and made-up experts' stand in.

    Raises:
        UsageError: a rate that is needed was not measured.
    """
    work = ModelWork(facts)
    token = work.token(miss_rate, context)
    layers = max(len(facts.cache_layers), len(facts.expert_layers))
    one, stream, expert_rate = None, None, engine.expert_flops
    if model is not None:
        expert_rate = model.expert_flops
        if link == "direct":
            one, stream = model.one_bytes_per_s, model.stream_bytes_per_s
    load_s = token.missed_bytes / (one or machine.link_rate(link)) if token.missed_bytes else 0.0
    top_k, routed = facts.top_k, len(facts.expert_layers)
    waits = 1 - (1 - miss_rate) ** top_k if waiting is None else waiting
    overhead_s = layers * engine.layer_s + engine.token_s
    experts_s = token.expert_bytes / engine.expert_bytes_per_s
    dense_s = token.dense_bytes / engine.dense_bytes_per_s
    own = model.token if model is not None and facts.expert_dtype == NATIVE else None
    if own is not None and own.dtype != facts.dtype:
        own = None
    if own is not None:
        overhead_s, experts_s = engine.token_s, routed * own.experts_s
        beyond = facts.cache_bytes(context, 1) - facts.cache_bytes(PROMPT_TOKENS, 1)
        dense_s = max(0.0, own.dense_s + beyond / engine.dense_bytes_per_s)
    if own is not None and one is not None and load_s:
        more = miss_rate * work.routed_experts - waits * routed
        overlap_s = load_s - waits * routed * own.first_miss_s - more * own.more_miss_s
    else:
        overlap_s = min(load_s, waits * (top_k - 1) / top_k * experts_s)
    memory_s = dense_s + experts_s
    everything = work.prompt(prompt_tokens, [0.0] * len(facts.expert_layers), 0.0)
    expert_flops = 2 * work.prompt_expert_elements(prompt_tokens)
    itemsize = dtype_bytes(facts.dtype) / 2  # rates are bfloat16's: a wider dtype takes as much longer
    compute_s = itemsize * ((everything.flops - expert_flops) / engine.dense_flops + expert_flops / expert_rate)
    prompt_load_s = prompt_missed_bytes / (stream or machine.link_rate(link)) if prompt_missed_bytes else 0.0
    return Speed(
        token_s=memory_s + load_s - overlap_s + overhead_s,
        first_token_s=compute_s + prompt_load_s - PROMPT_OVERLAP * min(compute_s, prompt_load_s) + overhead_s,
        memory_s=memory_s,
        load_s=load_s,
        overlap_s=overlap_s,
        overhead_s=overhead_s,
        prompt_compute_s=compute_s,
        prompt_load_s=prompt_load_s,
    )
