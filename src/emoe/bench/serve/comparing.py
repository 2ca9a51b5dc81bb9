"""Several servers under the same load: what `bench/scheduling.py` and Figures 12 and 19 compare schedulers with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emoe.bench.serve.client import Asking, Client, Record
from emoe.bench.serve.load import send
from emoe.bench.serve.local import Server
from emoe.bench.serve.results import Summary
from emoe.bench.serve.run import spaced
from emoe.bench.serve.targets import EVERY_TASK, Book, Targets, unloaded
from emoe.bench.serve.workload import Planned, Prompt, parse_mix, plan
from emoe.errors import EmoeError
from emoe.scheduling.arrivals import poisson_arrivals

CALIBRATION = 3
"""Requests of each task that an unloaded server answers for the targets."""


class LoadFailedError(EmoeError):
    """A request failed, so nothing can be compared."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run, live or simulated: goodput per second, share of requests that met their targets, mean seconds."""

    goodput: float
    met_share: float
    latency_s: float
    ttft_s: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def outcome_of(records: Sequence[Record]) -> Outcome:
    """From the client's view.

    Raises:
        LoadFailedError: a request failed.
    """
    failed = [record for record in records if not record.ok]
    if failed:
        raise LoadFailedError(
            f"{len(failed)} of {len(records)} requests failed, the first with {failed[0].error}: {failed[0].message}"
        )
    duration = max(record.ended_s for record in records) - min(record.sent_s for record in records)
    found = Summary.of(records, duration)
    whole, first = found.spreads["e2el"], found.spreads["ttft"]
    if whole is None or first is None:
        raise LoadFailedError(f"none of {len(records)} requests has a time to its first token and to its end")
    return Outcome(found.goodput, found.met_share, whole.mean, first.mean)


class Comparison:
    """Servers by name, the prompts they are asked, and the targets that an unloaded one gives."""

    def __init__(self, servers: Mapping[str, Server], prompts: Sequence[Prompt], max_tokens: int) -> None:
        self.servers = servers
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.book = Book({})

    def requests(self, rate: float, count: int, seed: int, wrong: float = 0.0) -> list[Planned]:
        """The same for every server: Poisson arrivals, tasks drawn uniformly."""
        made, _ = plan(
            poisson_arrivals(rate, count, seed),
            self.prompts,
            parse_mix(None, self.prompts),
            max_tokens=self.max_tokens,
            seed=seed,
            wrong_labels=wrong,
        )
        return made

    def live(self, runs: Sequence[tuple[str, Sequence[Planned]]]) -> list[Outcome]:
        """These servers with their requests, side by side.

        Raises:
            LoadFailedError: a request failed.
        """

        async def one(name: str, requests: Sequence[Planned]) -> list[Record]:
            async with Client(self.servers[name].url, Asking()) as client:
                await client.look(None)
                return await send(client, requests, self.book)

        async def go() -> list[list[Record]]:
            return await asyncio.gather(*(one(name, requests) for name, requests in runs))

        return [outcome_of(records) for records in asyncio.run(go())]

    def calibrate(self, base: str, scale: float) -> dict[str, Targets]:
        """Ask the server `base` a few of each task, one at a time, and warm the others up with one of each.

        The targets become `scale` times what `base` needed; returned is that need by task.
        """
        requests = self.requests(1.0, 200, seed=0)
        tasks = sorted({request.task or EVERY_TASK for request in requests})

        async def go(name: str, each_task: int) -> dict[str, Targets]:
            found = {}
            async with Client(self.servers[name].url, Asking()) as client:
                await client.look(None)
                for task in tasks:
                    mine = [request for request in requests if (request.task or EVERY_TASK) == task]
                    records = [await client.ask(each, Targets()) for each in spaced(mine, each_task)]
                    found[task] = unloaded([(r.ttft_s, r.tpot_s) for r in records if r.ttft_s is not None])
            return found

        async def others() -> None:
            await asyncio.gather(*(go(name, 1) for name in self.servers if name != base))

        found = asyncio.run(go(base, CALIBRATION))
        self.book = Book({task: needs.scaled(scale) for task, needs in found.items()})
        asyncio.run(others())
        return found
