"""Policies by name: eviction rules, scorers and predictors of the prediction room, and two bounds.

- lru, lfu, least-stale: the engine's rules (`emoe.residency.eviction`);
- a scorer (decayed, next-use, ...): the lowest score goes first;
- a predictor (static, emoe-a, ...): asked every p prompts for what the coming prompt's task needs (paper, section 2.3);
  that is loaded, and until the next call the lowest predicted share goes first;
- random: evicts at random, a floor; belady: evicts what is used again last, the bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from emoe.errors import UsageError, unknown
from emoe.plugins import Registry
from emoe.prediction.protocol import LayerScorer, RoutingShape, UseScorer
from emoe.prediction.registry import CONTESTED, NETWORKS, PREDICTORS, SCORERS, make_predictor, make_scorer
from emoe.prediction.schedule import DEFAULT_PROMPTS, make_schedule
from emoe.residency.eviction import EVICTION_RULES, Counts, Eviction, Now, Scored, Uses, make_eviction
from emoe.routing.trace import Array
from emoe.simulation.asking import Asking
from emoe.simulation.banks import Policy
from emoe.simulation.learning import Past
from emoe.simulation.lookups import Lookups

CHUNK_TOKENS = 256
"""Tokens that a scorer's batch method is given at once: scores of all their keys lie in memory."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How policies run.

    Attributes:
        replan_prompts: p, prompts from one call of a predictor to the next; or "adaptive", when what is observed has
            drifted from what was predicted (`emoe.prediction.schedule`).
        prefetch: load what a predictor names; without it, its shares only order evictions.
        seed: of training and of `random`.
    """

    replan_prompts: str | int = DEFAULT_PROMPTS
    prefetch: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        make_schedule(self.replan_prompts)


def scores_before(scorer: UseScorer, routes: Array, weights: Array | None, token_ids: Array | None) -> Iterator[Array]:
    """[layers, experts] scores before each token of a prompt; the scorer observes a token when the next is asked for.

    The one place that scores come from. Of a `LayerScorer` each layer's row also knows the token's own routes so far.
    """
    batch = scorer if isinstance(scorer, LayerScorer) else None
    for start in range(0, len(routes), CHUNK_TOKENS if batch is not None else 1):
        part = slice(start, start + (CHUNK_TOKENS if batch is not None else 1))
        of = routes[part], None if weights is None else weights[part], None if token_ids is None else token_ids[part]
        if batch is not None:
            yield from batch.scores_of(*of)
        else:
            yield scorer.scores()
            scorer.observe(*of)


class Plain:
    """An eviction rule that needs nothing but the past."""

    contested = False

    def __init__(self, name: str, rule: Eviction) -> None:
        self.name = name
        self.rule = rule

    def start(self, lookups: Lookups) -> None:
        """Nothing to prepare."""

    def before(self, token: int) -> Array | None:
        """Nothing to bring up to date."""
        return None


class RandomEviction:
    """Any resident expert, with equal chances."""

    name = "random"
    steady = False
    shared_from = np.inf

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def score(self, past: Uses, now: Now) -> Counts:
        """Score by chance."""
        return self._rng.integers(0, np.iinfo(np.int64).max, size=past.number.shape)


class FarthestNextUse:
    """The key whose next use is farthest goes first (Belady 1966). `next_use[number]` is the token of that use."""

    name = "belady"
    steady = False
    shared_from = np.inf

    def __init__(self, keys: int) -> None:
        self.next_use: Counts = np.zeros(keys, dtype=np.int64)

    def score(self, past: Uses, now: Now) -> Counts:
        """Score by the next use, in visits of layers."""
        order: Counts = -(self.next_use[past.number] * now.layers + past.rank)
        return order


class Belady:
    """Knows the future: no policy on the same bank loads less."""

    contested = False
    name = "belady"
    rule: FarthestNextUse

    def start(self, lookups: Lookups) -> None:
        """Find every look-up's next."""
        self._keys = lookups.keys
        self._top_k = lookups.shape.top_k
        self._next = lookups.next_use()
        self.rule = FarthestNextUse(lookups.nowhere + 1)

    def before(self, token: int) -> Array | None:
        """Move on to the uses after this token."""
        self.rule.next_use[self._keys[token]] = self._next[token]
        return None

    def visit(self, token: int, rank: int) -> None:
        """Move on to the uses after this token in one layer: for a bank that layers share."""
        part = slice(rank * self._top_k, (rank + 1) * self._top_k)
        self.rule.next_use[self._keys[token, part]] = self._next[token, part]


