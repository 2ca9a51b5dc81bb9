"""The server under everything at once, on a real socket: no leak, no wrong token, nobody without an answer or an error.

float32 throughout: there the engine's tokens are those of `generate()` alone, whatever shares its steps
(tests/engine/test_same_text.py), so every answer can be held against it.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import emoe
from emoe import nano
from emoe.engine.engine import Engine
from emoe.engine.interface import EngineSettings
from emoe.errors import ReadError
from emoe.server.settings import ServerSettings
from tests.engine.running import alone, nothing_left
from tests.server.conftest import Running, running, until
from tests.server.wire import BROKEN, Told, chat, request, shuffled, talk

pytestmark = pytest.mark.slow

KEY = "the key"
CLIENTS = 200
QUEUE = 32
TOKENS = 16
ENDLESS = 600
MAX_BODY = 1 << 16


class Arena:
    """A running server, its engine, and what `generate()` answers to each prompt."""

    def __init__(self, server: Running, engine: Engine, texts: dict[str, str]) -> None:
        self.server = server
        self.engine = engine
        self.texts = texts
        self.prompts = list(texts)

    @property
    def port(self) -> int:
        return self.server.port

    def calm(self) -> None:
        """Wait until nothing runs, then look for what was left behind."""
        stats = self.engine.stats
        assert until(lambda: stats().running == stats().waiting == stats().kv_tokens_used == 0, 60), stats()
        nothing_left(self.engine)
        assert self.engine.alive
        assert self.engine.failure is None

    def whole(self, told: Told, prompt: str) -> bool:
        """Whether the answer is complete; if so, it must be right. If not, it must have begun right."""
        if told.whole:
            assert told.text == self.texts[prompt]
        assert self.texts[prompt].startswith(told.text)
        return told.whole


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def arena_of(**about: Any) -> Iterator[Arena]:
    model, tokenizer = emoe.load(expert_memory="40%", dtype="float32", profile=nano.profile_path())
    assert tokenizer is not None
    prompts = [each["prompt"] for each in nano.prompts()][::6]
    texts = {}
    for prompt in prompts:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            answer = alone(model, ids, TOKENS)
        texts[prompt] = str(tokenizer.decode(answer, skip_special_tokens=True))
    engine = Engine(
        model, tokenizer, EngineSettings(max_running=16, max_waiting=QUEUE, kv_tokens=2048, max_batch_tokens=128)
    )
    engine.start()
    settings = ServerSettings(api_key=KEY, max_body_bytes=MAX_BODY, write_timeout_s=20.0, status_interval_s=0.5)
    try:
        with running(engine, settings, tokenizer) as server:
            yield Arena(server, engine, texts)
    finally:
        engine.stop()
        emoe.close(model)


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with arena_of() as made:
        yield made


def gather(clients: Sequence[Awaitable[Any]]) -> list[Any]:
    async def go() -> list[Any]:
        return await asyncio.gather(*clients)

    return asyncio.run(go())


def storm(arena: Arena, clients: int, seed: int) -> Counter[str]:
    """Clients of every kind at once. Checks each of them; returns how many fared how."""
    drawn = random.Random(seed)
    fared: Counter[str] = Counter()

    async def after(delay_s: float, kind: str, prompt: str) -> None:
        await asyncio.sleep(delay_s)
        fared[await one(kind, prompt)] += 1

    async def one(kind: str, prompt: str) -> str:
        port = arena.port
        good = request(chat(prompt, max_tokens=TOKENS), KEY)
        # Who leaves has asked for more than anybody waits for: unless it is cancelled, it shows.
        long = request(chat(prompt, max_tokens=ENDLESS, ignore_eos=True), KEY)
        if kind == "broken":
            what, body, code = drawn.choice(BROKEN)
            told = await talk(port, request(body, KEY))
            assert told.status == 400, what
            assert code in ("", told.error), what
        elif kind == "oversized":
            told = await talk(port, request(chat("x" * (MAX_BODY + 1)), KEY))
            assert (told.status, told.error) == (413, "body_too_large")
        elif kind == "huge":
            told = await talk(port, request(b"", KEY, length=1 << 40))
            assert (told.status, told.error) == (413, "body_too_large")
        elif kind == "wrong key":
            told = await talk(port, request(chat(prompt), drawn.choice([None, "a key", "ключ"])))
            assert (told.status, told.error) == (401, "invalid_api_key")
        elif kind == "too long":
            told = await talk(port, request(chat(prompt, max_tokens=5000), KEY))
            assert (told.status, told.error) == (400, "context_length_exceeded")
        elif kind == "impatient":
            told = await talk(port, long, hang_up_s=drawn.uniform(0.0, 1.0))
        elif kind == "leaving":
            told = await talk(port, long, events=drawn.randrange(1, 8))
        elif kind == "half a body":
            told = await talk(port, request(b'{"mess', KEY, length=100), hang_up_s=0.5)
        elif kind == "slow":
            told = await talk(port, good, pause_s=0.05)
        else:
            told = await talk(port, request(chat(prompt, max_tokens=TOKENS, stream=kind == "stream"), KEY))
        assert told.answered or told.gone, (kind, told)
        if told.status == 429 and not told.gone:
            assert told.error == "queue_full"
            assert int(told.headers["retry-after"]) >= 1
            return "refused"
        if kind in ("stream", "whole", "slow"):
            assert arena.whole(told, prompt), (kind, told)
            return "answered"
        known = min(len(told.text), len(arena.texts[prompt]))
        assert told.text[:known] == arena.texts[prompt][:known]
        return kind

    kinds = {"stream": 0.4, "whole": 0.15, "slow": 0.05, "impatient": 0.12, "leaving": 0.12, "broken": 0.05}
    others = ("oversized", "huge", "wrong key", "too long", "half a body")
    crowd = [kind for kind, share in kinds.items() for _ in range(int(share * clients))]
    crowd += [others[i % len(others)] for i in range(clients - len(crowd))]
    # Half of them at once, the others within two seconds: some find room.
    gather([after(max(0.0, drawn.uniform(-2, 2)), kind, drawn.choice(arena.prompts)) for kind in shuffled(seed, crowd)])
    return fared


def test_two_hundred_clients_on_a_queue_of_32(arena: Arena) -> None:
    storm(arena, CLIENTS // 2, seed=1)  # opens what stays open: thread pools, the loop's own files
    arena.calm()
    threads, files, before = threading.active_count(), open_files(), arena.engine.stats()
    fared = storm(arena, CLIENTS, seed=2)
    arena.calm()
    assert fared.total() == CLIENTS
    assert fared["refused"] > 0
    assert fared["answered"] >= QUEUE
    assert fared["leaving"] + fared["impatient"] > 0
    answered = arena.engine.stats().generation_tokens - before.generation_tokens
    assert fared["answered"] < answered < TOKENS * CLIENTS + ENDLESS, "who left was answered on"
    assert until(lambda: open_files() <= files), (open_files(), files)
    assert until(lambda: threading.active_count() <= threads), threading.enumerate()


def test_a_client_that_never_reads_and_then_leaves(arena: Arena) -> None:
    """It keeps nobody else waiting. (One that never leaves: test_faults.py, where an answer can be endless.)"""
    files = open_files()

    async def go() -> Told:
        _, writer = await asyncio.open_connection("127.0.0.1", arena.port, limit=256)
        writer.write(request(chat(arena.prompts[0], max_tokens=200, ignore_eos=True), KEY))
        await writer.drain()
        told = await talk(arena.port, request(chat(arena.prompts[1], max_tokens=TOKENS), KEY))
        writer.close()
        return told

    assert arena.whole(asyncio.run(go()), arena.prompts[1])
    arena.calm()
    assert until(lambda: open_files() <= files)


class BadDisk:
    """Stands before a model's reader: while `broken`, every read fails."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.broken = False
        self.failed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read_into(self, *args: Any, **kwargs: Any) -> int:
        if self.broken:
            self.failed += 1
            raise ReadError("model-00001.safetensors: reading 4096 bytes at 8192 failed: input/output error")
        return int(self._reader.read_into(*args, **kwargs))


