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

import emoe
from emoe.bench.cgroup import memory_cgroup
from emoe.bench.client import TORCH_WORKER, WorkerClient, WorkerError
from emoe.bench.decode import machine
from emoe.bench.fitting import fitting_budget
from emoe.bench.learning import learned
from emoe.bench.limits import machine_of
from emoe.bench.page_cache import drop, read_ahead_bytes
from emoe.bench.peers.build import worker_command
from emoe.bench.peers.entries import Entry, MemoryLimit, PeersSettings, context, entries
from emoe.bench.peers.files import prepared
from emoe.bench.peers.journal import Journal
from emoe.bench.peers.limits import limits_of
from emoe.bench.peers.results import PeersReport, Row
from emoe.bench.plant.card import LABEL, is_planted
from emoe.bench.prompts import prompt_ids
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.checkpoint.fingerprint import fingerprint
from emoe.config import ExpertMemory
from emoe.errors import UsageError
from emoe.planner import Plan, facts_of, plan
from emoe.planner.facts import Facts

Say = Callable[[str], None]

LLAMA_ROOM_BYTES = 256 * 2**20
"""Beside the file's bytes: Python, numpy, llama.cpp's own buffers and the context of a short prompt."""


def compare(settings: PeersSettings, say: Say = lambda _: None) -> PeersReport:
    """Measure every row in every round, one memory limit after the other. `say` is told what happens, one line at a
    time. Interrupted (Ctrl-C), it reports what was measured until then.

    A row that fails says why and is not tried again; so does one whose engine is not installed.

    Raises:
        UsageError: settings or a history that do not suit the checkpoint, or the file of an earlier run.
        CgroupError: a memory limit is asked for and no cgroup can be made here.
        BudgetError: a budget of emoe's is below the floor, or none fits into a limit.
        CheckpointError, UnsupportedModelError: the checkpoint is damaged, or no MoE.
    """
    run = _Comparison(settings, say)
    history = settings.history if any(run.turns()) else None  # learning takes minutes
    try:
        with learned(settings.folder, history, settings.evictions, say) as run.profile:
            for row, number in run.turns():
                run.measure(row, number)
    except KeyboardInterrupt:
        say("interrupted; this is what was measured")
        return run.report(interrupted=True)
    return run.report()


@dataclass(frozen=True, slots=True)
class _Tokens:
    prompt: list[int]
    forced: list[int]