class ByScore:
    """A scorer's order. Of interleaved sequences each has a scorer of its own, and a key's score is their mean.

    Measured with decayed counts on gpt-oss-20b (docs/log.md): the mean loads less than the largest score does, and than
    one scorer that sees the tokens of all, unless its memory is made longer by the number of sequences.
    """

    def __init__(self, name: str, shape: RoutingShape, settings: Settings, past: Past | None) -> None:
        self.name = name
        self.contested = name in CONTESTED
        self.rule = Scored(name, shape.layers * shape.experts)
        self._shape, self._past = shape, past
        self._scorers: list[UseScorer] = []

    def start(self, lookups: Lookups) -> None:
        """One scorer for each lane."""
        self._lookups = lookups
        self._scorers = [make_scorer(self.name, self._shape) for _ in range(lookups.lanes)]
        if self._past is not None:
            for scorer in self._scorers:
                self._past.teach(self.name, scorer)
        self._streams: list[Iterator[Array]] = [iter(()) for _ in self._scorers]
        self._scores = np.zeros((lookups.lanes, len(self.rule.values)), dtype=np.float32)
        self._begun = 0

    def before(self, token: int) -> Array | None:
        """Take the scores before this token."""
        lookups = self._lookups
        number = int(lookups.sequence[token])
        sequence = lookups.sequences[number]
        lane = sequence.lane
        if number == self._begun:
            next(self._streams[lane], None)  # the last token of the lane's sequence before is observed
            self._begun += 1
            self._scorers[lane].begin_prompt(sequence.task)
            trace, rows = lookups.trace, sequence.rows
            weights = None if trace.weights is None else trace.weights[rows]
            token_ids = None if trace.token_ids is None else trace.token_ids[rows]
            self._streams[lane] = scores_before(self._scorers[lane], trace.experts[rows], weights, token_ids)
        scores = next(self._streams[lane]).reshape(-1)
        if lookups.lanes == 1:
            self.rule.values[:] = scores
        else:
            self._scores[lane] = scores
            self._scores.mean(axis=0, out=self.rule.values)
        return None


class Planned:
    """A predictor's plan. Until the first, the least recently used goes first."""

    contested = False

    def __init__(self, name: str, shape: RoutingShape, settings: Settings, past: Past | None) -> None:
        self.name = name
        self.rule = Scored(name, shape.layers * shape.experts)
        self._prefetch = settings.prefetch
        predictor = make_predictor(name, shape)
        if past is not None:
            past.teach(name, predictor)
        self._asking = Asking(predictor, shape, settings.replan_prompts, learned=past is not None)

    def start(self, lookups: Lookups) -> None:
        """Forget which prompts ran."""
        self._lookups = lookups
        self._running: list[int | None] = [None] * lookups.lanes
        self._begun = 0

    def before(self, token: int) -> Array | None:
        """Ask for a plan where a prompt begins."""
        number = int(self._lookups.sequence[token])
        if number != self._begun:
            return None
        self._begun += 1
        sequence = self._lookups.sequences[number]
        ended = self._running[sequence.lane]
        if ended is not None:
            before = self._lookups.sequences[ended]
            self._asking.ended(before.task, self._lookups.trace.experts[before.rows])
        self._running[sequence.lane] = number
        shares = self._asking.begins(number, sequence.task)
        if shares is None:
            return None
        self.rule.values[:] = shares.reshape(-1)
        return shares if self._prefetch else None


_OWN: Registry[type] = Registry("policy of the simulator", "policy", {"random": RandomEviction, "belady": Belady})
"""Their names are taken: a rule called so would be run by the engine, and something else beside it be simulated."""


def names() -> tuple[str, ...]:
    """Every policy that can be named."""
    return tuple(dict.fromkeys((*sorted(EVICTION_RULES), "random", *sorted(SCORERS), *sorted(PREDICTORS), "belady")))


def check(name: str) -> None:
    """Raises UsageError where no policy has that name."""
    if name not in names():
        raise unknown("policy", name, names())


def check_history(named: Iterable[str], history: object | None) -> None:
    """Raises UsageError, before long work, where a network is to predict that has nothing to learn from."""
    untrained = [name for name in named if name in NETWORKS]
    if untrained and history is None:
        raise UsageError(f"{untrained[0]} is a network that has to be trained first: give --history or --split.")


def plans(name: str) -> bool:
    """Whether the policy is a predictor that plans for whole prompts."""
    return name in PREDICTORS and name not in SCORERS


def make_policy(name: str, shape: RoutingShape, settings: Settings, past: Past | None = None) -> Policy:
    """Return a new policy by name, having learned from the past if there is one.

    Raises:
        UsageError: no policy has that name.
    """
    check(name)
    if name == "belady":
        return Belady()
    if name == "random":
        return Plain(name, RandomEviction(settings.seed))
    if name in EVICTION_RULES:
        return Plain(name, make_eviction(name))
    made: type[ByScore] | type[Planned] = Planned if plans(name) else ByScore
    return made(name, shape, settings, past)


__all__ = ["Belady", "ByScore", "Settings", "check", "check_history", "make_policy", "names", "plans", "scores_before"]
