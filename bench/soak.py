"""A server under mixed requests for an hour, in a memory cgroup just above what its plan says.

    python -m bench.soak MODEL [--expert-memory 20%] [--margin 3] [--minutes 60] [--json FILE]

First a server with every expert and no limit answers each prompt alone: those texts are the truth. Then the server on
trial runs in a memory cgroup of its own plan (`emoe serve --dry-run`) and `--margin` percent, while `--clients` clients
ask for those prompts at random, streamed and not, some hanging up in the middle. At the end: whether the kernel killed
it, how its memory, threads and open files grew, and how many answers differ from the truth.

The model runs in float32 unless told otherwise: batches of another size round bfloat16 differently now and then, which
is no wrong token, and float32 hardly ever decides one. Checkpoints without a tokenizer (`emoe bench checkpoint`) get
one whose words are numbers, in a folder of links.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from emoe.bench.cgroup import MemoryCgroup, memory_cgroup
from emoe.bench.serve.local import Server
from emoe.config import format_bytes

SAMPLE_S = 5.0
SETTLE_SHARE = 0.2
"""Of the run, before growth is measured: caches of the allocator and of oneDNN fill first."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt and how much is wanted of it."""

    prompt: str | tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment."""

    at_s: float
    rss: int
    charged: int
    threads: int
    files: int


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    cut: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def with_tokenizer(model: Path, folder: Path) -> Path:
    """`model`, or a folder of links to its files beside a tokenizer whose words are numbers."""
    if (model / "tokenizer.json").exists():
        return model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = json.loads((model / "config.json").read_text())["vocab_size"]
    made = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return folder


def asks_of(model: Path, count: int, longest: int, most: int, seed: int) -> list[Ask]:
    """Prompts of all lengths up to `longest` tokens, answers of up to `most`."""
    rng = random.Random(seed)
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    found = []
    for number in range(count):
        length = round(8 * (longest / 8) ** (number / max(1, count - 1)))
        ids = tuple(rng.randrange(5, size) for _ in range(length))
        found.append(Ask(ids, rng.randint(2, most)))
    return found


def body_of(ask: Ask, stream: bool) -> dict[str, Any]:
    """A greedy completion."""
    prompt = list(ask.prompt) if isinstance(ask.prompt, tuple) else ask.prompt
    return {"model": "soak", "prompt": prompt, "max_tokens": ask.max_tokens, "temperature": 0, "stream": stream}


def truth(url: str, asks: Sequence[Ask]) -> list[str]:
    """What the server answers when it has nothing else to do."""
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        found = []
        for ask in asks:
            reply = client.post("/v1/completions", json=body_of(ask, False))
            reply.raise_for_status()
            found.append(str(reply.json()["choices"][0]["text"]))
    return found


async def one(client: httpx.AsyncClient, ask: Ask, wanted: str, rng: random.Random, tally: Tally) -> None:
    """One request of one client: streamed or not, perhaps cut off."""
    stream, cut = rng.random() < 0.5, rng.random() < 0.1
    try:
        if not stream:
            reply = await client.post("/v1/completions", json=body_of(ask, False))
            if reply.status_code == 429:
                tally.refused += 1
                await asyncio.sleep(1.0)
                return
            reply.raise_for_status()
            text = reply.json()["choices"][0]["text"]
        else:
            text = ""
            async with client.stream("POST", "/v1/completions", json=body_of(ask, True)) as streamed:
                if streamed.status_code == 429:
                    tally.refused += 1
                    return
                streamed.raise_for_status()
                async for line in streamed.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
                        if cut and text:
                            tally.cut += 1
                            return
    except httpx.HTTPError as error:
        tally.failed.append(repr(error))
        await asyncio.sleep(1.0)
        return
    tally.answered += 1
    if text != wanted:
        tally.wrong.append(f"{ask}: {text!r}, not {wanted!r}")


async def load(url: str, asks: Sequence[Ask], truths: Sequence[str], args: argparse.Namespace, tally: Tally) -> None:
    """All clients until the time is over."""
    end = time.monotonic() + args.minutes * 60

    async def client_loop(number: int) -> None:
        rng = random.Random(args.seed * 1000 + number)
        async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
            while time.monotonic() < end:
                chosen = rng.randrange(len(asks))
                await one(client, asks[chosen], truths[chosen], rng, tally)
                await asyncio.sleep(rng.expovariate(1 / args.pause) if args.pause else 0)

    await asyncio.gather(*(client_loop(number) for number in range(args.clients)))


async def watch(process: psutil.Process, group: MemoryCgroup, samples: list[Sample], tally: Tally) -> None:
    """A sample every few seconds, until cancelled."""
    usage = group.folder / ("memory.usage_in_bytes" if group.version == 1 else "memory.current")
    start = said = time.monotonic()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        now = time.monotonic()
        rss, charged = process.memory_info().rss, int(usage.read_text())
        samples.append(Sample(now - start, rss, charged, process.num_threads(), process.num_fds()))
        if now - said > 60:
            said = now
            told = (
                f"{tally.answered} answered, {tally.cut} cut off, {len(tally.failed)} failed, {len(tally.wrong)} wrong"
            )
            say(f"{(now - start) / 60:.0f} min: {told}; {format_bytes(rss)} resident, {format_bytes(charged)} charged")
        await asyncio.sleep(SAMPLE_S)


@contextmanager
def in_group(model: Path, words: Sequence[str], limit: int) -> Iterator[tuple[Server, psutil.Process, MemoryCgroup]]:
    """A server started inside a memory cgroup."""
    with memory_cgroup(limit) as group:
        group.entry.write_text(str(os.getpid()))
        try:
            server = Server("affinity", [*words, str(model)])
        finally:
            (group.folder.parent / "cgroup.procs").write_text(str(os.getpid()))  # its child stays
        with server:
            server.wait()
            yield server, psutil.Process(server.pid), group


def planned_bytes(model: Path, words: Sequence[str]) -> int:
    """What `emoe serve --dry-run` says the process takes."""
    command = [sys.executable, "-m", "emoe", "serve", "--dry-run", "--json", *words, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"emoe serve --dry-run failed: {done.stderr}")
    return int(json.loads(done.stdout)["total_bytes"])


def growth_per_hour(samples: Sequence[Sample], name: str) -> float:
    """Slope of a straight line through what came after the server settled, per hour."""
    late = [s for s in samples if s.at_s >= SETTLE_SHARE * samples[-1].at_s]
    if len(late) < 3:
        return float("nan")
    slope = statistics.linear_regression([s.at_s for s in late], [float(getattr(s, name)) for s in late]).slope
    return slope * 3600


def main() -> int:
    """Print what happened. Exit code 1 when it was killed, failed a request or gave a wrong answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path)
    add("--expert-memory", default="20%")
    add("--margin", type=float, default=3.0, help="percent above the plan")
    add("--minutes", type=float, default=60.0)
    add("--clients", type=int, default=6)
    add("--pause", type=float, default=0.5, help="mean seconds between a client's requests")
    add("--max-num-seqs", type=int, default=4)
    add("--prompts", type=int, default=24, help="different ones")
    add("--longest", type=int, default=384, help="prompt, in tokens")
    add("--most", type=int, default=32, help="tokens of an answer")
    add("--dtype", default="float32")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    common = ["--dtype", args.dtype, "--served-model-name", "soak", "--status-interval", "0"]
    common += ["--max-model-len", str(args.longest + args.most)]
    words = [*common, "--expert-memory", args.expert_memory, "--max-num-seqs", str(args.max_num_seqs)]
    tally, samples = Tally(), list[Sample]()
    with tempfile.TemporaryDirectory() as scratch:
        model = with_tokenizer(args.model, Path(scratch))
        asks = asks_of(model, args.prompts, args.longest, args.most, args.seed)
        say(f"asking a server with every expert {len(asks)} prompts, one at a time")
        with Server("fifo", [*common, str(model)]) as whole:
            truths = truth(whole.wait(), asks)
        plan = planned_bytes(model, words)
        limit = int(plan * (1 + args.margin / 100))
        say(f"the plan is {format_bytes(plan)}; the limit {format_bytes(limit)}; {args.minutes:g} minutes")

        with in_group(model, words, limit) as (server, process, group):

            async def go() -> None:
                watcher = asyncio.create_task(watch(process, group, samples, tally))
                await load(server.url, asks, truths, args, tally)
                watcher.cancel()

            try:
                asyncio.run(go())
            except KeyboardInterrupt:
                say("interrupted; what follows is of the time until then")
            alive, peak, kills = process.is_running(), group.peak_bytes, group.kills
    found = {
        "plan_bytes": plan,
        "limit_bytes": limit,
        "peak_rss": max(s.rss for s in samples),
        "peak_charged": peak,
        "killed": kills > 0 or not alive,
        "answered": tally.answered,
        "cut": tally.cut,
        "refused": tally.refused,
        "failed": len(tally.failed),
        "wrong": len(tally.wrong),
        **{f"{name}_growth_per_hour": growth_per_hour(samples, name) for name in ("rss", "threads", "files")},
    }
    print(json.dumps(found, indent=2))
    for text in (*tally.failed[:5], *tally.wrong[:5]):
        print(text[:500])
    if args.json is not None:
        args.json.write_text(json.dumps(found | {"samples": [[s.at_s, s.rss, s.charged] for s in samples]}) + "\n")
    return 1 if found["killed"] or tally.failed or tally.wrong else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
