"""What could speculation gain in exact decode? How well missing experts are guessed, and what that is worth in time.

    python bench/speculation.py ../shared/data/traces/gpt-oss-20b --layers 6 --slots 14

Prompts are split: half for `next-use` and for counting transitions, a quarter to fit a logistic regression on, a
quarter to report. Two guesses, both about experts that are not resident:

    next token   any layer's, from all that is known when a token's last layer has run (for the time of the head)
    next layer   from the running token's routes so far (for the time that the running layer computes)

Precision is the share of the guesses that the token then uses. The time is that of a link that serves demand first and
guesses when it is idle, piece by piece, so a wrong guess costs a slot and `--delay-ms` where a demand finds it under
way. All times are given: measure them (`emoe roofline`, `emoe stats`). Lines:

    none         demand only
    early down   the last expert of a layer computes its first projection while its second is read
    head         guesses for the next token, while the head computes
    anytime      the same guesses, and those that are left whenever the link has nothing to do
    layer        guesses for the next layer, while the link has nothing else to do
    both
    oracle       both, guessing what will be used: no guess can gain more

and some of them together. The trace's prompts are read as one stream.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emoe.cli.output import table
from emoe.prediction.next_use import NextUse
from emoe.prediction.next_use.learning import multi_hot, whole_raw
from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import Trace
from emoe.simulation.missing import like_model

Array = NDArray[Any]
HALF_LIVES = (2.0, 8.0, 32.0, 128.0)
PRIOR = 8.0
CHEAP = 7
"""The first so many features of the next token need no network."""


def learned(scorer: NextUse, trace: Trace) -> tuple[Array, Array]:
    """float32 [tokens, layers, experts], twice: log-odds of a use by the token after each, and the scorer's own sum."""
    soon, scores = [], []
    with torch.no_grad():
        for prompt in range(trace.num_prompts):
            scorer.begin_prompt(trace.task_of(prompt))
            rows = trace.experts[int(trace.offsets[prompt]) : int(trace.offsets[prompt + 1])]
            for at in range(0, len(rows), 128):
                hot = multi_hot(rows[at : at + 128], scorer.shape)
                raw, before = whole_raw(scorer.stream, hot)
                logits = scorer._network.of_tokens(raw, before, hot)
                soon.append(logits[:, 0].numpy())
                scores.append(torch.sigmoid(logits).sum(1).numpy())
    return np.concatenate(soon), np.concatenate(scores)


def odds(share: Array) -> Array:
    """Log-odds."""
    share = np.clip(share, 1e-3, 1 - 1e-3)
    found: Array = np.log(share / (1 - share))
    return found


def lifts(first: Array, then: Array) -> Array:
    """[layers, experts, experts]: log of how much likelier `then` is after `first`, both [tokens, layers, experts]."""
    pairs = np.einsum("tla,tlb->lab", first, then, optimize=True)
    base = then.mean(0)[:, None] + 1e-4
    seen = first.sum(0)[:, :, None]
    found: Array = np.log((pairs + PRIOR * base) / ((seen + PRIOR) * base))
    return found