def test_the_store_fails_in_the_middle_of_requests(arena: Arena) -> None:
    """Who needed what could not be read gets that error; the others go on; afterwards all is well."""
    (pool,) = arena.engine._binding.pools
    healthy = pool._reader
    disk = BadDisk(healthy)
    pool._reader = disk  # type: ignore[assignment]

    async def one(prompt: str) -> Told:
        told = await talk(arena.port, request(chat(prompt, max_tokens=TOKENS), KEY))
        if told.error is not None:
            disk.broken = False
        return told

    async def go(prompts: list[str]) -> list[Told]:
        clients = [asyncio.create_task(one(prompt)) for prompt in prompts]
        steps = arena.engine.stats().steps
        while arena.engine.stats().steps < steps + 4:
            await asyncio.sleep(0.001)
        disk.broken = True
        return await asyncio.gather(*clients)

    try:
        prompts = arena.prompts[:6] * 2
        found = asyncio.run(go(prompts))
        assert disk.failed
        errors = [told for told in found if told.error is not None]
        assert errors
        for told in errors:
            assert told.error == "read_error"
            assert "model-00001.safetensors" in told.message
        for prompt, told in zip(prompts, found, strict=True):
            assert arena.whole(told, prompt) is (told.error is None)
        arena.calm()
        again = gather([talk(arena.port, request(chat(p, max_tokens=TOKENS), KEY)) for p in prompts])
        assert all(arena.whole(told, prompt) for prompt, told in zip(prompts, again, strict=True))
        arena.calm()
    finally:
        pool._reader = healthy