class _Comparison:
    def __init__(self, settings: PeersSettings, say: Say) -> None:
        self.settings, self.say = settings, say
        self.profile: str | None = None
        self.full = self._plan(ExpertMemory("share", 1.0))
        self.limits = settings.limits(self.full.checkpoint_bytes)
        for limit in self.limits:
            if limit.nbytes is not None:
                with memory_cgroup(limit.nbytes):
                    pass  # refused here, before anything long
        self.journal = None if settings.out is None else Journal(settings.out, self._conditions())
        budgets = {limit: self._budgets_of(limit) for limit in self.limits}
        self.rates = machine_of(settings.folder, say)
        self.files = prepared(settings, say)
        self.rows = [
            Row(entry, limit, error=entry.missing)
            for limit in self.limits
            for entry in self._entries(limit, budgets[limit])
        ]
        self._recall()

    def turns(self) -> Iterator[tuple[Row, int]]:
        """What is to be measured still: each row of a limit in a round, then the next round, then the next limit."""
        for limit in self.limits:
            rows = [row for row in self.rows if row.limit == limit]
            for number in range(self.settings.rounds):
                turn = number % len(rows)
                for row in [*rows[turn:], *rows[:turn]]:
                    if row.error is None and number not in row.samples:
                        yield row, number

    def _tokens(self, number: int) -> _Tokens:
        """The prompt `number`, and what follows it. A planted checkpoint's are positions of its trace, in order."""
        settings = self.settings
        ids = prompt_ids(settings.folder, number, context(settings))
        return _Tokens(ids[: settings.prefill], ids[settings.prefill :])

    def _conditions(self) -> dict[str, Any]:
        """What rows of one file must have in common."""
        return {
            **self.settings.conditions(),
            "checkpoint": fingerprint(self.settings.folder),
            "emoe": emoe.__version__,
            "processor": machine()["cpu"],
        }

    def _recall(self) -> None:
        """What an earlier run has measured, from its file."""
        if self.journal is None:
            return
        count = 0
        for row in self.rows:
            for line in self.journal.of(row.limit.text, row.name):
                if row.entry.missing is None:
                    self._take(row, line)
                    count += 1
        if count:
            self.say(f"{count} measurements are in {self.journal.file}; going on after them")

    def _take(self, row: Row, line: dict[str, Any]) -> None:
        """One process's measurement, from here or from the file."""
        row.note_peak(line["cgroup_peak_bytes"])
        row.note_cached(line["still_cached_bytes"])
        if line["load"] is not None:
            row.loads.append(line["load"])
        if line["error"] is not None:
            row.error = line["error"]
        else:
            row.samples[line["round"]] = line["sample"]

    # -- what there is to measure -------------------------------------------------------------------------

    def _entries(self, limit: MemoryLimit, budgets: dict[str, tuple[ExpertMemory, ...]]) -> list[Entry]:
        return entries(
            self.settings,
            budgets=budgets,
            cpu_bytes=self._cpu_bytes(limit),
            llama_python=self.files.llama,
            ggufs=self.files.ggufs,
            airllm=importlib.util.find_spec("airllm") is not None,
            accelerate=importlib.util.find_spec("accelerate") is not None,
            llama_resident={dtype: _fits(gguf, limit) for dtype, gguf in self.files.ggufs.items()},
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

    def _budgets_of(self, limit: MemoryLimit) -> dict[str, tuple[ExpertMemory, ...]]:
        """emoe's, by expert dtype: those asked for, else the largest that fits the limit."""
        if "emoe" not in self.settings.peers:
            return {}
        dtypes = self.settings.expert_dtypes
        for dtype in dtypes:
            for budget in self.settings.budgets:
                self._plan(budget, dtype)  # refused here if below the floor
        return {dtype: self.settings.budgets or (self._fitting(limit, dtype),) for dtype in dtypes}

    def _fitting(self, limit: MemoryLimit, dtype: str) -> ExpertMemory:
        if limit.nbytes is None:
            return ExpertMemory("share", 1.0)
        return fitting_budget(
            self.settings.folder,
            limit.nbytes,
            context=context(self.settings),
            prompt=self.settings.prefill,
            expert_dtype=dtype,
        )

    def _cpu_bytes(self, limit: MemoryLimit) -> int:
        """What accelerate may keep in memory: the dense weights, and as many bytes of experts as emoe has. Quantised
        experts are none of its: a limit for them may be too small for native ones."""
        if NATIVE not in self.settings.expert_dtypes or "accelerate" not in self.settings.peers:
            return 0
        return self.full.dense_bytes + self._plan(self._fitting(limit, NATIVE)).budget_bytes

    # -- measuring ----------------------------------------------------------------------------------------

    def measure(self, row: Row, number: int) -> None:
        """One process: load, read the prompt, decode; what it found, or why not, goes into `row` and the file."""
        line: dict[str, Any] = {"memory_limit": row.limit.text, "name": row.name, "round": number}
        line |= {"load": None, "sample": None, "error": None, "cgroup_peak_bytes": None, "still_cached_bytes": 0}
        try:
            with self._started(row, line) as (client, load):
                line["load"] = client.ask("load", within_s=self.settings.timeout_s, **load)
                line["sample"] = self._feed(client, number)
        except WorkerError as error:
            self.say(f"{row.limit.where}, {error}")
            line["error"] = str(error).removeprefix(row.name).strip()
        else:
            found, of = line["sample"], f"round {number + 1}/{self.settings.rounds}"
            rate = len(found["step_s"]) / sum(found["step_s"])
            self.say(
                f"{row.limit.where}, {of}  {row.name}: first token after {found['first_token_s']:.2f} s, "
                f"{len(found['step_s'])} tokens at {rate:.2f} a second"
            )
        self._take(row, line)
        if self.journal is not None:
            self.journal.add(line)

    def _feed(self, client: WorkerClient, number: int) -> dict[str, Any]:
        """The warm-ups and then the measured prompt, one after the other in the trace; a process that has run for a
        while holds what it could keep."""
        settings = self.settings
        first = number * (settings.warmups + 1)
        before: list[float] = []
        for turn in range(settings.warmups):
            tokens = self._tokens(first + turn)
            found = client.ask(
                "feed", within_s=settings.timeout_s, prompt=tokens.prompt, forced=tokens.forced[:2], seconds=0
            )
            before.append(found["first_token_s"])
        tokens = self._tokens(first + settings.warmups)
        sample = client.ask(
            "feed",
            within_s=settings.timeout_s + settings.decode_s,
            prompt=tokens.prompt,
            forced=tokens.forced,
            seconds=settings.decode_s,
        )
        return sample | {"first_prompt_s": before[0]} if before else sample

    @contextmanager
    def _started(self, row: Row, line: dict[str, Any]) -> Iterator[tuple[WorkerClient, dict[str, Any]]]:
        """A worker for `row` and what to ask it to load. Its files are not in the page cache: pages that another
        process brought there would not count for its memory limit."""
        settings, entry = self.settings, row.entry
        with ExitStack() as stack:
            limit = row.limit.nbytes
            cgroup = stack.enter_context(memory_cgroup(limit)) if limit is not None else None
            command, environment = list(TORCH_WORKER), dict[str, str]()
            files = list(self.files.checkpoint)
            if entry.llama is not None:
                if self.files.llama is None:
                    raise WorkerError("llama.cpp is not built")
                command, environment = worker_command(self.files.llama)
                load = dict(entry.llama)
                files = [Path(load["gguf"])]
            else:
                options: dict[str, Any] = {"reader": "auto", "profile": self.profile} | entry.options
                if entry.peer in ("accelerate", "airllm"):
                    options["offload_folder"] = str(self._offload(entry.peer, stack))
                    files += sorted(Path(options["offload_folder"]).rglob("*.safetensors"))
                if entry.precision in self.files.quantised:
                    files += sorted(self.files.quantised[entry.precision].glob("*.safetensors"))
                contender = entry.contender.as_dict() if entry.contender is not None else None
                load = {
                    "contender": contender,
                    "folder": str(settings.folder),
                    "threads": entry.threads,
                    "options": options,
                }
            if limit is not None or settings.cold:
                line["still_cached_bytes"] = drop(files)
            client = stack.enter_context(
                WorkerClient(row.name, cgroup, entry.threads, command, environment, entry.cores)
            )
            yield client, load
            line["cgroup_peak_bytes"] = None if cgroup is None else cgroup.peak_bytes

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

    def report(self, interrupted: bool = False) -> PeersReport:
        """What was found."""
        full = self.full
        try:
            limits_of(self.rows, self._facts(), self.rates, self.settings.prefill)
            unlimited = None
        except UsageError as error:  # hours of measuring are worth more than this column
            unlimited = str(error)
        return PeersReport(
            settings=self.settings,
            memory_limits=self.limits,
            rates=self.rates.as_dict(),
            unlimited=unlimited,
            interrupted=interrupted,
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
            routes={dtype: agreement.text for dtype, agreement in self.files.routes.items()},
            versions={
                name: version for row in self.rows for load in row.loads for name, version in load["versions"].items()
            },
        )

    def _facts(self) -> dict[str, Facts]:
        measured = {row.entry.precision for row in self.rows if row.samples}
        return {dtype: facts_of(self.settings.folder, expert_dtype=dtype)[1] for dtype in measured}


def _fits(gguf: Path | str, limit: MemoryLimit) -> bool:
    """Whether llama.cpp can hold the whole file."""
    if isinstance(gguf, str) or limit.nbytes is None:
        return not isinstance(gguf, str)
    return gguf.stat().st_size + LLAMA_ROOM_BYTES <= limit.nbytes
