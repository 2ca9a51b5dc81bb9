"""Loads that a prompt begins for the layer to come, so that the disk works while attention computes.

A prompt of some hundred tokens needs nearly every expert of every layer, so what the next layer will miss is known
before its router has run. Only slots that experts pass through are used, once the running layer needs none of them any
more, and nothing here depends on how long anything takes: the same routes give the same loads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise

from emoe.errors import ReadError
from emoe.residency.loader import Loader
from emoe.residency.prefetches import NEXT_GATE, Flight, Start
from emoe.residency.table import Key, ResidencyTable

MOST_OF = 0.75
"""The share of a layer's experts that a chunk must use before the next layer's are loaded unasked."""


SURELY_MOST = 2
"""Tokens for each expert of the first layer that a chunk must have for loads to begin before its router has run."""


class Early:
    """The early loads of one bank. They stay `loading`, safe from eviction, until their layer comes."""

    def __init__(
        self,
        table: ResidencyTable,
        loader: Loader,
        start: Start,
        commit: Callable[[int, int], None],
        abort: Callable[[int], None],
    ) -> None:
        """Start with none; the functions are those of `Prefetches`."""
        self._table = table
        self._loader = loader
        self._start = start
        self._commit = commit
        self._abort = abort
        self._following = dict(pairwise(sorted(table.experts)))
        self._latest: dict[int, list[int]] = {}  # what each layer's latest chunk used, as `evenly` orders it
        self._flights: dict[Key, Flight] = {}
        self.few: int | None = None
        """The layer that this pass runs for a few of its tokens: what those need is known from its router alone."""

    def guess(self, layer: int, experts: list[int]) -> deque[Key]:
        """What the layer after `layer` will probably miss, after a chunk that used `experts` of this, in that order."""
        table, following = self._table, self._following.get(layer)
        self._latest[layer] = experts
        if (
            following is None
            or following == self.few
            or len(experts) < MOST_OF * table.experts[layer]
            or table.below_quota(following)
        ):
            return deque()
        return self._missing(following)

    def _missing(self, layer: int) -> deque[Key]:
        """What is not there of what the latest chunk used of `layer`, in its order; before any, of all its experts."""
        order = self._latest.get(layer, range(self._table.experts[layer]))
        return deque((layer, expert) for expert in order if self._table.find((layer, expert)) is None)

    def open(self, tokens: int) -> None:
        """Begin loads for the first layer, as a pass over so many tokens of prompts starts."""
        first = min(self._table.experts)
        if first == self.few:
            return
        if tokens >= SURELY_MOST * self._table.experts[first] and not self._table.below_quota(first):
            self.begin(self._missing(first))

    def begin(self, keys: deque[Key]) -> None:
        """Begin loads of `keys`, taken off it, while slots that experts pass through are free."""
        while keys:
            slot = self._table.reserve(keys[0], transient=True, prefetch=True)
            if slot is None:
                return
            key = keys.popleft()
            self._flights[key] = Flight(key, slot, self._start(key, slot, NEXT_GATE))

    def claim(self, layer: int, experts: Collection[int]) -> list[Flight]:
        """Hand over the loads of `experts` to `layer`, which runs now, in the order in which they began.

        Those of experts that it does not need end here, those of other layers (a pass that failed) are cancelled.
        """
        for key in [key for key in self._flights if key[0] != layer or key[1] not in experts]:
            flight = self._flights.pop(key)
            if key[0] == layer:
                self._end(flight)
            else:
                self._loader.cancel(flight.load)
                self._abort(flight.slot)
        flights, self._flights = self._flights, {}
        return list(flights.values())

    def _end(self, flight: Flight) -> None:
        try:
            nbytes = self._loader.wait(flight.load)
        except ReadError:  # no request needs it: the layer that does will read it again, and raise
            self._abort(flight.slot)
        except Exception:  # interrupted, the slot stays loading until the next pass begins (`Filling._mend`)
            self._loader.cancel(flight.load)
            self._abort(flight.slot)
            raise
        else:
            self._commit(flight.slot, nbytes)


def evenly(experts: Sequence[int]) -> list[int]:
    """Experts that come with the most tokens first, from the middle outwards: the largest with the smallest in turn.

    Any few of them then take about as long to be computed as any others, and loads, which all take as long, hide behind
    them. With the largest first the disk stood still at a layer's beginning, for want of slots, and the program at its
    end (docs/log.md).
    """
    middle = (len(experts) - 1) / 2
    return [experts[place] for place in sorted(range(len(experts)), key=lambda place: abs(place - middle))]


def turns(here: int, coming: int, begun: int) -> Iterator[bool]:
    """Whether the next expert to be computed is one that is there: they are spread evenly among those that come.

    So the disk gets a slot back after every few, and computing has something to do while a load takes longer. What
    comes goes first if loads were `begun` before.
    """
    done = waited = 0
    for _ in range(here + coming):
        mine = done < here and (waited == coming or done * coming < (waited + (not begun)) * here)
        yield mine
        done, waited = done + mine, waited + (not mine)
