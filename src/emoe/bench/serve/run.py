"""One run: look who is there, measure what it needs unloaded, send the load, report."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace

from emoe.bench.serve.client import Asking, Client, Record, ServerUnusableError
from emoe.bench.serve.load import Progress, send
from emoe.bench.serve.results import LoadReport
from emoe.bench.serve.settings import LoadSettings
from emoe.bench.serve.targets import EVERY_TASK, Book, Targets, unloaded
from emoe.bench.serve.workload import Planned, Prompt, Ruler, parse_mix, plan, read_prompts
from emoe.scheduling.arrivals import Arrival, poisson_arrivals, read_arrivals

Say = Callable[[str], None]

USUAL_SCALE = 5.0
"""Measured targets: so many times what an unloaded server needs."""

CALIBRATION_TOKENS = 32
"""Longest answer while calibrating: enough for the time per token, and soon done."""

CONTEXT_SHARE = 0.9
"""Of the context that fitted prompts and answers may fill: lengths are fitted by characters, so roughly."""


def arrivals_of(settings: LoadSettings) -> list[Arrival]:
    """The arrivals that the settings ask for. Raises UsageError."""
    if settings.arrivals is None:
        return poisson_arrivals(settings.rate, settings.requests, settings.seed)
    return read_arrivals(
        settings.arrivals,
        time_scale=settings.time_scale,
        length_scale=settings.length_scale,
        start=settings.start,
        limit=settings.limit,
    )


async def run(settings: LoadSettings, say: Say, progress: Progress | None = None) -> LoadReport:
    """Everything from the first look to the report. Ctrl-C ends the load early; what there is then is reported.

    Raises:
        UsageError: files or numbers that cannot be meant; before anything is sent.
        ServerUnusableError: nobody answers, or not one request works on the unloaded server.
    """
    arrivals = arrivals_of(settings)
    prompts = read_prompts(settings.prompts)
    mix = parse_mix(settings.task_mix, prompts)
    plan(arrivals, prompts, mix, max_tokens=1, wrong_labels=settings.wrong_labels)  # refuses what it would refuse later
    asking = Asking(
        endpoint=settings.endpoint,
        temperature=settings.temperature,
        ignore_eos=settings.ignore_eos,
        timeout_s=settings.timeout_s,
    )
    async with Client(settings.url, asking, settings.api_key) as client:
        server = await client.look(settings.model)
        notes: list[str] = []
        who = "an emoe server" if server.ours else "not an emoe server: it is told neither tasks nor targets"
        say(f"{client.url} serves {server.model} ({who})")
        await _knock(client, prompts[0], notes)
        fitted = settings.fit_prompts and any(arrival.input_tokens is not None for arrival in arrivals)
        ruler = await _measure_prompts(client, [p for p in prompts if mix.get(p.task)], notes) if fitted else None
        context = settings.context or (server.context and int(server.context * CONTEXT_SHARE)) or None
        requests, shortened = plan(
            arrivals,
            prompts,
            mix,
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            labels=settings.labels,
            wrong_labels=settings.wrong_labels,
            ruler=ruler,
            context=context,
        )
        if shortened:
            notes.append(f"{shortened} of {len(requests)} arrivals were shortened to {context} tokens in all")
        book, calibrated = await _targets(client, settings, requests, say)
        span = requests[-1].at_s
        say(f"sending {len(requests)} requests over {span:.1f} s ({len(requests) / max(span, 1e-9):.2f} per second)")
        records = await _send(client, settings, requests, book, say, progress)
    report = LoadReport(settings, server, book, calibrated, records, len(requests), notes)
    _note_lengths(report, requests)
    return report


async def _send(
    client: Client,
    settings: LoadSettings,
    requests: Sequence[Planned],
    book: Book,
    say: Say,
    progress: Progress | None,
) -> list[Record]:
    """The load itself; Ctrl-C and SIGTERM end it early."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    kinds: list[signal.Signals] = []
    try:
        for kind in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(kind, stop.set)
            kinds.append(kind)
    except (ValueError, RuntimeError, NotImplementedError):
        say("Ctrl-C cannot be caught here: it ends the benchmark without a report")
    try:
        return await send(client, requests, book, concurrency=settings.concurrency, stop=stop, progress=progress)
    finally:
        for kind in kinds:
            loop.remove_signal_handler(kind)