class Process:
    """`emoe serve` as users run it."""

    def __init__(self, *words: str) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self._said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "emoe", "serve", *words, "--port", "0"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._reading = threading.Thread(target=self._read)
        self._reading.start()
        assert until(lambda: self._port is not None or self.process.poll() is not None, 120), self.said
        assert self._port is not None, self.said
        self.port = self._port

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._said.append(line)

    @property
    def said(self) -> str:
        return "".join(self._said)

    @property
    def _port(self) -> int | None:
        for line in self._said:
            if "serving" in line and "http://" in line:
                return int(line.split("http://127.0.0.1:")[1].split("/")[0])
        return None

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reading.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


def ask(port: int, prompts: Sequence[str], tokens: int = TOKENS, **fields: Any) -> list[Told]:
    return gather([talk(port, request(chat(prompt, max_tokens=tokens, **fields))) for prompt in prompts])


def test_a_shard_is_truncated_and_the_process_is_told_to_stop(arena: Arena, tmp_path: Path) -> None:
    """The whole command: a store that breaks and is mended while it serves, then SIGTERM amid requests."""
    copy = tmp_path / "copy"
    shutil.copytree(nano.path(), copy)
    (shard,) = copy.glob("*.safetensors")
    content, stat = shard.read_bytes(), shard.stat()
    words = ("--expert-memory", "40%", "--dtype", "float32", "--reader", "cached", "--shutdown-timeout", "4")
    with Process(str(copy), *words, "--max-num-seqs", "8", "--max-queue", "64") as server:
        prompts = arena.prompts[:5]
        for told, prompt in zip(ask(server.port, prompts * 4), prompts * 4, strict=True):
            assert arena.whole(told, prompt)
        files, threads = server.files(), server.threads()

        # One after another: that none of eight in a row works is taken for the end of the store, not of a request.
        os.truncate(shard, len(content) // 4)
        broken = [ask(server.port, [prompt])[0] for prompt in prompts]
        assert {told.error for told in broken if not told.whole} == {"read_error"}, (broken, server.said)
        assert all(shard.name in told.message for told in broken if not told.whole)
        assert all(arena.texts[p].startswith(told.text) for p, told in zip(prompts, broken, strict=True))
        shard.write_bytes(content)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a store that is there again, not another file
        for told, prompt in zip(ask(server.port, prompts), prompts, strict=True):
            assert arena.whole(told, prompt), server.said
        assert until(lambda: server.files() <= files), (server.files(), files)
        assert until(lambda: server.threads() <= threads), (server.threads(), threads)

        def stop() -> None:
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)

        stopper = threading.Thread(target=stop)
        stopper.start()
        lengths = [8] * 12 + [700] * 16  # the short ones have time to finish, the long ones have not
        clients = [
            talk(server.port, request(chat(prompts[i % 5], max_tokens=tokens, ignore_eos=True)))
            for i, tokens in enumerate(lengths)
        ]
        found = gather(clients)
        stopper.join()
        assert server.process.wait(30) == 0, server.said
    assert all(told.answered for told in found)
    cut = [told for told in found if not told.whole]
    assert {(told.error, told.status in (200, 503)) for told in cut} <= {("shutting_down", True)}, cut
    assert sum(told.whole for told in found) >= 12
    assert cut
    assert "stopping: " in server.said
    assert server.said.rstrip().endswith("stopped")
    assert "Traceback" not in server.said
