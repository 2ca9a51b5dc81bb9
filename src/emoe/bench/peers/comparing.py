"""Measuring peers side by side: one process at a time, each in its own memory cgroup, all in turn in every round."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe.bench.cgroup import memory_cgroup
from emoe.bench.client import TORCH_WORKER, WorkerClient, WorkerError
from emoe.bench.decode import machine
from emoe.bench.fitting import fitting_budget
from emoe.bench.page_cache import drop, read_ahead_bytes
from emoe.bench.peers.build import llama_python, worker_command
from emoe.bench.peers.entries import LLAMA_PRECISIONS, Entry, PeersSettings, context, entries
from emoe.bench.peers.gguf_file import cached_gguf
from emoe.bench.peers.results import PeersReport, Row
from emoe.bench.peers.routes import Agreement, planted_routes
from emoe.bench.plant.card import LABEL, is_planted
from emoe.bench.prompts import prompt_ids
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.checkpoint.fingerprint import fingerprint
from emoe.checkpoint.writing import Progress
from emoe.config import ExpertMemory, format_bytes
from emoe.errors import UnsupportedModelError, UsageError
from emoe.model import quantise
from emoe.planner import Plan, plan

Say = Callable[[str], None]

LLAMA_ROOM_BYTES = 256 * 2**20
"""Beside the file's bytes: Python, numpy, llama.cpp's own buffers and the context of a short prompt."""


def compare(settings: PeersSettings, say: Say = lambda _: None) -> PeersReport:
    """Measure every row in every round. `say` is told what happens, one line at a time.

    A row that fails says why and is not tried again; so does one whose engine is not installed.

    Raises:
        UsageError: settings that do not suit the checkpoint.
        CgroupError: a memory limit is asked for and no cgroup can be made here.
        BudgetError: a budget of emoe's is below the floor, or none fits into the limit.
        CheckpointError, UnsupportedModelError: the checkpoint is damaged, or no MoE.
    """
    run = _Comparison(settings, say)
    for number in range(settings.rounds):
        turn = number % len(run.rows)
        for row in [*run.rows[turn:], *run.rows[:turn]]:
            if row.error is None:
                run.measure(row, number)
    return run.report()


@dataclass(frozen=True, slots=True)
class _Tokens:
    prompt: list[int]
    forced: list[int]


class _Comparison:
    def __init__(self, settings: PeersSettings, say: Say) -> None:
        self.settings, self.say = settings, say
        self.files = sorted(settings.folder.glob("*.safetensors"))
        self.full = self._plan(ExpertMemory("share", 1.0))
        self.limit = settings.limit_bytes(self.full.checkpoint_bytes)
        if self.limit is not None:
            with memory_cgroup(self.limit):
                pass  # refused here, before anything long
        self.quantised: dict[str, Path] = {}
        self.llama = llama_python(settings.cache) if "llama.cpp" in settings.peers else None
        self.routes: dict[str, Agreement] = {}
        self.tokens = [self._tokens(number) for number in range(settings.rounds)]
        self.rows = [Row(entry, error=entry.missing) for entry in self._entries()]

    def _tokens(self, number: int) -> _Tokens:
        """Of one round. A planted checkpoint's are positions of its trace, in order."""
        settings = self.settings
        ids = prompt_ids(settings.folder, number, context(settings))
        return _Tokens(ids[: settings.prefill], ids[settings.prefill :])

    # -- what there is to measure -------------------------------------------------------------------------

    def _entries(self) -> list[Entry]:
        settings = self.settings
        if "emoe" in settings.peers:
            for dtype in settings.expert_dtypes:
                if dtype != NATIVE:  # made here, outside the limit and the clock: it is done once
                    self.quantised[dtype] = quantise(
                        settings.folder, expert_dtype=dtype, progress=self._progress(dtype)
                    )
        ggufs = {dtype: self._gguf(dtype) for dtype in settings.expert_dtypes}
        if settings.check_routes:
            self.routes = self._check_routes(ggufs)
        return entries(
            settings,
            budgets={dtype: self._budgets(dtype) for dtype in settings.expert_dtypes if "emoe" in settings.peers},
            cpu_bytes=self._cpu_bytes(),
            llama_python=self.llama,
            ggufs=ggufs,
            airllm=importlib.util.find_spec("airllm") is not None,
            accelerate=importlib.util.find_spec("accelerate") is not None,
            llama_resident={dtype: self._fits(gguf) for dtype, gguf in ggufs.items()},
        )

    def _plan(self, budget: ExpertMemory, dtype: str = NATIVE) -> Plan:
        return plan(
            self.settings.folder,
            memory=2**62,  # whatever this machine has free now
            expert_memory=budget,
            expert_dtype=dtype,
            context=context(self.settings),
            prompt=self.settings.prefill,
        )

    def _budgets(self, dtype: str) -> tuple[ExpertMemory, ...]:
        """Those asked for, else the largest that fits the limit."""
        if not self.settings.budgets:
            return (self._fitting(dtype),)
        for budget in self.settings.budgets:
            self._plan(budget, dtype)  # refused here if below the floor
        return self.settings.budgets

    def _fitting(self, dtype: str) -> ExpertMemory:
        if self.limit is None:
            return ExpertMemory("share", 1.0)
        return fitting_budget(
            self.settings.folder,
            self.limit,
            context=context(self.settings),
            prompt=self.settings.prefill,
            expert_dtype=dtype,
        )

    def _cpu_bytes(self) -> int:
        """What accelerate may keep in memory: the dense weights, and as many bytes of experts as emoe has."""
        return self.full.dense_bytes + self._plan(self._fitting(NATIVE)).budget_bytes

    def _gguf(self, dtype: str) -> Path | str:
        """The file for llama.cpp, or why there is none. Nothing is written where llama.cpp is not there."""
        if self.llama is None:
            return "GGUF"
        precision = LLAMA_PRECISIONS[dtype]
        try:
            return cached_gguf(
                self.settings.folder, precision, self.settings.cache, self._progress(f"{precision} GGUF")
            )
        except (UsageError, UnsupportedModelError) as error:
            return f"no GGUF: {error}"

    def _progress(self, what: str) -> Progress:
        """Says each tenth of `what`."""
        shown = -1

        def show(done: int, total: int) -> None:
            nonlocal shown
            if done * 10 // total > shown:
                shown = done * 10 // total
                self.say(f"writing {what}: {done / total:.0%} of {format_bytes(total)}")

        return show

    def _check_routes(self, ggufs: dict[str, Path | str]) -> dict[str, Agreement]:
        """By expert dtype: whether llama.cpp routes as planted."""
        if self.llama is None or not is_planted(self.settings.folder):
            raise UsageError("--check-routes compares llama.cpp's routes with planted ones: it needs both")
        found = {}
        for dtype, gguf in ggufs.items():
            if isinstance(gguf, Path):
                found[dtype] = planted_routes(self.settings.folder, gguf, self.llama)
                self.say(f"{dtype}: {found[dtype].text}")
        return found

    def _fits(self, gguf: Path | str) -> bool:
        if isinstance(gguf, str) or self.limit is None:
            return not isinstance(gguf, str)
        return gguf.stat().st_size + LLAMA_ROOM_BYTES <= self.limit

    # -- measuring ----------------------------------------------------------------------------------------

    def measure(self, row: Row, number: int) -> None:
        """One process: load, read the prompt, decode; what it found, or why not, goes into `row`."""
        settings, tokens = self.settings, self.tokens[number]
        try:
            with self._started(row) as (client, load):
                row.loads.append(client.ask("load", within_s=settings.timeout_s, **load))
                for before in range(settings.prompts_before):
                    self._warm_up(client, settings.rounds + number * settings.prompts_before + before)
                found = client.ask(
                    "feed",
                    within_s=settings.timeout_s + settings.decode_s,
                    prompt=tokens.prompt,
                    forced=tokens.forced,
                    seconds=settings.decode_s,
                )
        except WorkerError as error:
            self.say(str(error))
            row.error = str(error).removeprefix(row.name).strip()
            return
        row.samples[number] = found
        decoded = len(found["step_s"])
        self.say(
            f"round {number + 1}/{settings.rounds}  {row.name}: first token after {found['first_token_s']:.2f} s, "
            f"{decoded} tokens at {decoded / sum(found['step_s']):.2f} a second"
        )

    def _warm_up(self, client: WorkerClient, number: int) -> None:
        """A prompt of other tokens: a process that has run for a while holds what it could keep."""
        tokens = self._tokens(number)
        client.ask("feed", within_s=self.settings.timeout_s, prompt=tokens.prompt, forced=tokens.forced[:2], seconds=0)

    @contextmanager
    def _started(self, row: Row) -> Iterator[tuple[WorkerClient, dict[str, Any]]]:
        """A worker for `row` and what to ask it to load. Its files are not in the page cache: pages that another
        process brought there would not count for its memory limit."""
        settings, entry = self.settings, row.entry
        with ExitStack() as stack:
            cgroup = stack.enter_context(memory_cgroup(self.limit)) if self.limit is not None else None
            command, environment = list(TORCH_WORKER), dict[str, str]()
            files = list(self.files)
            if entry.llama is not None:
                if self.llama is None:
                    raise WorkerError("llama.cpp is not built")
                command, environment = worker_command(self.llama)
                load = dict(entry.llama)
                files = [Path(load["gguf"])]
            else:
                options: dict[str, Any] = {"reader": "auto", "eviction": None} | entry.options
                if entry.peer in ("accelerate", "airllm"):
                    options["offload_folder"] = str(self._offload(entry.peer, stack))
                    files += sorted(Path(options["offload_folder"]).rglob("*.safetensors"))
                if entry.precision in self.quantised:
                    files += sorted(self.quantised[entry.precision].glob("*.safetensors"))
                contender = entry.contender.as_dict() if entry.contender is not None else None
                load = {
                    "contender": contender,
                    "folder": str(settings.folder),
                    "threads": entry.threads,
                    "options": options,
                }
            if self.limit is not None or settings.cold:
                row.still_cached_bytes = max(row.still_cached_bytes, drop(files))
            client = stack.enter_context(WorkerClient(row.name, cgroup, entry.threads, command, environment))
            yield client, load
            row.cgroup_peak_bytes = max(row.cgroup_peak_bytes or 0, (cgroup and cgroup.peak_bytes) or 0) or None

    def _offload(self, peer: str, stack: ExitStack) -> Path:
        """Where accelerate may write what it likes, once; AirLLM's copy of the checkpoint stays for other rounds."""
        if peer == "airllm":
            name = f"{self.settings.folder.resolve().name}-{fingerprint(self.settings.folder)[:12]}-airllm"
            folder = self.settings.cache / name
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        self.settings.cache.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix="offload-", dir=self.settings.cache)
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        return Path(scratch)

    def report(self) -> PeersReport:
        """What was found."""
        full = self.full
        return PeersReport(
            settings=self.settings,
            limit_bytes=self.limit,
            machine=machine() | {"read_ahead_bytes": read_ahead_bytes(self.settings.folder)},
            model={
                "name": self.settings.folder.resolve().name,
                "model_type": full.model_type,
                "dtype": full.dtype,
                "checkpoint_bytes": full.checkpoint_bytes,
                "expert_bytes": full.expert_bytes,
                "layers": full.layers,
                "experts_per_layer": full.experts_per_layer,
                "top_k": full.top_k,
                "label": LABEL if is_planted(self.settings.folder) else "",
            },
            rows=self.rows,
            routes={dtype: agreement.text for dtype, agreement in self.routes.items()},
            versions={
                name: version for row in self.rows for load in row.loads for name, version in load["versions"].items()
            },
        )
