"""What should be resident when a prompt has been read? Misses by position after it, under several choices.

    python bench/retention.py ../shared/data/traces/gpt-oss-20b

A prefill streams nearly every expert through memory, so any of them could stay for nothing. The first `--prompt`
tokens of each recorded prompt (loops left out) stand for a prompt, the next `--new` are decoded one by one; each layer
has slots of its own, and evicts what was used longest ago. The choices:

    now         what the answer before left there stays; what this prompt used is equally recent
    order       the same, but recency within the prompt counts
    last        the experts that were used last
    last-N      those used most by the last N tokens
    prompt      those used most by the whole prompt
    decay-N     by uses that count half after N tokens
    known       those used first after the prompt: no choice can know

Prompts are halved: even ones to choose by, odd ones to report.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.cli.output import table
from emoe.routing.trace import Trace

Array = NDArray[Any]
RECENT, DECAYS = (16, 64), (8, 16, 32, 64)
EARLY = 8


def choices(used: Array) -> dict[str, Array]:
    """float64 [experts] for each choice, the highest to stay, of a prompt's routes [tokens, experts] of 0 and 1."""
    age = np.arange(len(used) - 1, -1, -1)[:, None]
    last = np.where(used > 0, len(used) - age, 0).max(axis=0) / len(used)
    made = {"last": last, "prompt": used.sum(axis=0) + last}
    made |= {f"last-{n}": used[-n:].sum(axis=0) + last for n in RECENT}
    made |= {f"decay-{n}": (used * 0.5 ** (age / n)).sum(axis=0) for n in DECAYS}
    return made


def misses(resident: set[int], recency: Array, routes: Array) -> tuple[Array, set[int]]:
    """Misses of each token of routes [tokens, k], least recently used out, and what is resident at the end."""
    held, when = set(resident), recency.astype(np.float64)
    found = np.zeros(len(routes))
    for token, ids in enumerate(routes.tolist()):
        when[ids] = 1e6 + token
        for expert in ids:
            if expert not in held:
                held.discard(min(held - set(ids), key=lambda e: when[e]))
                held.add(expert)
                found[token] += 1
    return found, held


def measure(trace: Trace, prompts: list[int], layers: range, slots: int, prompt: int, new: int) -> dict[str, Array]:
    """[answers, new] misses by choice."""
    found: defaultdict[str, list[Array]] = defaultdict(list)
    for layer in layers:
        left: set[int] | None = None
        for number in prompts:
            first = int(trace.offsets[number])
            rows = trace.experts[first : first + prompt + new, layer].astype(np.int64)
            used = np.zeros((prompt, trace.num_experts))
            np.put_along_axis(used, rows[:prompt], 1, axis=1)
            scores, after = choices(used), rows[prompt:]
            uses = np.array([np.append(np.flatnonzero((after == e).any(1)), new)[0] for e in range(trace.num_experts)])
            scores["known"] = -uses.astype(np.float64)
            answers = {
                name: misses(set(np.argsort(-score, kind="stable")[:slots].tolist()), score, after)
                for name, score in scores.items()
            }
            if left is not None:
                answers["now"] = misses(left, used.max(axis=0), after)
                answers["order"] = misses(left, scores["last"], after)
                for name, (each, _) in answers.items():
                    found[name].append(each)
            left = answers["now" if left is not None else "last"][1]
    return {name: np.array(each) for name, each in found.items()}


def main() -> None:
    """Print a table for each capacity and half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--prompt", type=int, default=256, metavar="N")
    parser.add_argument("--new", type=int, default=64, metavar="N")
    parser.add_argument("--capacity", default="20,40,60,80", metavar="PERCENT")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th layer only")
    args = parser.parse_args()
    trace = Trace.read(args.trace)
    whole = [
        n
        for n, about in enumerate(trace.prompts)
        if not about.get("repetition") and trace.offsets[n + 1] - trace.offsets[n] >= args.prompt + args.new
    ]
    layers = range(0, len(trace.layers), args.every)
    print(f"{len(whole)} prompts of {args.prompt} tokens and {args.new} after them, {len(layers)} layers; misses of "
          f"{trace.top_k} routed experts")  # fmt: skip
    for percent in args.capacity.split(","):
        slots = max(trace.top_k, trace.num_experts * int(percent) // 100)
        halves = [measure(trace, whole[half::2], layers, slots, args.prompt, args.new) for half in (0, 1)]
        rows: list[tuple[str, ...]] = [
            (f"{percent} %: {slots} slots", f"choose: first {EARLY}", "all", f"report: first {EARLY}", "all")
        ]
        for name in sorted(halves[0], key=lambda name: float(halves[0][name].mean())):
            means = [(half[name][:, :EARLY].mean(), half[name].mean()) for half in halves]
            rows.append((name, *(f"{value:.3f}" for pair in means for value in pair)))
        print(table(rows, right=(1, 2, 3, 4)))


if __name__ == "__main__":
    main()
