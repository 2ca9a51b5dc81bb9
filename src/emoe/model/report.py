"""`stats`: what a loaded model has done so far, as plain numbers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from emoe.kernels.slots import available
from emoe.model.bind import Binding, binding_of
from emoe.model.hybrid import LABEL
from emoe.residency.contest import RECENCY


def stats(model: PreTrainedModel) -> dict[str, Any]:
    """Return the counters of a model made by `emoe.load`.

    Bytes are bytes, times seconds. A hit or a miss is one expert key that one forward pass of one layer routed to
    (in mode `resident`: that the model's own router wanted). `lossy` says whether the mode or `expert_dtype` can change
    the text.

    Returns:
        budget_bytes, resident_bytes (slots that hold an expert), peak_resident_bytes, total_expert_bytes, floor_bytes,
        slots, hits, misses, hit_rate (None before the first route), loads, bytes_read (from disk), bytes_copied (to a
        device reached by copies), host (None without such a device: budget_bytes, floor_bytes, slots, slots_bytes,
        resident_bytes, held_bytes (taken so far), pinned, notice (why not), hits, misses), hybrid (None without: label,
        computed (experts), and the seconds that decide: link_s, cpu_s, rows_s), slot_kernels (which kernels compute
        experts, and why), devices, spread (why a layer's experts are spread over devices, or not; empty: not asked
        for), synchronisations (how often the program stood still for a copy), load_wait_s,
        rerouted_tokens, routed_tokens, rerouted_share, prompts, passes, mode, lossy, reroutes (whether the mode can),
        expert_dtype, reader, reader_reason, embeddings (where the input embedding lies: place, reason, bytes_spared,
        rows_read, bytes_read), eviction, layers (per layer: hits, misses, loads, bytes_read,
        rerouted_tokens, routed_tokens, experts, slots (its quota; 0: the layers share one pool), resident: the experts
        there now), predictor, predictions, plans, tasks, prefetch, scorer (what looking ahead saved and cost in
        seconds, whether it is active, and why not; None: there is none), loads_ahead (issued, used, unused, cancelled,
        waiting: prefetches, and those of a prompt's next layer), kernels (what computes few tokens on a CPU:
        name, reason, linears: in how many dense layers too, calls_by_threads: how often the C kernels of this process
        ran on how many threads, which they choose by measurement).

    Raises:
        UsageError: the model was not made by `emoe.load`.
    """
    binding = binding_of(model)
    runtime, plan = binding.runtime, binding.plan
    layers: dict[int, dict[str, Any]] = {}
    with runtime.lock:
        for pool in binding.pools:
            for layer, c in pool.table.counters.items():
                first = binding.firsts.get(pool.table.plan.group, {}).get(layer, 0)
                found = {
                    "hits": c.hits,
                    "misses": c.misses,
                    "loads": c.loads,
                    "bytes_read": c.bytes_read,
                    "host_hits": c.host_hits,
                    "bytes_copied": c.bytes_copied,
                    "rerouted_tokens": c.rerouted,
                    "routed_tokens": c.tokens,
                    "experts": pool.table.experts[layer],
                    "slots": pool.table.plan.quotas[layer],
                    "resident": [first + expert for expert in pool.table.resident(layer)],
                }
                before = layers.get(layer)  # the same layer's experts on another device
                layers[layer] = found if before is None else {name: before[name] + found[name] for name in found}
        resident = sum(pool.table.occupied * pool.bank.slot_nbytes for pool in binding.pools)
        peak = sum(pool.peak_occupied * pool.bank.slot_nbytes for pool in binding.pools)
        wait = sum(pool.load_wait_s for pool in binding.pools)
        passes = max(pool.table.pass_no for pool in binding.pools)
        eviction = binding.pools[0].table.eviction.name
        homes = {id(pool.bank.home): pool.bank.home for pool in binding.pools}
        devices = sorted({str(pool.bank.device) for pool in binding.pools})
        host = _host(binding)
        prefetching, ahead = _prefetching(binding), _loads_ahead(binding)
        scoring = _scoring(binding)

    def total(name: str) -> int:
        return sum(int(layer[name]) for layer in layers.values())

    hits, misses, tokens, rerouted = (
        total("hits"),
        total("misses"),
        total("routed_tokens"),
        total("rerouted_tokens"),
    )
    return {
        "mode": runtime.mode,
        "lossy": binding.lossy,
        "reroutes": binding.ahead.lossy,
        "expert_dtype": binding.index.expert_dtype,
        "budget_bytes": plan.budget_bytes,
        "resident_bytes": resident,
        "peak_resident_bytes": peak,
        "total_expert_bytes": plan.total_bytes,
        "floor_bytes": plan.floor_bytes,
        "slots": plan.slots,
        "hits": hits,
        "misses": misses,
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "loads": total("loads"),
        "bytes_read": total("bytes_read"),
        "bytes_copied": total("bytes_copied"),
        "host": host,
        "hybrid": _hybrid(binding),
        "slot_kernels": available(binding.pools[0].bank.stacked())[1],
        "devices": devices,
        "spread": binding.spread,
        "synchronisations": sum(device.synchronisations for device in homes.values()),
        "load_wait_s": wait,
        "rerouted_tokens": rerouted,
        "routed_tokens": tokens,
        "rerouted_share": rerouted / tokens if tokens else 0.0,
        "prompts": runtime.prompts,
        "passes": passes,
        "reader": binding.reader.kind,
        "reader_reason": binding.reader_reason,
        "embeddings": _embeddings(binding),
        "eviction": eviction,
        "predictor": binding.ahead.settings.predictor,
        "predictions": binding.ahead.spent()._asdict(),
        "plans": 0 if binding.ahead.planner is None else binding.ahead.planner.plans,
        "tasks": list(runtime.tasks),
        "prefetch": prefetching,
        "loads_ahead": ahead,
        "scorer": scoring,
        "kernels": _kernels(model, binding),
        "layers": dict(sorted(layers.items())),
    }


def _embeddings(binding: Binding) -> dict[str, Any]:
    """Where the input embedding lies, and what was read of it."""
    table = binding.embedding
    return {
        "place": "memory" if table is None else "disk",
        "reason": binding.embeddings_reason,
        "bytes_spared": 0 if table is None else table.lookup.nbytes,
        "rows_read": 0 if table is None else table.rows_read,
        "bytes_read": 0 if table is None else table.bytes_read,
    }


def _host(binding: Binding) -> dict[str, Any] | None:
    """The host tier: what it may hold, holds, and was asked for."""
    tiers = [pool.transfers.host for pool in binding.pools if pool.transfers is not None]
    if not tiers or binding.host is None:
        return None
    counters = [c for pool in binding.pools for c in pool.table.counters.values()]
    hits = sum(c.host_hits for c in counters)
    return {
        "budget_bytes": binding.host.budget_bytes,
        "floor_bytes": binding.host.floor_bytes,
        "slots": sum(len(tier.table.slots) for tier in tiers),
        "slots_bytes": binding.host.nbytes,
        "resident_bytes": sum(tier.table.occupied * tier.slot_nbytes for tier in tiers),
        "held_bytes": sum(tier.held_bytes for tier in tiers),
        "pinned": all(tier.pinned for tier in tiers),
        "notice": next((tier.notice for tier in tiers if tier.notice), ""),
        "exclusive": any(tier.exclusive for tier in tiers),
        "bytes_back": sum(pool.transfers.bytes_back for pool in binding.pools if pool.transfers is not None),
        "hits": hits,
        "misses": sum(c.loads for c in counters) - hits,
    }


def _hybrid(binding: Binding) -> dict[str, Any] | None:
    """What the CPU computed of misses, and the times that decide it."""
    rules = [layer.hybrid for layer in binding.runtime.layers.values() if layer.hybrid is not None]
    if not rules:
        return None
    costs = rules[0].costs
    return {
        "label": LABEL,
        "computed": sum(rule.computed for rule in rules),
        "link_s": costs.link_s,
        "cpu_s": costs.cpu_s,
        "rows_s": costs.rows_s,
    }


def _kernels(model: PreTrainedModel, binding: Binding) -> dict[str, Any] | None:
    """What computes few tokens and many, why, in how many linear layers too, and with how many threads."""
    kernel, dense = binding.kernel, binding.dense
    if kernel is None or dense is None:
        return None
    threads = {} if kernel.calls is None else kernel.calls.thread_counts()
    return {
        "name": kernel.name,
        "reason": kernel.reason,
        "many_rows": kernel.many_rows(model.dtype),
        "linears": len(dense),
        "norms": dense.norms,
        "attention": model.config._attn_implementation,
        "attention_reason": binding.attention,
        "calls_by_threads": threads,
    }


def _loads_ahead(binding: Binding) -> dict[str, int]:
    """Every load begun ahead of need ends as used, evicted unused or cancelled; until then it waits."""
    counters = [c for pool in binding.pools for c in pool.table.counters.values()]
    return {
        "issued": sum(c.prefetches for c in counters),
        "used": sum(c.prefetches_used for c in counters),
        "unused": sum(c.prefetches_unused for c in counters),
        "cancelled": sum(c.prefetches_cancelled for c in counters),
        "waiting": sum(c.prefetches_waiting for c in counters),
    }


def _prefetching(binding: Binding) -> dict[str, Any] | None:
    """What was loaded ahead of need, and what that saved and cost."""
    ahead = binding.ahead
    name = ahead.settings.prefetch or (None if ahead.settings.predictor is None else "plan")
    if name is None:
        return None
    return {
        "name": name,
        **_loads_ahead(binding),
        "failed": sum(pool.prefetches.failed for pool in binding.pools),
        "last_error": next((pool.prefetches.last_error for pool in binding.pools if pool.prefetches.last_error), ""),
        "hidden_s": ahead.worth.hidden_s,
        "delayed_s": ahead.worth.delayed_s,
        "overhead_s": ahead.worth.overhead_s,
        "active": ahead.worth.active and not ahead.idle,
        "reason": ahead.idle or ahead.worth.reason,
    }


def _scoring(binding: Binding) -> dict[str, Any] | None:
    """What the scorer of evictions took and spared."""
    scores = binding.ahead.scores
    if scores is None:
        return None
    contests = {id(contest): contest for contest, _ in scores.live.contests.values()}.values()
    return {
        "name": scores.live.scorer.name,
        "spent_s": scores.live.spent_s,
        "spared_loads": scores.live.spared_loads() if contests else None,
        "spared_s": scores.worth.hidden_s,
        "recency_leads": any(contest.lead == RECENCY for contest in contests),
        "active": scores.live.active and not binding.ahead.idle,
        "reason": binding.ahead.idle or scores.idle or scores.worth.reason,
    }
