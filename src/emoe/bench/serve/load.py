"""Send a plan in open loop: each request at its time, however many are still waiting for their answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from emoe.bench.serve.client import INTERRUPTED, Client, Record
from emoe.bench.serve.targets import Book
from emoe.bench.serve.workload import Planned

Progress = Callable[[int, int, int], None]
"""Called with (sent, answered, failed)."""

TICK_S = 0.25


async def send(
    client: Client,
    requests: Sequence[Planned],
    book: Book,
    *,
    concurrency: int | None = None,
    stop: asyncio.Event | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Send every request at its time and wait for all answers; one record for each that was sent, in order.

    Args:
        client: opened.
        requests: in order of time.
        book: targets by task.
        concurrency: in flight at most; a request that waits for another to end is sent late, and its record says so.
        stop: once set, nothing more is sent and what is in flight is given up.
        progress: told now and then.
    """
    stop = stop or asyncio.Event()
    room = asyncio.Semaphore(concurrency) if concurrency else None
    flights: list[asyncio.Task[Record]] = []
    records: list[Record] = []
    watcher = asyncio.create_task(_watch(flights, progress)) if progress else None
    start = time.perf_counter()
    try:
        for planned in requests:
            due = start + planned.at_s
            await _until(due, stop)
            if room is not None and not stop.is_set():
                await _first(room.acquire(), stop)
            if stop.is_set():
                break
            record = Record(number=planned.number, task=planned.task, label=planned.label, due_s=due)
            flight = asyncio.create_task(client.ask(planned, book.of(planned.task), record))
            if room is not None:
                flight.add_done_callback(partial(_release, room))
            flights.append(flight)
            records.append(record)
        if flights:
            await _first(asyncio.wait(flights), stop)
    finally:
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        if watcher is not None:
            watcher.cancel()
        if progress is not None:
            _tell(flights, progress)
    for flight, record in zip(flights, records, strict=True):
        if flight.cancelled():
            record.error, record.message = INTERRUPTED, "the benchmark was ended"
        else:
            flight.result()  # raises what is a defect
    return [record for record in records if record.sent_s]


def _release(room: asyncio.Semaphore, _: object) -> None:
    room.release()


async def _until(due: float, stop: asyncio.Event) -> None:
    """Sleep until then, or until told to stop."""
    left = due - time.perf_counter()
    if left > 0:
        try:
            await asyncio.wait_for(stop.wait(), left)
        except TimeoutError:
            return
    else:
        await asyncio.sleep(0)  # let answers be read however far behind the sending is


async def _first(awaited: object, stop: asyncio.Event) -> None:
    """Wait for `awaited`, or until told to stop."""
    work = asyncio.ensure_future(awaited)  # type: ignore[call-overload]
    told = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work, told}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        work.cancel()
        told.cancel()


async def _watch(flights: Sequence[asyncio.Task[Record]], progress: Progress) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        _tell(flights, progress)


def _tell(flights: Sequence[asyncio.Task[Record]], progress: Progress) -> None:
    done = [
        flight.result() for flight in flights if flight.done() and not flight.cancelled() and not flight.exception()
    ]
    progress(len(flights), len(done), sum(not record.ok for record in done))
