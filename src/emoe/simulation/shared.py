"""One bank that all layers share, through the engine's own slot table. Exact, and an order of magnitude slower."""

from __future__ import annotations

import numpy as np

from emoe.errors import UsageError
from emoe.residency.budget import PoolPlan
from emoe.residency.table import ResidencyTable
from emoe.simulation.banks import REPORT_TOKENS, Policy, Report, Tally
from emoe.simulation.lookups import Lookups
from emoe.simulation.policies import Belady


def serve_shared(lookups: Lookups, slots_each: int, policy: Policy, report: Report | None = None) -> Tally:
    """Serve every look-up with one bank of `slots_each` slots for each layer.

    Args:
        lookups: what is looked up.
        slots_each: slots for each layer.
        policy: one that does not plan.
        report: called now and then.

    Raises:
        UsageError: the policy plans for whole prompts.
    """
    shape = lookups.shape
    policy.start(lookups)
    plan = PoolPlan(0, slots_each * shape.layers, 1, dict.fromkeys(range(shape.layers), 0))
    table = ResidencyTable(plan, dict.fromkeys(range(shape.layers), shape.experts), policy.rule)
    missed = np.zeros((len(lookups), shape.layers), dtype=np.uint16)
    rows = lookups.keys.reshape(len(lookups), shape.layers, shape.top_k)
    for token in range(len(lookups)):
        if not isinstance(policy, Belady) and policy.before(token) is not None:
            raise UsageError(f"{policy.name} plans for the banks of single layers: leave @pool out, or --no-prefetch.")
        table.begin_pass()
        for rank in range(shape.layers):
            if isinstance(policy, Belady):  # layers ahead in this pass are still to come
                policy.visit(token, rank)
            keys = [divmod(key, shape.experts) for key in rows[token, rank].tolist() if key != lookups.nowhere]
            table.visit(rank)
            protect = frozenset(keys)
            for key in keys:
                table.use(key, keep=True)
                if table.find(key) is not None:
                    continue
                slot = table.reserve(key, protect=protect)
                if slot is None:
                    raise UsageError(f"{table.plan.slots} slots do not hold one token's {shape.top_k} experts.")
                table.commit(slot, 1)
                missed[token, rank] += 1
        if report is not None and token % REPORT_TOKENS == 0:
            report(token, len(lookups))
    if report is not None:
        report(len(lookups), len(lookups))
    return Tally(slots_each, missed)
