"""A pool that holds every expert for good keeps no books beyond hits, and hands out the same slots."""

from __future__ import annotations

import torch

import emoe
from emoe.model.bind import binding_of, close
from tests.conftest import Checkpoints


def test_everything_resident_settles_and_less_does_not(checkpoints: Checkpoints) -> None:
    path = checkpoints("qwen3_moe")
    whole, _ = emoe.load(path)
    part, _ = emoe.load(path, expert_memory="50%")
    try:
        ids = torch.arange(3, 12)[None]
        for model in (whole, part):
            with torch.no_grad():
                out = model(input_ids=ids, use_cache=True)
                model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        assert all(pool._settled for pool in binding_of(whole).pools)
        assert not any(pool._settled for pool in binding_of(part).pools)
        full, half = emoe.stats(whole), emoe.stats(part)
        assert full["misses"] == 0
        assert full["hits"] == half["hits"] + half["misses"]
        pool = binding_of(whole).pools[0]
        layer = next(iter(pool.table.experts))
        slots = pool.take(layer, [2, 0, 2])
        assert slots == [pool.table.find((layer, expert)) for expert in (2, 0, 2)]
        pool.release(slots)
        ready = [(e, pool.table.find((layer, e))) for e in (1, 3)]
        assert list(pool.stream(layer, [1, 3], prefill=True, together=True)) == [ready]
        assert list(pool.stream(layer, [1, 3], prefill=True)) == [[one] for one in ready]
    finally:
        close(whole)
        close(part)