class Guesses:
    """Features of every key before each token, and the two logistic regressions over them."""

    def __init__(self, history: Array) -> None:
        """Count transitions in a history [tokens, layers, experts] of 0 and 1."""
        self.popular = odds(history.mean(0))
        self.same = lifts(history[:-1], history[1:])
        self.below = lifts(history[:, :-1], history[:, 1:])
        self.below2 = lifts(history[:, :-2], history[:, 2:])
        self.weights: dict[str, Any] = {}

    def features(self, used: Array, soon: Array) -> tuple[Array, Array]:
        """[tokens, layers, experts, n] for the next token and for the next layer; row t is about token t's routes."""
        tokens = len(used)
        decayed, since = [], np.empty_like(used)
        for half in HALF_LIVES:
            keep = 0.5 ** (1 / half)
            state, rows = used.mean(0), np.empty_like(used)
            for t in range(tokens):
                rows[t] = state
                state = keep * state + (1 - keep) * used[t]
            decayed.append(odds(rows))
        last = np.full(used.shape[1:], -200.0)
        for t in range(tokens):
            since[t] = np.log(t - last)
            last[used[t] > 0] = t
        before = np.concatenate([used[:1], used[:-1]])
        ahead = np.concatenate([soon[:1], soon[:-1]])
        same = np.einsum("tla,lab->tlb", before, self.same, optimize=True)
        common = [np.broadcast_to(self.popular, used.shape), *decayed, since, same, ahead]
        down, down2 = np.zeros_like(used), np.zeros_like(used)
        down[:, 1:] = np.einsum("tla,lab->tlb", used[:, :-1], self.below, optimize=True)
        down2[:, 2:] = np.einsum("tla,lab->tlb", used[:, :-2], self.below2, optimize=True)
        return np.stack(common, -1), np.stack([*common, down, down2], -1)

    def fit(self, name: str, features: Array, used: Array, missing: Array) -> None:
        """Fit one regression to keys that were missing."""
        x = torch.from_numpy(features[missing]).float()
        y = torch.from_numpy(used[missing]).float()
        mean, scale = x.mean(0), x.std(0) + 1e-6
        weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
        optimiser = torch.optim.LBFGS([weights], max_iter=60)

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            logits = (x - mean) / scale @ weights[1:] + weights[0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimiser.step(closure)  # type: ignore[no-untyped-call]
        self.weights[name] = (weights.detach().numpy(), mean.numpy(), scale.numpy())

    def chances(self, name: str, features: Array) -> Array:
        """[tokens, layers, experts] chances that the token uses each key, if it is missing."""
        weights, mean, scale = self.weights[name]
        logits = (features - mean) / scale @ weights[1:] + weights[0]
        found: Array = 1 / (1 + np.exp(-logits))
        return found


@dataclass
class Times:
    """Milliseconds."""

    load: float
    expert: float
    dense: float
    head: float
    delay: float
    first: float = 2 / 3


@dataclass
class Run:
    """One policy over the reported tokens.

    `order` [tokens, layers, experts]: the lowest leaves first, before each token's layer. `head`, `layer`: chances of
    the guesses, None where it does not guess.
    """

    used: Array
    order: Array
    slots: int
    times: Times
    head: Array | None = None
    layer: Array | None = None
    anytime: bool = False
    early_down: bool = False
    least: float = 0.1
    now: float = 0.0
    demand: int = 0
    guessed: int = 0
    useful: int = 0
    spoilt: int = 0
    hits: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers, self.experts = self.used.shape[1:]
        self.resident = np.zeros((self.layers, self.experts), dtype=bool)
        for rank in range(self.layers):
            self.resident[rank, np.argsort(-self.used[:64, rank].sum(0), kind="stable")[: self.slots]] = True
        self.ahead: set[tuple[int, int]] = set()
        self.queue: list[tuple[int, int]] = []
        self.left: dict[tuple[int, int], float] = {}

    def evict(self, token: int, rank: int, spared: Array) -> None:
        """Empty a slot of a layer."""
        order = np.where(self.resident[rank] & ~spared, self.order[token, rank], np.inf)
        victim = int(order.argmin())
        self.resident[rank, victim] = False
        self.ahead.discard((rank, victim))

    def idle(self, token: int, span: float) -> bool:
        """The link has nothing to do for so long: guesses travel. Whether one is under way at the end.

        `token`: the last one whose routes are all known.
        """
        while self.queue and span > 0:
            key = self.queue[0]
            took = min(span, self.left[key])
            self.left[key] -= took
            span -= took
            if self.left[key] > 1e-9:
                return True
            self.queue.pop(0)
            del self.left[key]
            rank, expert = key
            spared = np.zeros(self.experts, dtype=bool)
            self.evict(token, rank, spared)
            self.resident[rank, expert] = True
            self.ahead.add(key)
            self.guessed += 1
        return bool(self.queue)

    def guess(self, keys: list[tuple[int, int]], front: bool = False) -> None:
        """Queue guesses, best first; those no longer wanted are dropped with what they had read."""
        kept = [key for key in self.queue if front and key not in keys]
        self.left = {key: self.left.get(key, self.times.load) for key in [*keys, *kept]}
        self.queue = [*keys, *kept]

    def best(self, chances: Array, most: int) -> list[tuple[int, int]]:
        """The keys [layers, experts] of the highest chances among what is missing."""
        masked = np.where(self.resident, -np.inf, chances)
        order = np.argsort(-masked, axis=None, kind="stable")[:most]
        return [(int(i) // self.experts, int(i) % self.experts) for i in order if masked.flat[int(i)] >= self.least]

    def serve(self, token: int) -> None:
        """One token."""
        t, under_way = self.times, False
        for rank in range(self.layers):
            self.now += t.dense
            under_way = self.idle(max(token - 1, 0), t.dense)
            used = self.used[token, rank] > 0
            for key in [(rank, e) for e in np.flatnonzero(used)]:
                if key in self.ahead:
                    self.ahead.discard(key)
                    self.useful += 1
            missing = np.flatnonzero(used & ~self.resident[rank]).tolist()
            here = int(used.sum()) - len(missing)
            self.demand += len(missing)
            compute, arrival = here * t.expert, 0.0
            if missing and under_way and self.queue[0] not in [(rank, e) for e in missing]:
                arrival = t.delay
                self.spoilt += 1
            for number, expert in enumerate(sorted(missing, key=lambda e: self.left.get((rank, e), t.load)), start=1):
                part = self.left.pop((rank, expert), t.load)
                if (rank, expert) in self.queue:
                    self.queue.remove((rank, expert))
                arrival += part
                self.evict(token, rank, used)
                self.resident[rank, expert] = True
                if self.early_down and number == len(missing):
                    # A guess that was begun has read the first projection before the second.
                    first_there = arrival - min(part, (1 - t.first) * t.load)
                    compute = max(max(compute, first_there) + t.first * t.expert, arrival) + (1 - t.first) * t.expert
                else:
                    compute = max(compute, arrival) + t.expert
            self.queue = [key for key in self.queue if key[0] != rank]  # its layer has passed
            self.left = {key: left for key, left in self.left.items() if key[0] != rank}
            self.now += compute
            if self.layer is not None and rank + 1 < self.layers:
                only = np.full((self.layers, self.experts), -np.inf)
                only[rank + 1] = self.layer[token, rank + 1]
                self.guess(self.best(only, 2), front=True)
            self.idle(max(token - 1, 0), compute - arrival)
        if self.head is not None and token + 1 < len(self.used):
            self.guess(self.best(self.head[token + 1], 8 if self.anytime else 4))
        elif self.layer is not None:
            self.guess([])
        self.now += t.head
        self.idle(token, t.head)
        if self.layer is None and self.head is not None and not self.anytime:
            # no load of the head's is begun in the layers: what is under way may end while layer 0 computes
            self.queue = self.queue[:1] if self.queue and self.left[self.queue[0]] < self.times.load else []


def precision(chances: Array, used: Array, missing: Array, most: tuple[int, ...], by_layer: bool) -> list[str]:
    """Share of the n-th best-ranked missing keys that were used, for each n; and of all that were missing."""
    masked = np.where(missing, chances, -np.inf)
    flat = masked.reshape(-1, masked.shape[-1]) if by_layer else masked.reshape(len(masked), -1)
    truth = used.reshape(flat.shape)
    order = np.argsort(-flat, axis=1, kind="stable")
    cells = []
    for n in most:
        at = order[:, n - 1 : n]
        there = np.take_along_axis(flat, at, 1) > -np.inf  # so many were missing
        hits = np.take_along_axis(truth, at, 1)[there]
        cells.append(f"{100 * float(hits.mean()):.1f} %" if len(hits) else "-")
    return [*cells, f"{100 * float(used[missing].mean()):.1f} %"]


def residents(used: Array, order: Array, slots: int) -> Array:
    """bool [tokens, layers, experts]: what is resident when each token's layer runs, demand loads only."""
    run = Run(used, order, slots, Times(1, 0, 0, 0, 0))
    found = np.empty(used.shape, dtype=bool)
    for token in range(len(used)):
        found[token] = run.resident
        run.serve(token)
    return found


def recency(used: Array) -> Array:
    """float [tokens, layers, experts]: when each key was used last, the running token included."""
    at = np.where(used > 0, np.arange(1, len(used) + 1)[:, None, None], 0)
    found: Array = np.maximum.accumulate(at, axis=0).astype(np.float64)
    return found


def main() -> None:
    """Print precision and time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--layers", type=int, default=6, help="only the first so many")
    parser.add_argument("--slots", type=int, default=14, help="of a layer")
    parser.add_argument("--history", type=int, default=12000, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=4000, help="to report, and to fit the regressions on")
    parser.add_argument("--load-ms", type=float, default=14.5)
    parser.add_argument("--expert-ms", type=float, default=1.27)
    parser.add_argument("--dense-ms", type=float, default=1.0)
    parser.add_argument("--head-ms", type=float, default=30.0)
    parser.add_argument("--delay-ms", type=float, default=1.2)
    parser.add_argument("--least", type=float, default=0.1, help="chance below which nothing is guessed")
    parser.add_argument("--orders", default="least-stale,next-use")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trace = Trace.read(args.trace)
    if not trace.top_k <= args.slots < trace.num_experts:
        parser.error(
            f"--slots is at least one token's experts ({trace.top_k}) and fewer than a layer has ({trace.num_experts})"
        )
    trace = like_model(trace, args.layers, trace.num_experts, trace.top_k)
    whole = [n for n, about in enumerate(trace.prompts) if not about.get("repetition")]
    parts = [whole[0::4] + whole[2::4], whole[1::4], whole[3::4]]
    shape = RoutingShape.of(trace)

    def some(prompts: list[int], tokens: int) -> Trace:
        sizes = np.cumsum([trace.offsets[n + 1] - trace.offsets[n] for n in prompts])
        return trace.select(prompts[: int(np.searchsorted(sizes, tokens)) + 1])

    history, fitting, report = some(parts[0], args.history), some(parts[1], args.tokens), some(parts[2], args.tokens)
    scorer = NextUse(shape)
    scorer.fit(history, seed=0)
    used, soon, scores = {}, {}, {}
    for name, part in (("fit", fitting), ("report", report)):
        used[name] = multi_hot(part.experts, shape).numpy()
        soon[name], scores[name] = learned(scorer, part)
    guesses = Guesses(multi_hot(history.experts, shape).numpy())
    times = Times(args.load_ms, args.expert_ms, args.dense_ms, args.head_ms, args.delay_ms)
    for order_name in args.orders.split(","):
        order = {n: recency(used[n]) if order_name == "least-stale" else scores[n] for n in used}
        missing = {n: ~residents(used[n], order[n], args.slots) for n in used}
        features = {n: guesses.features(used[n], soon[n]) for n in used}
        chances, titles = {}, ("next token", "next layer")
        for i, name in enumerate(titles):
            guesses.fit(name, features["fit"][i], used["fit"], missing["fit"])
            chances[name] = guesses.chances(name, features["report"][i])
        cheap = {n: features[n][0][..., :CHEAP] for n in used}
        guesses.fit("cheap", cheap["fit"], used["fit"], missing["fit"])
        chances["cheap"] = guesses.chances("cheap", cheap["report"])
        mine, gone = used["report"], missing["report"]
        rate = float(mine[gone].sum() / mine.sum())
        print(
            f"\n{order_name}, {args.layers} layers, {args.slots} of {shape.experts} slots, {len(mine)} tokens: "
            f"{100 * rate:.1f} % of the routed experts are missing, {mine[gone].sum() / len(mine):.2f} a token"
        )
        most = (1, 2, 3, 4, 8)
        rows: list[tuple[str, ...]] = [("precision of the n-th guess", *(str(n) for n in most), "any missing")]
        feats = features["report"]
        ahead, transitions, decayed, below = feats[0][..., 7], feats[0][..., 6], feats[0][..., 2], feats[1][..., 8]
        all_layers = {
            "regression": chances["next token"],
            "without next-use": chances["cheap"],
            "next-use": ahead,
            "decayed": decayed,
            "transitions": transitions,
        }
        one_layer = {"regression": chances["next layer"], "next-use": ahead, "transitions": below}
        for name, by_layer, kinds in (
            ("next token, all layers", False, all_layers),
            ("next layer", True, one_layer),
        ):
            for kind, values in kinds.items():
                skip = slice(1, None) if by_layer else slice(None)
                cells = precision(values[:, skip], mine[:, skip], gone[:, skip], most, by_layer)
                rows.append((f"{name}: {kind}", *cells))
        print(table(rows, right=tuple(range(1, len(rows[0])))))
        base = 0.0
        rows = [("", "ms a token", "gain", "demand loads", "guessed", "of them used", "demands delayed")]
        kinds_of: dict[str, dict[str, Any]] = {
            "none": {},
            "early down": {"early_down": True},
            "head": {"head": chances["next token"]},
            "anytime": {"head": chances["next token"], "anytime": True},
            "anytime, early down": {"head": chances["next token"], "anytime": True, "early_down": True},
            "head, no next-use": {"head": chances["cheap"]},
            "head, early down": {"head": chances["next token"], "early_down": True},
            "layer": {"layer": chances["next layer"]},
            "both": {"head": chances["next token"], "layer": chances["next layer"]},
            "both, early down": {
                "head": chances["next token"],
                "layer": chances["next layer"],
                "early_down": True,
            },
            "oracle": {"head": mine, "layer": mine},
        }
        for name, settings in kinds_of.items():
            run = Run(mine, order["report"], args.slots, times, least=args.least, **settings)
            for token in range(len(mine)):
                run.serve(token)
            each = run.now / len(mine)
            base = base or each
            n = len(mine)
            rows.append((name, f"{each:.1f}", f"{100 * (base / each - 1):+.1f} %", f"{run.demand / n:.2f}",
                         f"{run.guessed / n:.2f}", f"{100 * run.useful / max(1, run.guessed):.0f} %",
                         f"{run.spoilt / n:.2f}"))  # fmt: skip
        print(table(rows, right=tuple(range(1, 7))))


if __name__ == "__main__":
    main()