async def _knock(client: Client, prompt: Prompt, notes: list[str]) -> None:
    """One request of one token. Its failure is the run's; a server without usage in streams is asked without."""
    record = await client.ask(_probe(prompt), Targets())
    if not record.ok and "stream_options" in record.message:
        client.asking = replace(client.asking, usage=False)
        record = await client.ask(_probe(prompt), Targets())
    if not record.ok:
        raise ServerUnusableError(f"{client.url} answers the first request with {record.error}: {record.message}")
    if not record.counted:
        notes.append("the server's streams tell no usage: output tokens are pieces of text, input tokens unknown")


async def _measure_prompts(client: Client, prompts: Sequence[Prompt], notes: list[str]) -> Ruler:
    """Characters of a token by task: what the server says of one prompt, whole and in half."""
    pairs = {}
    # The longest of each task: the shorter the text, the more a token more or less counts.
    for prompt in {prompt.task: prompt for prompt in sorted(prompts, key=lambda each: len(each.text))}.values():
        half = replace(prompt, text=prompt.text[: max(1, len(prompt.text) // 2)])
        found = [(each, await client.ask(_probe(each), Targets())) for each in (half, prompt)]
        counts = [(len(each.text), record.input_tokens) for each, record in found if record.input_tokens is not None]
        if len(counts) == len(found):
            pairs[prompt.task] = (counts[0], counts[1])
    ruler = Ruler.of(pairs)
    how = "as measured on the server" if ruler.characters else "a guess: the server does not count prompts"
    notes.append(f"prompts were repeated or cut to the arrivals' lengths, {ruler.usual:.2f} characters a token ({how})")
    return ruler


def _probe(prompt: Prompt) -> Planned:
    return Planned(number=-1, at_s=0.0, task=prompt.task, label=prompt.task, prompt=prompt.text, max_tokens=1)


async def _targets(
    client: Client, settings: LoadSettings, requests: Sequence[Planned], say: Say
) -> tuple[Book, dict[str, Targets]]:
    """Given targets, or measured ones and what the unloaded server needed."""
    if settings.targets:
        scale = settings.slo_scale or 1.0
        return Book({task: targets.scaled(scale) for task, targets in settings.targets.items()}), {}
    if not settings.calibration:
        return Book({}), {}
    scale = settings.slo_scale or USUAL_SCALE
    found: dict[str, Targets] = {}
    for task in dict.fromkeys(request.task for request in requests):
        mine = [request for request in requests if request.task == task]
        samples = []
        for request in spaced(mine, settings.calibration):
            short = replace(request, label=task, max_tokens=min(request.max_tokens, CALIBRATION_TOKENS))
            record = await client.ask(short, Targets())
            if record.ok and record.ttft_s is not None:
                samples.append((record.ttft_s, record.tpot_s))
            elif not record.ok:
                say(f"calibration, {task}: {record.error}: {record.message}")
        if not samples:
            raise ServerUnusableError(
                f"no request of task {task} worked on the unloaded server, so there is nothing to take targets from; "
                "give them with --slo"
            )
        found[task or EVERY_TASK] = unloaded(samples)
    say(f"targets are {scale:g} times what the unloaded server needs (milliseconds, first token / each later one):")
    for task, needs in found.items():
        say(f"  {task}: {_both(needs)} -> {_both(needs.scaled(scale))}")
    return Book({task: needs.scaled(scale) for task, needs in found.items()}), found


def spaced(requests: Sequence[Planned], count: int) -> list[Planned]:
    """`count` of them, from the middle of as many parts of the range of lengths."""
    ordered = sorted(requests, key=lambda request: len(request.prompt))
    return [ordered[(2 * part + 1) * len(ordered) // (2 * count)] for part in range(count)]


def _both(targets: Targets) -> str:
    return "/".join("-" if value is None else f"{value * 1e3:.0f}" for value in (targets.ttft_s, targets.tpot_s))


def _note_lengths(report: LoadReport, requests: Sequence[Planned]) -> None:
    asked = {request.number: request.input_tokens for request in requests}
    pairs = [
        (wanted, record.input_tokens)
        for record in report.records
        if record.input_tokens is not None and (wanted := asked[record.number]) is not None
    ]
    if pairs:
        wanted, got = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        report.notes.append(f"prompts had {got:.1f} tokens on average, the arrivals ask for {wanted:.1f}")
